"""Faults of kernels compiled for NVIDIA's GPUs that show in their text. Each function yields a line
for each fault.

What a compiler makes of a kernel may race where the source does not seem to, and no interpreter
sees that. ``machine_code.read`` raises for each fault, so the compile report covers every launch
that dispatch can pick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_PTX = re.compile(
    r"^\s*\{?\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|\[[^\]]*\]|[^,;\n]+),?([^;\n]*);", re.M
)
_REGISTER = re.compile(r"%(?:[a-z]+\d+|tid\.x|laneid)")
_ACCESS = re.compile(
    r"(ld|st)\.(?:\w+\.)*global[\w.:]*?(?:\.v(\d))?\.[a-z]+(\d+)|(cp)\.async\.c[ag]\.shared\.global"
)
_TILE = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.(?!prefetch)[\w.:]*?(shared::\w+|global)\b")


class Access(NamedTuple):
    """An access of each thread to global memory; ``address`` as it is written, registers and
    offset.
    """

    store: bool
    bits: int
    address: str
    varies: bool


def ptx_accesses(ptx: str) -> Iterator[Access | None]:
    """Accesses to global memory in order, those of whole tiles (TMA) with 128 bits, and None for
    each barrier of the program.

    An address ``varies`` between threads if it is computed from a thread's number on any path:
    nearly all registers of PTX have one definition.
    """
    code, varying, known = _PTX.findall(ptx), {"%tid.x", "%laneid"}, 0
    # A memory operand in first place writes no register.
    flows = [
        ({*_REGISTER.findall(first)}, {*_REGISTER.findall(rest)})
        for _, first, rest in code
        if first[0] != "["
    ]
    while known < len(varying):
        known = len(varying)
        varying.update(*(writes for writes, reads in flows if reads & varying))
    for op, first, rest in code:
        if op.startswith(("bar.sync", "barrier.sync")):
            yield None
        elif match := _TILE.match(op):
            yield Access(match[1] == "global", 128, "", True)
        elif match := _ACCESS.match(op):
            address, _, size = (first if match[1] == "st" else rest).strip().partition("]")
            bits = (
                8 * int(size.split(",")[1], 0) if match[4] else int(match[2] or 1) * int(match[3])
            )
            yield Access(
                match[1] == "st", bits, address, not varying.isdisjoint(_REGISTER.findall(address))
            )


def reloaded_scalars(ptx: str) -> Iterator[str]:
    """PTX: a scalar that the program loads and then stores with no barrier between.

    Every warp loads it and one thread stores. A warp that comes late would load the new value.
    """
    loaded: set[str] = set()
    for access in ptx_accesses(ptx):
        if access is None:
            loaded.clear()
        elif not access.varies and access.store and access.address in loaded:
            yield f"a late warp may load the scalar of {access.bits} bits that is stored to {access.address}]"
        elif not access.varies and not access.store:
            loaded.add(access.address)


def store_round_trips(ptx: str) -> Iterator[str]:
    """PTX: more than one wait until stores of tiles are in memory.

    A kernel needs one, before it ends. Between tiles it only waits until their shared memory has
    been read.
    """
    waits = len(re.findall(r"cp\.async\.bulk\.wait_group\s+0;", ptx))
    if waits > 1:
        yield f"{waits} waits for the end of stores of tiles"


_DOT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true")
_PENDINGS = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")
_NAME = re.compile(r"%[\w#]+")


def short_buffers(ttgir: str) -> Iterator[str]:
    """TTGIR of Hopper: operands that an asynchronous product may still read while the loop's next
    copy overwrites them.

    With N copies ahead of a loop, a product that runs on into the next round needs operands of N +
    1 buffers.
    """
    lines = ttgir.splitlines()
    # The line that allocates the memory of which a name is a view; names are used again.
    memory: dict[str, int] = {}
    # By place: the memory that a copy fills; the start of the loop around a product, and its
    # operands with their memory.
    copies: list[tuple[int, set[int]]] = []
    products: list[tuple[int, int, str, int]] = []
    loop = 0
    for place, line in enumerate(lines):
        name, _, value = line.strip().partition(" = ")
        used = _NAME.findall(value)
        memory[name] = place if "ttg.local_alloc : ()" in value else -1
        if "ttg.memdesc_" in value:
            memory[name] = memory.get(used[0], -1)
        if "scf.for" in line:
            loop = place
        if re.search(r"async_(?:tma_)?copy_global_to_local", line):
            copies.append((place, {memory.get(each, -1) for each in _NAME.findall(line)}))
        if dot := _DOT.search(line):
            products += [
                (place, loop, operand, memory.get(operand, -1)) for operand in dot.groups()
            ]
    for place, loop, operand, allocated in products:
        pendings = next(
            (match[1] for each in lines[place:] if (match := _PENDINGS.search(each))), "0"
        )
        depth = (
            re.search(r"memdesc<(\d+)x", lines[allocated])
            if allocated >= 0 and pendings != "0"
            else None
        )
        ahead = sum(allocated in filled for copy, filled in copies if allocated < copy < loop)
        refilled = any(allocated in filled for copy, filled in copies if copy > loop)
        if depth and refilled and int(depth[1]) <= ahead:
            yield f"{ahead} copies run ahead into {depth[1]} buffers of {operand}, which a product may still read"

"""Faults of compiled kernels that show in their text. Each function returns a line for each fault.

What a compiler makes of a kernel may race where the source does not seem to, and no interpreter sees that. ``machine_code.read``
raises for each fault, so the compile report covers every launch that dispatch can pick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import dropwhile
from typing import NamedTuple

_PTX = re.compile(r"^\s*\{?\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|\[[^\]]*\]|[^,;\n]+),?([^;\n]*);", re.M)
_REGISTER = re.compile(r"%(?:[a-z]+\d+|tid\.x|laneid)")
_ACCESS = re.compile(r"(ld|st)\.(?:\w+\.)*global[\w.:]*?(?:\.v(\d))?\.[a-z]+(\d+)|(cp)\.async\.c[ag]\.shared\.global")


class Access(NamedTuple):
    """An access of each thread to global memory. ``address``: as it is written, registers and offset."""

    store: bool
    bits: int
    address: str
    varies: bool


def ptx_accesses(ptx: str) -> Iterator[Access | None]:
    """Accesses to global memory in order, and None for each barrier of the whole program.

    An address ``varies`` between the threads if it is computed from a thread's number on any path: nearly all registers of PTX
    have one definition.
    """
    code = _PTX.findall(ptx)
    # A memory operand in first place writes no register.
    flows = [
        (set() if first.startswith("[") else {*_REGISTER.findall(first)}, {*_REGISTER.findall(others)})
        for _, first, others in code
    ]
    varying, known = {"%tid.x", "%laneid"}, 0
    while known < len(varying):
        known = len(varying)
        for writes, reads in flows:
            if reads & varying:
                varying |= writes
    for op, first, others in code:
        if op.startswith(("bar.sync", "barrier.sync")):
            yield None
        elif match := _ACCESS.match(op):
            store = match[1] == "st"
            address, _, size = (first if store else others).strip().partition("]")
            bits = 8 * int(size.split(",")[1], 0) if match[4] else int(match[2] or 1) * int(match[3])
            yield Access(store, bits, address, not varying.isdisjoint(_REGISTER.findall(address)))


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

    A kernel needs one, before it ends. Between tiles it only waits until their shared memory has been read.
    """
    waits = len(re.findall(r"cp\.async\.bulk\.wait_group\s+0;", ptx))
    if waits > 1:
        yield f"{waits} waits for the end of stores of tiles"


_DOT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true")
_PENDINGS = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")
_COPY = re.compile(r"async_(?:tma_)?copy_global_to_local")
_NAME = re.compile(r"%[\w#]+")


def short_buffers(ttgir: str) -> Iterator[str]:
    """TTGIR of Hopper: operands that an asynchronous product may still read while the loop's next copy overwrites them.

    With N copies ahead of a loop, a product that runs on into the next round needs operands of N + 1 buffers.
    """
    lines = ttgir.splitlines()

    def definition(name: str, before: int) -> int:
        """The line that defines ``name``. Other regions may use the name again, so it is the nearest one."""
        start = re.compile(rf"\s*{re.escape(name)} = ")
        return next((place for place in range(before - 1, -1, -1) if start.match(lines[place])), -1)

    def memory(name: str, before: int) -> int:
        """The line that allocates the memory of which ``name`` is a view; -1 if it is none."""
        place = definition(name, before)
        while place >= 0 and "ttg.memdesc_" in lines[place]:
            place = definition(_NAME.findall(lines[place])[1], place)
        return place if place >= 0 and "ttg.local_alloc : ()" in lines[place] else -1

    into = {
        place: {memory(name, place) for name in _NAME.findall(line.split(" = ", 1)[-1])} - {-1}
        for place, line in enumerate(lines)
        if _COPY.search(line)
    }
    for place, line in enumerate(lines):
        dot = _DOT.search(line)
        pendings = next((match[1] for each in lines[place:] if (match := _PENDINGS.search(each))), "0") if dot else "0"
        loop = max((i for i in range(place) if "scf.for" in lines[i]), default=0)
        for operand in dot.groups() if dot and pendings != "0" else ():
            allocated = memory(operand, place)
            ahead = sum(allocated in into[copy] for copy in into if allocated < copy < loop)
            refilled = any(allocated in into[copy] for copy in into if copy > loop)
            depth = re.search(r"memdesc<(\d+)x", lines[allocated]) if allocated >= 0 else None
            if depth and refilled and int(depth[1]) <= ahead:
                yield f"{ahead} copies run ahead into {depth[1]} buffers of {operand}, which a product may still read"


_GCN_WAIT = re.compile(r"s_waitcnt\b.*\bvmcnt\(0\)")
_GCN_STORE = re.compile(r"(?:buffer|global)_store_")


def early_counts(gcn: str) -> Iterator[str]:
    """AMD: atomics that publish stores of the whole program, but behind a barrier before which waves do not wait for theirs."""
    lines = [line.split(";")[0].strip() for line in gcn.splitlines()]
    for place, line in enumerate(lines):
        if line.startswith("global_atomic_add"):
            # Past the barriers, two in a row.
            behind = dropwhile(lambda line: line != "s_barrier", lines[place::-1])
            first = next((line for line in behind if _GCN_WAIT.match(line) or _GCN_STORE.match(line)), "")
            if _GCN_STORE.match(first):
                yield f"{line} publishes stores that other waves have not waited for"

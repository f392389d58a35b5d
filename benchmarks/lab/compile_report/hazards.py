"""Faults of compiled kernels that show in their text. Each function returns a line for each fault.

What a compiler makes of a kernel may race where the source does not seem to, and no interpreter sees that. ``machine_code.read``
raises for each fault, so the compile report covers every launch that dispatch can pick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.lab.compile_report.assembly import Code


def faults(code: Code, varies: list[bool], asm: dict[str, str]) -> list[str]:
    """All faults of a kernel for NVIDIA's GPUs; ``varies``: whether each instruction's address differs between threads."""
    return [*reloaded_scalars(code, varies), *store_round_trips(asm["ptx"]), *short_buffers(asm["ttgir"])]


def reloaded_scalars(code: Code, varies: list[bool]) -> Iterator[str]:
    """PTX: a scalar that the program loads and then stores with no barrier between.

    Every warp loads it and one thread stores. A warp that comes late would load the new value.
    """
    loaded: set[str] = set()
    for instruction, differs in zip(code, varies, strict=True):
        access = instruction.access
        if instruction.op.startswith(("bar.sync", "barrier.sync")):
            loaded.clear()
        elif access is not None and access.text and not differs:
            if access.store and access.text in loaded:
                yield f"a late warp may load what {instruction.op} {access.text} stores"
            elif not access.store:
                loaded.add(access.text)


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

    copies = [place for place, line in enumerate(lines) if _COPY.search(line)]
    into = {
        place: {memory(name, place) for name in _NAME.findall(lines[place].split(" = ", 1)[-1])} - {-1}
        for place in copies
    }
    for place, line in enumerate(lines):
        dot = _DOT.search(line)
        if not dot:
            continue
        pendings = next((match[1] for each in lines[place:] if (match := _PENDINGS.search(each))), "0")
        loop = max((i for i in range(place) if "scf.for" in lines[i]), default=0)
        for operand in dot.groups() if pendings != "0" else ():
            allocated = memory(operand, place)
            ahead = sum(allocated in into[copy] for copy in copies if allocated < copy < loop)
            refilled = any(allocated in into[copy] for copy in copies if copy > loop)
            depth = re.search(r"memdesc<(\d+)x", lines[allocated]) if allocated >= 0 else None
            if depth and refilled and int(depth[1]) <= ahead:
                yield f"{ahead} copies run ahead into {depth[1]} buffers of {operand}, which a product may still read"

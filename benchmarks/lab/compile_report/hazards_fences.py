"""Missing fences between what threads write to shared memory and what reads it asynchronously.

WGMMA, tcgen05.mma and stores of tiles (TMA) read shared memory through the async proxy. They are
sure to see what threads wrote (``st.shared``, ``stmatrix``, ``cp.async``) only if a
``fence.proxy.async`` stands between. Each function yields a line for each fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set

from benchmarks.lab.compile_report import ptx as ptx_code
from benchmarks.lab.compile_report import ttgir as ttgir_code
from benchmarks.lab.compile_report.control_flow import walk

_FENCE = re.compile(r"fence\.proxy\.async(?:\.shared::(?:cta|cluster))?$")
_READER = re.compile(
    r"wgmma\.mma_async|tcgen05\.(?:mma|cp)|cp\.(?:reduce\.)?async\.bulk\.\S*global\.shared"
)
_FENCE_IN_TTGIR = re.compile(
    r"ttng\.fence_async_shared|elementwise_inline_asm .*fence\.proxy\.async(?:;|\.shared)"
)
_READER_IN_TTGIR = re.compile(
    r"ttng\.(?:warp_group_dot |tc_gen5_mma|async_tma_copy_local_to_global|async_tma_(?:reduce|scatter))"
)
_STORE_IN_TTGIR = re.compile(r"ttg\.local_(alloc(?= %)|store)\b")


def unfenced_copies(ptx: str) -> Iterator[str]:
    """PTX: waits for copies (``cp.async``) from which a path leads to a reader without a fence.

    The text does not tell which memory the reader reads, so a reader of other memory counts too.
    """
    program = ptx_code.Program(ptx)
    statements = program.statements
    fences = {
        place
        for place, each in enumerate(statements)
        if _FENCE.match(each.opcode) and not each.guard
    }
    readers = {place for place, each in enumerate(statements) if _READER.match(each.opcode)}
    for place, wait in enumerate(statements):
        if not wait.opcode.startswith("cp.async.wait_"):
            continue
        if (reader := _first_unfenced(program.successors, place, fences, readers)) is not None:
            yield (
                f"no fence.proxy.async between {wait.opcode} {wait.operands} in line {wait.line} of the PTX and"
                f" {statements[reader].opcode.partition('.sync')[0]} in line {statements[reader].line}"
            )


def unfenced_stores(ttgir: str) -> Iterator[str]:
    """TTGIR: shared memory that threads store to, with a path to a reader of that memory without a
    fence.
    """
    program = ttgir_code.Program(ttgir)
    lines = program.lines
    fences = {place for place, line in enumerate(lines) if _FENCE_IN_TTGIR.search(line)}
    readers = {place for place, line in enumerate(lines) if _READER_IN_TTGIR.search(line)}
    for place, line in enumerate(lines):
        if not (store := _STORE_IN_TTGIR.search(line)):
            continue
        memory = {place} if store[1] == "alloc" else {*program.buffers[place].values()}
        of_memory = {
            reader for reader in readers if memory.intersection(program.buffers[reader].values())
        }
        if (reader := _first_unfenced(program.successors, place, fences, of_memory)) is not None:
            yield f"no fence.proxy.async between lines {place + 1} and {reader + 1} of the TTGIR ({lines[reader][:60]})"


def _first_unfenced(
    successors: Sequence[Sequence[int]], start: int, fences: Set[int], readers: Set[int]
) -> int | None:
    """The nearest of ``readers`` that a path from ``start`` comes to before a fence."""

    def pass_over(place: int, state: int) -> int | None:
        return None if place in fences or place in readers else state

    met = walk(successors, start, 0, pass_over)
    return next((place for place, _ in met if place in readers), None)

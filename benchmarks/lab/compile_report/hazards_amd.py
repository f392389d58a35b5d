"""Faults of kernels compiled for AMD's GPUs that show in their text. Each function yields a line
for each fault.

docs/internals/checked-without-a-gpu.md says why each instruction is needed. An instruction does not
tell an atomic's memory order. The text names each instruction's line of source, which does.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

import stablelora_kernels

_FILE = re.compile(r'\.file\s+(\d+) (?:"([^"]*)" )?"([^"]*)"')
_LINE = re.compile(r"\.loc\s+(\d+) (\d+)")
_ORDER = re.compile(r'sem="(\w+)"')
# Directives, and labels of debug information.
_ASIDE = re.compile(r"\.Ltmp|\.(?!L)")
_ATOMIC = re.compile(r"global_atomic_")
_LOAD = re.compile(r"(?:global|buffer|flat)_load_")
_STORE = re.compile(r"(?:global|buffer|flat)_store_")
# vmcnt counts a wave's loads, stores and atomics that are not done.
_ALL_DONE = re.compile(r"s_waitcnt\b.*\bvmcnt\(0\)")
_BARRIER = re.compile(r"s_barrier")
_BRANCH = re.compile(r"s_(?:c?branch)\w* (\.\w+)")
# With sc1: for the whole GPU.
_WRITE_BACK = re.compile(r"buffer_wbl2 sc1")
_INVALIDATE = re.compile(r"buffer_inv sc1|buffer_wbinvl1_vol")
# What leaves the condition of a loop as it is.
_IDLE = re.compile(r"s_(?:mov_b64 vcc, vcc|nop|sleep|waitcnt|barrier|c?branch)")


class Instruction(NamedTuple):
    """An instruction or a label, and the line of source that it comes from."""

    text: str
    source: str

    @property
    def order(self) -> str:
        """An atomic's memory order, else ``""``. The compiler may replace an atomic by a load."""
        accesses = _ATOMIC.match(self.text) or _LOAD.match(self.text)
        order = _ORDER.search(self.source) if accesses else None
        return order[1] if order else ""


def faults(gcn: str) -> Iterator[str]:
    """The faults of all kinds."""
    yield from early_counts(gcn)
    yield from late_releases(gcn)
    yield from early_acquires(gcn)
    yield from cached_polls(gcn)
    yield from endless_loops(gcn)


def early_counts(gcn: str) -> Iterator[str]:
    """Atomics that publish stores of the whole program, but behind a barrier before which waves do
    not wait for theirs.
    """
    code = _instructions(gcn)
    barriers = [place for place, instruction in enumerate(code) if _BARRIER.match(instruction.text)]
    for place, instruction in enumerate(code):
        # A ticket and a look at a flag publish nothing.
        publishes = instruction.order not in ("relaxed", "acquire")
        if publishes and instruction.text.startswith("global_atomic_add"):
            barrier = max((earlier for earlier in barriers if earlier < place), default=0)
            before = _block_before(code, barrier)
            waited = _last(_ALL_DONE, before)
            if waited < 0 or waited < _last(_STORE, before):
                yield f"{instruction.text} publishes stores that other waves have not waited for"


def late_releases(gcn: str) -> Iterator[str]:
    """Releases that may be seen before the stores ahead of them.

    The wave must wait for its stores. gfx942 has several L2 caches, so it first writes back this
    one, and waits for that too.
    """
    code = _instructions(gcn)
    for place, instruction in enumerate(code):
        if instruction.order in ("release", "acq_rel"):
            before = _block_before(code, place)
            waited = _last(_ALL_DONE, before)
            if waited < 0 or waited < _last(_STORE, before):
                yield f"{instruction.text} does not wait for stores: {instruction.source}"
            elif "gfx942" in gcn and not 0 <= _last(_WRITE_BACK, before) < waited:
                yield f"{instruction.text} does not write back L2 and wait for that: {instruction.source}"


def early_acquires(gcn: str) -> Iterator[str]:
    """Acquires behind which a load may find old data in a cache.

    One wave waits until its atomic has returned, then invalidates the cache of all waves. Loads
    come behind the next barrier.
    """
    code = _instructions(gcn)
    for place, instruction in enumerate(code):
        if instruction.order in ("acquire", "acq_rel"):
            after = [later.text for later in _path(code, place + 1)]
            barrier = _first(_BARRIER, after)
            invalidated = _first(_INVALIDATE, after)
            if invalidated > barrier:
                yield f"{instruction.text} invalidates no cache: {instruction.source}"
            elif invalidated < _first(_ALL_DONE, after):
                yield f"{instruction.text} may return after the cache was invalidated: {instruction.source}"
            if _first(_LOAD, after) < barrier:
                yield f"a load between {instruction.text} and the barrier may find old data: {instruction.source}"


def cached_polls(gcn: str) -> Iterator[str]:
    """Waiting loops whose load may be served by this processor's own cache, again and again."""
    bypasses = "sc1" if "gfx942" in gcn else "glc"
    for instruction in _instructions(gcn):
        polls = instruction.source.startswith("while ") and instruction.order
        if polls and _LOAD.match(instruction.text) and bypasses not in instruction.text.split():
            yield f"{instruction.text} polls a cache: {instruction.source}"


def endless_loops(gcn: str) -> Iterator[str]:
    """Loops in which nothing changes: waiting loops whose load the compiler has moved ahead of
    them.
    """
    code = [instruction.text for instruction in _instructions(gcn)]
    labels = {text[:-1]: place for place, text in enumerate(code) if text.endswith(":")}
    for place, text in enumerate(code):
        branch = _BRANCH.match(text)
        start = labels.get(branch[1], place) if branch else place
        body = [inside for inside in code[start:place] if not inside.endswith(":")]
        if start < place and all(_IDLE.match(inside) for inside in body):
            yield f"{text} waits for what nothing changes"


def _instructions(gcn: str) -> list[Instruction]:
    files: dict[str, str] = {}
    code = []
    source = ""
    for line in gcn.splitlines():
        text = line.split(";")[0].strip()
        if match := _FILE.match(text):
            files[match[1]] = _installed(str(Path(match[2] or "", match[3])))
        elif match := _LINE.match(text):
            source = linecache.getline(files[match[1]], int(match[2])).strip()
        elif text.startswith(".Lfunc_end"):
            break
        elif text and not _ASIDE.match(text):
            code.append(Instruction(" ".join(text.split()), source))
    return code


def _installed(path: str) -> str:
    """The installed file for a ``path`` in the text. Triton's cache may give code that was compiled
    in a clone which is gone.
    """
    for package in (stablelora_kernels, triton):
        directory = Path(package.__file__).parent
        inside = f"/{directory.name}/"
        if inside in path:
            return str(directory / path.rpartition(inside)[2])
    return path


def _block_before(code: list[Instruction], place: int) -> list[str]:
    """What runs before an instruction for certain, as far as the label ahead of it."""
    start = max((i for i in range(place) if code[i].text.endswith(":")), default=0)
    return [instruction.text for instruction in code[start:place]]


def _path(code: list[Instruction], place: int) -> Iterator[Instruction]:
    """What follows if no condition holds, until it repeats or the program ends."""
    labels = {
        instruction.text[:-1]: i
        for i, instruction in enumerate(code)
        if instruction.text.endswith(":")
    }
    seen: set[int] = set()
    while place < len(code) and place not in seen:
        seen.add(place)
        yield code[place]
        if code[place].text == "s_endpgm":
            return
        jump = re.match(r"s_branch (\.\w+)", code[place].text)
        place = labels[jump[1]] if jump else place + 1


def _first(pattern: re.Pattern[str], texts: list[str]) -> int:
    return next((i for i, text in enumerate(texts) if pattern.match(text)), len(texts))


def _last(pattern: re.Pattern[str], texts: list[str]) -> int:
    return max((i for i, text in enumerate(texts) if pattern.match(text)), default=-1)

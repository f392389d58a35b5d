"""Hazards of compiled kernels that show in their code: what may race, or wait for nothing.

A compiler may make a race of a source that has none, and no interpreter sees that. ``HAZARDS`` has
for each kind of code a function for each hazard, which yields a line for each fault.
``machine_code.read`` raises for each, so the compile report covers every launch that dispatch can
pick.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from benchmarks.lab.compile_report.programs import Instruction, Program, shared_memory
from benchmarks.lab.compile_report.sass_registers import WARPGROUP_A, WARPGROUP_PRODUCT


class Access(NamedTuple):
    """An access of each thread to global memory; ``address`` as PTX has it, registers and offset."""

    store: bool
    bits: int
    address: str
    varies: bool


_REGISTER = re.compile(r"%(?:[a-z]+\d+|tid\.x|laneid)")
_ACCESS = re.compile(
    r"(ld|st)\.(?:\w+\.)*global[\w.:]*?(?:\.v(\d))?\.[a-z]+(\d+)|cp\.async\.c[ag]\.shared\.global"
)
_TILE = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.(?!prefetch)[\w.:]*?(shared::\w+|global)\b")


def ptx_accesses(program: Program) -> Iterator[Access | None]:
    """PTX: accesses to global memory in order, those of whole tiles (TMA) with 128 bits, and None
    for each barrier of the program.

    An address ``varies`` between threads if it is computed from a thread's number on any path:
    nearly all registers of PTX have one definition.
    """
    varying, known = {"%tid.x", "%laneid"}, 0
    # A memory operand in first place writes no register.
    flows = [
        ({*_REGISTER.findall(operands[0])}, {*_REGISTER.findall(" ".join(operands[1:]))})
        for _, _, _, _, operands, *_ in program.instructions
        if operands and operands[0][0] != "["
    ]
    while known < len(varying):
        known = len(varying)
        varying.update(*(writes for writes, reads in flows if reads & varying))
    for instruction in program.instructions:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode.startswith(("bar.sync", "barrier.sync")):
            yield None
        elif match := _TILE.match(opcode):
            yield Access(match[1] == "global", 128, "", True)
        elif match := _ACCESS.match(opcode):
            store = match[1] == "st"
            address = operands[0 if store else 1]
            bits = int(match[2] or 1) * int(match[3]) if match[1] else 8 * int(operands[2], 0)
            varies = not varying.isdisjoint(_REGISTER.findall(address))
            yield Access(store, bits, address, varies)


def reloaded_scalars(ptx: Program) -> Iterator[str]:
    """A scalar that the program loads and then stores with no barrier between.

    Every warp loads it and one thread stores. A warp that comes late would load the new value.
    """
    loaded: set[str] = set()
    for access in ptx_accesses(ptx):
        if access is None:
            loaded.clear()
        elif not access.varies and access.store and access.address in loaded:
            yield f"a late warp may load the scalar of {access.bits} bits that is stored to {access.address}"
        elif not access.varies and not access.store:
            loaded.add(access.address)


def store_waits(ptx: Program) -> int:
    """The number of waits until stores of tiles are in memory.

    A kernel needs one, before it ends. Between tiles it only waits until their shared memory has
    been read; a longer wait costs time, and is no hazard.
    """
    return sum(each.text.endswith("cp.async.bulk.wait_group 0") for each in ptx.instructions)


_COPY = re.compile(r"async_(?:tma_)?copy_global_to_local")
_DOT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true")
_PENDINGS = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")


def short_buffers(ttgir: Program) -> Iterator[str]:
    """Hopper: operands that an asynchronous product may still read while the loop's next copy
    overwrites them.

    With N copies ahead of a loop, a product that runs on into the next round needs operands of N +
    1 buffers.
    """
    lines, memory = [each.text for each in ttgir.instructions], shared_memory(ttgir)
    copies = [place for place, line in enumerate(lines) if _COPY.search(line)]
    loop = 0
    for place, line in enumerate(lines):
        if "scf.for" in line:
            loop = place
        dot = _DOT.search(line)
        waits = (match[1] for each in lines[place:] if dot and (match := _PENDINGS.search(each)))
        if not dot or next(waits, "0") == "0":
            continue
        for operand in dot.groups():
            allocated = memory[place].get(operand, -1)
            depth = re.search(r"memdesc<(\d+)x", lines[allocated]) if allocated >= 0 else None
            filled = [copy for copy in copies if allocated in memory[copy].values()]
            ahead = sum(allocated < copy < loop for copy in filled)
            if depth and any(copy > loop for copy in filled) and int(depth[1]) <= ahead:
                yield f"{ahead} copies run ahead into {depth[1]} buffers of {operand}, which a product may still read"


# WGMMA, tcgen05.mma and stores of tiles (TMA) read shared memory through the async proxy. They are
# sure to see what threads wrote (st.shared, stmatrix, cp.async) only if a fence.proxy.async stands
# between.
_FENCE = re.compile(r"fence\.proxy\.async(?:\.shared::(?:cta|cluster))?$")
_READER = re.compile(
    r"wgmma\.mma_async|tcgen05\.(?:mma|cp)|cp\.(?:reduce\.)?async\.bulk\.\S*global\.shared"
)
_FENCE_IN_TTGIR = re.compile(
    r".*(?:ttng\.fence_async_shared|elementwise_inline_asm .*fence\.proxy\.async(?:;|\.shared))"
)
_READER_IN_TTGIR = re.compile(
    r"ttng\.(?:warp_group_dot |tc_gen5_mma|async_tma_copy_local_to_global|async_tma_(?:reduce|scatter))"
)
_STORE_IN_TTGIR = re.compile(r"ttg\.local_(alloc(?= %)|store)\b")


def unfenced_copies(ptx: Program) -> Iterator[str]:
    """Waits for copies (``cp.async``) from which a path leads to a reader without a fence.

    The text does not tell which memory the reader reads, so a reader of other memory counts too.
    """
    code = ptx.instructions
    readers = {place for place, each in enumerate(code) if _READER.match(each.opcode)}
    for place, wait in enumerate(code):
        if not wait.opcode.startswith("cp.async.wait_"):
            continue
        if (reader := _first_unfenced(ptx, place, _FENCE, readers)) is not None:
            yield (
                f"no fence.proxy.async between {wait.text} {wait.where} of the PTX and"
                f" {code[reader].opcode.partition('.sync')[0]} {code[reader].where}"
            )


def unfenced_stores(ttgir: Program) -> Iterator[str]:
    """Shared memory that threads store to, with a path to a reader of that memory without a fence."""
    lines, memory = [each.text for each in ttgir.instructions], shared_memory(ttgir)
    readers = {place for place, line in enumerate(lines) if _READER_IN_TTGIR.search(line)}
    for place, line in enumerate(lines):
        if not (store := _STORE_IN_TTGIR.search(line)):
            continue
        stored = {place} if store[1] == "alloc" else {*memory[place].values()}
        of_memory = {reader for reader in readers if stored.intersection(memory[reader].values())}
        reader = _first_unfenced(ttgir, place, _FENCE_IN_TTGIR, of_memory)
        if reader is not None:
            yield f"no fence.proxy.async between lines {place + 1} and {reader + 1} of the TTGIR ({lines[reader][:60]})"


def _first_unfenced(
    program: Program, start: int, fence: re.Pattern[str], readers: Set[int]
) -> int | None:
    """The nearest of ``readers`` that a path from ``start`` comes to before a ``fence``, which has
    no guard.
    """
    met = program.walk(start, 0, lambda each, state: None if fence.match(each.text) else state)
    return next((place for place, _ in met if place in readers), None)


# Some instructions of SASS run on after the next one has started, and need their registers until a
# later instruction waits for them. The assembler places these waits, and some of its releases are
# wrong.
_WITH_REGISTERS = re.compile(r"R(\d+)")
# Instructions of WGMMA up to one with gsb0 are a group. This waits until at most so many groups are
# left.
_GROUP_END = "gsb0"
_GROUP_WAIT = "WARPGROUP.DEPBAR.LE"
# More groups than any wait leaves.
_MANY_GROUPS = 8
_TENSOR_LOAD = "LDTM"
_NO_SCOREBOARD = -1


def overwritten_operands(sass: Program) -> Iterator[str]:
    """Hopper: registers of A that are written while a product (HGMMA) may still read them.

    Such a product has A in registers and runs on until a wait covers its group. The walk takes
    every path to those waits.
    """
    code = sass.instructions
    for place, product in enumerate(code):
        if not WARPGROUP_PRODUCT.match(product.opcode):
            continue
        # The operands are the sum, A, B's descriptor, ... A may be in shared memory.
        if first := _WITH_REGISTERS.match(product.operands[1]):
            in_flight = {*range(int(first[1]), int(first[1]) + WARPGROUP_A)}
            # The state: how many groups are committed behind the product's own; -1 before its own
            # is.
            behind = 0 if _GROUP_END in product.operands else -1
            met = [code[each] for each, _ in sass.walk(place, behind, _groups_behind)]
            writers = [each for each in met if each.writes & in_flight]
            if writers:
                registers = in_flight & set().union(*(writer.writes for writer in writers))
                yield _line(product, registers, "overwritten", writers[0])


def early_uses(sass: Program) -> Iterator[str]:
    """Blackwell: registers of a load from tensor memory (LDTM) that are used before a wait for the
    load.

    Triton places uses before ``tcgen05.wait::ld`` and leaves their order to the assembler. In
    machine code a load keeps a scoreboard busy, and an instruction that needs its registers waits
    for that. A load without a scoreboard is done when the next load is.
    """
    code = sass.instructions
    for place, load in enumerate(code):
        if load.opcode.startswith(_TENSOR_LOAD):
            in_flight = load.writes
            scoreboard = _NO_SCOREBOARD if load.write_scoreboard is None else load.write_scoreboard
            met = sass.walk(place, scoreboard, _scoreboard_of_load)
            users = [
                code[each]
                for each, scoreboard in met
                if in_flight & (code[each].reads | code[each].writes)
                and not code[each].waits_for(scoreboard)
                and not code[each].opcode.startswith(_TENSOR_LOAD)
            ]
            if users:
                registers = in_flight & set().union(*(user.reads | user.writes for user in users))
                yield _line(load, registers, "used", users[0])


def _groups_behind(instruction: Instruction, behind: int) -> int | None:
    """How many groups are committed behind a product's own after ``instruction``, or None if it
    waits for the product.
    """
    # Under a guard an instruction may not run.
    if instruction.guard:
        return behind
    if instruction.opcode == _GROUP_WAIT and int(instruction.operands[1], 16) <= behind:
        return None
    if WARPGROUP_PRODUCT.match(instruction.opcode) and _GROUP_END in instruction.operands:
        return min(behind + 1, _MANY_GROUPS)
    return behind


def _scoreboard_of_load(instruction: Instruction, scoreboard: int) -> int | None:
    """The scoreboard that is busy until a load is done, after ``instruction``, or None if that
    waits for the load.
    """
    if instruction.waits_for(scoreboard):
        return None
    if (
        scoreboard == _NO_SCOREBOARD
        and instruction.opcode.startswith(_TENSOR_LOAD)
        and not instruction.guard
    ):
        return scoreboard if instruction.write_scoreboard is None else instruction.write_scoreboard
    return scoreboard


def _line(in_flight: Instruction, registers: Set[int], verb: str, first: Instruction) -> str:
    be = "is" if len(registers) == 1 else "are"
    opcode = in_flight.opcode.partition(".")[0]
    return (
        f"{_names(registers)} of the {opcode} {in_flight.where} {be} {verb} before a wait,"
        f" first {first.where} ({first.text})"
    )


def _names(registers: Iterable[int]) -> str:
    """``R32``, or ``R32, R36 to R39``."""
    runs: list[list[int]] = []
    for register in sorted(registers):
        if runs and runs[-1][-1] == register - 1:
            runs[-1].append(register)
        else:
            runs.append([register])
    return ", ".join(f"R{run[0]}" if len(run) == 1 else f"R{run[0]} to R{run[-1]}" for run in runs)


# AMD: docs/internals/checked-without-a-gpu.md says why each instruction is needed. An instruction
# does not tell an atomic's memory order; its line of source does.
_ORDER = re.compile(r'sem="(\w+)"')
_ATOMIC = re.compile(r"global_atomic_")
_LOAD = re.compile(r"(?:global|buffer|flat)_load_")
_STORE = re.compile(r"(?:global|buffer|flat)_store_")
# vmcnt counts a wave's loads, stores and atomics that are not done.
_ALL_DONE = re.compile(r"s_waitcnt\b.*\bvmcnt\(0\)")
_BARRIER = re.compile(r"s_barrier")
# With sc1: for the whole GPU.
_WRITE_BACK = re.compile(r"buffer_wbl2 sc1")
_INVALIDATE = re.compile(r"buffer_inv sc1|buffer_wbinvl1_vol")
# What leaves the condition of a loop as it is.
_IDLE = re.compile(r"s_(?:mov_b64 vcc, vcc|nop|sleep|waitcnt|barrier|c?branch)")


def early_counts(gcn: Program) -> Iterator[str]:
    """Atomics that publish stores of the whole program, but behind a barrier before which waves do
    not wait for theirs.
    """
    barriers = [place for place, each in enumerate(gcn.instructions) if _BARRIER.match(each.text)]
    for place, instruction in enumerate(gcn.instructions):
        # A ticket and a look at a flag publish nothing.
        publishes = _order(instruction) not in ("relaxed", "acquire")
        if publishes and instruction.opcode.startswith("global_atomic_add"):
            barrier = max((earlier for earlier in barriers if earlier < place), default=0)
            if _waits_for_stores(_block_before(gcn, barrier)) is None:
                yield f"{instruction.text} publishes stores that other waves have not waited for"


def late_releases(gcn: Program) -> Iterator[str]:
    """Releases that may be seen before the stores ahead of them.

    The wave must wait for its stores. gfx942 has several L2 caches, so it first writes back this
    one, and waits for that too.
    """
    for place, instruction in enumerate(gcn.instructions):
        if _order(instruction) in ("release", "acq_rel"):
            before = _block_before(gcn, place)
            waited = _waits_for_stores(before)
            if waited is None:
                yield f"{instruction.text} does not wait for stores: {instruction.source}"
            elif "gfx942" in gcn.text and not 0 <= _last(_WRITE_BACK, before) < waited:
                yield f"{instruction.text} does not write back L2 and wait for that: {instruction.source}"


def early_acquires(gcn: Program) -> Iterator[str]:
    """Acquires behind which a load may find old data in a cache.

    One wave waits until its atomic has returned, then invalidates the cache of all waves. Loads
    come behind the next barrier.
    """
    for place, instruction in enumerate(gcn.instructions):
        if _order(instruction) in ("acquire", "acq_rel"):
            after = _straight_on(gcn, place)
            barrier = _first(_BARRIER, after)
            invalidated = _first(_INVALIDATE, after)
            if invalidated > barrier:
                yield f"{instruction.text} invalidates no cache: {instruction.source}"
            elif invalidated < _first(_ALL_DONE, after):
                yield f"{instruction.text} may return after the cache was invalidated: {instruction.source}"
            if _first(_LOAD, after) < barrier:
                yield f"a load between {instruction.text} and the barrier may find old data: {instruction.source}"


def cached_polls(gcn: Program) -> Iterator[str]:
    """Waiting loops whose load may be served by this processor's own cache, again and again."""
    bypasses = "sc1" if "gfx942" in gcn.text else "glc"
    for instruction in gcn.instructions:
        polls = instruction.source.startswith("while ") and _order(instruction)
        if polls and _LOAD.match(instruction.text) and bypasses not in instruction.text.split():
            yield f"{instruction.text} polls a cache: {instruction.source}"


def endless_loops(gcn: Program) -> Iterator[str]:
    """Loops in which nothing changes: waiting loops whose load the compiler has moved ahead of
    them.
    """
    for place, branch in enumerate(gcn.instructions):
        target = gcn.successors[place][:1]
        if re.match(r"s_c?branch", branch.opcode) and target and target[0] <= place:
            body = gcn.instructions[target[0] : place]
            if all(_IDLE.match(inside.text) for inside in body):
                yield f"{branch.text} waits for what nothing changes"


def _order(instruction: Instruction) -> str:
    """An atomic's memory order, else ``""``. The compiler may replace an atomic by a load."""
    accesses = _ATOMIC.match(instruction.text) or _LOAD.match(instruction.text)
    order = _ORDER.search(instruction.source) if accesses else None
    return order[1] if order else ""


def _waits_for_stores(texts: Sequence[str]) -> int | None:
    """The place of the last wait until all stores are done, or None if a store follows it."""
    waited = _last(_ALL_DONE, texts)
    return waited if waited >= 0 and waited > _last(_STORE, texts) else None


def _block_before(program: Program, place: int) -> list[str]:
    """What runs before an instruction for certain, as far as the label ahead of it."""
    labels = (label for places in program.labels.values() for label in places)
    start = max((label for label in labels if label <= place), default=0)
    return [instruction.text for instruction in program.instructions[start:place]]


def _straight_on(program: Program, place: int) -> list[str]:
    """What follows if no condition holds, until it repeats or the program ends."""
    places: dict[int, None] = {}
    while (following := program.successors[place]) and following[-1] not in places:
        place = following[-1]
        places[place] = None
    return [program.instructions[each].text for each in places]


def _first(pattern: re.Pattern[str], texts: Sequence[str]) -> int:
    return next((i for i, text in enumerate(texts) if pattern.match(text)), len(texts))


def _last(pattern: re.Pattern[str], texts: Sequence[str]) -> int:
    return max((i for i, text in enumerate(texts) if pattern.match(text)), default=-1)


# By kind of code, which is the name of its reader in programs.py.
HAZARDS: dict[str, tuple[Callable[[Program], Iterator[str]], ...]] = {
    "ptx": (reloaded_scalars, unfenced_copies),
    "ttgir": (short_buffers, unfenced_stores),
    "sass": (overwritten_operands, early_uses),
    "gcn": (early_counts, late_releases, early_acquires, cached_polls, endless_loops),
}


def faults(**programs: Program) -> list[str]:
    """The faults of all hazards in one kernel's programs, by kind of code."""
    return [
        line
        for kind, program in programs.items()
        for find in HAZARDS[kind]
        for line in find(program)
    ]

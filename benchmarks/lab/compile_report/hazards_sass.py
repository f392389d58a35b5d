"""Faults that only the machine code of NVIDIA's GPUs shows. Each function yields a line for each
fault.

Some instructions run on after the next one has started, and need their registers until a later
instruction waits for them. The assembler places these waits, and some of its releases are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set

from benchmarks.lab.compile_report.sass import Instruction, Program
from benchmarks.lab.compile_report.sass_registers import WARPGROUP_A, WARPGROUP_PRODUCT

_WITH_REGISTERS = re.compile(r"R(\d+)")
# Instructions of WGMMA up to one with gsb0 are a group. This waits until at most so many groups are
# left.
_GROUP_END = "gsb0"
_GROUP_WAIT = "WARPGROUP.DEPBAR.LE"
# More groups than any wait leaves.
_MANY_GROUPS = 8
_TENSOR_LOAD = "LDTM"
_NO_SCOREBOARD = -1


def overwritten_operands(program: Program) -> Iterator[str]:
    """Hopper: registers of A that are written while a product (HGMMA) may still read them.

    Such a product has A in registers and runs on until a wait covers its group. The walk takes
    every path to those waits.
    """
    for place, product in enumerate(program.instructions):
        if WARPGROUP_PRODUCT.match(product.opcode) and (first := _first_of_a(product)) is not None:
            in_flight = {*range(first, first + WARPGROUP_A)}
            # The state: how many groups are committed behind the product's own; -1 before its own
            # is.
            behind = 0 if _GROUP_END in product.operands else -1
            met = program.walk(place, behind, _groups_behind)
            writers = [instruction for instruction, _ in met if instruction.writes & in_flight]
            if writers:
                registers = in_flight & set().union(*(writer.writes for writer in writers))
                yield _line(product, registers, "overwritten", writers[0])


def early_uses(program: Program) -> Iterator[str]:
    """Blackwell: registers of a load from tensor memory (LDTM) that are used before a wait for the
    load.

    Triton places uses before ``tcgen05.wait::ld`` and leaves their order to the assembler. In
    machine code a load keeps a scoreboard busy, and an instruction that needs its registers waits
    for that. A load without a scoreboard is done when the next load is.
    """
    for place, load in enumerate(program.instructions):
        if load.opcode.startswith(_TENSOR_LOAD):
            in_flight = load.writes
            scoreboard = _NO_SCOREBOARD if load.write_scoreboard is None else load.write_scoreboard
            met = program.walk(place, scoreboard, _scoreboard_of_load)
            users = [
                instruction
                for instruction, scoreboard in met
                if in_flight & (instruction.reads | instruction.writes)
                and not instruction.waits_for(scoreboard)
                and not instruction.opcode.startswith(_TENSOR_LOAD)
            ]
            if users:
                registers = in_flight & set().union(*(user.reads | user.writes for user in users))
                yield _line(load, registers, "used", users[0])


def _first_of_a(product: Instruction) -> int | None:
    """The first register of A, or None if A is in shared memory. The operands are the sum, A, B's
    descriptor, ...
    """
    match = _WITH_REGISTERS.match(product.operands[1])
    return int(match[1]) if match else None


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
        f"{_names(registers)} of the {opcode} at {in_flight.address:#x} {be} {verb} before a wait,"
        f" first at {first.address:#x} ({first.text})"
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

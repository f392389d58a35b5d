"""Faults that only the machine code of NVIDIA's GPUs shows. Each function yields a line for each fault.

An instruction that works on in the background needs its registers until another instruction waits for it. Only the assembler
keeps that right, and some releases of it do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from benchmarks.lab.compile_report.sass import Instruction, Program
from benchmarks.lab.compile_report.sass_registers import WARPGROUP_A, WARPGROUP_PRODUCT

_WITH_REGISTERS = re.compile(r"R(\d+)$")
# Instructions of WGMMA up to one with gsb0 are a group. This waits until at most so many groups are left.
_GROUP_END = "gsb0"
_GROUP_WAIT = "WARPGROUP.DEPBAR.LE"
# More groups than any wait leaves.
_MANY_GROUPS = 8


def overwritten_operands(program: Program) -> Iterator[str]:
    """Hopper: registers of A that are written while a product (HGMMA) may still read them.

    Such a product has A in registers and runs on until a wait covers its group. The walk takes every path to those waits.
    """
    for place, product in enumerate(program.instructions):
        if WARPGROUP_PRODUCT.match(product.opcode) and (first := _first_of_a(product)) is not None:
            in_flight = {*range(first, first + WARPGROUP_A)}
            # The state: how many groups are committed behind the product's own; -1 before its own is.
            behind = 0 if _GROUP_END in product.operands else -1
            met = (instruction for instruction, _ in program.walk(place, behind, _groups_behind))
            writers = [instruction for instruction in met if instruction.writes & in_flight]
            if writers:
                registers = in_flight & set().union(*(writer.writes for writer in writers))
                verb = "is" if len(registers) == 1 else "are"
                yield (
                    f"{_names(registers)} of the {product.opcode.partition('.')[0]} at {product.address:#x} {verb} overwritten"
                    f" before a wait, first at {writers[0].address:#x} ({writers[0].text})"
                )


def _first_of_a(product: Instruction) -> int | None:
    """The first register of A, or None if A is in shared memory. The operands are the sum, A, B's descriptor, ..."""
    match = _WITH_REGISTERS.match(product.operands[1])
    return int(match[1]) if match else None


def _groups_behind(instruction: Instruction, behind: int) -> int | None:
    """How many groups are committed behind a product's own after ``instruction``, or None if it waits for the product."""
    # Under a guard an instruction may not run.
    if instruction.guard:
        return behind
    if instruction.opcode == _GROUP_WAIT and int(instruction.operands[1], 16) <= behind:
        return None
    if WARPGROUP_PRODUCT.match(instruction.opcode) and _GROUP_END in instruction.operands:
        return min(behind + 1, _MANY_GROUPS)
    return behind


def _names(registers: Iterable[int]) -> str:
    """``R32``, or ``R32, R36 to R39``."""
    runs: list[list[int]] = []
    for register in sorted(registers):
        if runs and runs[-1][-1] == register - 1:
            runs[-1].append(register)
        else:
            runs.append([register])
    return ", ".join(f"R{run[0]}" if len(run) == 1 else f"R{run[0]} to R{run[-1]}" for run in runs)

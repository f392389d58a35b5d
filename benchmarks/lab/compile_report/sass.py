"""SASS, the machine code of NVIDIA's GPUs, as ``cuobjdump -sass`` prints it: its instructions and
the order they may run in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from benchmarks.lab.compile_report import sass_registers
from benchmarks.lab.compile_report.control_flow import State, walk

# The text has an instruction's lower word on the instruction's line and the upper word alone on the
# next line.
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<upper_word>[0-9a-f]{16}) \*/",
    re.M,
)
_BYTES = 16
# Places of fields in the upper word. 7 is no scoreboard.
_WRITE_SCOREBOARD = 46
_WAIT_MASK = 52
# No kernel of this project has them.
_OTHER_JUMP = re.compile(r"BRA|BRX|JM|CALL|RET|RTT|KILL|WARPSYNC\.COLLECTIVE")


class Instruction(NamedTuple):
    """One instruction. ``@!P0 BRA 0x40`` has the guard ``!P0``, the opcode ``BRA`` and the operand
    ``0x40``.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    upper_word: int

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()

    @property
    def writes(self) -> set[int]:
        """The numbers of the registers that this instruction writes."""
        return sass_registers.written(self.opcode, self.operands)

    @property
    def reads(self) -> set[int]:
        """The numbers of the registers that this instruction reads."""
        return sass_registers.read(self.opcode, self.operands)

    @property
    def write_scoreboard(self) -> int | None:
        """The scoreboard that is busy until this instruction has written its results."""
        number = self.upper_word >> _WRITE_SCOREBOARD & 7
        return None if number == 7 else number

    def waits_for(self, scoreboard: int) -> bool:
        """True if this instruction starts only when ``scoreboard`` is not busy."""
        return scoreboard >= 0 and bool(self.upper_word >> (_WAIT_MASK + scoreboard) & 1)


class Program:
    """The instructions of one kernel and, for each, the places of those that may run next.

    Raises:
        ValueError: the text is not that of one kernel.
    """

    def __init__(self, sass: str) -> None:
        self.instructions = [_instruction(match) for match in _INSTRUCTION.finditer(sass)]
        addresses = [instruction.address for instruction in self.instructions]
        if addresses != [*range(0, _BYTES * len(addresses), _BYTES)]:
            raise ValueError(
                "the SASS has more than one function, or an instruction that cannot be read"
            )
        self._places = {address: place for place, address in enumerate(addresses)}

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each instruction, the places of those that may run next.

        Raises:
            ValueError: an instruction jumps in a way that this method does not know.
        """
        return [self._successors_of(place) for place in range(len(self.instructions))]

    def walk(
        self, start: int, state: State, pass_over: Callable[[Instruction, State], State | None]
    ) -> Iterator[tuple[Instruction, State]]:
        """Every instruction that may run after that at place ``start``; see
        :func:`control_flow.walk`.
        """

        def pass_over_place(place: int, state: State) -> State | None:
            return pass_over(self.instructions[place], state)

        for place, state_before in walk(self.successors, start, state, pass_over_place):
            yield self.instructions[place], state_before

    def _successors_of(self, place: int) -> list[int]:
        instruction = self.instructions[place]
        opcode = instruction.opcode.partition(".")[0]
        target = self._places.get(_address(instruction.operands[-1:]))
        following = [place + 1] if place + 1 < len(self.instructions) else []
        if opcode == "EXIT":
            return following if instruction.guard else []
        if opcode == "BRA" and target is not None:
            # BRA.U and BRA.DIV have conditions among their operands.
            conditional = instruction.guard or len(instruction.operands) > 1
            return [target, *(following if conditional else [])]
        if opcode == "CALL" and target is not None and not instruction.guard:
            return [target]
        if opcode == "RET" and not instruction.guard:
            return self._behind_calls
        # Threads of a BSYNC go on together where the BSSY of the same barrier says. That is right
        # behind the BSYNC.
        meets = (
            opcode == "BSYNC" and not {*following} & self._meeting_points[instruction.operands[0]]
        )
        if meets or _OTHER_JUMP.match(instruction.opcode):
            raise ValueError(f"cannot follow {instruction.text} at {instruction.address:#x}")
        return following

    @cached_property
    def _behind_calls(self) -> list[int]:
        """Where a return may go on: behind any call."""
        return [
            place + 1
            for place, instruction in enumerate(self.instructions)
            if instruction.opcode.startswith("CALL")
        ]

    @cached_property
    def _meeting_points(self) -> dict[str, set[int]]:
        """The places that a BSSY names, by barrier."""
        points: dict[str, set[int]] = defaultdict(set)
        for instruction in self.instructions:
            if instruction.opcode.startswith("BSSY"):
                points[instruction.operands[0]].add(
                    self._places[_address(instruction.operands[1:])]
                )
        return points


def _address(operands: Sequence[str]) -> int:
    """The address that is the only one of ``operands``, or -1."""
    return int(operands[0], 16) if operands and operands[0].startswith("0x") else -1


def _instruction(match: re.Match[str]) -> Instruction:
    operands = tuple(match["operands"].split(", ")) if match["operands"] else ()
    return Instruction(
        int(match["address"], 16),
        match["guard"] or "",
        match["opcode"],
        operands,
        int(match["upper_word"], 16),
    )

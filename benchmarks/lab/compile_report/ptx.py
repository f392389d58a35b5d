"""PTX, the assembly language that Triton hands to NVIDIA's assembler: its statements and the order
they may run in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from typing import NamedTuple

# Comments, and directives without a semicolon, such as .loc.
_NO_CODE = re.compile(r"//[^\n]*|^[ \t]*\.[^;\n]*$", re.M)
_LABEL_OR_STATEMENT = re.compile(
    r"(?P<label>[$\w]+):(?!:)|(?:@(?P<guard>!?[%\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);"
)


class Statement(NamedTuple):
    """One statement. ``@%p1 bra $L`` has the guard ``%p1``, the opcode ``bra`` and the operands
    ``$L``.
    """

    line: int
    guard: str
    opcode: str
    operands: str


class Program:
    """The statements of one kernel and, for each, the places of those that may run next."""

    def __init__(self, ptx: str) -> None:
        self.statements: list[Statement] = []
        # Inline assembly repeats the names of labels.
        self._labels: dict[str, list[int]] = defaultdict(list)
        code = _NO_CODE.sub("", ptx)
        line, end = 1, 0
        for match in _LABEL_OR_STATEMENT.finditer(code):
            line, end = line + code.count("\n", end, match.start()), match.start()
            if match["label"]:
                self._labels[match["label"]].append(len(self.statements))
            else:
                operands = match["operands"].strip()
                self.statements.append(
                    Statement(line, match["guard"] or "", match["opcode"], operands)
                )

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each statement, the places of those that may run next.

        Raises:
            ValueError: a statement jumps in a way that this method does not know.
        """
        return [self._successors_of(place) for place in range(len(self.statements))]

    def _successors_of(self, place: int) -> list[int]:
        statement = self.statements[place]
        operation = statement.opcode.partition(".")[0]
        following = [place + 1] if place + 1 < len(self.statements) else []
        if operation == "brx":
            raise ValueError(
                f"cannot follow {statement.opcode} in line {statement.line} of the PTX"
            )
        if operation in ("ret", "exit", "trap"):
            return following if statement.guard else []
        if operation == "bra":
            # Of labels that share a name, the one in the same pair of braces is the nearest.
            target = min(self._labels[statement.operands], key=lambda label: abs(label - place))
            return [target, *(following if statement.guard else [])]
        return following

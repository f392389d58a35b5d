"""TTGIR, Triton's intermediate code for GPUs: its lines, the order they may run in, and the shared
memory that they name.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

_NAME = re.compile(r"%[\w#.-]+")
_LOCATION = re.compile(r"\s*loc\([^()]*(?:\([^()]*\))?\)$")
_BLOCK = re.compile(r"\^\w+")


class Region(NamedTuple):
    """The places of the lines that open, divide (``} else {``, ``} do {``) and close a region;
    ``middle`` may be -1.
    """

    kind: str
    start: int
    middle: int
    end: int


class Program:
    """The lines of one kernel and, for each, the places of those that may run next."""

    def __init__(self, ttgir: str) -> None:
        self.lines = [_LOCATION.sub("", line).strip() for line in ttgir.splitlines()]

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each line, the places of those that may run next.

        Raises:
            ValueError: a line starts programs beside each other.
        """
        successors = [[place + 1] for place in range(len(self.lines))]
        successors[-1:] = [[]]
        blocks = {
            line.partition(":")[0].partition("(")[0]: place
            for place, line in enumerate(self.lines)
            if line.startswith("^")
        }
        for place, line in enumerate(self.lines):
            if line.startswith(("cf.br ", "cf.cond_br ")):
                successors[place] = [blocks[name] for name in _BLOCK.findall(line)]
            elif line.startswith("tt.return"):
                successors[place] = []
            elif "ttg.warp_specialize" in line:
                raise ValueError(f"cannot follow {line[:60]}")
        for region in self._regions:
            behind = region.end + 1
            if region.kind == "scf.for":
                successors[region.start] = [region.start + 1, behind]
                successors[region.end] = [region.start + 1, behind]
            elif region.kind == "scf.while":
                successors[region.middle] = [region.middle + 1, behind]
                successors[region.end] = [region.start + 1]
            elif region.kind == "scf.if" and region.middle < 0:
                successors[region.start] = [region.start + 1, behind]
            elif region.kind == "scf.if":
                successors[region.start] = [region.start + 1, region.middle + 1]
                successors[region.middle] = [behind]
        return successors

    @cached_property
    def _regions(self) -> list[Region]:
        regions, opened = [], []
        for place, line in enumerate(self.lines):
            if line.startswith("}") and line.endswith("{"):
                opened[-1] = opened[-1]._replace(middle=place)
            elif line.startswith("}"):
                regions.append(opened.pop()._replace(end=place))
            elif line.endswith("{"):
                kind = re.search(r"scf\.\w+", line)
                opened.append(Region(kind[0] if kind else "", place, -1, -1))
        return regions

    @cached_property
    def buffers(self) -> list[dict[str, int]]:
        """For each line, the shared memory that its operands name: by name the place of the line
        that allocates it.
        """
        # A name may be used again in another region.
        allocated: dict[str, int] = {}
        buffers: list[dict[str, int]] = []
        for place, line in enumerate(self.lines):
            result, _, operation = line.partition(" = ") if line.startswith("%") else ("", "", line)
            operands = {
                name: allocated[name] for name in _NAME.findall(operation) if name in allocated
            }
            buffers.append(operands)
            allocated.pop(result, None)
            if operation.startswith("ttg.local_alloc"):
                allocated[result] = place
            elif operation.startswith("ttg.memdesc_") and operands:
                allocated[result] = next(iter(operands.values()))
        return buffers

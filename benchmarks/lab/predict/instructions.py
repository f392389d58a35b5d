"""Instructions of a launch, counted in its machine code, and the table of those that predictions
ask about.

A launch has parts: one turn of each job's loop (S, DB, Y, DA); TILE, what a tile of Y takes beside
its turns; RANKS, one turn of the loops over ranks in it. ``python -m benchmarks.lab.predict.count``
makes the table.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from benchmarks.common.tables import RESULTS
from benchmarks.lab.predict.formula import thin_jobs
from stablelora_kernels.kernels.lora import linear
from stablelora_kernels.launch.base import leaves

TABLE = RESULTS / "instructions.csv"
TILE, RANKS = "tile", "ranks"

# Threads a clock of a processor, by the unit that an instruction takes; of all together ISSUED.
# CUDA's programming guide, "throughput of native arithmetic instructions", compute capability 9.0.
ISSUED, UNITS = 128, {"integer": 64, "memory": 32, "special": 16}
_INTEGER = (
    *("LOP3", "PLOP3", "SEL", "IADD", "VIADD", "IABS", "SHF", "SHL", "SHR", "PRMT", "LEA", "MOV", "BMSK", "SGXT", "P2R", "R2P"),
    *("ISETP", "FSETP", "HSETP", "FSEL", "IMNMX", "VIMNMX", "FMNMX", "F2F", "F2I", "I2F"),
)  # fmt: skip
_MEMORY = ("LD", "ST", "ATOM", "RED", "SHFL", "UTMA")


class Instruction(NamedTuple):
    op: str
    operands: str
    # Whether a predicate decides on it.
    guarded: bool
    # The function of this package's kernels that it comes from, or "" for what they call.
    function: str

    @property
    def unit(self) -> str:
        named = {"memory": _MEMORY, "special": ("MUFU",), "integer": _INTEGER}
        return next((unit for unit, names in named.items() if self.op.startswith(names)), "")


_LINE = re.compile(r'\s*//## File "[^"]*?(\w+\.py)", line (\d+)')
_CODE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([\w.]+)\s*([^;]*);")
_REGISTERS = re.compile(r"\bR(\d+)\b")


@cache
def _functions(file: str) -> list[tuple[range, str]]:
    """The lines and names of functions in a file of the kernels."""
    path = Path(linear.__file__).with_name(file)
    nodes = ast.walk(ast.parse(path.read_text())) if path.exists() else ()
    return [
        (range(n.lineno, n.end_lineno + 1), n.name) for n in nodes if isinstance(n, ast.FunctionDef)
    ]


class Code(NamedTuple):
    """Instructions, and for each those that may come next."""

    instructions: list[Instruction]
    follows: list[list[int]]

    def at(self, places: Iterable[int]) -> list[Instruction]:
        return [self.instructions[place] for place in places]

    def loops(self) -> list[range]:
        """With matrix instructions, but without other such loops inside."""
        loops = [
            range(first, last + 1)
            for last, firsts in enumerate(self.follows)
            for first in firsts
            if first <= last
        ]
        # A wait's second try lies behind the end of the code, and jumps back.
        loops = [loop for loop in loops if not any(i.op == "EXIT" for i in self.at(loop))]
        loops = [loop for loop in loops if any("MMA" in i.op for i in self.at(loop))]
        return [
            a
            for a in loops
            if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)
        ]

    def reached(self, start: int, backward: bool = False) -> set[int]:
        """The places that come after ``start``, or before it."""
        follows = self.follows
        if backward:
            follows = [[] for _ in self.instructions]
            for place, after in enumerate(self.follows):
                for next_place in after:
                    follows[next_place].append(place)
        reached = {start}
        todo = [start]
        while todo:
            new = set(follows[todo.pop()]) - reached
            reached |= new
            todo += new
        return reached


def read(text: str) -> Code:
    """A disassembly with labels and source lines."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    function = ""
    for line in text.splitlines():
        if match := _LINE.match(line):
            function = next(
                (name for lines, name in _functions(match[1]) if int(match[2]) in lines), ""
            )
        elif match := re.match(r"(\.L\w+):", line.strip()):
            labels[match[1]] = len(code)
        elif (match := _CODE.match(line)) and match[2] != "NOP":
            # A branch may also take its predicate as an operand.
            guarded = bool(match[1]) or match[3].startswith(("P", "!P", "UP", "!UP"))
            code.append(Instruction(match[2], match[3], guarded, function))
    follows = []
    for place, i in enumerate(code):
        target = re.search(r"\.L\w+", i.operands) if i.op.startswith("BRA") else None
        ends = i.op.startswith(("BRA", "EXIT")) and not i.guarded
        after = [*([labels[target[0]]] if target else []), *([] if ends else [place + 1])]
        follows.append([next_place for next_place in after if next_place < len(code)])
    return Code(code, follows)


_COPIES = ("LDGSTS", "UTMALDG")


def _round_trips(code: Iterable[Instruction], into_main: bool) -> int:
    """How often the instructions wait for loads among them; ``into_main``: the main loop that
    follows waits for their copies.
    """
    trips, loaded, copying = 0, set[str](), False
    for i in code:
        if copying and i.op.startswith(("SYNCS.PHASECHK", "DEPBAR")):
            trips, copying = trips + 1, False
        registers = _REGISTERS.findall(i.operands)
        if not loaded.isdisjoint(registers):
            trips += 1
            loaded.clear()
        if i.op.startswith(_COPIES):
            copying = True
        elif i.op.startswith("LDG") and registers:
            first = int(registers[0])
            wide = max(1, int(re.search(r"\.(\d+)\b|$", i.op)[1] or 32) // 32)
            loaded |= {*map(str, range(first, first + wide))}
    return trips + (copying and into_main)


class Part(NamedTuple):
    """A warp's instructions in one part of a launch: all, and those for a unit of its own, shared
    memory's among ``memory``.

    ``round_trips``: how often they wait for loads that they have just begun.
    """

    issued: int
    integer: int
    memory: int
    special: int
    round_trips: int = 0

    @property
    def cycles(self) -> float:
        """Clocks of a processor that one warp's instructions take."""
        return 32 * max(
            self.issued / ISSUED, *(getattr(self, unit) / rate for unit, rate in UNITS.items())
        )


def _part(code: Sequence[Instruction], round_trips: int = 0) -> Part:
    units = Counter(i.unit for i in code)
    return Part(len(code), *(units[unit] for unit in UNITS), round_trips)


def jobs_of(launch: Any) -> list[str]:
    """Those of S, DB, Y and DA that a launch does."""
    a = launch.arguments
    thin = [*thin_jobs(a)]
    return thin if "TILE" not in a and thin else [*thin, *(["Y"] if a.get("PRODUCTS", 1) else [])]


def parts(text: str, jobs: Collection[str], persistent: bool) -> dict[str, Part]:
    """The parts of a launch that does ``jobs``, from its disassembly. ``persistent``: programs take
    tile after tile.
    """
    code = read(text)
    job_loops: dict[str, range] = {}
    ranks: list[range] = []
    for loop in sorted(code.loops(), key=lambda loop: loop.start):
        function = Counter(i.function for i in code.at(loop) if i.function).most_common(1)[0][0]
        if function == "add_branch":
            ranks.append(loop)
            continue
        # dB's code comes before dA's.
        names = {"down_part": ["S"], "weight_grad": ["DB", "DA"]}.get(function, ["Y"])
        job = next((job for job in names if job in jobs and job not in job_loops), None)
        if job:
            job_loops[job] = loop
    if {*jobs} - {*job_loops} > {"Y"}:
        raise ValueError(f"loops of {jobs} were expected, those of {[*job_loops]} were found")
    result = {job: _part(code.at(loop)) for job, loop in job_loops.items()}
    if ranks:
        bodies = [code.at(loop) for loop in ranks]
        result[RANKS] = _part(
            [i for body in bodies for i in body],
            sum(_round_trips(body, False) for body in bodies),
        )
    if "Y" in jobs:
        main = job_loops.get("Y", ranks[0] if ranks else range(0))
        behind = code.reached(main.start)
        before = code.reached(main.start, backward=True)
        beside = behind & before if persistent else behind | before
        if "Y" in job_loops:
            beside -= {*main}
        prologue = [place for place in sorted(beside) if place < main.start]
        epilogue = [place for place in sorted(beside) if place >= main.start]
        trips = _round_trips(code.at(prologue), "Y" in job_loops)
        trips += _round_trips(code.at(epilogue), False)
        result[TILE] = _part(code.at(prologue + epilogue), trips)
    return result


def key_of(launch: Any) -> str:
    """Launches of one key have the same code, which does not depend on integers beside tuples."""
    values = [value for value in launch.args if not isinstance(value, int)]
    words = [launch.kernel.__name__, launch.constants, launch.options, *map(_kind, leaves(values))]
    return hashlib.sha256(str(words).encode()).hexdigest()[:10]


def _kind(value: Any) -> str:
    if isinstance(value, int):
        return "1" if value == 1 else "16" if value % 16 == 0 else "int"
    base = getattr(value, "base", value)
    return str(base.dtype) if isinstance(base, Tensor) else type(value).__name__


class Counts(NamedTuple):
    """Of one launch; ``residents``: programs that a processor holds at a time."""

    residents: int
    parts: dict[str, Part]

    def cycles(self, part: str, warps: int) -> float:
        """Clocks of a processor that one turn takes a program; 0 for a part that the launch lacks."""
        return warps * self.parts[part].cycles if part in self.parts else 0.0

    def round_trips(self, part: str) -> int:
        return self.parts[part].round_trips if part in self.parts else 0


def counted_archs() -> set[str]:
    """The architectures of the table."""
    return set(pd.read_csv(TABLE, usecols=["arch"])["arch"])


@cache
def _table(arch: str) -> dict[str, Counts]:
    rows = pd.read_csv(TABLE, dtype={"launch": str})
    rows = rows[rows["arch"] == arch]
    return {
        launch: Counts(
            int(of_launch["residents"].iloc[0]),
            {row.part: Part(*row[6:]) for row in of_launch.itertuples(index=False)},
        )
        for launch, of_launch in rows.groupby("launch")
    }


def counts_of(launch: Any, arch: str) -> Counts:
    """From the table. A launch that it lacks raises KeyError."""
    try:
        return _table(arch)[key_of(launch)]
    except KeyError:
        missing = f"{launch.kernel.__name__}, {launch.variant}, is not counted for {arch}"
        raise KeyError(f"{missing}: run python -m benchmarks.lab.predict.count") from None

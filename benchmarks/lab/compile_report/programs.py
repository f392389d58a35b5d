"""Compiled code as instructions and the order they may run in: PTX, SASS (NVIDIA's machine code, as
``cuobjdump -sass`` prints it), AMD's assembly, and TTGIR (Triton's intermediate code for GPUs).
"""

from __future__ import annotations

import linecache
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton

import stablelora_kernels
from benchmarks.lab.compile_report import sass_registers


class Instruction(NamedTuple):
    """One instruction; of TTGIR, one line.

    ``@!P0 BRA 0x40`` has the guard ``!P0``, the opcode ``BRA`` and the operand ``0x40``. Operands
    in TTGIR are the names that a line uses.
    """

    text: str
    where: str
    guard: str
    opcode: str
    operands: tuple[str, ...]
    # The upper word of SASS, with the scoreboards, and the line of source of AMD's assembly.
    upper_word: int = 0
    source: str = ""

    @property
    def writes(self) -> set[int]:
        """The numbers of the registers that an instruction of SASS writes."""
        return sass_registers.written(self.opcode, self.operands)

    @property
    def reads(self) -> set[int]:
        """The numbers of the registers that an instruction of SASS reads."""
        return sass_registers.read(self.opcode, self.operands)

    @property
    def write_scoreboard(self) -> int | None:
        """The scoreboard that is busy until this instruction of SASS has written its results."""
        number = self.upper_word >> _WRITE_SCOREBOARD & 7
        return None if number == 7 else number

    def waits_for(self, scoreboard: int) -> bool:
        """True if this instruction of SASS starts only when ``scoreboard`` is not busy."""
        return scoreboard >= 0 and bool(self.upper_word >> (_WAIT_MASK + scoreboard) & 1)


# Places of fields in the upper word of SASS. 7 is no scoreboard.
_WRITE_SCOREBOARD = 46
_WAIT_MASK = 52
_END = re.compile(r"(?:ret|exit|trap|EXIT)\b|s_endpgm|tt\.return")
_JUMP = re.compile(r"(?:bra|BRA|CALL)\b|s_c?branch")
# No kernel of this project has them.
_OTHER_JUMP = re.compile(r"brx|BRX|JM|RTT|KILL|WARPSYNC\.COLLECTIVE|ttg\.warp_specialize")


class Program:
    """The instructions of one kernel and, for each, the places of those that may run next.

    ``labels`` has the places of each label, and ``jumps`` what may run next where no instruction
    says so: at the ends of TTGIR's regions.
    """

    def __init__(
        self,
        text: str,
        instructions: Sequence[Instruction],
        labels: Mapping[str, Sequence[int]],
        jumps: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.text = text
        self.instructions = instructions
        self.labels = labels
        self._jumps = jumps or {}

    @cached_property
    def successors(self) -> list[Sequence[int]]:
        """For each instruction, the places of those that may run next; last, the one that runs if
        no condition holds.

        Raises:
            ValueError: an instruction jumps in a way that this method does not know.
        """
        return [self._successors_of(place) for place in range(len(self.instructions))]

    def walk(
        self, start: int, state: int, pass_over: Callable[[Instruction, int], int | None]
    ) -> Iterator[tuple[int, int]]:
        """Every place that may run after ``start``, nearest first, with every state in which a path
        comes to it.

        ``pass_over`` returns the state behind an instruction, or None if the path ends there.
        """
        todo = deque((place, state) for place in self.successors[start])
        met = {*todo}
        while todo:
            place, state = todo.popleft()
            yield place, state
            state_behind = pass_over(self.instructions[place], state)
            if state_behind is None:
                continue
            for successor in self.successors[place]:
                if (successor, state_behind) not in met:
                    met.add((successor, state_behind))
                    todo.append((successor, state_behind))

    def _successors_of(self, place: int) -> Sequence[int]:
        if place in self._jumps:
            return self._jumps[place]
        instruction = self.instructions[place]
        guard, opcode, operands = instruction.guard, instruction.opcode, instruction.operands
        following = [place + 1] if place + 1 < len(self.instructions) else []
        if _END.match(opcode):
            return following if guard else []
        if opcode.startswith("RET") and not guard:
            return [
                call + 1
                for call, each in enumerate(self.instructions)
                if each.opcode.startswith("CALL")
            ]
        if _JUMP.match(opcode) and (places := self.labels.get(operands[-1])):
            # Inline assembly repeats labels. The one in the same pair of braces is the nearest.
            target = min(places, key=lambda label: abs(label - place))
            # BRA.U and BRA.DIV have conditions among their operands.
            conditional = guard or len(operands) > 1 or opcode.startswith("s_cbranch")
            return [target, *(following if conditional else [])]
        # Threads of a BSYNC go on together where the BSSY of the same barrier says. That is right
        # behind the BSYNC.
        meets = opcode.startswith("BSYNC") and not {*following} & self._meeting_points(operands[0])
        if meets or opcode.startswith("RET") or _JUMP.match(opcode) or _OTHER_JUMP.match(opcode):
            raise ValueError(f"cannot follow {instruction.text[:60]} {instruction.where}")
        return following

    def _meeting_points(self, barrier: str) -> set[int]:
        """The places that a BSSY names for ``barrier``."""
        return {
            place
            for instruction in self.instructions
            if instruction.opcode.startswith("BSSY") and instruction.operands[0] == barrier
            for place in self.labels[instruction.operands[1]]
        }


_STATEMENT = re.compile(r"(?:@(!?[%\w]+) )?([\w.:]+) ?(.*)")
_OPERAND = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,])+")


def _instruction(text: str, where: str, upper_word: int = 0, source: str = "") -> Instruction:
    """An instruction of PTX, SASS or AMD's assembly."""
    text = " ".join(text.split())
    match = _STATEMENT.fullmatch(text)
    assert match, f"cannot read {text} {where}"
    operands = tuple(operand.strip() for operand in _OPERAND.findall(match[3]))
    return Instruction(text, where, match[1] or "", match[2], operands, upper_word, source)


# Comments, and directives without a semicolon, such as .loc.
_NO_PTX = re.compile(r"//[^\n]*|^[ \t]*\.[^;\n]*$", re.M)
_PTX = re.compile(r"(?P<label>[$\w]+):(?!:)|(?P<text>(?:@!?[%\w]+\s+)?[a-z][^;]*);")


def ptx(text: str) -> Program:
    """A kernel in PTX."""
    instructions: list[Instruction] = []
    labels: dict[str, list[int]] = defaultdict(list)
    code = _NO_PTX.sub("", text)
    line, end = 1, 0
    for match in _PTX.finditer(code):
        line, end = line + code.count("\n", end, match.start()), match.start()
        if match["label"]:
            labels[match["label"]].append(len(instructions))
        else:
            instructions.append(_instruction(match["text"], f"in line {line}"))
    return Program(text, instructions, labels)


# The text has an instruction's lower word on the instruction's line and the upper word alone on the
# next line.
_SASS = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>(?:@!?\w+\s+)?[A-Z][^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<upper_word>[0-9a-f]{16}) \*/",
    re.M,
)
_BYTES = 16


def sass(text: str) -> Program:
    """A kernel in SASS.

    Raises:
        ValueError: the text is not that of one kernel.
    """
    instructions: list[Instruction] = []
    labels: dict[str, list[int]] = {}
    for place, match in enumerate(_SASS.finditer(text)):
        if int(match["address"], 16) != _BYTES * place:
            raise ValueError(
                "the SASS has more than one function, or an instruction that cannot be read"
            )
        address = f"{_BYTES * place:#x}"
        labels[address] = [place]
        upper_word = int(match["upper_word"], 16)
        instructions.append(_instruction(match["text"], f"at {address}", upper_word))
    return Program(text, instructions, labels)


_FILE = re.compile(r'\.file\s+(\d+) (?:"([^"]*)" )?"([^"]*)"')
_LINE = re.compile(r"\.loc\s+(\d+) (\d+)")
# Directives, and labels of debug information.
_NO_GCN = re.compile(r"\.Ltmp|\.(?!L)")


def gcn(text: str) -> Program:
    """A kernel in AMD's assembly, with each instruction's line of source."""
    files: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, list[int]] = {}
    source = ""
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split(";")[0].strip()
        if match := _FILE.match(code):
            files[match[1]] = _installed(str(Path(match[2] or "", match[3])))
        elif match := _LINE.match(code):
            source = linecache.getline(files[match[1]], int(match[2])).strip()
        elif code.startswith(".Lfunc_end"):
            break
        elif not code or _NO_GCN.match(code):
            continue
        elif code.endswith(":"):
            labels[code[:-1]] = [len(instructions)]
        else:
            instructions.append(_instruction(code, f"in line {number}", source=source))
    return Program(text, instructions, labels)


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


_NAME = re.compile(r"%[\w#.-]+")
_LOCATION = re.compile(r"\s*loc\([^()]*(?:\([^()]*\))?\)$")
_BLOCK = re.compile(r"\^\w+")


def ttgir(text: str) -> Program:
    """A kernel in TTGIR: an instruction for each line."""
    lines = [_LOCATION.sub("", line).strip() for line in text.splitlines()]
    instructions: list[Instruction] = []
    labels: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        operation = line.partition(" = ")[2] if line.startswith("%") else line
        opcode, operands = operation.partition(" ")[0], tuple(_NAME.findall(operation))
        instructions.append(Instruction(line, f"in line {place + 1}", "", opcode, operands))
        if block := _BLOCK.match(line):
            labels[block[0]] = [place]
    jumps = {
        place: [labels[name][0] for name in _BLOCK.findall(line)]
        for place, line in enumerate(lines)
        if line.startswith(("cf.br ", "cf.cond_br "))
    }
    return Program(text, instructions, labels, jumps | _region_jumps(lines))


def _region_jumps(lines: Sequence[str]) -> dict[int, list[int]]:
    """What may run behind the lines that open, divide (``} else {``, ``} do {``) and close loops
    and conditions.
    """
    jumps: dict[int, list[int]] = {}
    opened: list[tuple[str, list[int]]] = []
    for place, line in enumerate(lines):
        closes, opens = line.startswith("}"), line.endswith("{")
        if closes:
            opened[-1][1].append(place)
        elif opens:
            kind = re.search(r"scf\.\w+", line)
            opened.append((kind[0] if kind else "", [place]))
        if opens or not closes:
            continue
        name, (start, *middle, end) = opened.pop()
        inside, behind = start + 1, end + 1
        if name == "scf.for":
            jumps |= {start: [inside, behind], end: [inside, behind]}
        elif name == "scf.while":
            jumps |= {middle[0]: [middle[0] + 1, behind], end: [inside]}
        elif name == "scf.if":
            jumps |= {start: [inside, middle[0] + 1 if middle else behind]}
            jumps |= {divider: [behind] for divider in middle}
    return jumps


def shared_memory(program: Program) -> list[dict[str, int]]:
    """For each line of TTGIR, the shared memory that its operands name: by name the place of the
    line that allocates it.
    """
    # A name may be used again in another region.
    allocated: dict[str, int] = {}
    memory: list[dict[str, int]] = []
    for place, line in enumerate(program.instructions):
        named = {name: allocated[name] for name in line.operands if name in allocated}
        memory.append(named)
        result = line.text.partition(" = ")[0]
        allocated.pop(result, None)
        if line.opcode.startswith("ttg.local_alloc"):
            allocated[result] = place
        elif line.opcode.startswith("ttg.memdesc_") and named:
            allocated[result] = next(iter(named.values()))
    return memory

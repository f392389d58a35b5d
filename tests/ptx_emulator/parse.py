"""From PTX text to the instructions of one kernel: labels resolved, names of inner scopes made
unique.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Bytes of each type.
SIZES = {
    **dict.fromkeys(("b8", "u8", "s8", "pred"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}
# Where threads may part, wait or end.
CONTROL = ("bra", "brx", "ret", "bar", "barrier", "setmaxnreg")
# Where a CTA's shared memory begins. TMA and wgmma need multiples of 1,024.
SHARED_BASE = 1024

_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$.]+)\s*\((.*?)\)(.*?)\{", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_TOKEN = re.compile(
    r"(?P<skip>\s+|\.(?:pragma|section|file)[^\n]*)|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<brace>[{}])"
    r"|(?P<label>[$\w.%]+):(?!:)|(?P<code>[^;]+);"
)
_NAME = re.compile(r"[%$\w]+")


@dataclass(frozen=True)
class Param:
    """A parameter of the kernel, ``offset`` bytes behind the first."""

    name: str
    size: int
    offset: int


@dataclass(eq=False)
class Instruction:
    """One instruction. ``args`` are its operands as text; one in braces is a list."""

    pc: int
    text: str
    op: str
    args: list[Any]
    # The predicate that it runs under, and whether it runs where that is false.
    guard: str | None = None
    negated: bool = False
    # The kernel's source, "file:line".
    line: str = ""
    # Of a branch.
    target: int = -1

    @cached_property
    def mods(self) -> list[str]:
        """The words of the operation: ``ld``, ``global``, ``b32``."""
        return self.op.split(".")

    @property
    def kind(self) -> str:
        """The last word, mostly the type."""
        return self.mods[-1]

    @property
    def shared(self) -> bool:
        """Whether a load, store or atomic accesses shared memory."""
        return any(word.startswith("shared") for word in self.mods)

    @property
    def is_control(self) -> bool:
        """Whether it ends a straight run of instructions."""
        may_part = self.mods[0] in CONTROL and self.op != "bar.warp.sync"
        return may_part or self.op.startswith("mbarrier.try_wait")

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.negated}{self.guard} "
        return f"{guard}{self.text} [{self.line}]"

    def unknown(self) -> NotImplementedError:
        """The error for an instruction that the emulator does not know. It never skips one."""
        return NotImplementedError(f"the PTX emulator does not know {self}")


@dataclass
class Program:
    """A kernel."""

    name: str
    threads: int
    params: list[Param]
    # Registers by name: place and type.
    registers: dict[str, tuple[int, str]] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    # Offsets of parameters, and addresses in shared memory.
    symbols: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """The kernel in ``ptx``, a module with one entry."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(.*?)"', ptx))
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("the PTX has no kernel")
    params, offset = [], 0
    for align, kind, name, count in _PARAM.findall(entry[2]):
        offset = -(-offset // int(align or SIZES[kind])) * int(align or SIZES[kind])
        params.append(Param(name, SIZES[kind] * int(count or 1), offset))
        offset += params[-1].size
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    program = Program(entry[1], int(threads[1]) if threads else 0, params)
    # A kernel has all its shared memory behind one symbol.
    program.symbols = {"global_smem": SHARED_BASE} | {param.name: param.offset for param in params}
    _Body(program, files).read(ptx, entry.end())
    return program


class _Body:
    """Reads the statements between the braces of a kernel."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program, self.files = program, files
        # New names of the registers and labels of each scope that is open, and of all scopes.
        self.scopes: list[dict[str, str]] = [{}]
        self.count = 0

    def read(self, ptx: str, start: int) -> None:
        waiting: list[tuple[Instruction, list[dict[str, str]]]] = []
        # Of branches by number: their targets, by the table's label.
        tables: dict[str, list[str]] = {}
        for kind, text, line in self._statements(ptx, start):
            if text == "{":
                self.scopes.append({})
                self.count += 1
            elif text == "}":
                self.scopes.pop()
            elif kind == "label":
                self.program.labels[self._declare(text)] = len(self.program.code)
            elif text.startswith(".reg"):
                self._registers(text)
            elif text.startswith(".branchtargets"):
                tables[next(reversed(self.program.labels))] = text.removeprefix(
                    ".branchtargets"
                ).split(",")
            else:
                instruction = _instruction(len(self.program.code), text, line)
                if instruction.op.startswith("."):
                    raise instruction.unknown()
                self.program.code.append(instruction)
                # A label may follow its branch, so names are looked up in the end.
                waiting.append((instruction, self.scopes.copy()))
        for instruction, scopes in waiting:
            if len(scopes) > 1:
                instruction.args = [_renamed(arg, scopes) for arg in instruction.args]
                instruction.guard = instruction.guard and _renamed(instruction.guard, scopes)
            if instruction.mods[0] == "bra":
                instruction.target = self.program.labels[instruction.args[0]]
            elif instruction.mods[0] == "brx":
                instruction.args.append([name.strip() for name in tables[instruction.args[1]]])

    def _statements(self, ptx: str, at: int) -> Iterator[tuple[str, str, str]]:
        """Each statement's kind, text and place in the kernel's source, up to the brace that closes
        the kernel.
        """
        line, depth = "", 0
        while True:
            token = _TOKEN.match(ptx, at)
            if token is None:
                raise ValueError(f"the PTX breaks off at {ptx[at : at + 80]!r}")
            at = token.end()
            if token["file"]:
                line = f"{self.files[token['file']].rpartition('/')[2]}:{token['line']}"
            elif not token["skip"]:
                depth += {"{": 1, "}": -1}.get(token["brace"] or "", 0)
                if depth < 0:
                    return
                kind = token.lastgroup or ""
                yield kind, " ".join(token[kind].split()), line

    def _declare(self, name: str) -> str:
        """``name``, in an inner scope with that scope's number."""
        if len(self.scopes) > 1:
            self.scopes[-1][name] = f"{name}@{self.count}"
        return self.scopes[-1].get(name, name)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(maxsplit=2)
        for name in names.split(","):
            family = re.fullmatch(r"(%?\w+)<(\d+)>", name.strip())
            made = (
                [f"{family[1]}{i}" for i in range(int(family[2]))]
                if family
                else [self._declare(name.strip())]
            )
            for each in made:
                self.program.registers[each] = (len(self.program.registers), kind[1:])


def _renamed(argument: Any, scopes: list[dict[str, str]]) -> Any:
    if isinstance(argument, list):
        return [_renamed(each, scopes) for each in argument]
    names = {name: new for scope in scopes for name, new in scope.items()}
    return _NAME.sub(lambda found: names.get(found[0], found[0]), argument)


def _instruction(pc: int, text: str, line: str) -> Instruction:
    guard = re.match(r"@(!?)([%\w$]+)\s+", text)
    text = text[guard.end() :] if guard else text
    op, _, operands = text.partition(" ")
    args: list[Any] = [
        [each.strip() for each in part[1:-1].split(",")] if part[0] == "{" else part
        for part in _split(operands)
    ]
    return Instruction(
        pc, text, op, args, guard[2] if guard else None, bool(guard and guard[1]), line
    )


def _split(operands: str) -> list[str]:
    """The operands: commas inside of brackets and braces do not part them."""
    depth, parts = 0, [""]
    for character in operands:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]

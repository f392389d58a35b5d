"""PTX and AMD's assembly as lists of instructions, with the registers each reads and writes, and its jump targets."""

from __future__ import annotations

import re
from typing import NamedTuple


class Access(NamedTuple):
    """An access to global memory. ``address``: the registers that hold it, empty if the whole program has one address."""

    store: bool
    bits: int
    address: tuple[str, ...]
    tile: bool = False
    # In PTX, the address as it is written: registers and offset.
    text: str = ""


class Instruction(NamedTuple):
    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    # A predicated instruction may leave its result as it was.
    certain: bool
    # The index of its jump target, and whether the next instruction may follow it.
    target: int | None
    continues: bool
    access: Access | None


Code = list[Instruction]


# NVIDIA's, from PTX: its widths are the machine code's, and its loops are not unrolled.

_PTX = re.compile(r"\s*(?:(\$\w+):|\{?\s*(?:@!?(%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);)")
_PTX_REGISTER = re.compile(r"%(?:[a-z]+\d+|tid\.x|laneid)")
_PTX_ACCESS = re.compile(r"(ld|st)\.(?:\w+\.)*global[\w.:]*?(?:\.v(\d))?\.[a-z]+(\d+)")
# Copies from global to shared memory, through a thread's own address and of whole tiles.
_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global")
_PTX_TILE = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.(?!prefetch)[\w.:]*?(shared::\w+|global)\b")
# Sources of a thread's number.
PTX_THREAD = ("%tid.x", "%laneid")


def parse_ptx(text: str) -> Code:
    lines: list[tuple[str | None, str, str]] = []
    places: dict[str, int] = {}
    for line in text.splitlines():
        if match := _PTX.match(line):
            label, predicate, op, operands = match.groups()
            if label is None:
                lines.append((predicate, op, operands.strip()))
            else:
                places[label] = len(lines)
    return [_ptx(*line, places) for line in lines]


def _ptx(predicate: str | None, op: str, text: str, places: dict[str, int]) -> Instruction:
    # A memory operand in first position writes no register.
    first, rest = ("", text) if text.startswith("[") else _first_operand(text)
    writes, reads = _PTX_REGISTER.findall(first), _PTX_REGISTER.findall(rest)
    access = None
    if match := _PTX_ACCESS.match(op):
        store = match[1] == "st"
        address = re.search(r"\[[^\]]*\]", text)
        written = address[0] if address else ""
        registers = tuple(_PTX_REGISTER.findall(written))
        access = Access(store, int(match[2] or 1) * int(match[3]), registers, text=written)
    elif _PTX_COPY.match(op):
        _, source, size = re.split(r"\s*,\s*", text)[:3]
        access = Access(False, 8 * int(size, 0), tuple(_PTX_REGISTER.findall(source)))
    elif match := _PTX_TILE.match(op):
        access = Access(match[1] == "global", 128, (), tile=True)
    name = op.split(".")[0]
    target = places.get(text) if name == "bra" else None
    continues = predicate is not None or name not in ("bra", "brx", "ret", "exit", "trap")
    return Instruction(op, tuple(writes), tuple(reads), predicate is None, target, continues, access)


def _first_operand(text: str) -> tuple[str, str]:
    """The operand before the first comma, or the vector in braces, and the others."""
    end = text.find("}") + 1 if text.startswith("{") else 0
    comma = text.find(",", end)
    return (text, "") if comma < 0 else (text[:comma], text[comma:])


# AMD's.

_GCN = re.compile(r"(?:(\.?\w+):|\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)[ \t]*([^\n;]*)).*")
_GCN_REGISTER = re.compile(r"\b([vsa])(?:(\d+)|\[(\d+):(\d+)\])|\b(vcc)\b")
_GCN_ACCESS = re.compile(r"(global|buffer|flat)_(load|store)_(?:lds_)?(?:dwordx?(\d*)|b(\d+)|\w*?(short|byte))")
# A thread's number is in v0 at the start. LANES stands for any register that holds another value in every lane.
LANES = "v"
GCN_THREAD = ("v0", LANES)
_GCN_NO_RESULT = re.compile(
    r"(global|buffer|flat|scratch)_(store|atomic)|ds_write|s_(cmp|cbranch|branch|waitcnt|barrier|endpgm)"
)


def parse_gcn(text: str) -> Code:
    """The instructions of AMD's assembly, as LLVM prints it."""
    lines: list[tuple[str, str]] = []
    places: dict[str, int] = {}
    for label, op, operands in (match.groups() for match in map(_GCN.fullmatch, text.splitlines()) if match):
        if label is None:
            lines.append((op, operands.strip()))
        else:
            places[label] = len(lines)
    return [_gcn(op, operands, places) for op, operands in lines]


def _gcn(op: str, text: str, places: dict[str, int]) -> Instruction:
    operands = re.split(r",\s*", text)
    found = [_gcn_registers(operand) for operand in operands]
    branch = op.startswith(("s_branch", "s_cbranch"))
    n_results = 0 if _GCN_NO_RESULT.match(op) else 2 if "_co_" in op else 1
    access = None
    if match := _GCN_ACCESS.match(op):
        kind, way, dwords, plain, part = match.groups()
        bits = {"short": 16, "byte": 8}[part] if part else int(plain) if plain else 32 * int(dwords or 1)
        # A load into shared memory has no result; other loads, and stores to buffers, name the data first.
        to_shared = "lds" in op or text.endswith("lds")
        n_results = 0 if to_shared else n_results
        place = 1 if n_results or (way, kind) == ("store", "buffer") else 0
        access = Access(way == "store", bits, tuple(r for r in found[place] if r[0] == "v" and r != "vcc"))
    writes = [register for operand in found[:n_results] for register in operand]
    reads = [register for operand in found[n_results:] for register in operand]
    if op.startswith(("v_readfirstlane", "v_readlane")):
        # One lane's value, the same for all.
        reads = []
    elif "mbcnt" in op or op.startswith("scratch_load"):
        # The lane's number, or a spilled register of unknown value.
        reads.append(LANES)
    target = places.get(operands[0]) if branch else None
    return Instruction(op, tuple(writes), tuple(reads), True, target, op not in ("s_branch", "s_endpgm"), access)


def _gcn_registers(operand: str) -> tuple[str, ...]:
    found = []
    for kind, one, first, last, vcc in _GCN_REGISTER.findall(operand):
        found += ["vcc"] if vcc else [f"{kind}{i}" for i in range(int(one or first), int(one or last) + 1)]
    return tuple(found)

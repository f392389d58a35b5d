"""Compiling one launch for a GPU that need not be there, and reading the machine code that came out.

What counts as a *hot* access, of which the report gives the narrowest:

- It reaches global memory, and its address differs between the threads of a program. That leaves out what all threads read
  alike: table entries, seeds, counters, hyper-parameters. It is found by following the thread's number from register to
  register through the code. An access of a whole tile (TMA) counts as 128 bits.
- Loads: in a kernel with matrix products, those in the innermost loops that hold matrix instructions (or FFMA, where products
  are exact), and in loops that issue TMA; in any other kernel, all.
- Stores: all.
- Of these the widths are dropped, narrowest first, that together make up less than a twelfth of the bytes a thread moves by
  the text of the code, each instruction counted once and a TMA as 64 bytes: odd sums and masks' scraps.

A kernel that has no such access has 0 bits.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

# Widths below this share of the bytes are scraps. B's sums of squares in the optimizer are 6%, A's tile beside X's and W's 8.5%.
SCRAPS = 1 / 12
TMA_BYTES = 64


class Access(NamedTuple):
    """Of global memory. ``address``: the registers that hold it; none where the whole program names one address."""

    store: bool
    bits: int
    address: tuple[str, ...]
    tile: bool = False


class Instruction(NamedTuple):
    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    # A predicated instruction may leave its result as it was.
    certain: bool
    # Where it may jump to, by place in the list, and whether the next one may follow it.
    target: int | None
    continues: bool
    access: Access | None


Code = list[Instruction]


# NVIDIA's.

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
# Registers and predicates of a thread. Those that begin with U are one for all threads, so they are not followed.
_SASS_REGISTER = re.compile(r"(?<![\w])(R\d+|P\d)\b|SR_(?:TID|LANEID)")
_SASS_ENDS = ("EXIT", "RET", "BRX", "JMX", "BRA", "JMP")
_SASS_STORES = ("STG", "ST", "UTMASTG", "UTMAREDG")
_SASS_LOADS = ("LDG", "LD", "LDGSTS", "UTMALDG", "UBLKCP")
_NO_RESULT = {"STG", "ST", "STS", "STL", "LDGSTS", "RED", "REDG", "BRA", "STSM", "STTM"}
# Their first operand is a predicate, their second the result.
_PREDICATE_FIRST = {"LOP3", "SHFL", "ATOM", "ATOMG", "ATOMS"}
THREAD = "SR_TID"


def parse_sass(text: str) -> Code:
    """The instructions that ``cuobjdump -sass`` printed."""
    lines = [match.groups() for match in _SASS.finditer(text)]
    places = {int(address, 16): place for place, (address, *_) in enumerate(lines)}
    return [_sass(predicate, op, operands, places) for _, predicate, op, operands in lines]


def _sass(predicate: str | None, op: str, text: str, places: dict[int, int]) -> Instruction:
    name, *suffixes = op.split(".")
    operands = [operand.strip() for operand in text.split(",")] if text else []
    found = [_registers(operand) for operand in operands]
    jump = re.search(r"0x([0-9a-f]+)$", text) if name in ("BRA", "JMP") else None
    # One operand, the target: no condition.
    stops = name in _SASS_ENDS and predicate in (None, "PT") and len(operands) <= (1 if jump else 2)
    writes: list[str] = []
    n_results = 0
    if name not in _NO_RESULT and operands:
        n_results = 1
        while n_results < len(operands) and re.fullmatch(r"P[\dT]", operands[n_results]):
            n_results += 1
        if operands[0][0] == "P" and name in _PREDICATE_FIRST:
            n_results = 2
        writes = [register for operand in found[:n_results] for register in operand]
        if writes and writes[-1][0] == "R":
            width = 2 if "WIDE" in suffixes or (name == "CS2R" and "32" not in suffixes) else _sass_bits(suffixes, 32) // 32
            first = int(writes[-1][1:])
            writes += [f"R{first + i}" for i in range(1, width)]
    reads = [register for operand in found[n_results:] for register in operand]
    access = None
    if name in _SASS_LOADS + _SASS_STORES:
        tile = name.startswith("U")
        # The descriptor's bracket comes before the address's.
        addresses = [operand for operand in operands if "[" in operand]
        where = addresses[-1].rpartition("[")[2] if addresses else ""
        access = Access(name in _SASS_STORES, 128 if tile else _sass_bits(suffixes, 32), _registers(where), tile)
    certain = predicate in (None, "PT")
    target = places.get(int(jump[1], 16)) if jump else None
    return Instruction(op, tuple(writes), tuple(reads), certain, target, not stops, access)


def _registers(operand: str) -> tuple[str, ...]:
    return tuple(match[1] or THREAD for match in _SASS_REGISTER.finditer(operand))


def _sass_bits(suffixes: Sequence[str], default: int) -> int:
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return max((sizes[suffix] for suffix in suffixes if suffix in sizes), default=default)


# AMD's.

_GCN = re.compile(r"(?:(\.?\w+):|\s+((?:s|v|ds|global|buffer|flat)_\w+)[ \t]*([^\n;]*)).*")
_GCN_REGISTER = re.compile(r"\b([vsa])(?:(\d+)|\[(\d+):(\d+)\])|\b(vcc)\b")
_GCN_ACCESS = re.compile(r"(global|buffer|flat)_(load|store)_(?:lds_)?(?:dwordx?(\d*)|b(\d+)|\w*?(short|byte))")
_GCN_NO_RESULT = re.compile(r"(global|buffer|flat)_(store|atomic)|ds_write|s_(cmp|cbranch|branch|waitcnt|barrier|endpgm)")


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
        to_shared = "lds" in op or text.endswith("lds")
        # A store to a buffer, and a load into registers, names the data first.
        place = 1 if (way == "load") != to_shared or (way, kind) == ("store", "buffer") else 0
        place, n_results = (0, 0) if to_shared else (place, n_results)
        access = Access(way == "store", bits, tuple(r for r in found[place] if r[0] == "v" and r != "vcc"))
    writes = [register for operand in found[:n_results] for register in operand]
    reads = [register for operand in found[n_results:] for register in operand]
    # What a scalar register gets from one lane is the same for all.
    reads = [] if op.startswith(("v_readfirstlane", "v_readlane")) else [*reads, *(["v0"] if "mbcnt" in op else [])]
    target = places.get(operands[0]) if branch else None
    return Instruction(op, tuple(writes), tuple(reads), True, target, op not in ("s_branch", "s_endpgm"), access)


def _gcn_registers(operand: str) -> tuple[str, ...]:
    found = []
    for kind, one, first, last, vcc in _GCN_REGISTER.findall(operand):
        found += ["vcc"] if vcc else [f"{kind}{i}" for i in range(int(one or first), int(one or last) + 1)]
    return tuple(found)


# Either's.


def loops(code: Code) -> list[frozenset[int]]:
    """The instructions of each loop, by place; loops that begin at the same place are one."""
    after = [_successors(code, place) for place in range(len(code))]
    before: dict[int, list[int]] = defaultdict(list)
    for place, places in enumerate(after):
        for successor in places:
            before[successor].append(place)
    tails: dict[int, list[int]] = defaultdict(list)
    for place, successor in _back_edges(after):
        tails[successor].append(place)
    found = []
    for head, ends in tails.items():
        body, todo = {head}, list(ends)
        while todo:
            place = todo.pop()
            if place not in body:
                body.add(place)
                todo += before[place]
        found.append(frozenset(body))
    return found


def _successors(code: Code, place: int) -> tuple[int, ...]:
    instruction = code[place]
    following = (place + 1,) if instruction.continues and place + 1 < len(code) else ()
    return following if instruction.target is None else (*following, instruction.target)


def _back_edges(after: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Edges to an instruction that is still open in a depth-first search: in compiled code, those that close loops."""
    state = [0] * len(after)
    # Code that only an indirect jump or a call reaches is searched from its own first instruction.
    for root in range(len(after)):
        if state[root]:
            continue
        state[root] = 1
        path: list[tuple[int, Iterator[int]]] = [(root, iter(after[root]))]
        while path:
            place, rest = path[-1]
            successor = next(rest, None)
            if successor is None:
                state[place] = 2
                path.pop()
            elif state[successor] == 1:
                yield place, successor
            elif state[successor] == 0:
                state[successor] = 1
                path.append((successor, iter(after[successor])))


def varying(code: Code, thread: Iterable[str]) -> list[bool]:
    """For each instruction, whether it accesses memory at an address that is computed from the registers in ``thread``."""
    bit: dict[str, int] = {}
    for name in (*thread, *(name for instruction in code for name in (*instruction.writes, *instruction.reads))):
        bit.setdefault(name, 1 << len(bit))

    def mask(names: Iterable[str]) -> int:
        return sum(bit[name] for name in set(names))

    start = mask(thread)
    writes = [mask(instruction.writes) for instruction in code]
    reads = [mask(instruction.reads) for instruction in code]
    known = [start if place == 0 else 0 for place in range(len(code))]
    seen = [False] * len(code)
    todo = list(range(len(code) - 1, -1, -1))
    while todo:
        place = todo.pop()
        if seen[place]:
            continue
        seen[place] = True
        state = known[place]
        if state & reads[place]:
            state |= writes[place]
        elif code[place].certain:
            state &= ~writes[place]
        for successor in _successors(code, place):
            if state & ~known[successor]:
                known[successor] |= state
                seen[successor] = False
                todo.append(successor)
    return [
        instruction.access is not None
        and any(bit.get(name, 0) & state for name in instruction.access.address)
        for instruction, state in zip(code, known, strict=True)
    ]


_MATRIX = re.compile(r"([A-Z]*(?:HMMA|GMMA|IMMA|DMMA)|UTC\w*MMA)(\.\d\w*)?|v_mfma_[a-z]+\d+_\d+x\d+x\d+")
_FMA = re.compile(r"FFMA2?|v_(?:pk_)?fmac?_f32|v_dot\w+")


def matrix_instructions(code: Code) -> list[str]:
    """Their names with the shape and without the types, ``HGMMA.64x256x16``."""
    return sorted({match[0] for match in (_MATRIX.match(instruction.op) for instruction in code) if match})


def products(code: Code, has_dot: bool) -> tuple[str, list[frozenset[int]]]:
    """What the matrix products are computed by, and the innermost loops that do; without products "" and []."""
    if not has_dot:
        return "", []
    names = matrix_instructions(code)
    pattern = _MATRIX if names else _FMA
    marked = {place for place, instruction in enumerate(code) if pattern.match(instruction.op)}
    inner = _innermost(loops(code), marked)
    if not names:
        names = sorted({_FMA.match(code[place].op)[0] for body in inner for place in body & marked})  # type: ignore[index]
    return " ".join(names), inner


def _innermost(bodies: list[frozenset[int]], marked: set[int]) -> list[frozenset[int]]:
    having = [body for body in bodies if body & marked]
    return [body for body in having if not any(other < body for other in having)]


def hot_bits(code: Code, thread: Iterable[str], inner: list[frozenset[int]]) -> tuple[int, int]:
    """The narrowest hot load and store, in bits; ``inner``: the loops of the matrix products, empty where there are none."""
    tiles = {place for place, instruction in enumerate(code) if instruction.access and instruction.access.tile}
    hot: set[int] = set(range(len(code)))
    if inner:
        hot = set().union(*inner, *_innermost(loops(code), tiles))
    loads, stores = [], []
    for place, (instruction, varies) in enumerate(zip(code, varying(code, thread), strict=True)):
        access = instruction.access
        if access is not None and (varies or access.tile):
            if access.store:
                stores.append(access)
            elif place in hot:
                loads.append(access)
    return _narrowest(loads), _narrowest(stores)


def _narrowest(accesses: list[Access]) -> int:
    moved: dict[int, int] = defaultdict(int)
    for access in accesses:
        moved[access.bits] += TMA_BYTES if access.tile else access.bits // 8
    total, passed = sum(moved.values()), 0
    for bits in sorted(moved):
        passed += moved[bits]
        if passed >= total * SCRAPS:
            return bits
    return 0

"""Hopper's wgmma: products of a warpgroup that read shared memory, and write their accumulators,
while the threads go on.

A wgmma reads and writes when its group is waited for. Until then its accumulators hold poison. It
needs a ``wgmma.fence`` between a thread's write of a register and its own use of that register,
except for the accumulator of the wgmma before it.

A copy of a register behind the fence is no such write, as long as it is ahead of the first wgmma:
see :func:`_copies`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx_emulator import numerics as nx
from tests.ptx_emulator.arithmetic import Arithmetic, whole
from tests.ptx_emulator.memory import EmulationError
from tests.ptx_emulator.parse import Instruction
from tests.ptx_emulator.tma import Action, Queue

if TYPE_CHECKING:
    from tests.ptx_emulator.machine import CTA

# Of a descriptor's swizzle: bytes of a row, and the mask of the rows' numbers.
SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
POISON = np.uint32(0xFFC0BAD1)
THREAD = np.arange(128)


@dataclass(frozen=True)
class Operand:
    """A matrix [count, depth] in shared memory, as a descriptor says."""

    descriptor: int
    count: int
    depth: int
    kind: str
    transposed: bool

    @property
    def size(self) -> int:
        return nx.ELEMENTS[self.kind][0]

    @lru_cache(4096)  # noqa: B019 - few operands, each a thousand times
    def addresses(self) -> Any:
        """Of all elements."""
        start, leading, stride = (((self.descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        if (self.descriptor >> 49) & 7:
            raise NotImplementedError(
                "the PTX emulator does not know wgmma descriptors with a base offset"
            )
        row, mask = SWIZZLES[(self.descriptor >> 62) & 3]
        i, k = np.arange(self.count)[:, None], np.arange(self.depth)[None, :]
        if not self.transposed and mask:
            linear = (i // 8) * stride + (i % 8) * row + k * self.size
        elif not self.transposed:
            linear = (
                (i // 8) * stride
                + (k * self.size // 16) * leading
                + (i % 8) * 16
                + k * self.size % 16
            )
        else:
            wide, steps = row // self.size, (stride, leading) if mask else (leading, stride)
            linear = (
                (i % wide) * self.size
                + (i // wide) * steps[1]
                + (k % 8) * row
                + (k // 8) * steps[0]
            )
        linear = start + linear
        return linear ^ (((linear >> 7) & mask) << 4)

    @lru_cache(4096)  # noqa: B019
    def granules(self, shift: int, first: int) -> Any:
        """[4, k], for each warp of a warpgroup."""
        found = np.unique(self.addresses() >> shift) - first
        return np.broadcast_to(found, (4, len(found)))

    def read(self, c: CTA) -> Any:
        size, value = nx.ELEMENTS[self.kind]
        return value(c.shared.views[size][c.shared.at(self.addresses(), size)]).astype(np.float64)


@dataclass(eq=False)
class Product:
    """A wgmma in flight. ``left``: in shared memory, or the places of its registers."""

    ins: Instruction
    serial: int
    left: Operand | list[int]
    right: Operand
    accumulators: list[int]
    accumulates: bool
    kind: str
    # See :func:`_copies`.
    copies: dict[int, int]


@dataclass
class Warpgroup(Queue):
    """The wgmmas of four warps: the accumulators' values with the number of wgmmas on their way to
    each, and the last fence.
    """

    values: dict[int, Any] = field(default_factory=dict)
    pending: dict[int, int] = field(default_factory=dict)
    fenced: list[Any] | None = None


def _warpgroups(c: CTA, mask: Any, ins: Instruction) -> list[tuple[Any, int, Warpgroup]]:
    """The threads, number and state of each warpgroup in ``mask``, which must be whole."""
    warps = c.full_warps(mask, ins)
    numbers = sorted({int(warp) // 4 for warp in warps})
    if len(warps) != 4 * len(numbers):
        raise EmulationError(f"a part of a warpgroup at {ins}")
    return [(128 * i + THREAD, i, c.products.setdefault(i, Warpgroup())) for i in numbers]


def end(c: CTA) -> None:
    for product in (product for group in c.products.values() for product in group.all()):
        c.machine.faults.add("the CTA ends before its wgmma has", product.ins, "")


def _unfenced(c: CTA, group: Warpgroup, lanes: Any, place: int, copies: dict[int, int]) -> bool:
    """Whether a register has changed since the last fence, and is no copy of one that has not."""
    if group.fenced is None:
        return True
    values = c.R[place][lanes]
    before = (group.fenced[one][lanes] for one in {place, copies.get(place, place)})
    return not any(np.array_equal(values, fenced) for fenced in before)


def _copies(words: Arithmetic, product: Instruction) -> dict[int, int]:
    """The registers that are copied between the last fence and the first wgmma behind it, each with
    the one whose value it holds, if all of them and ``product`` are in one straight run.

    PTX names values. Where two accumulators begin with one value, they have two names, and LLVM
    writes the second one's ``mov`` right ahead of the wgmma, behind the fence. The fence has
    ordered that value. Its copy is made by ptxas (12.9, 13.0 and 13.4), which places it ahead of the
    ``WARPGROUP.ARRIVE`` that the HGMMA follows, or adds an ARRIVE behind it. For a copy behind the
    first wgmma, ptxas ends that one's group, so there a copy needs a fence like any write.
    """
    code, labels = words.program.code, words.program.labels
    targets = {ins.target for ins in code}
    targets |= {labels[name] for ins in code if ins.mods[0] == "brx" for name in ins.args[2]}
    first = at = product.pc
    while code[at].op != "wgmma.fence.sync.aligned" or code[at].guard is not None:
        if at in targets or at == 0 or code[at - 1].is_control:
            return {}
        if code[at].op.startswith("wgmma.mma_async"):
            first = at
        at -= 1
    sources: dict[int, int] = {}
    for ins in code[at:first]:
        moves = ins.op in ("mov.b32", "mov.f32") and ins.guard is None
        if moves and ins.args[1] in words.registers:
            target, source = map(words.place, ins.args)
            sources[target] = sources.get(source, source)
    return sources


def _issue(c: CTA, lanes: Any, number: int, group: Warpgroup, product: Product) -> None:
    machine, (region,), ins = c.machine, c.shared.regions, product.ins
    warps = np.arange(4) + c.first_warp + 4 * number
    for operand in (product.left, product.right):
        if isinstance(operand, Operand):
            addresses = operand.addresses().reshape(-1)
            if c.shared.reach(
                addresses, addresses + operand.size, operand.size, machine.faults, ins
            ) != [(region, slice(None))]:
                return
            granules = operand.granules(region.shift, region.first)
            machine.races.read(
                region, granules, warps, ins, c.warps + number, behind=product.serial
            )
        elif any(_unfenced(c, group, lanes, place, product.copies) for place in operand):
            machine.faults.add("missing wgmma.fence (A in registers)", ins, f"registers {operand}")
    for place in product.accumulators:
        if place not in group.pending:
            if _unfenced(c, group, lanes, place, product.copies):
                machine.faults.add("missing wgmma.fence (accumulator)", ins, f"register {place}")
            group.values[place] = c.R[place][lanes]
            c.set(place, POISON, lanes)
        group.pending[place] = group.pending.get(place, 0) + 1
    group.open.append(product)


def _complete(c: CTA, lanes: Any, number: int, group: Warpgroup, product: Product) -> None:
    right = product.right.read(c)
    if isinstance(product.left, Operand):
        left = product.left.read(c)
    else:
        left = np.empty((64, product.right.depth))
        for i, place in enumerate(product.left):
            parts = nx.PARTS[product.kind](c.R[place][lanes])
            for part, values in enumerate(parts):
                row, column = nx.operand_at(THREAD, i, part, len(parts))
                left[row, column] = values
    result = left @ right.T
    for i, place in enumerate(product.accumulators):
        row, column = nx.accumulator_at(THREAD, i)
        values = result[row, column]
        if product.accumulates:
            values = values + group.values[place].view(np.float32)
        group.values[place] = values.astype(np.float32).view(np.uint32)
        group.pending[place] -= 1
        if not group.pending[place]:
            del group.pending[place]
            c.set(place, group.values[place], lanes)
            if group.fenced is not None:
                group.fenced[place] = c.R[place]
    c.machine.races.seen[c.first_warp + 4 * number + np.arange(4), product.serial] = True


# Instructions.


def _fence(ins: Instruction, c: CTA, mask: Any) -> None:
    for _, _, group in _warpgroups(c, mask, ins):
        group.fenced = list(c.R)


def _commit(ins: Instruction, c: CTA, mask: Any) -> None:
    for _, _, group in _warpgroups(c, mask, ins):
        group.commit()


def _wait(ins: Instruction, c: CTA, mask: Any) -> None:
    for lanes, number, group in _warpgroups(c, mask, ins):
        while len(group.groups) > int(ins.args[0], 0):
            for product in group.groups.pop(0):
                _complete(c, lanes, number, group, product)


def _multiply(words: Arithmetic, ins: Instruction) -> Action:
    columns, depth = map(int, re.findall(r"n(\d+)k(\d+)", ins.op)[0])
    d_kind, left_kind, right_kind = ins.mods[-3:]
    numbers = [int(each, 0) for each in ins.args[4:]]
    if d_kind != "f32" or not {left_kind, right_kind} <= {*nx.ELEMENTS} or numbers[:2] != [1, 1]:
        raise ins.unknown()
    accumulators = [words.place(name) for name in ins.args[0]]
    registers = (
        [words.place(name) for name in ins.args[1]] if isinstance(ins.args[1], list) else None
    )
    left = None if registers else words.reader(ins.args[1], "u64")
    right, accumulates = words.reader(ins.args[2], "u64"), words.reader(ins.args[3], "pred")
    transposed = [bool(each) for each in numbers[2:]]
    copies = _copies(words, ins)

    def multiply(c: CTA, mask: Any) -> None:
        for lanes, number, group in _warpgroups(c, mask, ins):

            def of_all(read: Callable[[Any], Any], lanes: Any = lanes) -> int:
                values = read(c)[lanes]
                if (values != values[0]).any():
                    c.machine.faults.add(
                        "an operand of wgmma that differs within the warpgroup", ins, ""
                    )
                return int(values[0])

            a: Any = registers
            if left is not None:
                a = Operand(of_all(left), 64, depth, left_kind, bool(transposed and transposed[0]))
            b = Operand(
                of_all(right), columns, depth, right_kind, bool(transposed and transposed[-1])
            )
            serial = c.machine.races.new_serial(c.first_warp)
            _issue(
                c,
                lanes,
                number,
                group,
                Product(
                    ins, serial, a, b, accumulators, bool(of_all(accumulates)), left_kind, copies
                ),
            )

    return multiply


INSTRUCTIONS: dict[str, Callable[[Arithmetic, Instruction], Action]] = {
    "wgmma.fence": whole(_fence), "wgmma.commit_group": whole(_commit), "wgmma.wait_group": whole(_wait),
    "wgmma.mma_async": _multiply,
}  # fmt: skip

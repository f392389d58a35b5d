"""Data-center Blackwell's tcgen05: tensor memory, and products that read and write it while the
threads go on.

A CTA's tensor memory has 128 lanes of 512 columns of 32 bits. Every access to it is asynchronous
and has a serial number, see ``memory``. A warp waits for its own loads with ``tcgen05.wait::ld``
and for its own stores with ``tcgen05.wait::st``. For products it waits at an mbarrier, on which
``tcgen05.commit`` arrives when all earlier products of its thread have ended. A product computes
when somebody waits for that mbarrier, or at once, see ``Schedule.landing``.

Registers of a ``tcgen05.ld`` have their values at once: PTX orders a thread's own use of them
behind the load without a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.ptx_emulator import numerics as nx
from tests.ptx_emulator import tma
from tests.ptx_emulator.arithmetic import Arithmetic, whole
from tests.ptx_emulator.memory import EmulationError, Races, Region
from tests.ptx_emulator.parse import Instruction
from tests.ptx_emulator.tma import Action
from tests.ptx_emulator.wgmma import Operand

if TYPE_CHECKING:
    from tests.ptx_emulator.machine import CTA

LANES, COLUMNS = 128, 512
# Lanes that one warp of a warpgroup may load and store.
QUARTER = 32
THREAD = np.arange(32)
# Types of operands by their numbers in an instruction descriptor.
TYPES = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}
# Of an instruction descriptor: the bits of float32 sums, and those that must be as in it: no
# sparsity, sign or shift.
FLOAT32_SUMS, FIXED = 1 << 4, 0x7F | 3 << 13 | 1 << 23 | 7 << 29


class Shape(NamedTuple):
    """Of D [rows, columns] = A [rows, depth] B [depth, columns], with the type of A and B."""

    rows: int
    columns: int
    depth: int
    kind: str


class Accumulator(NamedTuple):
    """What products must have in common for PTX to order them: the thread, the address of D, and
    the shape.
    """

    thread: int
    address: int
    shape: Shape


@dataclass(eq=False)
class Product:
    """A ``tcgen05.mma`` in flight. ``left``: an operand in shared memory, or the words of tensor
    memory that hold it.
    """

    ins: Instruction
    accumulator: Accumulator
    left: Any
    right: Operand
    # The words of D, [rows, columns].
    to: Any
    accumulates: bool

    @property
    def thread(self) -> int:
        return self.accumulator.thread

    def compute(self, c: CTA) -> None:
        """Compute this product behind its thread's earlier ones, unless that has happened."""
        waiting = c.tensor_memory.waiting
        if self not in waiting:
            return
        for product in [product for product in waiting if product.thread == self.thread]:
            product._multiply(c)
            waiting.remove(product)
            if product is self:
                return

    def _multiply(self, c: CTA) -> None:
        words, shape = c.tensor_memory.words, self.accumulator.shape
        if isinstance(self.left, Operand):
            left = self.left.read(c)
        else:
            parts = nx.PARTS[shape.kind](words[self.left])
            left = np.stack(parts, 2).reshape(shape.rows, shape.depth).astype(np.float64)
        result = left @ self.right.read(c).T
        if self.accumulates:
            result = result + words[self.to].view(np.float32)
        words[self.to] = result.astype(np.float32).view(np.uint32)


@dataclass(eq=False)
class Commit:
    """An arrival on an mbarrier behind products of one thread. ``serials``: of all products that it
    covers.
    """

    ins: Instruction
    thread: int
    mbarrier: int
    products: list[Product]
    serials: list[int]

    def land(self, c: CTA) -> None:
        """Arrive, behind the thread's earlier commits."""
        commits = c.tensor_memory.commits
        for commit in [commit for commit in commits if commit.thread == self.thread]:
            commits.remove(commit)
            commit._arrive(c)
            if commit is self:
                return

    def _arrive(self, c: CTA) -> None:
        for product in self.products:
            product.compute(c)
        barrier = tma.mbarrier(c, self.mbarrier, self.ins, ())
        barrier.end(c, self.serials)
        if barrier.pending:
            barrier.pending -= 1
            barrier.settle(c)
        else:
            c.machine.faults.add(
                "mbarrier: more arrivals than it expects", self.ins, f"{self.mbarrier:#x}"
            )


@dataclass(eq=False)
class TensorMemory:
    """A CTA's tensor memory, as far as it is allocated, and the operations on it that are in
    flight.
    """

    columns: int = 0
    # The first column that is allocated.
    base: int = 0
    # The words of the allocated columns, lane by lane. The region's bytes are these words.
    words: Any = None
    region: Any = None
    relinquished: bool = False
    # Products that nobody has committed, and those that have not computed.
    open: list[Product] = field(default_factory=list)
    waiting: list[Product] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    # The serials of all products.
    issued: dict[Accumulator, list[int]] = field(default_factory=dict)
    # By warp: the serials of loads and stores that it has not waited for.
    loads: dict[int, list[int]] = field(default_factory=dict)
    stores: dict[int, list[int]] = field(default_factory=dict)

    def issued_by(self, thread: int) -> list[int]:
        """The serials of all products of a thread."""
        return [
            serial
            for by, serials in self.issued.items()
            if by.thread == thread
            for serial in serials
        ]

    def at(self, address: int, lanes: Any, columns: Any, ins: Instruction) -> Any:
        """The places in ``words`` of ``lanes`` and ``columns``, which count from an address."""
        lane = (address >> 16) + lanes
        column = (address & 0xFFFF) + columns - self.base
        if lane.max() >= LANES or column.min() < 0 or column.max() >= self.columns:
            raise EmulationError(f"tensor memory that is not allocated, {address:#x}, at {ins}")
        return lane * self.columns + column


def end(c: CTA) -> None:
    memory = c.tensor_memory
    for operation in (*memory.open, *memory.commits):
        c.machine.faults.add("the CTA ends before its tcgen05.mma has", operation.ins, "")
    if memory.columns:
        c.machine.faults.add("the CTA ends with tensor memory", None, f"{memory.columns} columns")


# Allocation.


def _the_warp(c: CTA, mask: Any, ins: Instruction) -> int:
    warps = c.full_warps(mask, ins)
    if len(warps) != 1:
        raise EmulationError(f"{len(warps)} warps at {ins}")
    return int(warps[0])


def _allocate(words: Arithmetic, ins: Instruction) -> Action:
    address, count = words.address(ins.args[0]), words.reader(ins.args[1], "u32")

    def allocate(c: CTA, mask: Any) -> None:
        memory, races, (shared,) = c.tensor_memory, c.machine.races, c.shared.regions
        warp = _the_warp(c, mask, ins)
        columns = int(count(c)[32 * warp])
        if memory.columns or memory.relinquished:
            raise EmulationError(f"a second allocation of tensor memory at {ins}")
        if columns not in (32, 64, 128, 256, 512):
            raise EmulationError(f"{columns} columns at {ins}")
        # Other CTAs may have the first columns, so a kernel must use the address that it is given.
        memory.columns, memory.base = columns, COLUMNS - columns
        memory.words = np.full(LANES * columns, 0xFFFFFFFF, np.uint32)
        # A slot of readers for each warp's loads, and one for products.
        memory.region = Region(0, memory.words.nbytes, "tensor memory", 4, c.warps + 1)
        # PTX orders this write with other accesses to the address, so TMA needs no proxy fence.
        # Other warps need a barrier.
        at, serial = address(c)[[32 * warp]], races.new_serial(c.first_warp)
        number = np.array([c.first_warp + warp])
        races.write(shared, shared.granules(at, 4), number, ins, behind=serial)
        races.seen[number, serial] = True
        c.shared.views[4][c.shared.at(at, 4)] = memory.base

    return allocate


def _deallocate(words: Arithmetic, ins: Instruction) -> Action:
    address, count = words.reader(ins.args[0], "u32"), words.reader(ins.args[1], "u32")

    def deallocate(c: CTA, mask: Any) -> None:
        memory, warp = c.tensor_memory, _the_warp(c, mask, ins)
        given = int(address(c)[32 * warp]), int(count(c)[32 * warp])
        if given != (memory.base, memory.columns):
            raise EmulationError(f"tensor memory {given} is not what was allocated at {ins}")
        # Like a write of everything: all loads, stores and products must have ended.
        every = np.arange(len(memory.words))[None, :]
        c.machine.races.write(memory.region, every, np.array([c.first_warp + warp]), ins)
        memory.columns, memory.words, memory.region = 0, None, None

    return deallocate


def _relinquish(ins: Instruction, c: CTA, mask: Any) -> None:
    c.tensor_memory.relinquished = True


# Loads and stores.


class Fragment:
    """The operands of a load or store of a warp: its registers, and where they lie from its address
    on.
    """

    def __init__(self, words: Arithmetic, ins: Instruction) -> None:
        shape, self.ins = ins.mods[4], ins
        place, *offset = ins.args[1:] if ins.mods[1] == "ld" else ins.args[:-1]
        registers = ins.args[0] if ins.mods[1] == "ld" else ins.args[-1]
        self.registers = registers if isinstance(registers, list) else [registers]
        self.address = words.address(place)
        number = np.arange(len(self.registers))[:, None]
        # [registers, threads]
        if shape == "32x32b":
            self.lanes, self.columns = THREAD + 0 * number, number + 0 * THREAD
        elif shape == "16x32bx2":
            # The upper half of the warp has other columns of the same lanes.
            self.lanes = THREAD % 16 + 0 * number
            self.columns = number + int(offset[0], 0) * (THREAD // 16)
        else:
            raise ins.unknown()
        if ins.mods[5:] != [f"x{len(self.registers)}", "b32"]:
            raise ins.unknown()

    def places(self, c: CTA, warp: int) -> Any:
        """The places of a warp's registers among the words of tensor memory, [registers, threads]."""
        addresses = c.by_warp(self.address(c), warp)
        address = int(addresses[0])
        lane, height = address >> 16, int(self.lanes.max()) + 1
        first = QUARTER * (warp % 4)
        inside = first <= lane and lane + height <= first + QUARTER
        if not inside or lane % height or (addresses != address).any():
            detail = f"{address:#x}, warp {warp}, {height} lanes"
            c.machine.faults.add("tensor memory that a warp may not access", self.ins, detail)
        return c.tensor_memory.at(address, self.lanes, self.columns, self.ins)


def _load(words: Arithmetic, ins: Instruction) -> Action:
    fragment = Fragment(words, ins)
    registers = [words.place(name) for name in fragment.registers]

    def load(c: CTA, mask: Any) -> None:
        memory, races = c.tensor_memory, c.machine.races
        for warp in c.full_warps(mask, ins):
            places, serial = fragment.places(c, warp), races.new_serial(c.first_warp)
            number = np.array([c.first_warp + warp])
            races.read(memory.region, places.reshape(1, -1), number, ins, warp, behind=serial)
            memory.loads.setdefault(int(warp), []).append(serial)
            for register, values in zip(registers, memory.words[places], strict=True):
                c.set_by_warp(register, values, [warp])

    return load


def _store(words: Arithmetic, ins: Instruction) -> Action:
    fragment = Fragment(words, ins)
    reads = [words.reader(name, "b32") for name in fragment.registers]

    def store(c: CTA, mask: Any) -> None:
        memory, races = c.tensor_memory, c.machine.races
        for warp in c.full_warps(mask, ins):
            places, serial = fragment.places(c, warp), races.new_serial(c.first_warp)
            number = np.array([c.first_warp + warp])
            races.write(memory.region, places.reshape(1, -1), number, ins, behind=serial)
            memory.stores.setdefault(int(warp), []).append(serial)
            memory.words[places] = np.stack([c.by_warp(read(c), warp) for read in reads])

    return store


def _wait_for_loads(ins: Instruction, c: CTA, mask: Any) -> None:
    for warp in c.full_warps(mask, ins):
        c.machine.races.seen[c.first_warp + warp, c.tensor_memory.loads.pop(int(warp), [])] = True


def _wait_for_stores(ins: Instruction, c: CTA, mask: Any) -> None:
    for warp in c.full_warps(mask, ins):
        c.machine.races.seen[c.first_warp + warp, c.tensor_memory.stores.pop(int(warp), [])] = True


# Products.


def _shape(bits: int, ins: Instruction) -> Shape:
    types = TYPES[ins.kind]
    left, right = bits >> 7 & 7, bits >> 10 & 7
    columns, rows = 8 * (bits >> 17 & 63), 16 * (bits >> 24 & 31)
    if bits & FIXED != FLOAT32_SUMS or left != right or left not in types or rows not in (64, 128):
        raise ins.unknown()
    return Shape(rows, columns, 32 // nx.ELEMENTS[types[left]][0], types[left])


def _lanes_of(rows: int) -> Any:
    """The lanes of a matrix's rows, [rows, 1]: of 64 rows, 16 in each warp's quarter."""
    row = np.arange(rows)[:, None]
    return row if rows == LANES else QUARTER * (row // 16) + row % 16


def _operand(
    descriptor: int, count: int, shape: Shape, transposed: int, ins: Instruction
) -> Operand:
    """A matrix in shared memory. Its descriptor is a wgmma's, but for a constant and one more bit
    of the swizzle.
    """
    constant, others = descriptor >> 46 & 7, descriptor >> 49 & 0xFFF | descriptor >> 61 & 1
    if constant != 1 or others & 0xFFF:
        raise ins.unknown()
    return Operand(descriptor, count, shape.depth, shape.kind, bool(transposed))


@contextmanager
def _as_seen(races: Races, warp: int, serials: Sequence[int]) -> Iterator[None]:
    """In the block, ``warp`` has synchronized with these operations."""
    before = races.seen[warp, serials].copy()
    races.seen[warp, serials] = True
    yield
    races.seen[warp, serials] = before


def _reads_shared(c: CTA, operand: Operand, number: Any, serial: int, ins: Instruction) -> bool:
    """Record a product's read of an operand. False if the operand leaves shared memory."""
    (shared,) = c.shared.regions
    addresses = operand.addresses().reshape(-1)
    reached = c.shared.reach(
        addresses, addresses + operand.size, operand.size, c.machine.faults, ins
    )
    if reached != [(shared, slice(None))]:
        return False
    granules = operand.granules(shared.shift, shared.first)[:1]
    c.machine.races.read(shared, granules, number, ins, c.warps, behind=serial)
    return True


def _multiply(words: Arithmetic, ins: Instruction) -> Action:
    if ins.kind not in TYPES or "cta_group::1" not in ins.mods or len(ins.args) != 5:
        raise ins.unknown()
    to = words.address(ins.args[0])
    right = words.reader(ins.args[2], "u64")
    about = words.reader(ins.args[3], "u32")
    in_tensor_memory = ins.args[1][0] == "["
    left = words.address(ins.args[1]) if in_tensor_memory else words.reader(ins.args[1], "u64")
    accumulates = words.reader(ins.args[4], "pred")

    def issue(c: CTA, thread: int) -> None:
        memory, races = c.tensor_memory, c.machine.races
        warp, serial = int(c.warp_of[thread]), races.new_serial(c.first_warp)
        bits, number = int(about(c)[thread]), np.array([warp])
        shape = _shape(bits, ins)
        lanes = _lanes_of(shape.rows)
        b = _operand(int(right(c)[thread]), shape.columns, shape, bits >> 16 & 1, ins)
        a: Any
        if in_tensor_memory:
            columns = np.arange(shape.depth * nx.ELEMENTS[shape.kind][0] // 4)
            a = memory.at(int(left(c)[thread]), lanes, columns, ins)
            races.read(memory.region, a.reshape(1, -1), number, ins, c.warps, behind=serial)
        else:
            a = _operand(int(left(c)[thread]), shape.rows, shape, bits >> 15 & 1, ins)
        operands = [operand for operand in (a, b) if isinstance(operand, Operand)]
        if not all([_reads_shared(c, operand, number, serial, ins) for operand in operands]):
            return
        accumulator = Accumulator(thread, int(to(c)[thread]), shape)
        d = memory.at(accumulator.address, lanes, np.arange(shape.columns), ins)
        before = memory.issued.setdefault(accumulator, [])
        with _as_seen(races, warp, before):
            races.write(memory.region, d.reshape(1, -1), number, ins, behind=serial)
        before.append(serial)
        product = Product(ins, accumulator, a, b, d, bool(accumulates(c)[thread]))
        memory.open.append(product)
        memory.waiting.append(product)
        if c.machine.lands_early():
            product.compute(c)

    def multiply(c: CTA, mask: Any) -> None:
        for thread in c.lanes(mask):
            issue(c, int(thread))

    return multiply


def _commit(words: Arithmetic, ins: Instruction) -> Action:
    address = words.address(ins.args[0])
    if len(ins.args) != 1 or "cta_group::1" not in ins.mods:
        raise ins.unknown()

    def commit(c: CTA, mask: Any) -> None:
        memory = c.tensor_memory
        for lane in c.lanes(mask):
            thread, at = int(lane), int(address(c)[lane])
            tma.mbarrier(c, at, ins, [int(c.warp_of[lane])])
            products = [product for product in memory.open if product.thread == thread]
            memory.open = [product for product in memory.open if product.thread != thread]
            made = Commit(ins, thread, at, products, memory.issued_by(thread))
            memory.commits.append(made)
            if c.machine.lands_early():
                made.land(c)

    return commit


INSTRUCTIONS: dict[str, Callable[[Arithmetic, Instruction], Action]] = {
    "tcgen05.alloc": _allocate, "tcgen05.dealloc": _deallocate, "tcgen05.relinquish_alloc_permit": whole(_relinquish),
    "tcgen05.ld.sync": _load, "tcgen05.st.sync": _store, "tcgen05.wait::ld": whole(_wait_for_loads),
    "tcgen05.wait::st": whole(_wait_for_stores), "tcgen05.mma.cta_group": _multiply, "tcgen05.commit": _commit,
}  # fmt: skip

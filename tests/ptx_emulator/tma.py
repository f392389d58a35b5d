"""Hopper's mbarriers and TMA: copies of boxes of a tensor that nobody's thread waits with.

A load lands, and completes its bytes on its mbarrier, when somebody waits for that mbarrier. A
store reads shared memory, and writes global memory, when somebody waits for its bulk group. Either
may happen early, see ``Schedule.landing``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.ptx_emulator.arithmetic import Arithmetic, whole
from tests.ptx_emulator.memory import EmulationError, Region, Snapshot
from tests.ptx_emulator.parse import Instruction

if TYPE_CHECKING:
    from tests.ptx_emulator.machine import CTA

Action = Callable[["CTA", Any], None]


class TensorMap(NamedTuple):
    """What a CUtensorMap of two dimensions says."""

    base: int
    # Rows and columns of the tensor; bytes of an element and from row to row.
    shape: tuple[int, int]
    size: int
    pitch: int
    # Rows and columns of a box.
    block: tuple[int, int]
    # 0, 1, 2, 3: of none, 32, 64, 128 bytes.
    swizzle: int
    # Elements outside of the tensor are NaN, not zero.
    nan: bool

    def box(self, column: int, row: int, shared: int) -> tuple[Any, Any, Any]:
        """Of each element of a box: its addresses in global and in shared memory, and whether the
        tensor has it.
        """
        rows, columns = np.arange(self.block[0])[:, None], np.arange(self.block[1])[None, :]
        y, x = row + rows, column + columns
        inside = (y >= 0) & (y < self.shape[0]) & (x >= 0) & (x < self.shape[1])
        there = self.base + y * self.pitch + x * self.size
        here = shared + (rows * self.block[1] + columns) * self.size
        here = here ^ (((here >> 7) & ((1 << self.swizzle) - 1)) << 4)
        return there.reshape(-1), here.reshape(-1), inside.reshape(-1)


@dataclass
class Mbarrier:
    """``count`` arrivals, and bytes, complete a phase."""

    count: int
    pending: int
    # The warp that initialized it, and that warp's epoch.
    init: tuple[int, int]
    tx: int = 0
    phase: int = 0
    # What those who wait for the last phase learn, and what arrivals of this one have brought.
    published: Snapshot | None = None
    brought: Snapshot | None = None

    def bring(self, given: Snapshot) -> None:
        self.brought = given.merged(self.brought)

    def end(self, c: CTA, serials: list[int]) -> None:
        """Bring the ends of asynchronous operations."""
        nothing = np.zeros_like(c.machine.races.clock[0])
        seen = np.zeros(max(serials, default=0) + 1, bool)
        seen[serials] = True
        self.bring(Snapshot(nothing, nothing, seen))

    def settle(self, c: CTA) -> None:
        """Complete the phase if all of it is here."""
        if self.pending == 0 and self.tx == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.published = None if self.brought is None else self.brought.merged(self.published)
            self.brought = None
            c.machine.progress += 1


@dataclass(eq=False)
class Load:
    """A load in flight."""

    mbarrier: int
    there: Any
    here: Any
    inside: Any
    map: TensorMap
    serial: int

    def land(self, c: CTA) -> None:
        size, memory, shared = self.map.size, c.machine.memory, c.shared
        fill = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF}[size] if self.map.nan else 0
        values = memory.views[size][
            memory.at(np.where(self.inside, self.there, memory.regions[0].start), size)
        ]
        shared.views[size][shared.at(self.here, size)] = np.where(self.inside, values, fill)
        c.loads.remove(self)
        barrier = c.mbarriers.get(self.mbarrier)
        if barrier is None:
            raise EmulationError("a TMA load completes on an mbarrier that is gone")
        barrier.tx -= len(self.there) * size
        barrier.end(c, [self.serial])
        barrier.settle(c)


@dataclass(eq=False)
class Store:
    """A store in flight, with the serials of its read of shared and of its write of global memory."""

    there: Any
    here: Any
    map: TensorMap
    ins: Instruction
    reads: int
    writes: int
    data: Any = None

    def read(self, c: CTA) -> None:
        if self.data is None:
            self.data = c.shared.views[self.map.size][c.shared.at(self.here, self.map.size)]

    def write(self, c: CTA) -> None:
        self.read(c)
        memory = c.machine.memory
        memory.views[self.map.size][memory.at(self.there, self.map.size)] = self.data
        c.machine.progress += 1


@dataclass
class Queue:
    """Operations of one thread or warpgroup: those since the last commit, and committed groups."""

    open: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def all(self) -> list[Any]:
        return [each for group in [*self.groups, self.open] for each in group]


def end(c: CTA) -> None:
    """The CTA has ended: what is in flight lands, but nothing may still read its shared memory or
    be on its way there.
    """
    for store in (store for queue in c.stores.values() for store in queue.all()):
        if store.data is None:
            c.machine.faults.add(
                "the CTA ends while a TMA store may read its shared memory", store.ins, ""
            )
        store.write(c)
    for load in c.loads:
        c.machine.faults.add(
            "the CTA ends before a TMA load has landed", None, f"a box of {load.map.block}"
        )


def mbarrier(c: CTA, address: int, ins: Instruction, warps: Any) -> Mbarrier:
    """The mbarrier at ``address``, which ``warps`` use."""
    barrier = c.mbarriers.get(address)
    if barrier is None:
        raise EmulationError(f"no mbarrier at {address:#x}: {ins}")
    by, epoch = barrier.init
    for warp in warps:
        if c.machine.races.clock[warp, by] < epoch:
            c.machine.faults.add(
                "mbarrier used without a barrier behind its init", ins, f"{address:#x}: warp {warp}"
            )
    return barrier


def _awaited(c: CTA, address: int) -> list[Any]:
    """What will arrive on an mbarrier: TMA loads, and commits of tcgen05's products."""
    return [
        operation
        for operation in (*c.loads, *c.tensor_memory.commits)
        if operation.mbarrier == address
    ]


def phase_has_passed(c: CTA, address: int, parity: int, ins: Instruction) -> bool:
    """Whether the phase of ``parity`` has completed. Operations land until it has."""
    barrier = mbarrier(c, address, ins, ())
    for operation in _awaited(c, address):
        if barrier.phase & 1 == parity:
            operation.land(c)
    return barrier.phase & 1 != parity


def _init(words: Arithmetic, ins: Instruction) -> Action:
    address, count = words.address(ins.args[0]), words.reader(ins.args[1], "u32")

    def init(c: CTA, mask: Any) -> None:
        (region,), races = c.shared.regions, c.machine.races
        for lane in c.lanes(mask):
            at, warp, number = int(address(c)[lane]), int(c.warp_of[lane]), int(count(c)[lane])
            races.write(region, region.granules(np.array([at]), 8), np.array([warp]), ins)
            c.mbarriers[at] = Mbarrier(number, number, (warp, int(races.clock[warp, warp])))

    return init


def _invalidate(words: Arithmetic, ins: Instruction) -> Action:
    address = words.address(ins.args[0])

    def invalidate(c: CTA, mask: Any) -> None:
        for lane in c.lanes(mask):
            at = int(address(c)[lane])
            if mbarrier(c, at, ins, ()).tx or _awaited(c, at):
                c.machine.faults.add(
                    "mbarrier invalidated while operations will arrive on it", ins, f"{at:#x}"
                )
            del c.mbarriers[at]

    return invalidate


def _expect(words: Arithmetic, ins: Instruction) -> Action:
    """Arrive, and expect bytes."""
    address, number = words.address(ins.args[1]), words.reader(ins.args[2], "u32")

    def expect(c: CTA, mask: Any) -> None:
        for lane in c.lanes(mask):
            at, warp = int(address(c)[lane]), int(c.warp_of[lane])
            barrier = mbarrier(c, at, ins, [warp])
            if not barrier.pending:
                c.machine.faults.add("mbarrier: more arrivals than it expects", ins, f"{at:#x}")
                continue
            barrier.bring(c.machine.races.snapshot(warp))
            barrier.tx, barrier.pending = barrier.tx + int(number(c)[lane]), barrier.pending - 1
            barrier.settle(c)

    return expect


# Copies.


def _box_granules(region: Region, addresses: Any, size: int) -> Any:
    """[1, k]"""
    return np.unique(region.granules(addresses, size))[None, :]


def _operand(words: Arithmetic, text: str) -> Callable[[CTA, int], tuple[TensorMap, int, int]]:
    """A tensor map and the column and row of a box, of one thread."""
    name, places = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*?)\}\s*\]", text).groups()  # type: ignore[union-attr]
    readers = [words.reader(each.strip(), "s32") for each in places.split(",")]
    if len(readers) != 2:
        raise NotImplementedError(
            f"the PTX emulator does not know tensor maps of {len(readers)} dimensions"
        )

    def read(c: CTA, lane: int) -> tuple[TensorMap, int, int]:
        column, row = (int(reader(c)[lane]) for reader in readers)
        return c.launch.maps[int(c.R[words.place(name)][lane])], column, row

    return read


def _bounded(c: CTA, addresses: Any, size: int, ins: Instruction) -> bool:
    """Whether a box lies in the CTA's shared memory."""
    reached = c.shared.reach(addresses, addresses + size, size, c.machine.faults, ins)
    return len(reached) == 1 and isinstance(reached[0][1], slice)


def _load(words: Arithmetic, ins: Instruction) -> Action:
    shared = words.address(ins.args[0])
    operand = _operand(words, ins.args[1])
    barrier = words.address(ins.args[2])

    def load(c: CTA, mask: Any) -> None:
        machine, races = c.machine, c.machine.races
        for lane in c.lanes(mask):
            (tensor, *place), to, at = operand(c, lane), int(shared(c)[lane]), int(barrier(c)[lane])
            warp = np.array([c.warp_of[lane]])
            mbarrier(c, at, ins, warp)
            if to % (128 << tensor.swizzle if tensor.swizzle else 128):
                machine.faults.add("misaligned box in shared memory", ins, f"{to:#x}")
            there, here, inside = tensor.box(*place, to)
            if not _bounded(c, here, tensor.size, ins):
                continue
            serial, (region,) = races.new_serial(c.first_warp), c.shared.regions
            races.write(region, _box_granules(region, here, tensor.size), warp, ins, behind=serial)
            source = there[inside]
            for each, which in machine.memory.reach(
                source, source + tensor.size, tensor.size, machine.faults, ins
            ):
                races.read(
                    each,
                    _box_granules(each, source[which], tensor.size),
                    warp,
                    ins,
                    0,
                    behind=serial,
                )
            c.loads.append(Load(at, there, here, inside, tensor, serial))
            if machine.lands_early():
                c.loads[-1].land(c)

    return load


def _store(words: Arithmetic, ins: Instruction) -> Action:
    operand, shared = _operand(words, ins.args[0]), words.address(ins.args[1])

    def store(c: CTA, mask: Any) -> None:
        machine, races = c.machine, c.machine.races
        for lane in c.lanes(mask):
            tensor, *place = operand(c, lane)
            warp = np.array([c.warp_of[lane]])
            there, here, inside = tensor.box(*place, int(shared(c)[lane]))
            if not _bounded(c, here, tensor.size, ins):
                continue
            reads = races.new_serial(c.first_warp)
            writes = races.new_serial(c.first_warp)
            (region,) = c.shared.regions
            granules = _box_granules(region, here, tensor.size)
            races.read(region, granules, warp, ins, len(region.reader) - 1, behind=reads)
            target = there[inside]
            for each, which in machine.memory.reach(
                target, target + tensor.size, tensor.size, machine.faults, ins
            ):
                races.write(
                    each, _box_granules(each, target[which], tensor.size), warp, ins, behind=writes
                )
            made = Store(target, here[inside], tensor, ins, reads, writes)
            c.stores.setdefault(int(lane), Queue()).open.append(made)
            if machine.lands_early():
                made.read(c)

    return store


def _commit(ins: Instruction, c: CTA, mask: Any) -> None:
    for lane in {*c.lanes(mask).tolist()} & {*c.stores}:
        c.stores[lane].commit()


def _wait(ins: Instruction, c: CTA, mask: Any) -> None:
    """For the reads of shared memory alone (``.read``), or for all."""
    allowed, seen = int(ins.args[0], 0), c.machine.races.seen
    for lane in {*c.lanes(mask).tolist()} & {*c.stores}:
        queue, warp = c.stores[lane], c.warp_of[lane]
        done = queue.groups[: max(len(queue.groups) - allowed, 0)]
        for store in (store for group in done for store in group):
            store.read(c)
            seen[warp, store.reads] = True
            if ins.kind != "read":
                store.write(c)
                seen[warp, store.writes] = True
        if ins.kind != "read":
            del queue.groups[: len(done)]


def _proxy_fence(ins: Instruction, c: CTA, mask: Any) -> None:
    """What these threads have written, or synchronized with, becomes visible to TMA and wgmma."""
    c.machine.races.proxy_fence(np.unique(c.warp_of[c.lanes(mask)]))


INSTRUCTIONS: dict[str, Callable[[Arithmetic, Instruction], Action]] = {
    "mbarrier.init": _init, "mbarrier.inval": _invalidate, "mbarrier.arrive.expect_tx": _expect,
    "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier": _load, "cp.async.bulk.tensor.2d.global.shared::cta": _store,
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier": _load,
    "cp.async.bulk.commit_group": whole(_commit), "cp.async.bulk.wait_group": whole(_wait),
    "fence.proxy.async": whole(_proxy_fence),
}  # fmt: skip

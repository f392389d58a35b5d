"""Memory, and who may see what of it: bounds, happens-before between warps, and races.

Happens-before is kept by vector clocks: ``clock[w, u]`` is the last epoch of warp u that warp w has
synchronized with. An asynchronous operation (a copy, a TMA access, a wgmma) is an agent of its own
with a serial number: ``seen[w, serial]`` says whether warp w has synchronized with its end. Every
granule of memory knows its last writer and its last readers.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx_emulator.parse import SHARED_BASE, Instruction

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Agents from here on are asynchronous operations; below, warps.
ASYNC = 1 << 24
# Each byte of memory that nobody has written.
POISON = 0xFF


class EmulationError(Exception):
    """The emulator can't go on: a deadlock, or an instruction that needs a whole warp in a part of
    one.
    """


class Faults:
    """What was found: each kind at each instruction once, with a count and its first detail."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[int, str]] = {}

    def add(self, kind: str, ins: Instruction | None, detail: str, count: int = 1) -> None:
        key = kind, "" if ins is None else str(ins)
        before, first = self.found.get(key, (0, detail))
        self.found[key] = before + count, first

    def merge(self, other: Faults) -> None:
        for (kind, where), (count, detail) in other.found.items():
            before, first = self.found.get((kind, where), (0, detail))
            self.found[kind, where] = before + count, first

    def lines(self) -> list[str]:
        return [
            f"{kind} x{count}: {where[:230]} | {detail}"
            for (kind, where), (count, detail) in self.found.items()
        ]


class Region:
    """A piece of memory. Of each granule it has the last writer and, for each of its slots, the
    last reader.
    """

    def __init__(self, start: int, end: int, name: str, granule: int, slots: int) -> None:
        self.start, self.end, self.name = start, end, name
        self.shift = granule.bit_length() - 1
        self.first = start >> self.shift
        n = ((end - 1) >> self.shift) - self.first + 1
        self.writer, self.write_epoch = np.full(n, -1, np.int32), np.zeros(n, np.int32)
        self.reader = np.full((slots, n), -1, np.int32)
        self.read_epoch = np.zeros((slots, n), np.int32)
        # Words that atomics changed: of each address the epochs by warp.
        self.atomics: dict[int, dict[int, int]] = {}
        self.written = False

    def granules(self, addresses: Any, size: int) -> Any:
        """[lanes, k]: what ``size`` bytes from each address lie in."""
        return ((addresses >> self.shift) - self.first)[:, None] + np.arange(
            max(size >> self.shift, 1)
        )

    def address(self, granule: int) -> int:
        return (int(granule) + self.first) << self.shift


class Space:
    """A memory of regions: ``views[size]`` are its words, of which the first lies at address
    ``low``.
    """

    def __init__(self, low: int, whole: Any, regions: list[Region]) -> None:
        self.low, self.regions = low, sorted(regions, key=lambda region: region.start)
        self.views: dict[int, Any] = {size: whole.view(kind) for size, kind in WORDS.items()}
        self._starts = [region.start for region in self.regions]

    def find(self, address: int) -> Region | None:
        """The region that holds ``address``."""
        place = bisect_right(self._starts, address) - 1
        return self.regions[place] if place >= 0 and address < self.regions[place].end else None

    def at(self, addresses: Any, size: int) -> Any:
        """The places of words of ``size`` bytes in ``views[size]``."""
        return (addresses - self.low) >> (size.bit_length() - 1)

    def reach(
        self, addresses: Any, ends: Any, align: int, faults: Faults, ins: Instruction
    ) -> list[tuple[Region, Any]]:
        """The regions of an access, each with the places among ``addresses`` that are in bounds and
        aligned there.
        """
        left = addresses % align == 0
        if not left.all():
            faults.add("misaligned", ins, f"{int(addresses[~left][0]):#x}", int((~left).sum()))
        region = self.find(int(addresses.min())) if len(addresses) and left.all() else None
        if region is not None and int(ends.max()) <= region.end:
            return [(region, slice(None))]
        found = []
        for region in self.regions:
            here = left & (addresses >= region.start) & (ends <= region.end)
            if here.any():
                found.append((region, np.flatnonzero(here)))
                left &= ~here
        if left.any():
            place = np.flatnonzero(left)[0]
            address = int(addresses[place])
            near = min(
                self.regions,
                key=lambda each: min(abs(address - each.start), abs(address - each.end)),
            )
            where = f"{near.name} of {near.end - near.start} bytes {address - near.start:+d}"
            faults.add(
                "out of bounds", ins, f"{address:#x}, {where}, access {place}", int(left.sum())
            )
        return found


def shared_memory(size: int, granule: int, warps: int) -> Space:
    """A CTA's. Its slots of readers: one for each warp, each warpgroup's wgmmas and TMA's stores."""
    size = max(size, 16)
    region = Region(SHARED_BASE, SHARED_BASE + size, "shared", granule, warps + -(-warps // 4) + 1)
    return Space(SHARED_BASE, np.full(-(-size // 16) * 16, POISON, np.uint8), [region])


def global_memory(pieces: Iterable[tuple[int, int, str]], granule: int) -> Space:
    """The process's own memory. ``pieces``: the addresses, bytes and names that kernels may access."""
    merged: list[tuple[int, int, str]] = []
    for start, size, name in sorted(piece for piece in pieces if piece[1]):
        if merged and start < merged[-1][1]:
            first, end, names = merged.pop()
            name = names if name in names.split("+") else f"{names}+{name}"
            merged.append((first, max(end, start + size), name))
        else:
            merged.append((start, start + size, name))
    low, high = merged[0][0] & ~15, (merged[-1][1] + 15) & ~15
    whole = np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), dtype=np.uint8)
    return Space(low, whole, [Region(start, end, name, granule, 1) for start, end, name in merged])


class Snapshot(NamedTuple):
    """What a warp had synchronized with, to be handed on."""

    clock: Any
    # The same for what a proxy fence has made visible to TMA and wgmma.
    proxy: Any
    seen: Any

    def merged(self, other: Snapshot | None) -> Snapshot:
        if other is None:
            return self
        seen = np.zeros(max(len(self.seen), len(other.seen)), bool)
        for each in (self.seen, other.seen):
            seen[: len(each)] |= each
        return Snapshot(
            np.maximum(self.clock, other.clock), np.maximum(self.proxy, other.proxy), seen
        )


class Races:
    """The clocks of all warps, and the checks of every access against them."""

    def __init__(self, warps: int, faults: Faults) -> None:
        self.faults = faults
        self.clock = np.eye(warps, warps + 1, dtype=np.int32)
        self.proxy = np.zeros((warps, warps + 1), np.int32)
        # Column -1, for accesses by nobody, which all have seen.
        self.clock[:, -1] = self.proxy[:, -1] = np.iinfo(np.int32).max
        self.seen = np.zeros((warps, 256), bool)
        # Of each asynchronous operation the first warp of its CTA. Serials begin at 1.
        self.owners = [0]
        # What releases left, by address.
        self.released: dict[Any, Snapshot] = {}
        # The warps of the scopes of atomics with .cta, by address and warp.
        self.of_ctas: dict[tuple[int, int], range] = {}

    # Synchronization.

    def new_serial(self, first_warp: int) -> int:
        """A number for an asynchronous operation of the CTA of ``first_warp``."""
        self.owners.append(first_warp)
        if len(self.owners) > self.seen.shape[1]:
            self.seen = np.concatenate([self.seen, np.zeros_like(self.seen)], 1)
        return len(self.owners) - 1

    def snapshot(self, warp: int) -> Snapshot:
        """What ``warp`` hands on now; what it does later is not part of it."""
        found = Snapshot(self.clock[warp].copy(), self.proxy[warp].copy(), self.seen[warp].copy())
        self.clock[warp, warp] += 1
        return found

    def take(self, warp: int, given: Snapshot | None) -> None:
        if given is not None:
            np.maximum(self.clock[warp], given.clock, out=self.clock[warp])
            np.maximum(self.proxy[warp], given.proxy, out=self.proxy[warp])
            self.seen[warp, : len(given.seen)] |= given.seen

    def join(self, warps: Any) -> None:
        """A barrier of ``warps``."""
        self.clock[warps], self.proxy[warps] = self.clock[warps].max(0), self.proxy[warps].max(0)
        self.seen[warps] = self.seen[warps].any(0)
        self.clock[warps, warps] += 1

    def proxy_fence(self, warps: Any) -> None:
        self.proxy[warps] = np.maximum(self.proxy[warps], self.clock[warps])
        self.clock[warps, warps] += 1

    def synchronize(self, warp: int, keys: Iterable[Any], acquires: bool, releases: bool) -> None:
        """What an atomic, or a load that acquires, of ``keys`` does to happens-before."""
        for key in keys if acquires else ():
            self.take(warp, self.released.get(key))
        given = self.snapshot(warp) if releases else None
        for key in keys if given is not None else ():
            self.released[key] = given.merged(self.released.get(key))

    # Checks. ``granules``: [lanes, k]; ``warps``: [lanes]. A warp that issues an asynchronous
    # access stands for it.

    def _late(self, warps: Any, agents: Any, epochs: Any) -> Any:
        """Where the warp, of the last axis but one, has not synchronized with the agent's access of
        that epoch.
        """
        behind = agents >= ASYNC
        if not behind.any():
            return self.clock[warps[:, None], agents] < epochs
        late = self.clock[warps[:, None], np.where(behind, -1, agents)] < epochs
        return late | behind & ~self.seen[warps[:, None], np.where(behind, agents - ASYNC, 0)]

    def _report(
        self, bad: Any, what: str, region: Region, granules: Any, warps: Any, agents: Any, ins: Any
    ) -> None:
        if not bad.any():
            return
        lane, k = np.argwhere(bad)[0]
        agent, warp = int(agents[lane, k]), int(warps[lane])
        other = f"warp {agent}" if agent < ASYNC else f"asynchronous operation {agent - ASYNC}"
        detail = f"{region.name}+{region.address(granules[lane, k]) - region.start}: warp {warp}, {other}"
        kind = "race" if agent < ASYNC or "fence" in what else "missing wait"
        self.faults.add(f"{kind} ({what})", ins, detail, int(np.count_nonzero(bad)))

    def _check_writer(
        self,
        region: Region,
        granules: Any,
        warps: Any,
        ins: Any,
        behind: bool,
        what: str,
        differs: Any,
    ) -> None:
        writer, epochs = region.writer[granules], region.write_epoch[granules]
        place = region, granules, warps, writer, ins
        self._report(self._late(warps, writer, epochs) & differs, f"{what} after write", *place)
        if behind:
            hidden = self.proxy[warps[:, None], np.where(writer < ASYNC, writer, -1)] < epochs
            self._report(hidden, f"{what} without fence.proxy.async", *place)

    def read(
        self,
        region: Region,
        granules: Any,
        warps: Any,
        ins: Any,
        slot: Any,
        behind: int = 0,
        atomic: bool = False,
    ) -> None:
        """A read. ``slot``: of the region's readers, for each lane. ``behind``: the serial of an
        asynchronous reader.
        """
        self._check_writer(region, granules, warps, ins, bool(behind), "read", True)
        if region.atomics and not behind and not atomic:
            self._check_atomics(region, granules, warps, ins, "read")
        slot = np.broadcast_to(slot, warps.shape)[:, None]
        region.reader[slot, granules] = ASYNC + behind if behind else warps[:, None]
        region.read_epoch[slot, granules] = self.clock[warps, warps][:, None]

    def write(
        self, region: Region, granules: Any, warps: Any, ins: Any, behind: int = 0, same: Any = None
    ) -> None:
        """A write. ``same``: [lanes], where it leaves the bytes as they are, so that nobody can
        tell when it happens.
        """
        differs = True if same is None else ~same[:, None]
        self._check_writer(region, granules, warps, ins, bool(behind), "write", differs)
        # [slots, lanes, k]
        agents = region.reader[:, granules]
        late = self._late(warps, agents, region.read_epoch[:, granules]) & differs
        for slot in np.flatnonzero(late.any((1, 2))):
            self._report(late[slot], "write after read", region, granules, warps, agents[slot], ins)
        if region.atomics:
            self._check_atomics(region, granules, warps, ins, "write")
        region.writer[granules] = ASYNC + behind if behind else warps[:, None]
        region.write_epoch[granules] = self.clock[warps, warps][:, None]
        region.written = True

    def lost(self, region: Region, granules: Any, warps: Any, ins: Any) -> None:
        """Report where several warps wrote different values in one instruction."""
        agents = region.writer[granules]
        self._report(
            agents != warps[:, None],
            "two warps write different values",
            region,
            granules,
            warps,
            agents,
            ins,
        )

    def atomic(
        self,
        region: Region,
        granules: Any,
        warps: Any,
        ins: Any,
        addresses: Any,
        of_cta: range | None,
    ) -> None:
        """A read and write at once, which races with plain accesses, and with atomics of another
        CTA if either has the scope of its CTA alone. ``of_cta``: that scope's warps, None for all.
        """
        self._check_writer(region, granules, warps, ins, False, "atomic", True)
        for address, warp in zip(addresses.tolist(), warps.tolist(), strict=True):
            word = address & ~3
            by_warp = region.atomics.setdefault(word, {})
            if of_cta is not None:
                self.of_ctas[word, warp] = of_cta
            # Few launches have one.
            for by, epoch in by_warp.items() if self.of_ctas else ():
                scopes = (of_cta or (by,), self.of_ctas.get((word, by), (warp,)))
                if self.clock[warp, by] < epoch and (by not in scopes[0] or warp not in scopes[1]):
                    detail = (
                        f"{region.name}+{word - region.start}: warp {warp}, atomic of warp {by}"
                    )
                    self.faults.add("race (atomics of scope .cta in two CTAs)", ins, detail)
            by_warp[warp] = int(self.clock[warp, warp])

    def _check_atomics(
        self, region: Region, granules: Any, warps: Any, ins: Any, what: str
    ) -> None:
        for row, warp in zip(granules, warps.tolist(), strict=True):
            for word in {region.address(granule) & ~3 for granule in row}:
                for by, epoch in region.atomics.get(word, {}).items():
                    if by != warp and self.clock[warp, by] < epoch:
                        detail = (
                            f"{region.name}+{word - region.start}: warp {warp}, atomic of warp {by}"
                        )
                        self.faults.add(f"race ({what}, and an atomic)", ins, detail)
                if what == "write":
                    region.atomics.pop(word, None)

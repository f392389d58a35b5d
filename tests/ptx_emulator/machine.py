"""The threads: CTAs of groups of threads at one instruction, barriers, and the order in which all
of them run.

Triton's warps mostly run in lockstep here. Branches part a CTA's threads into groups, of which the
one that is furthest behind runs, and groups that meet at one instruction merge. With
:attr:`Schedule.warps`, warps or warpgroups run apart instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.ptx_emulator import tcgen05, tma, wgmma
from tests.ptx_emulator.memory import EmulationError, Faults, Races, Space, shared_memory
from tests.ptx_emulator.parse import SIZES, Instruction

# What a control instruction says: go on; other threads' turn; the group waits or has ended; and it
# polls, without effect so far. BLOCKED says a CTA none of whose threads can go on.
GO, YIELD, STOP, SPIN, BLOCKED = "go", "yield", "stop", "spin", "blocked"
# So many fruitless turns of each CTA are a deadlock.
PATIENCE = 400
# A CTA that has run so many pieces of code, each up to a branch, runs for ever.
ENDLESS = 100_000
# How often a slow CTA has its turn, for one turn of a quick one's: others come to wait for it.
SELDOM = 0.02
# What registers hold at first, by their bytes.
NOISE = {2: np.uint16(0xFFFF), 4: np.uint32(0xFFC0DEAD), 8: np.uint64(0xFFF8DEADDEADDEAD)}


class Schedule(NamedTuple):
    """How a launch runs, wherever a GPU may do one or another thing."""

    arch: str = "sm_80"
    # When asynchronous copies and tcgen05's products land: "late", at the wait that covers them;
    # "early", at once; "random".
    landing: str = "late"
    # None: warps in lockstep. "first": the first warp runs until it waits, then the next; "last",
    # "random". "groups-first" and so on: warpgroups, which a wgmma needs whole.
    warps: str | None = None
    # Of CTAs: "forward", "reverse", "random".
    order: str = "forward"
    # With one, CTAs take turns at their barriers and polls, half of them seldom. None: each runs
    # until it waits.
    seed: int | None = None
    # How many CTAs run at a time: the next begins when one has ended. None: all.
    resident: int | None = None


@dataclass(eq=False)
class Group:
    """Threads of a CTA at one instruction."""

    pc: int
    mask: Any
    # The only warp or warpgroup that it may be of, where those run apart.
    unit: int = -1
    # ("bar", number, count), ("mbarrier", address, parity, instruction) or ("grid",)
    waits: tuple[Any, ...] | None = None
    # It has polled in vain.
    tired: bool = False


@dataclass(eq=False)
class LaunchState:
    """One launch of a machine. ``program``: what to run, see
    :class:`~tests.ptx_emulator.program.CompiledProgram`.
    """

    program: Any
    name: str
    grid: tuple[int, int, int]
    params: bytes
    shared_bytes: int
    # Tensor maps by their places among the parameters.
    maps: dict[int, Any]

    @property
    def warps(self) -> int:
        """Of all its CTAs."""
        return int(np.prod(self.grid)) * (self.program.threads // 32)


class CTA:
    """One program: registers, as an array over its threads each, shared memory, and groups of
    threads.
    """

    def __init__(self, machine: Machine, launch: LaunchState, index: int) -> None:
        self.machine, self.launch, self.index, self.program = machine, launch, index, launch.program
        n = self.n = self.program.threads
        self.warps = n // 32
        self.first_warp = index * self.warps
        # Of each thread the number of its warp among the machine's.
        self.warp_of = np.repeat(np.arange(self.warps) + self.first_warp, 32)
        gx, gy, _ = launch.grid
        self.id = index % gx, index // gx % gy, index // (gx * gy)
        coin = np.random.default_rng(index).random(n) < 0.5
        registers = self.program.registers.values()
        self.R = [
            coin if kind == "pred" else np.full(n, NOISE[SIZES[kind]]) for _, kind in registers
        ]
        self.shared = shared_memory(launch.shared_bytes, self.program.shared_granule, self.warps)
        self.everyone, self.all_lanes = np.ones(n, bool), np.arange(n)
        self.live = self.everyone.copy()
        self.groups = [Group(0, self.everyone)]
        if machine.schedule.warps:
            size = 128 if machine.schedule.warps.startswith("groups") else 32
            self.groups = [Group(0, self.all_lanes // size == i, i) for i in range(-(-n // size))]
        # Asynchronous operations in flight, see ``accesses``, ``tma``, ``wgmma`` and ``tcgen05``.
        self.copies: list[Any] = []
        self.copy_group = np.zeros(self.warps, np.int64)
        self.mbarriers: dict[int, Any] = {}
        self.loads: list[Any] = []
        # Queues of TMA stores by thread, and of wgmmas by warpgroup.
        self.stores: dict[int, Any] = {}
        self.products: dict[int, Any] = {}
        self.tensor_memory = tcgen05.TensorMemory()

    # Registers.

    def lanes(self, mask: Any) -> Any:
        """The threads of ``mask``; None is all."""
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def set(self, place: int, values: Any, lanes: Any) -> None:
        """A register of some threads. Arrays are never changed in place."""
        if lanes is not self.all_lanes:
            whole = self.R[place].copy()
            whole[lanes] = values
            values = whole
        self.R[place] = values

    def full_warps(self, mask: Any, ins: Instruction) -> Any:
        """The CTA's warps in ``mask``, each of which must be whole."""
        by_warp = (self.everyone if mask is None else mask).reshape(self.warps, 32)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise EmulationError(f"a part of a warp at {ins}")
        return np.flatnonzero(by_warp.all(1))

    def by_warp(self, values: Any, warps: Any) -> Any:
        """[warps, 32]"""
        return values.reshape(self.warps, 32)[warps]

    def set_by_warp(self, place: int, values: Any, warps: Any) -> None:
        whole = self.R[place].reshape(self.warps, 32).copy()
        whole[warps] = values
        self.R[place] = whole.reshape(-1)

    # Running.

    def run(self) -> Iterator[str]:
        """Run until all threads have ended; yields where other CTAs may have their turn."""
        runs, left = self.program.runs, ENDLESS
        while self.groups:
            group = self._pick()
            if group is None:
                yield BLOCKED
                continue
            outcome = GO
            while outcome == GO and group in self.groups:
                if (left := left - 1) < 0:
                    raise EmulationError(f"no end after {ENDLESS} steps: {_state(self)}")
                run = runs[group.pc]
                run(self, None if group.mask is self.everyone else group.mask)
                group.pc = run.end
                if run.control is not None:
                    outcome = run.control(self, group)
                if len(self.groups) > 1:
                    break
            group.tired = outcome == SPIN
            if outcome in (SPIN, YIELD):
                yield outcome

    def _pick(self) -> Group | None:
        """The group to run: of those that are ready and, if any are, not tired, the one furthest
        behind.
        """
        if len(self.groups) > 1:
            self._merge()
        for group in self.groups:
            if group.waits is not None and self._may_go_on(group):
                group.waits = None
        ready = [group for group in self.groups if group.waits is None]
        fresh = [group for group in ready if not group.tired]
        if ready and not fresh:
            for group in ready:
                group.tired = False
            fresh = ready
        how = self.machine.schedule.warps
        if how and fresh:
            units = [group.unit for group in fresh]
            unit = self.machine.random.choice(units) if how.endswith("random") else min(units)
            unit = max(units) if how.endswith("last") else unit
            fresh = [group for group in fresh if group.unit == unit]
        return min(fresh, key=lambda group: group.pc, default=None)

    def _may_go_on(self, group: Group) -> bool:
        assert group.waits is not None
        return group.waits[0] == "mbarrier" and tma.phase_has_passed(self, *group.waits[1:])

    def _merge(self) -> None:
        merged: dict[Any, Group] = {}
        for group in self.groups:
            first = merged.setdefault((group.pc, group.waits, group.unit), group)
            if first is not group:
                first.mask, first.tired = first.mask | group.mask, first.tired and group.tired
        self.groups = list(merged.values())
        for group in self.groups:
            if group.mask.all():
                group.mask = self.everyone

    def branch(self, group: Group, taken: Any, target: int, polls: bool) -> str:
        """Part the group into those at ``target`` and those that go on. ``polls``: of a loop that
        waits for others.
        """
        back = target < group.pc
        taken = taken & group.mask
        count = np.count_nonzero(taken)
        if count == 0:
            return GO
        if count == np.count_nonzero(group.mask):
            group.pc = target
        else:
            self.groups.append(Group(target, taken, group.unit))
            group.mask = group.mask & ~taken
        return SPIN if back and polls else GO

    def exit(self, group: Group) -> str:
        self.live &= ~group.mask
        self.groups.remove(group)
        self._complete_barriers()
        return STOP

    def barrier(self, group: Group, number: int, count: int | None) -> str:
        """``bar.sync``: wait until ``count`` threads, or all that live, are here."""
        group.waits = ("bar", number, count)
        self._complete_barriers()
        if group.waits is not None:
            return STOP
        return YIELD if self.machine.schedule.seed is not None else GO

    def _complete_barriers(self) -> None:
        waiting: dict[Any, list[Group]] = {}
        for group in self.groups:
            if group.waits is not None and group.waits[0] == "bar":
                waiting.setdefault(group.waits, []).append(group)
        for (_, _, count), groups in waiting.items():
            mask = np.any([group.mask for group in groups], axis=0)
            if np.count_nonzero(mask) >= (np.count_nonzero(self.live) if count is None else count):
                self.machine.races.join(np.unique(self.warp_of[mask]))
                for group in groups:
                    group.waits = None


class Machine:
    """One launch over a global memory."""

    def __init__(self, memory: Space, launch: LaunchState, schedule: Schedule) -> None:
        self.memory, self.launch, self.schedule, self.faults = memory, launch, schedule, Faults()
        self.random = random.Random(schedule.seed)
        self.races = Races(launch.warps, self.faults)
        # Counts what may let a waiting CTA go on.
        self.progress = 0

    def lands_early(self) -> bool:
        landing = self.schedule.landing
        return landing == "early" or (landing == "random" and self.random.random() < 0.5)

    def run(self) -> None:
        waiting = [*range(int(np.prod(self.launch.grid)))]
        if self.schedule.order == "reverse":
            waiting.reverse()
        if self.schedule.order == "random":
            self.random.shuffle(waiting)
        # With how often each has its turn.
        active: list[tuple[CTA, Iterator[str], float]] = []
        in_vain = 0
        while waiting or active:
            while waiting and len(active) < (self.schedule.resident or len(waiting) + len(active)):
                cta = CTA(self, self.launch, waiting.pop(0))
                active.append((cta, cta.run(), 1.0))
            shares = [share for *_, share in active]
            place = (
                self.random.choices(range(len(active)), shares)[0]
                if self.schedule.seed is not None
                else 0
            )
            cta, running, share = active.pop(place)
            before = self.progress
            outcome = next(running, None)
            while outcome == YIELD and self.random.random() < 0.5:
                outcome = next(running, None)
            if outcome is None:
                tma.end(cta)
                wgmma.end(cta)
                tcgen05.end(cta)
                # Memory for the others.
                cta.R = []
            else:
                # CTAs become slow, and quick again, at any of their turns: the quick ones draw the
                # first tickets.
                share = self.random.choice((1.0, SELDOM)) if self.random.random() < 0.2 else share
                active.append((cta, running, share))
            in_vain = in_vain + 1 if outcome in (BLOCKED, SPIN) and self.progress == before else 0
            if in_vain > PATIENCE * len(active):
                states = " || ".join(_state(each) for each, *_ in active[:4])
                raise EmulationError(f"deadlock, {len(waiting)} CTAs have not begun: {states}")


def _state(cta: CTA) -> str:
    groups = "; ".join(
        f"{group.waits[:3] if group.waits else 'runs'} at {cta.program.code[group.pc]}"
        for group in cta.groups
    )
    return f"CTA {cta.index} of {cta.launch.name}: {groups}"

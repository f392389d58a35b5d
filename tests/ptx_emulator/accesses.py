"""Loads, stores, atomics, asynchronous copies, and what a warp does as one: shuffles, votes,
matrices.

Each builder takes the program's :class:`~tests.ptx_emulator.arithmetic.Arithmetic` and an
instruction, and returns a function of the CTA and the mask of its threads (None is all).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx_emulator import numerics as nx
from tests.ptx_emulator.arithmetic import Arithmetic, whole
from tests.ptx_emulator.machine import CTA
from tests.ptx_emulator.memory import ASYNC, WORDS, Space
from tests.ptx_emulator.parse import SIZES, Instruction
from tests.ptx_emulator.tma import Action

LANE = np.arange(32)


def get(
    c: CTA, space: Space, addresses: Any, lanes: Any, size: int, n: int, ins: Instruction
) -> list[Any]:
    """Load ``n`` words of ``size`` bytes for each lane; out of bounds, all bits are ones."""
    words: list[Any] = []
    for region, here in space.reach(
        addresses, addresses + size * n, size * n, c.machine.faults, ins
    ):
        a, warps = addresses[here], c.warp_of[lanes[here]]
        if "nc" in ins.mods and region.written:
            c.machine.faults.add(
                "ld.global.nc of memory that this launch has written", ins, region.name
            )
        slot = warps - c.first_warp if space is c.shared else 0
        c.machine.races.read(
            region,
            region.granules(a, size * n),
            warps,
            ins,
            slot,
            atomic=_order(ins)[0] is not None,
        )
        at, view = space.at(a, size), space.views[size]
        if isinstance(here, slice):
            return [view[at + j] for j in range(n)]
        words = words or [
            np.full(len(lanes), view.dtype.type(-1 % (1 << 8 * size))) for _ in range(n)
        ]
        for j, word in enumerate(words):
            word[here] = view[at + j]
    return words or [np.full(len(lanes), -1 % (1 << 8 * size), WORDS[size]) for _ in range(n)]


def put(
    c: CTA, space: Space, addresses: Any, lanes: Any, words: list[Any], size: int, ins: Instruction
) -> None:
    """Store words of ``size`` bytes for each lane."""
    races, total, view = c.machine.races, size * len(words), space.views[size]
    for region, here in space.reach(addresses, addresses + total, total, c.machine.faults, ins):
        a, warps, at = addresses[here], c.warp_of[lanes[here]], space.at(addresses[here], size)
        granules = region.granules(a, total)
        same = np.all([view[at + j] == word[here] for j, word in enumerate(words)], axis=0)
        races.write(region, granules, warps, ins, same=same)
        for j, word in enumerate(words):
            view[at + j] = word[here]
        if any((view[at + j] != word[here]).any() for j, word in enumerate(words)):
            races.lost(region, granules, warps, ins)


# Loads, stores and atomics.


def _order(ins: Instruction) -> tuple[str | None, bool]:
    """How an access synchronizes, and whether with its own CTA alone."""
    words = ("acquire", "release", "acq_rel", "relaxed", "volatile")
    return next((word for word in ins.mods if word in words), None), "cta" in ins.mods


def _synchronize(c: CTA, lanes: Any, addresses: Any, order: str | None, local: bool) -> None:
    for warp, address in sorted({*zip(c.warp_of[lanes].tolist(), addresses.tolist(), strict=True)}):
        # What others of the CTA see, and what all see.
        keys = [(address, c.first_warp), *([] if local else [address])]
        c.machine.races.synchronize(
            warp, keys, order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
        )


def _load_parameter(words: Arithmetic, ins: Instruction) -> Action:
    names = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
    first, size = int(words.address(ins.args[1])(None)[0]), SIZES[ins.kind]

    def load(c: CTA, mask: Any) -> None:
        for i, name in enumerate(names):
            place, declared = words.registers[name]
            data = c.launch.params[first + i * size : first + (i + 1) * size]
            signed = ins.kind[0] == "s"
            bits = int.from_bytes(data, "little", signed=signed) % (1 << 8 * SIZES[declared])
            c.set(place, np.full(len(c.lanes(mask)), bits, WORDS[SIZES[declared]]), c.lanes(mask))

    return load


def _load(words: Arithmetic, ins: Instruction) -> Action:
    names = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
    size, address, (order, local) = SIZES[ins.kind], words.address(ins.args[1]), _order(ins)
    if "local" in ins.mods or ins.kind[0] not in "bu":
        raise ins.unknown()

    def load(c: CTA, mask: Any) -> None:
        lanes = c.lanes(mask)
        a, space = address(c)[lanes], c.shared if ins.shared else c.machine.memory
        for name, word in zip(names, get(c, space, a, lanes, size, len(names), ins), strict=True):
            place, declared = words.registers[name]
            c.set(place, word.astype(WORDS[SIZES[declared]]), lanes)
        if order is not None:
            _synchronize(c, lanes, a, order, local)

    return load


def _store(words: Arithmetic, ins: Instruction) -> Action:
    sources = ins.args[1] if isinstance(ins.args[1], list) else [ins.args[1]]
    size, address = SIZES[ins.kind], words.address(ins.args[0])
    if _order(ins)[0]:
        raise ins.unknown()
    values = [words.reader(source, f"b{8 * size}") for source in sources]

    def store(c: CTA, mask: Any) -> None:
        lanes = c.lanes(mask)
        a, space = address(c)[lanes], c.shared if ins.shared else c.machine.memory
        put(c, space, a, lanes, [value(c)[lanes] for value in values], size, ins)
        c.machine.progress += not ins.shared

    return store


def _atomic(words: Arithmetic, ins: Instruction) -> Action:
    returns = ins.mods[0] == "atom"
    if "add" not in ins.mods or ins.kind != "u32":
        raise ins.unknown()
    size, (order, local) = 4, _order(ins)
    address, read = words.address(ins.args[-2]), words.reader(ins.args[-1], "u32")

    def atomic(c: CTA, mask: Any) -> None:
        lanes = c.lanes(mask)
        a, space = address(c)[lanes], c.machine.memory
        operands, view, results = read(c)[lanes], space.views[size], np.zeros(len(lanes), np.uint32)
        of_cta = range(c.first_warp, c.first_warp + c.warps) if local else None
        for region, here in space.reach(a, a + size, size, c.machine.faults, ins):
            c.machine.races.atomic(
                region, region.granules(a[here], size), c.warp_of[lanes[here]], ins, a[here], of_cta
            )
            for i in np.arange(len(lanes))[here]:
                at = space.at(a[i], size)
                results[i] = view[at]
                view[at] += operands[i]
        _synchronize(c, lanes, a, order, local)
        if returns and ins.args[0] != "_":
            c.set(words.place(ins.args[0]), results, lanes)
        c.machine.progress += 1

    return atomic


def _nothing(ins: Instruction, c: CTA, mask: Any) -> None:
    """Hints, and a barrier of one warp's threads, which are ordered here anyway."""


# cp.async: the bytes belong to nobody until they land.


@dataclass
class Copy:
    """A copy in flight: for each lane its thread, its group, and where from and to; ``real`` bytes,
    then zeros.
    """

    lanes: Any
    group: Any
    to: Any
    source: Any
    real: Any
    size: int
    landed: bool = False

    def part(self, which: Any) -> Copy:
        arrays = (self.lanes, self.group, self.to, self.source, self.real)
        return Copy(*(each[which] for each in arrays), self.size, self.landed)

    def move(self, c: CTA) -> None:
        memory, shared = c.machine.memory, c.shared
        for byte in range(0, self.size, 4):
            inside = self.real >= byte + 4
            words = memory.views[4][
                memory.at(np.where(inside, self.source + byte, memory.regions[0].start), 4)
            ]
            shared.views[4][shared.at(self.to + byte, 4)] = np.where(inside, words, np.uint32(0))
        self.landed = True

    def land(self, c: CTA) -> None:
        """The bytes are there, written by the threads that waited for them."""
        if not self.landed:
            self.move(c)
        (region,), warps = c.shared.regions, c.warp_of[self.lanes]
        granules = region.granules(self.to, self.size)
        region.writer[granules] = warps[:, None]
        region.write_epoch[granules] = c.machine.races.clock[warps, warps][:, None]


def _copy(words: Arithmetic, ins: Instruction) -> Action:
    to, source, size = words.address(ins.args[0]), words.address(ins.args[1]), int(ins.args[2], 0)
    read_size = words.reader(ins.args[3], "u32") if len(ins.args) > 3 else None

    def copy(c: CTA, mask: Any) -> None:
        lanes, machine = c.lanes(mask), c.machine
        a, b = to(c)[lanes], source(c)[lanes]
        real = (
            np.full(len(lanes), size) if read_size is None else read_size(c)[lanes].astype(np.int64)
        )
        if (real % 4).any():
            raise ins.unknown()
        some = np.flatnonzero(real)
        fine = np.zeros(len(lanes), bool)
        for region, here in machine.memory.reach(
            b[some], (b + real)[some], size, machine.faults, ins
        ):
            which = some[here]
            fine[which] = True
            granules = np.minimum(
                region.granules(b[which], size),
                ((b + real)[which, None] - 1 >> region.shift) - region.first,
            )
            machine.races.read(region, granules, c.warp_of[lanes[which]], ins, 0)
        real = np.where(fine, real, 0)
        serial = machine.races.new_serial(c.first_warp)
        for region, here in c.shared.reach(a, a + size, size, machine.faults, ins):
            made = Copy(lanes, c.copy_group[lanes // 32], a, b, real, size).part(here)
            machine.races.write(region, region.granules(made.to, size), c.warp_of[made.lanes], ins)
            region.writer[region.granules(made.to, size)] = ASYNC + serial
            if machine.lands_early():
                made.move(c)
            c.copies.append(made)

    return copy


def _commit_copies(ins: Instruction, c: CTA, mask: Any) -> None:
    c.copy_group[np.unique(c.lanes(mask) // 32)] += 1


def _wait_for_copies(ins: Instruction, c: CTA, mask: Any) -> None:
    limit, here, left = np.full(c.warps, -1), np.unique(c.lanes(mask) // 32), []
    limit[here] = c.copy_group[here] - int(ins.args[0], 0)
    for made in c.copies:
        lands = made.group < limit[made.lanes // 32]
        if lands.any():
            made.part(lands).land(c)
        if not lands.all():
            left.append(made.part(~lands))
    c.copies = left


# Warps.


def _shuffle(words: Arithmetic, ins: Instruction) -> Action:
    mode, place = ins.mods[2], words.place(ins.args[0])
    reads = [words.reader(arg, "s32") for arg in ins.args[1:4]]
    if mode not in ("bfly", "idx"):
        raise ins.unknown()

    def shuffle(c: CTA, mask: Any) -> None:
        warps = c.full_warps(mask, ins)
        values, n, bound = (c.by_warp(read(c), warps) for read in reads)
        segment, top = (bound >> 8) & 31, bound & 31
        low = LANE & segment
        source = LANE ^ n if mode == "bfly" else low | (n & ~segment & 31)
        source = np.where(source <= (low | (top & ~segment)), source, LANE)
        c.set_by_warp(place, np.take_along_axis(values, source, 1).view(np.uint32), warps)

    return shuffle


def _elect(words: Arithmetic, ins: Instruction) -> Action:
    """One thread of each warp: the first."""
    name, _, predicate = ins.args[0].partition("|")

    def elect(c: CTA, mask: Any) -> None:
        warps = c.full_warps(mask, ins)
        if name != "_":
            c.set_by_warp(words.place(name), np.uint32(0), warps)
        c.set_by_warp(words.place(predicate), LANE == 0, warps)

    return elect


def _reduce(words: Arithmetic, ins: Instruction) -> Action:
    """The smallest or largest number of each warp, NaN left out, for all its threads."""
    reduce = {"redux.sync.min.f32": np.fmin.reduce, "redux.sync.max.f32": np.fmax.reduce}.get(
        ins.op
    )
    if reduce is None:
        raise ins.unknown()
    place, read = words.place(ins.args[0]), words.reader(ins.args[1], "f32")

    def redux(c: CTA, mask: Any) -> None:
        warps = c.full_warps(mask, ins)
        results = reduce(c.by_warp(read(c), warps), axis=1)
        c.set_by_warp(place, results.view(np.uint32)[:, None], warps)

    return redux


def _mma(words: Arithmetic, ins: Instruction) -> Action:
    *shape, d_kind, a_kind, b_kind, c_kind = ins.mods[-7:]
    rows, columns, depth = map(int, re.findall(r"\d+", shape[0]))
    if (rows, columns, d_kind, c_kind) != (16, 8, "f32", "f32") or not {a_kind, b_kind} <= {
        *nx.PARTS
    }:
        raise ins.unknown()
    places = [words.place(name) for name in ins.args[0]]
    left, right = ([words.reader(name, "b32") for name in arg] for arg in ins.args[1:3])
    before, per = [words.reader(name, "f32") for name in ins.args[3]], nx.ELEMENTS[a_kind][0]
    # Where each part of each register lies.
    row, column = nx.operand_at(LANE, *np.ogrid[: len(left), : 4 // per, :1][:2], 4 // per)
    of_right = nx.operand_at(LANE, *np.ogrid[: 2 * len(right) : 2, : 4 // per, :1][:2], 4 // per)
    to = nx.accumulator_at(LANE, np.arange(4)[:, None])

    def parts(c: CTA, reads: list[Any], warps: Any, kind: str) -> Any:
        """[warps, registers, parts, 32]"""
        return np.stack(
            [np.stack(nx.PARTS[kind](c.by_warp(read(c), warps)), 1) for read in reads], 1
        )

    def mma(c: CTA, mask: Any) -> None:
        warps = c.full_warps(mask, ins)
        a, b = np.empty((len(warps), 16, depth)), np.empty((len(warps), depth, 8))
        a[:, row, column] = parts(c, left, warps, a_kind)
        b[:, of_right[1], of_right[0]] = parts(c, right, warps, b_kind)
        result = (a @ b)[:, to[0], to[1]]
        # All of C is read before any of D is written.
        values = [result[:, i] + c.by_warp(read(c), warps) for i, read in enumerate(before)]
        for place, value in zip(places, values, strict=True):
            c.set_by_warp(place, value.astype(np.float32).view(np.uint32), warps)

    return mma


def _matrix(words: Arithmetic, ins: Instruction) -> Action:
    """ldmatrix and stmatrix: each lane holds two neighbors of a row of each 8 x 8 matrix."""
    store, transposed = ins.mods[0] == "stmatrix", "trans" in ins.mods
    operand, names = ins.args if store else ins.args[::-1]
    places = [words.place(name) for name in (names if isinstance(names, list) else [names])]
    address = words.address(operand)
    if ins.kind != "b16" or "m8n8" not in ins.mods:
        raise ins.unknown()
    halves = [(LANE >> 2, 2 * (LANE & 3) + half) for half in (0, 1)]
    if transposed:
        halves = [(column, row) for row, column in halves]

    def move(c: CTA, mask: Any) -> None:
        warps = c.full_warps(mask, ins)
        rows = 8 * len(places)
        a = c.by_warp(address(c), warps)[:, :rows].reshape(-1)
        lanes = (32 * warps[:, None] + LANE[:rows]).reshape(-1)
        if not store:
            found = np.stack(get(c, c.shared, a, lanes, 4, 4, ins), 1).view(np.uint16)
            data = found.reshape(len(warps), len(places), 8, 8)
            for j, place in enumerate(places):
                low, high = (data[:, j, row, column].astype(np.uint32) for row, column in halves)
                c.set_by_warp(place, low | high << np.uint32(16), warps)
            return
        data = np.empty((len(warps), len(places), 8, 8), np.uint16)
        for j, place in enumerate(places):
            for half, (row, column) in enumerate(halves):
                data[:, j, row, column] = c.by_warp(c.R[place], warps) >> np.uint32(16 * half)
        stored = data.reshape(-1, 8).view(np.uint32)
        put(c, c.shared, a, lanes, [stored[:, i] for i in range(4)], 4, ins)

    return move


# By the beginning of the operation; the first that fits.
INSTRUCTIONS: dict[str, Callable[[Arithmetic, Instruction], Action]] = {
    "ld.param": _load_parameter, "ld.": _load, "st.": _store, "atom.global": _atomic, "red.global": _atomic,
    "cp.async.commit_group": whole(_commit_copies), "cp.async.wait_group": whole(_wait_for_copies),
    "cp.async.ca.shared": _copy, "cp.async.cg.shared": _copy, "shfl.sync": _shuffle, "elect.sync": _elect, "redux.sync": _reduce,
    "mma.sync": _mma,
    "ldmatrix": _matrix, "stmatrix": _matrix, "prefetch.global": whole(_nothing), "bar.warp.sync": whole(_nothing),
}  # fmt: skip

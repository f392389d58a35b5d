"""The predicted seconds of one launch, ours or another library's, by a GPU's ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import product
from typing import Any, NamedTuple

from benchmarks.lab.predict.ceilings import Gpu
from benchmarks.lab.predict.formula import (
    Traffic,
    branches,
    formula,
    formula_by_tensor,
    operand,
    thin_jobs,
    total,
    weights,
)
from benchmarks.lab.predict.instructions import RANKS, TILE, Counts, counts_of
from stablelora_kernels.dispatch.problem import cdiv

# Memory latency: it determines how many bytes must be in flight.
LATENCY = 0.8e-6
# One way through L2 for what programs tell each other, or a load: twice the 130 ns that an idle
# H100's pointer chase takes.
L2_LATENCY = 0.3e-6
# Bytes a clock into a processor.
PORT = 64
# Tiles of the vendor's products, rows by columns, and how many programs may share one.
VENDOR_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
VENDOR_SPLITS = (1, 2, 4, 8, 16)


class Work(NamedTuple):
    """A launch that is not ours: bytes from and to memory, matrix operations, sizes of a wide
    product [m, k] by [k, n].
    """

    name: str
    bytes: float
    flops: float = 0.0
    # m, n and k
    sizes: tuple[int, int, int] | None = None
    # Rows and columns of a tile of Triton's product; None for the vendor's, which has several.
    tile: tuple[int, int] | None = None
    # Whether the vendor's product adds to its output's earlier values (beta = 1).
    adds: bool = False

    def seconds(self, gpu: Gpu) -> float:
        if self.sizes is None:
            return gpu.launch + max(self.bytes / gpu.bandwidth, self.flops / gpu.matrix_rate)
        # The epilogue's operations take as long as those of a longer sum.
        longer = self.flops / (2.0 * math.prod(self.sizes))
        if self.tile is None:
            return gpu.launch + longer * vendor_seconds(gpu, *self.sizes, self.bytes, self.adds)
        return gpu.launch + longer * triton_seconds(gpu, self.sizes, self.bytes, self.tile)


class Facts(NamedTuple):
    """Programs of one of our launches, as far as their time depends on it."""

    moved: Traffic
    # Equal pieces of work, and their operations on the matrix units, padding and narrow
    # instructions included.
    units: int
    operations: float
    programs: int
    # Bytes that a program keeps in flight.
    flight: float
    # Clocks of a processor: for the instructions of all turns of the units' loops, and for those of
    # one unit beside them, which wait so often for loads from L2.
    turns: float
    beside: float = 0.0
    round_trips: int = 0
    # Programs that share a sum, and the bytes of each one's part.
    splits: int = 1
    part: float = 0.0
    # Programs on a processor at a time, at most.
    residents: int = 1
    # Of a product's launch: its first programs if it is chained, which compute S and then dB, and
    # its last ones for dA. What dA reads that the product reads, too, is not in its bytes.
    ahead: Facts | None = None
    da: Facts | None = None
    # Bytes read a second time, from memory if L2 cannot hold them.
    again: int = 0
    # Units without turns, such as tiles of a branch alone: while one waits for its loads, others on
    # its processor store.
    ends_alone: bool = False

    def seconds(self, gpu: Gpu) -> float:
        jobs = [job.with_misses(gpu) for job in (self.ahead, self, self.da) if job]
        lasting = max(_last_end(gpu, jobs), sum(job.moved.unique for job in jobs) / gpu.bandwidth)
        if self.ahead:
            # No tile ends before S is there.
            lasting = max(lasting, jobs[0].busy(gpu) + self.finish(gpu))
        return gpu.launch + lasting

    def with_misses(self, gpu: Gpu) -> Facts:
        """The same, with what is read again among the bytes from memory if half of L2 is too small:
        the other half serves W.
        """
        missed = self.again if 2 * self.again > gpu.l2_bytes else 0
        return self._replace(moved=total([self.moved, Traffic(read_unique=missed)]))

    def busy(self, gpu: Gpu) -> float:
        """Seconds from the first program to the last, alone."""
        flight = min(self.programs, self.residents * gpu.processors) * self.flight
        share = gpu.share(self.units)
        busy = max(
            self.moved.unique / gpu.bandwidth,
            self.moved.issued / gpu.l2_bandwidth,
            self.moved.issued * share / (gpu.clocks * PORT),
            self.operations * share / gpu.triton_rate,
            self.turns * share / gpu.clocks,
            self.moved.read_unique * LATENCY / flight,
        )
        # Of programs that share a processor, one finishes while another computes.
        waves = cdiv(self.units, gpu.processors * self.residents)
        ends = waves * self.finish(gpu)
        if self.ends_alone:
            busy = max(busy, ends)
            ends = self.finish(gpu)
        return busy + ends + _shared_sum(gpu, self.splits, self.part)

    def finish(self, gpu: Gpu) -> float:
        """Seconds of a unit beside its turns."""
        return self.beside / gpu.clock + self.round_trips * L2_LATENCY

    def pieces(self, gpu: Gpu) -> list[tuple[int, float]]:
        """Programs, or units where each has a program, and the seconds of each; those that begin
        first at the front.
        """
        rounds = cdiv(self.units, gpu.processors)
        each = self.busy(gpu) / max(rounds, 1)
        if self.programs >= self.units:
            return [(self.units, each)]
        longer = self.units - (rounds - 1) * self.programs
        return [(longer, rounds * each), (self.programs - longer, (rounds - 1) * each)]

    def in_turns(self, gpu: Gpu) -> Facts:
        """The same if matrix operations wait while other instructions of the loop run."""
        return self._replace(turns=self.turns + self.operations / gpu.triton_rate * gpu.clocks)


def _last_end(gpu: Gpu, jobs: Sequence[Facts]) -> float:
    """When the last program of ``jobs`` ends, if each begins on the processor that is free first."""
    free = [(0.0, gpu.processors)]
    for count, seconds in (piece for job in jobs for piece in job.pieces(gpu)):
        while count:
            begin, processors = heappop(free)
            taken = min(count, processors)
            count -= taken
            heappush(free, (begin + seconds, taken))
            if processors > taken:
                heappush(free, (begin, processors - taken))
    return max(end for end, _ in free)


def facts(launch: Any, arch: str, narrow_columns: int) -> Facts | Work:
    """What the time of a launch in 16 bits depends on, on a GPU of this kind."""
    if isinstance(launch, Work):
        return launch
    if not hasattr(launch, "kernel"):
        m, n, k = *launch.y.shape, launch.x.shape[1]
        moved = formula(launch).unique
        return Work("vendor", moved, 2.0 * m * n * k, (m, n, k), adds=launch.add)
    a, programs, counts = launch.arguments, math.prod(launch.grid), counts_of(launch, arch)
    thin = [*thin_jobs(a)]
    if "TILE" not in a and not thin:
        # Elementwise: a program loads its parts at once.
        turns = programs * counts.cycles(TILE, launch.options["num_warps"])
        flight = _read(launch).read_issued / programs
        return Facts(
            _read(launch), programs, 0.0, programs, flight, turns, residents=counts.residents
        )
    if "TILE" not in a:
        return _thin(launch, thin, programs, narrow_columns, counts)
    ahead, da = None, None
    if a.get("S") is not None:
        ahead = _thin(launch, ["S", "DB"], a["S_PROGRAMS"], narrow_columns, counts)
        # dB's part follows dS's.
        twice = (
            formula(launch, ["S"]).read_unique
            + formula(launch, ["DB"]).read_unique
            - ahead.moved.read_unique
        )
        ahead = ahead._replace(again=twice)
        programs -= a["S_PROGRAMS"]
    if a.get("DA") is not None:
        of_da = programs - a["PRODUCTS"]
        more = zip(formula(launch, ["Y", "DA"]), formula(launch, ["Y"]), strict=True)
        moved = Traffic(*(x - y for x, y in more))
        da = _thin(launch, ["DA"], of_da, narrow_columns, counts)._replace(moved=moved)
        programs -= of_da
    return _product(launch, programs, narrow_columns, counts)._replace(ahead=ahead, da=da)


def _read(launch: Any) -> Traffic:
    """Of the product or the elementwise launch. The values of a code are found in the first cache."""
    found = formula_by_tensor(launch, ["Y"])
    return total(
        traffic for tensor, traffic in found.items() if tensor not in ("w.code", "w.nested_code")
    )


def _thin(
    launch: Any, jobs: Sequence[str], programs: int, narrow_columns: int, counts: Counts
) -> Facts:
    """S or dS with dB, or dA with dB or alone."""
    m, operations, turns, found = launch.arguments["M"], 0.0, 0.0, thin_jobs(launch.arguments)
    for name in (each for each in jobs if each in found):
        read, job, tile, splits = found[name]
        # The size that the sum does not run over is in whole tiles.
        size = (
            _up(m, tile.BLOCK_M) * read.width if name == "S" else m * _up(read.width, tile.BLOCK_C)
        )
        operations += (
            2.0
            * size
            * sum(_ranks(member.R, tile.BLOCK_R, narrow_columns) for member in job.members)
        )
        sums, steps = (m, tile.BLOCK_M), (read.width, tile.BLOCK_K if name == "S" else tile.BLOCK_C)
        sums, steps = (sums, steps) if name == "S" else (steps, sums)
        tiles = cdiv(*sums) * cdiv(job.members[0].R, tile.BLOCK_R)
        turns += (
            tiles
            * splits
            * cdiv(cdiv(*steps), splits)
            * counts.cycles(name, launch.options["num_warps"])
        )
    _, job, tile, splits = found[jobs[0]]
    if jobs[0] == "S":
        # A step of few rows loads more of A than of X.
        rows = min(tile.BLOCK_M, m)
        loaded = tile.BLOCK_K * (
            2.0 * rows + sum(min(each.R, tile.BLOCK_R) * each.down.itemsize for each in job.members)
        )
    else:
        rows, loaded = tile.BLOCK_C, 2.0 * tile.BLOCK_M * tile.BLOCK_C
    flight, part = (tile.STAGES - 1) * loaded, 4.0 * rows * tile.BLOCK_R * tile.MEMBERS
    moved = formula(launch, jobs)
    return Facts(
        moved, programs, operations, programs, flight, turns, 0.0, 0, splits, part, counts.residents
    )


def _product(launch: Any, programs: int, narrow_columns: int, counts: Counts) -> Facts:
    """The product with its branch."""
    a, warps = launch.arguments, launch.options["num_warps"]
    k, tile, count = operand(a, "x").shape[1], a["TILE"], len(weights(a))
    rows, columns = _up(a["M"], tile.BLOCK_M), _up(a["N"], tile.BLOCK_N)
    tiles = rows // tile.BLOCK_M * (columns // tile.BLOCK_N)
    operations = (
        2.0
        * rows
        * columns
        * (k * count + sum(_up(each.R, block.BLOCK_R) for each, block in branches(a)))
    )
    if "BRANCH" in a and not a["BRANCH"].LOAD_S:
        ranks = _ranks(a["branch"].R, a["BRANCH"].BLOCK_R, narrow_columns)
        operations += 2.0 * rows * k * ranks * columns / tile.BLOCK_N
    # The branch alone loads a tile of its base at once.
    loaded, steps = tile.BLOCK_M * tile.BLOCK_N, 0
    if count:
        loaded = (
            (launch.options["num_stages"] - 1)
            * tile.BLOCK_K
            * (tile.BLOCK_M + count * tile.BLOCK_N)
        )
        steps = cdiv(k, tile.BLOCK_K)
    # Persistent programs take tile after tile; elsewhere a program is a piece.
    splits, persistent = a.get("SPLITS", 1), programs < tiles
    units = tiles if persistent else programs
    # The code of each loop over ranks is in a tile's once.
    more = max(cdiv(each.R, block.BLOCK_R) for each, block in branches(a)) - 1
    beside = counts.cycles(TILE, warps) + more * counts.cycles(RANKS, warps)
    round_trips = counts.round_trips(TILE) + more * counts.round_trips(RANKS)
    turns = units * (cdiv(steps, splits) * counts.cycles("Y", warps) if count else beside)
    part = 4.0 * min(tile.BLOCK_M, a["M"]) * tile.BLOCK_N
    return Facts(
        _read(launch),
        units,
        operations,
        programs,
        2.0 * loaded,
        turns,
        beside,
        round_trips,
        splits,
        part,
        counts.residents,
        ends_alone=not count,
    )


def _up(size: int, block: int) -> int:
    return cdiv(size, block) * block


def _ranks(r: int, block: int, narrow_columns: int) -> int:
    """Columns of a thin product as the matrix units count them."""
    return cdiv(r, block) * max(block, narrow_columns)


def _shared_sum(gpu: Gpu, splits: int, part: float) -> float:
    """Seconds until the last of ``splits`` programs has stored and counted its part and read all,
    each of ``part`` bytes.
    """
    if splits == 1:
        return 0.0
    return 2 * L2_LATENCY + (splits + 1) * part / (gpu.clock * PORT)


@cache
def vendor_seconds(gpu: Gpu, m: int, n: int, k: int, unique: float, adds: bool = False) -> float:
    """[m, k] by [k, n] by the vendor's library, with the best of its tiles, without the launch.

    ``unique``: bytes from and to memory. On data-center GPUs from Hopper on, two programs share the
    reads of a tile's columns (multicast). ``adds``: onto earlier values of the result, which each
    tile reads at its end.
    """
    sharing = 2 if gpu.device.tma else 1
    times = []
    for (rows, columns), splits in product(VENDOR_TILES, VENDOR_SPLITS):
        if splits > 1 and k < 256 * splits:
            continue
        rows = min(rows, _up(m, 16))
        busy = _product_seconds(
            gpu, (m, n, k), unique, (rows, columns), splits, sharing, gpu.matrix_rate, adds
        )
        if adds:
            tiles = cdiv(m, rows) * cdiv(n, columns)
            reading = LATENCY + 2.0 * rows * columns / (gpu.clock * PORT)
            busy += gpu.source_exposed * cdiv(tiles, gpu.processors) * reading
        times.append(busy + _shared_sum(gpu, splits, 4.0 * min(rows, m) * columns))
    return min(times)


@cache
def triton_seconds(
    gpu: Gpu, sizes: tuple[int, int, int], unique: float, tile: tuple[int, int]
) -> float:
    """The same by a product of Triton's with this one tile: its programs share neither reads nor
    sums. Its tiles' ends are in ``gpu.triton_share``, which comes from whole products.
    """
    return _product_seconds(gpu, sizes, unique, tile, 1, 1, gpu.triton_rate)


def _product_seconds(
    gpu: Gpu,
    sizes: tuple[int, int, int],
    unique: float,
    tile: tuple[int, int],
    splits: int,
    sharing: int,
    rate: float,
    adds: bool = False,
) -> float:
    """The longest of a product's demands on memory, L2, the processors' ports and their matrix
    units.

    ``splits`` programs share a tile's sum, ``sharing`` programs the reads of a tile's columns.
    ``adds``: the result's earlier values are read, too.
    """
    m, n, k = sizes
    rows, columns = tile
    tiles_m = cdiv(m, rows)
    tiles_n = cdiv(n, columns)
    parts = 4.0 * m * n * splits * (splits > 1)
    of_result = m * n * (2 if adds else 1)
    elements = m * k * tiles_n + n * k * max(1, tiles_m / sharing) + of_result
    issued = 2.0 * elements + 2 * parts
    share = gpu.share(tiles_m * tiles_n * splits)
    return max(
        unique / gpu.bandwidth,
        issued / gpu.l2_bandwidth,
        issued * share / (gpu.clocks * PORT),
        2.0 * tiles_m * rows * tiles_n * columns * k * share / rate,
    )

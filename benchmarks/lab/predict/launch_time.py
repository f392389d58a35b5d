"""A GPU's ceilings, and by them the predicted seconds of one launch, ours or the vendor's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lab.predict.formula import Traffic, branches, formula, operand, thin_jobs, weights
from stablelora_kernels.dispatch.problem import DEVICES, Device, cdiv

GPUS = Path(__file__).parent / "gpus"
# The slow end of the band: the least share of the vendor's matrix rate that Triton's products are taken to reach.
SLOWEST = 0.85
# The suffixes of columns at the band's ends.
FAST, SLOW = "", " (slow)"


# Memory latency: it determines how many bytes must be in flight.
LATENCY = 0.8e-6
# One way through L2 for what programs tell each other: twice the 130 ns that an idle H100's pointer chase takes.
L2_LATENCY = 0.3e-6
# Tiles of the vendor's products, rows by columns, and how many programs may share one.
VENDOR_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
VENDOR_SPLITS = (1, 2, 4, 8, 16)


class Gpu(NamedTuple):
    """Ceilings of a GPU: bytes and operations a second, seconds a launch."""

    name: str
    arch: str
    bandwidth: float
    # What L2 delivers: the figure that the sources suggest, and the lowest and the highest that they allow.
    l2_bandwidth: float
    l2_range: tuple[float, float]
    # Into all processors together; each takes an equal share at most.
    port_bandwidth: float
    # Of the vendor's products in 16 bits.
    matrix_rate: float
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    # Instructions a second of all threads together; of those to memory, shared memory's included, a quarter.
    issue_rate: float
    launch: float
    # The share of the vendor's matrix rate that Triton's products reach.
    efficiency: float = 1.0

    @property
    def device(self) -> Device:
        return DEVICES[self.arch]

    def share(self, units: int) -> float:
        """How much longer the busiest processor works than the average one, for ``units`` equal pieces of work."""
        processors = self.device.processors
        return cdiv(units, processors) * processors / units if units else 1.0


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/lab/predict/gpus/<name>.json."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    del content["sources"]
    return Gpu(**content | {"l2_range": tuple(content["l2_range"])})


def band_ends(gpu: Gpu) -> dict[str, Gpu]:
    """The fast end and the slow one. What only a GPU can tell takes its best value at one and its worst at the other."""
    low, high = gpu.l2_range
    return {FAST: gpu._replace(l2_bandwidth=high), SLOW: gpu._replace(l2_bandwidth=low, efficiency=SLOWEST)}


class Work(NamedTuple):
    """A launch that is not ours: bytes from and to memory, matrix operations, sizes of a wide product [m, k] by [k, n]."""

    name: str
    bytes: float
    flops: float = 0.0
    # m, n and k
    sizes: tuple[int, int, int] | None = None

    def seconds(self, gpu: Gpu) -> float:
        if self.sizes is None:
            return gpu.launch + max(self.bytes / gpu.bandwidth, self.flops / gpu.matrix_rate)
        # The epilogue's operations take as long as those of a longer sum.
        return gpu.launch + self.flops / (2.0 * math.prod(self.sizes)) * vendor_seconds(gpu, *self.sizes, self.bytes)


class Facts(NamedTuple):
    """Programs of one of our launches, as far as their time depends on it."""

    moved: Traffic
    # Equal pieces of work, and their operations on the matrix units, padding and narrow instructions included.
    units: int
    operations: float
    programs: int
    # Bytes that a program keeps in flight.
    flight: float
    # Programs that share a sum, and the bytes of each one's part.
    splits: int = 1
    part: float = 0.0
    # Programs on a processor at a time, at most.
    residents: int = 2
    # Of a product's launch: its first programs if it is chained, which compute S and dB, and its last ones for dA. What dA reads
    # that the product reads, too, is not in its bytes.
    ahead: Facts | None = None
    da: Facts | None = None

    def seconds(self, gpu: Gpu) -> float:
        # The product's programs fill the processors that S's leave idle.
        ahead = self.ahead.busy(gpu, share=1.0) if self.ahead else 0.0
        return gpu.launch + ahead + self.busy(gpu, gpu.share(self.units))

    def busy(self, gpu: Gpu, share: float) -> float:
        """Seconds from the first program to the last. ``share``: the busiest processor's work over the average one's."""
        flight = min(self.programs, self.residents * gpu.device.processors) * self.flight
        busy = max(
            (self.moved.unique + (self.da.moved.unique if self.da else 0)) / gpu.bandwidth,
            self.moved.issued / gpu.l2_bandwidth,
            self.moved.issued * share / gpu.port_bandwidth,
            self.operations * share / (gpu.matrix_rate * gpu.efficiency),
            self.moved.read_unique * LATENCY / flight,
        )
        tail = self.da.tail(gpu, busy, self.units) if self.da else 0.0
        return busy + _shared_sum(gpu, self.splits, self.part) + tail

    def tail(self, gpu: Gpu, busy: float, units: int) -> float:
        """Seconds that dA's programs take after the product's ``units``, which last ``busy`` seconds.

        They run on processors that have no tile left.
        """
        processors = gpu.device.processors
        # Bytes a second into one processor.
        rate = min(gpu.port_bandwidth / processors, self.residents * self.flight / LATENCY)
        alone = max(
            self.moved.unique / gpu.bandwidth,
            self.moved.issued / gpu.l2_bandwidth,
            self.moved.issued / rate / processors,
            self.operations / (gpu.matrix_rate * gpu.efficiency),
        )
        idle = busy * processors * (1 - 1 / gpu.share(units))
        return alone * max(0.0, 1 - idle * rate / self.moved.issued)


def facts(launch: Any, narrow_columns: int) -> Facts | Work:
    """What the time of a launch in 16 bits depends on. ``narrow_columns`` is the GPU's."""
    if isinstance(launch, Work):
        return launch
    if not hasattr(launch, "kernel"):
        m, n, k = *launch.y.shape, launch.x.shape[1]
        return Work("vendor", formula(launch).unique, 2.0 * m * n * k, (m, n, k))
    a, programs = launch.arguments, math.prod(launch.grid)
    if "BLOCK" in a:
        # Elementwise: a program loads its parts of G and U.
        return Facts(formula(launch), programs, 0.0, programs, flight=2 * 2.0 * a["BLOCK"], residents=8)
    if "TILE" not in a:
        return _thin(launch, [*thin_jobs(a)], programs, narrow_columns)
    # Every program of the launch asks for the shared memory of a product's operands.
    ahead, da, residents = None, None, 1 if weights(a) else 2
    if a.get("S") is not None:
        ahead = _thin(launch, ["S", "DB"], a["S_PROGRAMS"], narrow_columns)._replace(residents=residents)
        programs -= a["S_PROGRAMS"]
    if a.get("DA") is not None:
        more = zip(formula(launch, ["Y", "DA"]), formula(launch, ["Y"]), strict=True)
        moved = Traffic(*(x - y for x, y in more))
        da = _thin(launch, ["DA"], programs, narrow_columns)._replace(moved=moved, residents=residents)
    return _product(launch, programs, narrow_columns)._replace(ahead=ahead, da=da)


def _thin(launch: Any, jobs: Sequence[str], programs: int, narrow_columns: int) -> Facts:
    """S or dS with dB, or dA with dB or alone."""
    m, operations, found = launch.arguments["M"], 0.0, thin_jobs(launch.arguments)
    for name in (each for each in jobs if each in found):
        read, job, tile, _ = found[name]
        # The size that the sum does not run over is in whole tiles.
        size = _up(m, tile.BLOCK_M) * read.width if name == "S" else m * _up(read.width, tile.BLOCK_C)
        operations += 2.0 * size * sum(_ranks(member.R, tile.BLOCK_R, narrow_columns) for member in job.members)
    _, job, tile, splits = found[jobs[0]]
    if jobs[0] == "S":
        # A step of few rows loads more of A than of X.
        rows = min(tile.BLOCK_M, m)
        loaded = tile.BLOCK_K * (2.0 * rows + sum(min(each.R, tile.BLOCK_R) * each.a.itemsize for each in job.members))
    else:
        rows, loaded = tile.BLOCK_C, 2.0 * tile.BLOCK_M * tile.BLOCK_C
    flight, part = (tile.STAGES - 1) * loaded, 4.0 * rows * tile.BLOCK_R * tile.MEMBERS
    return Facts(formula(launch, jobs), programs, operations, programs, flight, splits, part)


def _product(launch: Any, programs: int, narrow_columns: int) -> Facts:
    """The product with its branch; ``programs`` with those of dA."""
    a = launch.arguments
    k, tile, count = operand(a, "x").shape[1], a["TILE"], len(weights(a))
    rows, columns = _up(a["M"], tile.BLOCK_M), _up(a["N"], tile.BLOCK_N)
    tiles = rows // tile.BLOCK_M * (columns // tile.BLOCK_N)
    operations = 2.0 * rows * columns * (k * count + sum(_up(each.R, block.BLOCK_R) for each, block in branches(a)))
    if "BRANCH" in a and not a["BRANCH"].LOAD_S:
        ranks = _ranks(a["branch"].R, a["BRANCH"].BLOCK_R, narrow_columns)
        operations += 2.0 * rows * k * ranks * columns / tile.BLOCK_N
    # The branch alone loads a tile of its base at once.
    loaded = tile.BLOCK_M * tile.BLOCK_N
    if count:
        loaded = (launch.options["num_stages"] - 1) * tile.BLOCK_K * (tile.BLOCK_M + count * tile.BLOCK_N)
    # Persistent programs take tile after tile; elsewhere a program is a piece.
    units, part = max(tiles, a.get("PRODUCTS", programs)), 4.0 * min(tile.BLOCK_M, a["M"]) * tile.BLOCK_N
    return Facts(formula(launch, ["Y"]), units, operations, programs, 2.0 * loaded, a.get("SPLITS", 1), part)


def _up(size: int, block: int) -> int:
    return cdiv(size, block) * block


def _ranks(r: int, block: int, narrow_columns: int) -> int:
    """Columns of a thin product as the matrix units count them."""
    return cdiv(r, block) * max(block, narrow_columns)


def _shared_sum(gpu: Gpu, splits: int, part: float) -> float:
    """Seconds until the last of ``splits`` programs has stored and counted its part and read all, each of ``part`` bytes."""
    if splits == 1:
        return 0.0
    return 2 * L2_LATENCY + (splits + 1) * part * gpu.device.processors / gpu.port_bandwidth


@cache
def vendor_seconds(gpu: Gpu, m: int, n: int, k: int, unique: float) -> float:
    """[m, k] by [k, n] by the vendor's library: the best of its tiles, at the full matrix rate, without the launch.

    ``unique``: bytes from and to memory. From Hopper on, two programs share the reads of a tile's columns (multicast).
    """
    pair = 2 if gpu.device.generation >= 90 else 1
    found = []
    for (rows, columns), splits in product(VENDOR_TILES, VENDOR_SPLITS):
        if splits > 1 and k < 256 * splits:
            continue
        rows = min(rows, _up(m, 16))
        tiles_m, tiles_n = cdiv(m, rows), cdiv(n, columns)
        parts = 4.0 * m * n * splits * (splits > 1)
        issued = 2.0 * (m * k * tiles_n + n * k * max(1, tiles_m / pair) + m * n) + 2 * parts
        share = gpu.share(tiles_m * tiles_n * splits)
        busy = max(
            unique / gpu.bandwidth,
            issued / gpu.l2_bandwidth,
            issued * share / gpu.port_bandwidth,
            2.0 * tiles_m * rows * tiles_n * columns * k * share / gpu.matrix_rate,
        )
        found.append(busy + _shared_sum(gpu, splits, 4.0 * min(rows, m) * columns))
    return min(found)

"""A GPU's ceilings, and by them the predicted seconds of one launch, ours or the vendor's."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lab.predict.formula import Traffic, arguments_of, formula
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
    # A launch that may begin before the one ahead of it ends.
    overlapped_launch: float
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
    """One of our launches, as far as its time depends on it."""

    # Bytes without the co-scheduled dA, and what dA adds; what both read is counted in the first.
    moved: Traffic
    grad_moved: Traffic
    # Equal pieces of work, and their operations on the matrix units, padding and narrow instructions included.
    units: int
    operations: float
    grad_operations: float
    programs: int
    # Bytes that a program of the product, and one of dA, keeps in flight.
    flight: float
    grad_flight: float
    # Programs that share a sum, and the bytes of each one's part.
    splits: int = 1
    part: float = 0.0
    # Whether it may begin before the launch ahead of it ends, and whether the next may before this one ends.
    begins_early: bool = False
    ends_early: bool = False

    def seconds(self, gpu: Gpu) -> float:
        return (gpu.overlapped_launch if self.begins_early else gpu.launch) + self.busy(gpu)

    def busy(self, gpu: Gpu, residents: int = 2) -> float:
        """Seconds from the first program to the last, at most ``residents`` of them on a processor."""
        # Where the next launch begins early, it fills the processors that this one leaves idle.
        share = 1.0 if self.ends_early else gpu.share(self.units)
        flight = min(self.programs, residents * gpu.device.processors) * self.flight
        busy = max(
            (self.moved.unique + self.grad_moved.unique) / gpu.bandwidth,
            self.moved.issued / gpu.l2_bandwidth,
            self.moved.issued * share / gpu.port_bandwidth,
            self.operations * share / (gpu.matrix_rate * gpu.efficiency),
            self.moved.read_unique * LATENCY / flight,
        )
        return busy + _shared_sum(gpu, self.splits, self.part) + self._grad_tail(gpu, busy)

    def _grad_tail(self, gpu: Gpu, busy: float) -> float:
        """Seconds that dA's programs take after the product's, which last ``busy`` seconds.

        Every program of the launch asks for the product's shared memory, so dA's programs run on processors that have no tile
        left.
        """
        if not self.grad_moved.issued:
            return 0.0
        processors = gpu.device.processors
        # Bytes a second into one processor.
        rate = min(gpu.port_bandwidth / processors, self.grad_flight / LATENCY)
        alone = max(
            self.grad_moved.unique / gpu.bandwidth,
            self.grad_moved.issued / gpu.l2_bandwidth,
            self.grad_moved.issued / rate / processors,
            self.grad_operations / (gpu.matrix_rate * gpu.efficiency),
        )
        idle = busy * processors * (1 - 1 / gpu.share(self.units))
        return alone * max(0.0, 1 - idle * rate / self.grad_moved.issued)


def facts(launch: Any, narrow_columns: int) -> Facts | Work:
    """What the time of a launch in 16 bits depends on. ``narrow_columns`` is the GPU's."""
    if isinstance(launch, Work):
        return launch
    if not hasattr(launch, "kernel"):
        m, n, k = *launch.y.shape, launch.x.shape[1]
        return Work("vendor", formula(launch).unique, 2.0 * m * n * k, (m, n, k))
    v = arguments_of(launch)
    moved, grad_moved = formula(launch), Traffic()
    if v.get("HAS_GRAD") and "LOAD_S" in v:
        bare = formula(launch._replace(constants=launch.constants | {"HAS_GRAD": False}))
        moved, grad_moved = bare, Traffic(*(a - b for a, b in zip(moved, bare, strict=True)))
    units, operations, grad_operations = work(launch, narrow_columns)
    if "BLOCK" in v:
        # Elementwise: a processor holds eight such programs rather than two, each with its parts of G and U.
        return Facts(moved, grad_moved, units, 0.0, 0.0, units, flight=4 * 2 * 2.0 * v["BLOCK"], grad_flight=0.0)
    inner = v.get("BLOCK_K", v["BLOCK_M"])
    # Gate and up read two weights.
    across = v.get("BLOCK_C", v["BLOCK_M"] + v.get("BLOCK_N", 0) * (2 if "STORE_GU" in v else 1))
    columns = v["BLOCK_N"] if "LOAD_S" in v else v.get("BLOCK_R", 0)
    return Facts(
        moved, grad_moved, units, operations, grad_operations, math.prod(launch.grid),
        flight=(launch.options["num_stages"] - 1) * inner * across * 2.0,
        grad_flight=(v["GRAD_STAGES"] - 1) * v["GRAD_M"] * v["GRAD_C"] * 2.0 if v.get("HAS_GRAD") else 0.0,
        splits=v.get("SPLITS", 1),
        part=4.0 * min(v["BLOCK_M"], v["M"]) * columns,
        begins_early=bool(launch.options.get("launch_pdl")),
        ends_early=bool(v.get("TRIGGERS_DEPENDENTS")),
    )  # fmt: skip


def _up(size: int, block: int) -> int:
    return cdiv(size, block) * block


def work(launch: Any, narrow_columns: int) -> tuple[int, float, float]:
    """The pieces of a launch's work, their operations, and those of the co-scheduled dA."""
    v = arguments_of(launch)
    name, programs = launch.kernel.__name__, math.prod(launch.grid)
    if name == "_gated_activation_kernel":
        return programs, 0.0, 0.0
    m, n, k, r = v["M"], v.get("N", 0), v["K"], v.get("R", 0)
    if "MEMBERS" in v:
        # The sum runs over M for dA and over K for S; the other two sizes are a tile's.
        rows = _up(k, v["BLOCK_C"]) * m if "BLOCK_C" in v else _up(m, v["BLOCK_M"]) * k
        return programs, 2.0 * rows * v["MEMBERS"] * max(v["BLOCK_R"], narrow_columns), 0.0

    def ranks_of(block: int) -> int:
        return _up(r, block) // block * max(block, narrow_columns)

    def grad(columns: int) -> float:
        return 2.0 * _up(columns, v["GRAD_C"]) * m * ranks_of(v["GRAD_R"]) if v.get("HAS_GRAD") else 0.0

    if name == "_lora_weight_grads_kernel":
        programs_b = launch.grid[0] - v["PROGRAMS_A"]
        columns = _up(k, v["BLOCK_C"]) * (v["PROGRAMS_A"] > 0) + _up(n, v["BLOCK_C"]) * (programs_b > 0)
        return programs, 2.0 * columns * m * ranks_of(v["BLOCK_R"]), 0.0
    rows = _up(m, v["BLOCK_M"])
    s = 2.0 * rows * k * ranks_of(v["BLOCK_R"])
    if name == "_lora_shrink_kernel":
        # dB's programs are spread among those of dS.
        return programs, s + grad(k), 0.0
    columns = _up(n, v["BLOCK_N"])
    if "STORE_GU" in v:
        ranks = sum(_up(v[name], v["BLOCK_R"]) for name in ("R_G", "R_U"))
        return rows // v["BLOCK_M"] * (columns // v["BLOCK_N"]), 2.0 * rows * columns * (2 * k + ranks), 0.0
    branch = 2.0 * rows * columns * _up(r, v["BLOCK_R"])
    if name == "_lora_expand_kernel":
        return programs, branch + (0.0 if v["LOAD_S"] else s * launch.grid[1]), 0.0
    s = 0.0 if v.get("LOAD_S", True) else s * columns / v["BLOCK_N"]
    # Persistent programs take tile after tile; elsewhere a program is a piece.
    units = max(rows // v["BLOCK_M"] * (columns // v["BLOCK_N"]), v.get("PRODUCTS", programs))
    product = 2.0 * rows * columns * k if v.get("HAS_W", True) else 0.0
    return units, product + branch + s, grad(n)


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

"""Predicted seconds of one launch, ours or the vendor's, from its bytes, its operations and the programs that share them."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

from benchmarks.lab.cost_model.gpu import Gpu
from benchmarks.lab.traffic.formula import Traffic, formula

# Memory latency: it determines how many bytes must be in flight.
LATENCY = 0.8e-6
# Tiles of the vendor's products, rows by columns, and how many programs may share one.
VENDOR_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))
VENDOR_SPLITS = (1, 2, 4, 8, 16)


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def values(launch: Any) -> dict[str, Any]:
    """The arguments and constants of a launch, by name."""
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants


class Work(NamedTuple):
    """What a launch computes: its equal pieces, their operations on the matrix units, and those of the co-scheduled gradient.

    Operations include padding and what narrow instructions waste.
    """

    units: int
    operations: float
    grad_units: int = 0
    grad_operations: float = 0.0


def work(launch: Any, gpu: Gpu) -> Work:
    v = values(launch)
    m, n, k, r, name = v["M"], v.get("N", 0), v["K"], v["R"], launch.kernel.__name__
    programs = math.prod(launch.grid)

    def ranks_of(block: int) -> int:
        return _up(r, block) // block * max(block, gpu.narrow_columns)

    def grad(columns: int) -> float:
        return 2.0 * _up(columns, v["GRAD_C"]) * m * ranks_of(v["GRAD_R"]) if v.get("HAS_GRAD") else 0.0

    if name == "_lora_weight_grads_kernel":
        programs_b = launch.grid[0] - v["PROGRAMS_A"]
        columns = _up(k, v["BLOCK_C"]) * (v["PROGRAMS_A"] > 0) + _up(n, v["BLOCK_C"]) * (programs_b > 0)
        return Work(programs, 2.0 * columns * m * ranks_of(v["BLOCK_R"]))
    rows = _up(m, v["BLOCK_M"])
    if name == "_lora_shrink_kernel":
        # dB's programs are spread among those of dS.
        return Work(programs, 2.0 * rows * k * ranks_of(v["BLOCK_R"]) + grad(k))
    columns = _up(n, v["BLOCK_N"])
    branch = 2.0 * rows * columns * _up(r, v["BLOCK_R"])
    if name == "_lora_expand_kernel":
        return Work(programs, branch + (0.0 if v["LOAD_S"] else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * launch.grid[1]))
    s = 0.0 if v.get("LOAD_S", True) else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * columns / v["BLOCK_N"]
    products = v.get("PRODUCTS", programs)
    tiles = rows // v["BLOCK_M"] * (columns // v["BLOCK_N"])
    # Persistent programs take tile after tile; elsewhere a program is a piece.
    units = max(tiles, products)
    return Work(units, 2.0 * rows * columns * k + branch + s, programs - products, grad(n))


def _in_flight(launch: Any, gpu: Gpu, residents: int = 2) -> float:
    """Bytes that the launch's programs keep in flight, with at most ``residents`` programs a processor."""
    v = values(launch)
    inner = v.get("BLOCK_K", v["BLOCK_M"])
    across = v.get("BLOCK_C", v["BLOCK_M"] + v.get("BLOCK_N", 0))
    resident = min(math.prod(launch.grid), residents * gpu.device.processors)
    return resident * (launch.options["num_stages"] - 1) * inner * across * 2.0


def _shared_sum(gpu: Gpu, splits: int, part: float) -> float:
    """Seconds until the last of ``splits`` programs has stored and counted its part and read all, each of ``part`` bytes."""
    if splits == 1:
        return 0.0
    return 2 * LATENCY + (splits + 1) * part * gpu.device.processors / gpu.port_bandwidth


def _split_tail(launch: Any, gpu: Gpu) -> float:
    v = values(launch)
    columns = v["BLOCK_N"] if "LOAD_S" in v else v.get("BLOCK_R", 0)
    return _shared_sum(gpu, v.get("SPLITS", 1), 4.0 * min(v["BLOCK_M"], v["M"]) * columns)


def _grad_traffic(launch: Any) -> tuple[Traffic, Traffic]:
    """A launch's bytes without dA's programs, and what those add. What both read is counted in the first."""
    whole = formula(launch)
    if not launch.constants.get("HAS_GRAD") or "LOAD_S" not in launch.constants:
        return whole, Traffic()
    bare = formula(launch._replace(constants=launch.constants | {"HAS_GRAD": False}))
    return bare, Traffic(*(a - b for a, b in zip(whole, bare, strict=True)))


def _grad_tail(launch: Any, gpu: Gpu, w: Work, moved: Traffic, busy: float, efficiency: float) -> float:
    """Seconds that dA's programs take after the product's, which fill the GPU for ``busy`` seconds.

    Every program of the launch asks for the product's shared memory, so dA's programs run on processors that have no tile left.
    """
    if not w.grad_units:
        return 0.0
    v, processors = values(launch), gpu.device.processors
    flight = (v["GRAD_STAGES"] - 1) * v["GRAD_M"] * v["GRAD_C"] * 2.0
    # Bytes a second into one processor.
    rate = min(gpu.port_bandwidth / processors, flight / LATENCY)
    alone = max(
        moved.unique / gpu.bandwidth,
        moved.issued / gpu.l2_bandwidth,
        moved.issued / rate / processors,
        w.grad_operations / (gpu.matrix_rate["bf16"] * efficiency),
    )
    idle = busy * processors * (1 - 1 / gpu.share(w.units))
    return alone * max(0.0, 1 - idle * rate / moved.issued)


def busy_seconds(gpu: Gpu, launch: Any, efficiency: float = 1.0, residents: int = 2, followed: bool = False) -> float:
    """One of our launches in bf16, from its first program to its last, at most ``residents`` of them on a processor.

    ``followed``: what comes next fills the processors that this launch leaves idle.
    """
    bare, grad = _grad_traffic(launch)
    w = work(launch, gpu)
    share = 1.0 if followed else gpu.share(w.units)
    busy = max(
        bare.unique / gpu.bandwidth,
        bare.issued / gpu.l2_bandwidth,
        bare.issued * share / gpu.port_bandwidth,
        w.operations * share / (gpu.matrix_rate["bf16"] * efficiency),
        bare.read_unique * LATENCY / _in_flight(launch, gpu, residents),
    )
    busy = max(busy, (bare.unique + grad.unique) / gpu.bandwidth)
    return busy + _split_tail(launch, gpu) + _grad_tail(launch, gpu, w, grad, busy, efficiency)


def gap(gpu: Gpu, launch: Any) -> float:
    """Seconds between the launch before and this one."""
    return gpu.overlapped_launch if launch.options.get("launch_pdl") else gpu.launch


def launch_seconds(gpu: Gpu, launch: Any, efficiency: float = 1.0) -> float:
    """One of our launches, in bf16, or the vendor's product."""
    if not hasattr(launch, "kernel"):
        (m, n), k = launch.y.shape, launch.x.shape[1]
        return gpu.launch + vendor_seconds(gpu, m, n, k, extra=formula(launch).unique - 2 * (m * k + k * n + m * n))
    return gap(gpu, launch) + busy_seconds(gpu, launch, efficiency, followed=launch.constants.get("TRIGGERS_DEPENDENTS", False))


def chained_seconds(gpu: Gpu, shrink: Any, linear: Any, efficiency: float = 1.0) -> float:
    """The pair of ``split`` as one launch: S's programs first, then the product's, each of which waits for its rows' flag.

    The same bytes and operations. S's programs are one a processor, since each takes the product's shared memory.
    """
    first = busy_seconds(gpu, shrink, efficiency, residents=1, followed=True)
    return gpu.launch + first + busy_seconds(gpu, linear, efficiency)


def vendor_seconds(gpu: Gpu, m: int, n: int, k: int, extra: float = 0.0) -> float:
    """[m, k] by [k, n] by the vendor's library: the best of its tiles, at the full matrix rate, without the launch.

    ``extra``: further bytes. From Hopper on, two programs share the reads of a tile's columns (multicast).
    """
    unique = 2.0 * (m * k + k * n + m * n) + extra
    pair = 2 if gpu.device.generation >= 90 else 1
    found = []
    for (rows, columns), splits in product(VENDOR_TILES, VENDOR_SPLITS):
        if splits > 1 and k < 256 * splits:
            continue
        rows = min(rows, _up(m, 16))
        tiles_m, tiles_n = -(-m // rows), -(-n // columns)
        parts = 4.0 * m * n * splits * (splits > 1)
        issued = 2.0 * (m * k * tiles_n + n * k * max(1, tiles_m / pair) + m * n) + 2 * parts
        share = gpu.share(tiles_m * tiles_n * splits)
        busy = max(
            unique / gpu.bandwidth,
            issued / gpu.l2_bandwidth,
            issued * share / gpu.port_bandwidth,
            2.0 * tiles_m * rows * tiles_n * columns * k * share / gpu.matrix_rate["bf16"],
        )
        found.append(busy + _shared_sum(gpu, splits, 4.0 * min(rows, m) * columns))
    return min(found)

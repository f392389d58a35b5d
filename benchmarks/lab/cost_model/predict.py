"""Predicted times: the bytes and operations of each launch over a GPU's ceilings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.lab.cost_model.rivals import RIVALS, Shape, Work
from benchmarks.lab.traffic.formula import formula
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import Choice, choose, possible_kernels
from stablelora_kernels.launch.dry_run import call_launches

GPUS = Path(__file__).parent / "gpus"
# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
BF16 = torch.bfloat16
# Memory latency: it determines how many bytes must be in flight.
LATENCY = 0.8e-6


class Gpu(NamedTuple):
    """Ceilings of a GPU: bytes and operations a second, seconds a launch."""

    name: str
    arch: str
    bandwidth: float
    l2_bandwidth: float
    matrix_rate: dict[str, float]
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    # Instructions a second of all threads together; of those to memory, shared memory's included, a quarter.
    issue_rate: float
    launch: float


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/lab/cost_model/gpus/<name>.json."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    return Gpu(**{field: content[field] for field in Gpu._fields})


def rival_seconds(gpu: Gpu, works: Sequence[Work]) -> float:
    return sum(
        gpu.launch + max(w.bytes / gpu.bandwidth, w.flops / gpu.matrix_rate["bf16"], w.l2_bytes / gpu.l2_bandwidth)
        for w in works
    )


# This library.


def matrix_operations(launch: Any, gpu: Gpu) -> float:
    """Operations on the matrix units, padding and narrow instructions included."""
    v = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    m, n, k, r, name = v["M"], v.get("N", 0), v["K"], v["R"], launch.kernel.__name__

    def up(size: int, block: int) -> int:
        return -(-size // block) * block

    def ranks_of(block: int) -> int:
        return up(r, block) // block * max(block, gpu.narrow_columns)

    if name == "_lora_weight_grads_kernel":
        programs_b = launch.grid[0] - v["PROGRAMS_A"]
        columns = up(k, v["BLOCK_C"]) * (v["PROGRAMS_A"] > 0) + up(n, v["BLOCK_C"]) * (programs_b > 0)
        return 2.0 * columns * m * ranks_of(v["BLOCK_R"])
    rows = up(m, v["BLOCK_M"])
    if name == "_lora_shrink_kernel":
        beside = 2.0 * up(k, v["GRAD_C"]) * m * ranks_of(v["GRAD_R"]) if v["HAS_GRAD"] else 0.0
        return 2.0 * rows * k * ranks_of(v["BLOCK_R"]) + beside
    columns = up(n, v["BLOCK_N"])
    branch = 2.0 * rows * columns * up(r, v["BLOCK_R"])
    if name == "_lora_expand_kernel":
        return branch + (0.0 if v["LOAD_S"] else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * launch.grid[1])
    s = 0.0 if v.get("LOAD_S", True) else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * columns / v["BLOCK_N"]
    beside = 2.0 * columns * m * ranks_of(v["GRAD_R"]) if v.get("HAS_GRAD") else 0.0
    return 2.0 * rows * columns * k + branch + s + beside


def _in_flight(launch: Any, gpu: Gpu) -> float:
    """Bytes that the launch's programs keep in flight."""
    v = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    inner = v.get("BLOCK_K", v["BLOCK_M"])
    across = v.get("BLOCK_C", v["BLOCK_M"] + v.get("BLOCK_N", 0))
    resident = min(math.prod(launch.grid), 2 * DEVICES[gpu.arch].processors)
    return resident * (launch.options["num_stages"] - 1) * inner * across * 2.0


def launch_seconds(gpu: Gpu, launch: Any, efficiency: float = 1.0) -> float:
    """One of our launches, in bf16."""
    traffic = formula(launch)
    if not hasattr(launch, "kernel"):
        # The vendor's tiles are unknown; each operand is read once, as for rivals.
        operations = 2.0 * launch.y.shape[0] * launch.y.shape[1] * launch.x.shape[1]
        return gpu.launch + max(traffic.unique / gpu.bandwidth, operations / gpu.matrix_rate["bf16"])
    # Programmatic dependent launch: a launch that begins early costs no gap.
    gap = 0.0 if launch.options.get("launch_pdl") else gpu.launch
    return gap + max(
        traffic.unique / gpu.bandwidth,
        traffic.issued / gpu.l2_bandwidth,
        matrix_operations(launch, gpu) / (gpu.matrix_rate["bf16"] * efficiency),
        traffic.read_unique * LATENCY / _in_flight(launch, gpu),
    )


def ours(
    gpu: Gpu, s: Shape, efficiency: float = 1.0, forward: str | None = None, backward: str | None = None
) -> tuple[float, float]:
    """Predicted seconds of forward and backward, by the kernels that dispatch chooses unless they are given."""
    choices = [None if kernel is None else Choice(kernel, "") for kernel in (forward, backward)]
    found = call_launches(DEVICES[gpu.arch], s.m, s.n, s.k, s.r, BF16, BF16, s.p, *choices)
    first, second = (sum(launch_seconds(gpu, launch, efficiency) for launch in launches) for launches in found)
    return first, second


def without_overlap(gpu: Gpu, s: Shape) -> float:
    """Predicted seconds of forward and backward, both split, if no work overlaps.

    dY comes from memory for dS and again for dB. dA begins after dX. No launch begins before the previous one ended.
    """
    split = Choice("split", "")
    forward, (thin, wide) = call_launches(DEVICES[gpu.arch], s.m, s.n, s.k, s.r, BF16, BF16, s.p, split, split)
    alone = [launch._replace(options={**launch.options, "launch_pdl": False}) for launch in forward]
    again, x = 2 * s.m * s.n, 2 * s.m * s.k
    thin_seconds = gpu.launch + (formula(thin).unique + again) / gpu.bandwidth
    product = (
        matrix_operations(wide._replace(constants=wide.constants | {"HAS_GRAD": False}), gpu) / gpu.matrix_rate["bf16"]
    )
    return (
        sum(launch_seconds(gpu, launch) for launch in alone) + thin_seconds + gpu.launch + product + x / gpu.bandwidth
    )


def call_of(s: Shape, direction: str) -> Call:
    """What dispatch is asked about one direction."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    return Call(direction, s.m, *sizes, s.r, BF16, BF16, s.dropout)


def best(gpu: Gpu, s: Shape, direction: str, efficiency: float = 1.0) -> dict[str, float]:
    """Predicted seconds of one direction by each kernel that can do it."""
    place = ("forward", "backward").index(direction)
    spare = "split"
    return {
        kernel: ours(gpu, s, efficiency, *((kernel, spare) if place == 0 else (spare, kernel)))[place]
        for kernel in possible_kernels(call_of(s, direction))
    }


def regret(gpu: Gpu, s: Shape, direction: str, efficiency: float = 1.0) -> tuple[str, str, float]:
    """Dispatch's kernel, the kernel predicted to be fastest, and how much longer dispatch's takes."""
    chosen = choose(DEVICES[gpu.arch], call_of(s, direction)).kernel
    times = best(gpu, s, direction, efficiency)
    fastest = min(times, key=times.__getitem__)
    return chosen, fastest, times[chosen] / times[fastest] - 1


def predicted(gpu: Gpu, s: Shape, direction: str, arm: str) -> float | None:
    """Seconds of "forward", "backward" or "both" for an arm of the GPU command, or None if the model does not know the arm."""
    name = {"eager": "eager (PEFT)", "peft": "eager (PEFT)"}.get(arm, arm)
    if arm != "ours" and name not in RIVALS:
        return None
    times = ours(gpu, s) if arm == "ours" else [rival_seconds(gpu, works) for works in RIVALS[name](s)]
    return sum(times) if direction == "both" else times[direction == "backward"]

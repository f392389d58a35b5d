"""Predicted times: the bytes and operations of each launch over a GPU's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.lab.cost_model.gpu import Gpu, band_ends
from benchmarks.lab.cost_model.launch_time import Facts, chained_seconds, facts, facts_seconds, vendor_seconds
from benchmarks.lab.cost_model.rivals import RIVALS, Shape, Work
from benchmarks.lab.traffic.formula import Traffic, formula
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.rules import Choice, choose, overlaps, possible_kernels
from stablelora_kernels.launch.dry_run import call_launches

# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
BF16 = torch.bfloat16
# The slow end of the band: the least share of the vendor's matrix rate that Triton's products are taken to reach.
SLOWEST = 0.85


def lora_dtype(s: Shape) -> torch.dtype:
    return torch.float32 if s.wide_adapters else BF16


def rival_seconds(gpu: Gpu, works: Sequence[Work]) -> float:
    return sum(gpu.launch + _rival_busy(gpu, work) for work in works)


def _rival_busy(gpu: Gpu, work: Work) -> float:
    if work.sizes is None:
        return max(work.bytes / gpu.bandwidth, work.flops / gpu.matrix_rate["bf16"])
    m, n, k = work.sizes
    # The epilogue's operations take as long as those of a longer sum.
    more = work.flops / (2.0 * m * n * k)
    return more * vendor_seconds(gpu, m, n, k, extra=work.bytes - 2.0 * (m * k + k * n + m * n))


# This library.


class _Vendor(NamedTuple):
    """The vendor's product [m, k] by [k, n], with bytes beyond its operands'."""

    m: int
    n: int
    k: int
    extra: float


def _launches(gpu: Gpu, s: Shape, kernel: str) -> tuple[list[Facts | _Vendor], list[Facts | _Vendor]]:
    # Whether launches overlap depends on the interpreter, too.
    return _cached_launches(gpu.device, overlaps(gpu.device), gpu.narrow_columns, s, kernel)


@cache
def _cached_launches(
    device: Device, overlapping: bool, narrow_columns: int, s: Shape, kernel: str
) -> tuple[list[Facts | _Vendor], list[Facts | _Vendor]]:
    """The launches of forward and backward by ``kernel``, or by "split" for a direction that has no such kernel."""
    choices = [
        Choice(kernel if kernel in possible_kernels(call_of(s, direction)) else "split", "")
        for direction in ("forward", "backward")
    ]
    found = call_launches(device, s.m, s.n, s.k, s.r, BF16, lora_dtype(s), s.p, *choices)
    first, second = ([_facts(launch, narrow_columns) for launch in launches] for launches in found)
    return first, second


def _facts(launch: Any, narrow_columns: int) -> Facts | _Vendor:
    if hasattr(launch, "kernel"):
        return facts(launch, narrow_columns)
    (m, n), k = launch.y.shape, launch.x.shape[1]
    return _Vendor(m, n, k, formula(launch).unique - 2.0 * (m * k + k * n + m * n))


def kernel_seconds(gpu: Gpu, s: Shape, direction: str, kernel: str, efficiency: float = 1.0) -> float:
    """Predicted seconds of one direction by ``kernel``. "chained" is priced from the pair of launches that it joins."""
    pair = "split" if kernel == "chained" else kernel
    launches = _launches(gpu, s, pair)[direction == "backward"]
    if kernel == "chained":
        shrink, linear = launches
        assert isinstance(shrink, Facts) and isinstance(linear, Facts)
        return chained_seconds(gpu, shrink, linear, efficiency)
    return sum(
        gpu.launch + vendor_seconds(gpu, *launch)
        if isinstance(launch, _Vendor)
        else facts_seconds(gpu, launch, efficiency)
        for launch in launches
    )


def launch_seconds(gpu: Gpu, launch: Any, efficiency: float = 1.0) -> float:
    """One of our launches, in bf16, or the vendor's product."""
    found = _facts(launch, gpu.narrow_columns)
    if isinstance(found, _Vendor):
        return gpu.launch + vendor_seconds(gpu, *found)
    return facts_seconds(gpu, found, efficiency)


def ours(
    gpu: Gpu, s: Shape, efficiency: float = 1.0, forward: str | None = None, backward: str | None = None
) -> tuple[float, float]:
    """Predicted seconds of forward and backward, by the kernels that dispatch chooses unless they are given."""
    first, second = (
        kernel_seconds(gpu, s, direction, kernel or choose(gpu.device, call_of(s, direction)).kernel, efficiency)
        for direction, kernel in (("forward", forward), ("backward", backward))
    )
    return first, second


def without_overlap(gpu: Gpu, s: Shape) -> float:
    """Predicted seconds of forward and backward, both split, if no work overlaps.

    dY comes from memory for dS and again for dB. dA begins after dX. No launch begins before the previous one ended.
    """
    found = [f for launches in _launches(gpu, s, "split") for f in launches]
    apart = [f._replace(begins_early=False, ends_early=False) for f in found if isinstance(f, Facts)]
    *forward, thin, wide = apart
    again, x = 2 * s.m * s.n, 2 * s.m * s.k
    bare = wide._replace(grad_moved=Traffic(), grad_operations=0.0)
    return sum(facts_seconds(gpu, f) for f in (*forward, thin, bare)) + (again + x) / gpu.bandwidth


def call_of(s: Shape, direction: str) -> Call:
    """What dispatch is asked about one direction."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    return Call(direction, s.m, *sizes, s.r, BF16, lora_dtype(s), s.dropout)


def best(gpu: Gpu, s: Shape, direction: str, efficiency: float = 1.0) -> dict[str, float]:
    """Predicted seconds of one direction by each kernel that can do it."""
    kernels = possible_kernels(call_of(s, direction))
    return {kernel: kernel_seconds(gpu, s, direction, kernel, efficiency) for kernel in kernels}


class Regret(NamedTuple):
    """Dispatch's kernel over the band: how much longer it takes than the fastest one, at the end where that is most."""

    kernel: str
    # The fastest kernel at each end, and by how much dispatch's takes longer.
    fastest: tuple[str, ...]
    at_ends: tuple[float, ...]
    # The kernel whose worst regret is the least, and that regret.
    minimax: str
    least: float

    @property
    def worst(self) -> float:
        return max(self.at_ends)


def regret(gpu: Gpu, s: Shape, direction: str, efficiency: float = SLOWEST) -> Regret:
    chosen = choose(gpu.device, call_of(s, direction)).kernel
    times = [best(end.gpu, s, direction, end.efficiency) for end in band_ends(gpu, efficiency)]
    fastest = [min(found, key=found.__getitem__) for found in times]
    regrets = {
        kernel: [found[kernel] / found[first] - 1 for found, first in zip(times, fastest, strict=True)]
        for kernel in times[0]
    }
    minimax = min(regrets, key=lambda kernel: max(regrets[kernel]))
    return Regret(chosen, tuple(fastest), tuple(regrets[chosen]), minimax, max(regrets[minimax]))


def predicted(gpu: Gpu, s: Shape, direction: str, arm: str) -> float | None:
    """Seconds of "forward", "backward" or "both" for an arm of the GPU command, or None if the model does not know the arm."""
    name = {"eager": "eager (PEFT)", "peft": "eager (PEFT)"}.get(arm, arm)
    if arm != "ours" and name not in RIVALS:
        return None
    times = ours(gpu, s) if arm == "ours" else [rival_seconds(gpu, works) for works in RIVALS[name](s)]
    return sum(times) if direction == "both" else times[direction == "backward"]

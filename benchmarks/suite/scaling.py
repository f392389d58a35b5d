"""The least time that a case could take on this machine, and how times grow with a size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.common.intervals import log_slope
from benchmarks.common.measure import interleave
from stablelora_kernels.ops import matmul

FP32 = 4


class Machine(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bandwidth: float


@cache
def machine(device: torch.device) -> Machine:
    """The fastest of some large products and copies, so that a floor is one."""
    size, length = 2048, 1 << 26
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source, target = (torch.zeros(length, device=device) for _ in range(2))
    arms = {"product": lambda: matmul.product(a, b), "copy": lambda: target.copy_(source)}
    samples = interleave(arms, warmup=2, iters=7)  # type: ignore[arg-type]
    return Machine(2 * size**3 / min(samples["product"]), 2 * FP32 * length / min(samples["copy"]))


def layer_floors(m: int, k: int, n: int, r: int, rates: Machine) -> dict[str, float]:
    """The least milliseconds of the frozen layer, and of LoRA on top of it, forward and backward in float32."""

    def longer(operations: float, elements: float) -> float:
        return 1e3 * max(operations / rates.flops, FP32 * elements / rates.bandwidth)

    # Y and dX; x, W and dY read, W again for dX, Y and dX written.
    frozen = longer(4 * m * n * k, m * (2 * k + 2 * n) + 2 * n * k)
    # S, its product with B, dS, dX's part, dA and dB; x and dY read again, A, B and their gradients.
    lora = longer(6 * m * r * (n + k), m * (n + k) + 3 * r * (n + k))
    return {"frozen": frozen, "overhead": lora}


def step_floor(elements: int, rates: Machine) -> dict[str, float]:
    """Parameter, gradient and two moments are read; all but the gradient are written."""
    return {"step": 1e3 * 7 * FP32 * elements / rates.bandwidth}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float] | None:
    """The slope of log time against log size over the larger half, and half the width of its 95 % interval."""
    points = [(a, b) for a, b in zip(sizes, times, strict=True) if b > 0]
    points = points[len(points) // 2 :] if len(points) > 5 else points[-3:]
    return log_slope([size for size, _ in points], [time for _, time in points])


def exponents(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """The exponents of each axis and arm: of its time, and of what it adds to the base."""
    times: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for report in reports:
        if axis := report.get("axis"):
            for arm, figures in report["arms"].items():
                times[axis["name"]][arm][axis["size"]] = figures["ms"]["median"]
                if report["base"] not in (arm, report["rival"]):
                    times[axis["name"]][f"{arm}, overhead"][axis["size"]] = figures["overhead_ms"]["median"]
    found = {
        name: {arm: exponent([*points], [*points.values()]) for arm, points in arms.items()}
        for name, arms in times.items()
    }
    return {name: {arm: fit for arm, fit in fits.items() if fit is not None} for name, fits in found.items()}

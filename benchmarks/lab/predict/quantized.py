"""Predicted times of a LoRA layer on a weight in 4 or 8 bits: dequantized in the product's loop, or
first. Nothing is measured.

As for other layers. Only a GPU can tell whether the instructions that dequantize run beside the
matrix instructions or take turns with them, so both are given.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product

import pandas as pd

from benchmarks.lab.predict import layer_time
from benchmarks.lab.predict.ceilings import Gpu, points, range_over
from benchmarks.lab.predict.launch_time import Facts, Work
from benchmarks.lab.predict.layer_time import DIRECTIONS, call_of
from benchmarks.lab.predict.rivals import BF16, Shape, Ways
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice, choose_quantized
from stablelora_kernels.explanation import linear_launches

BITS = {"nf4": 4, "fp8": 8}
ROWS = (1, 16, 64, *range(128, 705, 32), 1024, 2048, 8192)
SIZES = ((4096, 4096), (14336, 4096))
# Of forward and of backward.
RESULTS = ("Y", "dX")


def by_kernel(device: Device, s: Shape, kind: str, kernel: str) -> Ways:
    """The launches of forward and backward by ``kernel``, "in_loop" or "dequantize"."""
    choices = [Choice(kernel, "")] * 2
    return linear_launches(device, s.m, s.n, s.k, s.r, (BF16, BF16), s.p, kind, choices)


def shapes() -> list[Shape]:
    return [Shape(m, n, k, 16, False) for (n, k), m in product(SIZES, ROWS)]


@cache
def _kernel_facts(
    device: Device, narrow_columns: int, s: Shape, kind: str, kernel: str
) -> layer_time.WaysFacts:
    return layer_time.facts_of(by_kernel(device, s, kind, kernel), device, narrow_columns)


def seconds(gpu: Gpu, s: Shape, kind: str, kernel: str, overlap: bool = True) -> list[float]:
    """Forward and backward by ``kernel``. Dequantizing in the loop overlaps with the products or
    takes turns with them.
    """
    ways = _kernel_facts(gpu.device, gpu.narrow_columns, s, kind, kernel)
    return [sum(_launch_seconds(gpu, launch, overlap) for launch in way) for way in ways]


def _launch_seconds(gpu: Gpu, launch: Facts | Work, overlap: bool) -> float:
    if isinstance(launch, Facts) and not overlap:
        launch = launch.in_turns(gpu)
    return launch.seconds(gpu)


def arms(gpu: Gpu, s: Shape, kind: str) -> dict[str, list[float]]:
    """Seconds of forward and backward: of a plain W, and of each way to use W in bits."""
    return {
        "plain W": layer_time.seconds(gpu, s, layer_time.OURS),
        "in loop": seconds(gpu, s, kind, "in_loop"),
        "in turns": seconds(gpu, s, kind, "in_loop", overlap=False),
        "first": seconds(gpu, s, kind, "dequantize"),
    }


def table(gpu: Gpu, kind: str, rows: Iterable[Shape] = ()) -> pd.DataFrame:
    """Microseconds of Y and of dX at r 16, low, middle and high, and dispatch's choice; in turns
    with products, or beside them.
    """
    lines = []
    for s in rows or shapes():
        at_points = [arms(point, s, kind) for point in points(gpu)]
        for place, direction in enumerate(DIRECTIONS):
            line: dict[str, object] = {"M": s.m, "N": s.n, "K": s.k, "of": RESULTS[place]}
            for arm in at_points[0]:
                times = [1e6 * ways[arm][place] for ways in at_points]
                line[arm] = range_over(times).text("{:.0f}")
            line["by"] = choose_quantized(gpu.device, call_of(s, direction), BITS[kind]).strategy
            lines.append(line)
    return pd.DataFrame(lines)

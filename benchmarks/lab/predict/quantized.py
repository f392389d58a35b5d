"""Predicted times of a LoRA layer on a weight in 4 or 8 bits: dequantized in the product's loop, or
first. Nothing is measured.

As for other layers. Only a GPU can tell whether the instructions that dequantize run beside the
matrix instructions or take turns with them, so both are given.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd

from benchmarks.lab.predict import layer_time
from benchmarks.lab.predict.launch_time import Gpu, facts
from benchmarks.lab.predict.layer_time import DIRECTIONS, call_of
from benchmarks.lab.predict.rivals import BF16, Shape, Ways
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice, choose_quantized
from stablelora_kernels.explanation import linear_launches

BITS = {"nf4": 4, "fp8": 8}
ROWS = (1, 16, 64, *range(128, 705, 32), 1024, 2048, 8192)
SIZES = ((4096, 4096), (14336, 4096))


def by_kernel(device: Device, s: Shape, kind: str, kernel: str) -> Ways:
    """The launches of forward and backward by ``kernel``, "in_loop" or "dequantize"."""
    choices = [Choice(kernel, "")] * 2
    return linear_launches(device, s.m, s.n, s.k, s.r, (BF16, BF16), s.p, kind, choices)


def shapes() -> list[Shape]:
    return [Shape(m, n, k, 16, False) for (n, k), m in product(SIZES, ROWS)]


def seconds(gpu: Gpu, s: Shape, kind: str, kernel: str, overlap: bool = True) -> list[float]:
    """Forward and backward by ``kernel``. Dequantizing in the loop overlaps with the products or
    takes turns with them.
    """
    found = [
        [facts(launch, gpu.arch, gpu.narrow_columns) for launch in way]
        for way in by_kernel(gpu.device, s, kind, kernel)
    ]
    return [
        sum((each if overlap else each.in_turns(gpu)).seconds(gpu) for each in way) for way in found
    ]


def table(gpu: Gpu, kind: str) -> pd.DataFrame:
    """Microseconds of forward and backward at r 16, and dispatch's choice; in turns with products,
    or beside them.
    """
    rows = []
    for s in shapes():
        arms = {
            "plain W": layer_time.seconds(gpu, s, layer_time.OURS),
            "in loop": seconds(gpu, s, kind, "in_loop"),
            "in turns": seconds(gpu, s, kind, "in_loop", overlap=False),
            "first": seconds(gpu, s, kind, "dequantize"),
        }
        row: dict[str, Any] = {"M": s.m, "N": s.n, "K": s.k}
        for place, (result, direction) in enumerate(zip(("Y", "dX"), DIRECTIONS, strict=True)):
            row |= {f"{result} {name}": round(1e6 * both[place], 1) for name, both in arms.items()}
            row[f"{result} by"] = choose_quantized(
                gpu.device, call_of(s, direction), BITS[kind]
            ).strategy
        rows.append(row)
    return pd.DataFrame(rows)

"""Predicted times of a LoRA layer on a weight in 4 or 8 bits: dequantized in the product's loop, or first. Nothing is measured.

As for other layers, with one more ceiling: a weight's element takes so many instructions each time that it is dequantized, and so
many of them go to memory, which takes a quarter as many a clock. Both are counted in sm_90's machine code; a nightly test counts
them again. Only a GPU can tell whether they run beside the matrix instructions or take turns with them, so both are given. Values
of a code are taken to be found in the first cache.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd

from benchmarks.lab.predict import layer_time
from benchmarks.lab.predict.formula import formula_by_tensor, total
from benchmarks.lab.predict.launch_time import Gpu, facts
from benchmarks.lab.predict.layer_time import DIRECTIONS, call_of
from benchmarks.lab.predict.rivals import BF16, Shape
from stablelora_kernels.dispatch.problem import cdiv
from stablelora_kernels.dispatch.rules import Choice, choose_quantized
from stablelora_kernels.explanation import linear_launches

BITS = {"nf4": 4, "fp8": 8}
ROWS = (1, 16, 64, *range(128, 705, 32), 1024, 2048, 8192)
SIZES = ((4096, 4096), (14336, 4096))
# Instructions for an element of W, and those of them to memory, by what computes it and the rows of its tile.
COUNTS: dict[str, dict[int, tuple[float, float]]] = {
    "y nf4": {16: (13.8, 3.0), 64: (17.4, 5.3), 128: (13.4, 2.8)},
    "dx nf4": {16: (14.9, 4.0), 64: (9.9, 1.7), 128: (18.7, 6.5)},
    "dequantize nf4": {0: (14.0, 1.8)},
    "y fp8": {16: (15.2, 0.5), 64: (14.6, 0.4), 128: (16.1, 0.6)},
    "dx fp8": {16: (16.7, 1.6), 64: (15.2, 0.5), 128: (16.9, 0.7)},
    "dequantize fp8": {0: (17.3, 0.6)},
}


def key_of(launch: Any) -> tuple[str, int] | None:
    """The keys in COUNTS of a launch that dequantizes."""
    c = launch.constants if hasattr(launch, "kernel") else {}
    if "PACKED" not in c:
        return None
    way = "dequantize" if "TRANS_W" not in c else "dx" if c["TRANS_W"] else "y"
    return f"{way} {'nf4' if c['PACKED'].NF4 else 'fp8'}", c["TILE"].BLOCK_M if "TILE" in c else 0


def launch_seconds(gpu: Gpu, launch: Any, overlap: bool) -> float:
    """One launch. Dequantizing either overlaps with the products or takes turns with them."""
    key = key_of(launch)
    if key is None:
        return facts(launch, gpu.narrow_columns).seconds(gpu)
    a, found = launch.arguments, formula_by_tensor(launch)
    moved = total(traffic for tensor, traffic in found.items() if tensor not in ("w.code", "w.nested_code"))
    (instructions, to_memory), times, units, products = COUNTS[key[0]][key[1]], 1, 0, 0.0
    if "TILE" in a:
        times, product = cdiv(a["M"], a["TILE"].BLOCK_M), facts(launch, gpu.narrow_columns)
        units, products = product.units, product.operations / gpu.matrix_rate
    elements = a["N"] * a["K"] * times * max(instructions, 4 * to_memory) / gpu.issue_rate
    return gpu.launch + max(
        moved.unique / gpu.bandwidth,
        moved.issued / gpu.l2_bandwidth,
        (max(elements, products) if overlap else elements + products) * gpu.share(units),
    )


def seconds(gpu: Gpu, s: Shape, kind: str, kernel: str, overlap: bool = True) -> list[float]:
    """Forward and backward by ``kernel``, "in_loop" or "dequantize"."""
    ways = linear_launches(gpu.device, s.m, s.n, s.k, s.r, (BF16, BF16), s.p, kind, [Choice(kernel, "")] * 2)
    return [sum(launch_seconds(gpu, launch, overlap) for launch in way) for way in ways]


def table(gpu: Gpu, kind: str) -> pd.DataFrame:
    """Microseconds of forward and backward at r 16, and dispatch's choice; in turns with products, or beside them."""
    rows = []
    for s in (Shape(m, n, k, 16, False) for (n, k), m in product(SIZES, ROWS)):
        arms = {
            "plain W": layer_time.seconds(gpu, s, layer_time.OURS),
            "in loop": seconds(gpu, s, kind, "in_loop"),
            "in turns": seconds(gpu, s, kind, "in_loop", overlap=False),
            "first": seconds(gpu, s, kind, "dequantize"),
        }
        row: dict[str, Any] = {"M": s.m, "N": s.n, "K": s.k}
        for place, (result, direction) in enumerate(zip(("Y", "dX"), DIRECTIONS, strict=True)):
            row |= {f"{result} {name}": round(1e6 * both[place], 1) for name, both in arms.items()}
            row[f"{result} by"] = choose_quantized(gpu.device, call_of(s, direction), BITS[kind]).kernel
        rows.append(row)
    return pd.DataFrame(rows)

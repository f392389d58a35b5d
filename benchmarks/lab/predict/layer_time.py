"""Predicted times of layers and gated MLPs, this library's and its rivals', and how well dispatch
chooses among the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pandas as pd

from benchmarks.lab.mlp_launches import mlp_launches
from benchmarks.lab.predict.launch_time import Gpu, band_ends, facts
from benchmarks.lab.predict.rivals import (
    ACTIVATION,
    BF16,
    FROZEN,
    MLP,
    RIVALS,
    UNSLOTH,
    Shape,
    Ways,
    join,
    rival,
)
from stablelora_kernels.dispatch.problem import DEVICES, Call, Device
from stablelora_kernels.dispatch.rules import Choice, choose, possible_strategies
from stablelora_kernels.explanation import linear_launches

# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
# Rows, K, F and ranks of gated MLPs in Llama 3.1 8B.
MLPS = tuple((m, 4096, 14336, r) for r in (16, 64) for m in (2048, 8192, 16384))
DIRECTIONS = ("forward", "backward")
# Our layer; our gated MLP by ``fuse_mlp``, and by separate layers.
OURS, ONE_OP, SEPARATE = "ours", "one op", "three layers"


def layer_launches(device: Device, s: Shape, *choices: Choice) -> tuple[list[Any], list[Any]]:
    return linear_launches(
        device, s.m, s.n, s.k, s.r, (BF16, s.lora_dtype), s.p, choices=choices or (None, None)
    )


def call_of(s: Shape, direction: str) -> Call:
    """What dispatch is asked about one direction."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    return Call(direction, s.m, *sizes, s.r, BF16, s.lora_dtype, s.dropout)


def by_kernel(device: Device, s: Shape, kernel: str) -> tuple[list[Any], list[Any]]:
    """The launches of forward and backward by ``kernel``, or by "split" for a direction that has no
    such kernel.
    """
    choices = [
        Choice(kernel if kernel in possible_strategies(call_of(s, way)) else "split", "")
        for way in DIRECTIONS
    ]
    return layer_launches(device, s, *choices)


@cache
def _layer_facts(arch: str, narrow_columns: int, s: Shape, kernel: str) -> list[list[Any]]:
    return [
        [facts(launch, arch, narrow_columns) for launch in way]
        for way in by_kernel(DEVICES[arch], s, kernel)
    ]


def kernel_seconds(gpu: Gpu, s: Shape, direction: str, kernel: str) -> float:
    """Predicted seconds of one direction by ``kernel``."""
    found = _layer_facts(gpu.arch, gpu.narrow_columns, s, kernel)[DIRECTIONS.index(direction)]
    return sum(launch.seconds(gpu) for launch in found)


def mlp_launches_of(device: Device, mlp: MLP, arm: str) -> Ways:
    """Forward and backward, as ``ONE_OP``, or as ``SEPARATE`` with a bias each and a fused
    activation, one launch each way.
    """
    if arm == SEPARATE:
        return join(mlp, [layer_launches(device, shape) for shape in mlp.layers()], FROZEN)
    gate = mlp.layers()[0]
    return mlp_launches(
        device, mlp.m, (mlp.k, mlp.f, mlp.k), mlp.r, (BF16, gate.lora_dtype), gate.p
    )


def arms_of(case: Shape | MLP) -> list[str]:
    layer = isinstance(case, Shape)
    rivals = [
        name for name in (RIVALS if layer else ACTIVATION) if not (case.dropout and name == UNSLOTH)
    ]
    return [*rivals, *((OURS,) if layer else (SEPARATE, ONE_OP))]


def seconds(gpu: Gpu, case: Shape | MLP, arm: str) -> list[float]:
    """Predicted seconds of forward and backward of one of ``arms_of(case)``, ours by the kernels
    that dispatch chooses.
    """
    if isinstance(case, Shape) and arm == OURS:
        kernels = {
            direction: choose(gpu.device, call_of(case, direction)).strategy
            for direction in DIRECTIONS
        }
        return [kernel_seconds(gpu, case, *pair) for pair in kernels.items()]
    ways = mlp_launches_of(gpu.device, case, arm) if arm in (SEPARATE, ONE_OP) else rival(arm, case)
    return [
        sum(facts(launch, gpu.arch, gpu.narrow_columns).seconds(gpu) for launch in way)
        for way in ways
    ]


def regret(gpu: Gpu, s: Shape, direction: str) -> pd.DataFrame:
    """How much longer each possible kernel takes than the fastest one, at each end of the band."""
    kernels, ends = possible_strategies(call_of(s, direction)), band_ends(gpu).items()
    times = {
        end: {kernel: kernel_seconds(at, s, direction, kernel) for kernel in kernels}
        for end, at in ends
    }
    return pd.DataFrame(times) / pd.DataFrame(times).min() - 1


def table(gpu: Gpu, cases: Sequence[Shape | MLP]) -> pd.DataFrame:
    """A row for each case: predicted microseconds of its arms, forward and backward, at both ends
    of the band.

    For a layer also dispatch's kernels, their regret at the worse end, and the least that a kernel
    has there.
    """
    rows = []
    for case in cases:
        row: dict[str, Any] = {
            "gpu": gpu.name,
            **case._asdict(),
            "dropout": 0.1 if case.dropout else 0.0,
        }
        for arm, (end, at) in product(arms_of(case), band_ends(gpu).items()):
            found = (
                round(1e6 * each, 2 if isinstance(case, Shape) else 1)
                for each in seconds(at, case, arm)
            )
            row |= {
                f"{arm} {direction}{end}": us
                for direction, us in zip(DIRECTIONS, found, strict=True)
            }
        for direction in DIRECTIONS if isinstance(case, Shape) else ():
            kernel, worst = (
                choose(gpu.device, call_of(case, direction)).strategy,
                regret(gpu, case, direction).max(axis=1),
            )
            row[f"{direction} kernel"] = kernel
            row |= {
                f"{direction} regret at most": worst[kernel],
                f"{direction} least regret": worst.min(),
            }
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="wide_adapters", errors="ignore").round(3)


def layers(dropout: bool) -> list[Shape]:
    return [Shape(m, n, k, r, dropout) for (n, k), m, r in product(SIZES, ROWS, RANKS)]

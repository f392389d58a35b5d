"""Predicted times of layers and gated MLPs, this library's and its rivals', and how well dispatch
chooses among the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import pandas as pd

from benchmarks.lab.mlp_launches import mlp_launches
from benchmarks.lab.predict.ceilings import Gpu, Range, points, range_over, ratios
from benchmarks.lab.predict.launch_time import Facts, Work, facts
from benchmarks.lab.predict.rivals import (
    ACTIVATION,
    BF16,
    FROZEN,
    LORAFUSION,
    MLP,
    PEFT,
    RIVALS,
    UNSLOTH,
    Shape,
    Ways,
    join,
    published_ratio,
    rival,
)
from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Call, Device, Rule
from stablelora_kernels.dispatch.rules import Choice, choose, possible_strategies
from stablelora_kernels.explanation import linear_launches

# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
# From so many rows on, dispatch may take the vendor's product with the branch ahead of it.
BRANCH_ROWS = 512
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


def by_branch(device: Device, s: Shape, strategy: str) -> tuple[list[Any], list[Any]]:
    """The launches by "vendor" with the branch by ``strategy``, in place of the table's."""
    always = (Rule(lambda call: True, strategy, ""),)
    with mock.patch.object(rules, "BRANCH_RULES", always):
        return by_kernel(device, s, "vendor")


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


# What the times of the launches of forward and of backward depend on.
WaysFacts = list[list[Facts | Work]]


def facts_of(ways: Ways, device: Device, narrow_columns: int) -> WaysFacts:
    return [[facts(launch, device.arch, narrow_columns) for launch in way] for way in ways]


@cache
def _kernel_facts(device: Device, narrow_columns: int, s: Shape, kernel: str) -> WaysFacts:
    return facts_of(by_kernel(device, s, kernel), device, narrow_columns)


@cache
def _branch_facts(device: Device, narrow_columns: int, s: Shape, strategy: str) -> WaysFacts:
    return facts_of(by_branch(device, s, strategy), device, narrow_columns)


@cache
def _mlp_facts(device: Device, narrow_columns: int, mlp: MLP, arm: str) -> WaysFacts:
    return facts_of(mlp_launches_of(device, mlp, arm), device, narrow_columns)


def kernel_seconds(gpu: Gpu, s: Shape, direction: str, kernel: str) -> float:
    """Predicted seconds of one direction by ``kernel``."""
    ways = _kernel_facts(gpu.device, gpu.narrow_columns, s, kernel)
    return sum(launch.seconds(gpu) for launch in ways[DIRECTIONS.index(direction)])


def branch_seconds(gpu: Gpu, s: Shape, direction: str, strategy: str) -> float:
    """Predicted seconds of one direction by "vendor" with the branch by ``strategy``."""
    ways = _branch_facts(gpu.device, gpu.narrow_columns, s, strategy)
    return sum(launch.seconds(gpu) for launch in ways[DIRECTIONS.index(direction)])


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
    if isinstance(case, MLP) and arm in (SEPARATE, ONE_OP):
        ways = _mlp_facts(gpu.device, gpu.narrow_columns, case, arm)
    else:
        ways = [list(way) for way in rival(arm, case, gpu.arch)]
    return [sum(launch.seconds(gpu) for launch in way) for way in ways]


def both_ways(gpu: Gpu, case: Shape | MLP, arm: str) -> list[float]:
    """Predicted seconds of forward and backward together at each of ``points(gpu)``."""
    return [sum(seconds(point, case, arm)) for point in points(gpu)]


def over_frozen(gpu: Gpu, case: Shape | MLP, arm: str) -> Range:
    """Forward and backward of an arm over the frozen layer's or MLP's.

    LoRAFusion has two estimates: by its tiles, and by its published gain over eager LoRA. Its range
    holds both, and its middle is half way between theirs.
    """
    frozen = both_ways(gpu, case, FROZEN)
    by_launches = ratios(both_ways(gpu, case, arm), frozen)
    gain = published_ratio(gpu.arch, case) if arm == LORAFUSION else None
    if gain is None:
        return by_launches
    eager = ratios(both_ways(gpu, case, PEFT), frozen)
    by_gain = Range(eager.low / gain.best, eager.middle / gain.mean, eager.high / gain.mean)
    return Range(
        min(by_launches.low, by_gain.low),
        (by_launches.middle + by_gain.middle) / 2,
        max(by_launches.high, by_gain.high),
    )


def regret(gpu: Gpu, s: Shape, direction: str) -> pd.DataFrame:
    """How much longer each possible kernel takes than the fastest one, at each of
    ``points(gpu)``.
    """
    kernels = possible_strategies(call_of(s, direction))
    times = pd.DataFrame(
        {
            place: {kernel: kernel_seconds(point, s, direction, kernel) for kernel in kernels}
            for place, point in enumerate(points(gpu))
        }
    )
    return times / times.min() - 1


def table(gpu: Gpu, cases: Sequence[Shape | MLP]) -> pd.DataFrame:
    """A row for each case: predicted microseconds of its arms at the middle of all ranges, forward
    and backward; and the low, middle and high of both together over the frozen layer's, which has
    its microseconds there.

    For a layer also dispatch's kernels, their largest regret, and the least that a kernel can have.
    """
    rows = []
    for case in cases:
        row: dict[str, Any] = {
            "gpu": gpu.name,
            **case._asdict(),
            "dropout": 0.1 if case.dropout else 0.0,
        }
        for arm in arms_of(case):
            for direction, time in zip(DIRECTIONS, seconds(gpu, case, arm), strict=True):
                row[f"{arm} {direction}"] = round(1e6 * time, 2)
            whole = over_frozen(gpu, case, arm)
            if arm == FROZEN:
                whole = range_over(both_ways(gpu, case, arm)).times(1e6)
            row |= {f"{arm} {end}": value for end, value in whole._asdict().items()}
        if isinstance(case, Shape):
            row |= _kernels_of(gpu, case)
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="wide_adapters", errors="ignore").round(4)


def _kernels_of(gpu: Gpu, s: Shape) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for direction in DIRECTIONS:
        kernel = choose(gpu.device, call_of(s, direction)).strategy
        worst = regret(gpu, s, direction).max(axis=1)
        row[f"{direction} kernel"] = kernel
        row[f"{direction} regret at most"] = worst[kernel]
        row[f"{direction} least regret"] = worst.min()
    return row


def is_counted_in_full(device: Device) -> bool:
    """Whether all tables have this GPU: the H100, for which dispatch's rules were made. Others have
    layers of rank 16 alone, because each further launch takes seconds to count.
    """
    return device.generation == 90


def layers(device: Device, dropout: bool) -> list[Shape]:
    """The layers whose instructions are counted for a GPU."""
    ranks = RANKS if is_counted_in_full(device) else (16,)
    return [Shape(m, n, k, r, dropout) for (n, k), m, r in product(SIZES, ROWS, ranks)]

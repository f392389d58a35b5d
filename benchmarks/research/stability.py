"""Is feature learning stable across widths? The parts of each step's output change, the latch, and
which learning rate is best.

One step moves an adapted layer's output on fixed inputs Z by s (A_{t+1}, B_{t+1} against A_t, B_t),
which is exactly

    delta_1 = s dB A' Z        delta_2 = s B dA Z        delta_3 = s dB dA Z        delta_shrink = s B (A' - A) Z

with A' = A (1 - lambda) where the pair shrank, A elsewhere, and dA = A_{t+1} - A', dB = B_{t+1} -
B. Sizes are root mean squares.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import optimizers
from benchmarks.research import widths

PROBES = (1, 2, 5, 10, 20, 50, 100, 200, 300)
PARTS = ("delta_1", "delta_2", "delta_3", "delta_shrink", "delta", "a_z")
COLUMNS = ("step", *PARTS, "loss", "shrinks", "latched")
ADAMW, NEAR_ZERO, LORA_PLUS = "AdamW", "AdamW, A near zero", "LoRA+"
# A law is a learning rate at width 64 and a power: the rate falls as n^-power. First as people do;
# then as theory has all parts stable; and as theory calls the usual start unstable. A run of the
# grid has a rate of its own, and no probes.
LAWS, GRID = {"fixed": (1e-3, 0.0), "n^-1/2": (1e-2, 0.5), "n^-5/4": (3e-2, 1.25)}, "grid"


class Arm(NamedTuple):
    """An optimizer, and a factor of A's start."""

    optimizer: str = optimizers.ADAMW_FUSED
    start: float = 1.0
    shrink_ratio: float = 0.0


ARMS = {ADAMW: Arm(), NEAR_ZERO: Arm(start=1e-3), LORA_PLUS: Arm(optimizers.LORA_PLUS)} | {
    f"Stable-LoRA {ratio:g}": Arm(optimizers.OURS, shrink_ratio=ratio)
    for ratio in optimizers.SHRINK_RATIOS
}
TASKS = {"planted": widths.planted, "transformers": widths.transformers}


class Run(NamedTuple):
    task: str
    steps: int
    width: int
    seed: int
    arm: str
    law: str
    lr: float


class Preset(NamedTuple):
    widths: tuple[int, ...]
    seeds: int
    lrs: tuple[float, ...]
    steps: int = 300
    task: str = "planted"
    laws: int = 3  # of LAWS, the first ones


PRESETS = {
    "quick": Preset((64, 128, 256, 512, 1024), 3, (1e-4, 1e-3, 1e-2)),
    "full": Preset(
        (64, 128, 256, 512, 1024, 2048, 4096), 10, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ),
    "transformers": Preset(
        (64, 128, 256, 512), 5, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 100, "transformers", 2
    ),
}


def parts(preset: str, _records: Any) -> Iterator[list[Run]]:
    """All runs, the widest first, for they take longest."""
    chosen, runs = PRESETS[preset], []
    for width in sorted(chosen.widths, reverse=True):
        rates = [
            (law, lr * (64 / width) ** power) for law, (lr, power) in [*LAWS.items()][: chosen.laws]
        ]
        rates += [(GRID, lr) for lr in chosen.lrs]
        turns = product(range(chosen.seeds), ARMS, rates)
        runs += [
            Run(chosen.task, chosen.steps, width, seed, arm, *rate) for seed, arm, rate in turns
        ]
    yield runs


def execute(run: Run) -> list[dict[str, Any]]:
    """Train: a row of the whole run, and without a grid's rate a row of each probed step."""
    arm = ARMS[run.arm]
    problem = TASKS[run.task](run.width, run.seed, arm.start)
    return fit(problem, arm, run.lr, run.steps, () if run.law == GRID else PROBES)


def fit(
    problem: widths.Problem, arm: Arm, lr: float, steps: int, probes: Sequence[int]
) -> list[dict[str, Any]]:
    pairs, rows = problem.pairs, []
    options = {"shrink_ratio": arm.shrink_ratio} if arm.shrink_ratio else {}
    optimizer = optimizers.build(arm.optimizer, pairs, lr=lr, **options)
    for step in range(1, steps + 1):
        if step in probes:
            before = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
            with torch.no_grad():
                zs = problem.inputs()
        optimizer.zero_grad(set_to_none=True)
        problem.step_loss().backward()
        optimizer.step()
        if step in probes:
            latched = (
                [pair.latched for pair in optimizer.stability()]
                if arm.shrink_ratio
                else [True] * len(pairs)
            )
            found = [
                changes(
                    z,
                    a,
                    b,
                    a if stays else a * (1 - arm.shrink_ratio),
                    pair.A.detach(),
                    pair.B.detach(),
                )
                for z, (a, b), pair, stays in zip(zs, before, pairs, latched, strict=True)
            ]
            # Root mean squares over the elements, then over the pairs.
            sizes = {
                name: norm(part[name] / math.sqrt(part[name].numel()) for part in found)
                for name in PARTS
            }
            rows.append(
                {"step": step}
                | {name: size / math.sqrt(len(pairs)) for name, size in sizes.items()}
            )
    at = [pair.latched_at for pair in optimizer.stability()] if arm.shrink_ratio else []
    with torch.no_grad():
        loss = problem.held_out_loss()
    whole = {
        "loss": loss if math.isfinite(loss) else math.inf,
        "shrinks": statistics.median([steps if step is None else step - 1 for step in at] or [0]),
        "latched": int(bool(at) and None not in at),
    }
    return [*rows, whole]


def norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


def changes(
    z: Tensor, a: Tensor, b: Tensor, shrunk: Tensor, a_next: Tensor, b_next: Tensor
) -> dict[str, Tensor]:
    """A step's parts, the whole change ``delta``, and A Z, as ``a_z``; ``shrunk`` is A'."""
    d_a, d_b = a_next - shrunk, b_next - b
    found = {
        "delta_1": z @ shrunk.t() @ d_b.t(),
        "delta_2": z @ d_a.t() @ b.t(),
        "delta_3": z @ d_a.t() @ d_b.t(),
        "delta_shrink": z @ (shrunk - a).t() @ b.t(),
        "delta": z @ a_next.t() @ b_next.t() - z @ a.t() @ b.t(),
    }
    return {name: widths.SCALING * change for name, change in found.items()} | {"a_z": z @ a.t()}

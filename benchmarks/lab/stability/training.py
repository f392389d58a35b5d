"""Training of the planted task, with measurements: the parts of each step's output change, norms and latches.

One step moves an adapted layer's output on fixed inputs Z by s (A_{t+1}, B_{t+1} against A_t, B_t), which is exactly

    delta_1 = s dB A' Z        delta_2 = s B dA Z        delta_3 = s dB dA Z        delta_shrink = s B (A' - A) Z

with A' = A (1 - lambda) where the pair shrank, A elsewhere, and dA = A_{t+1} - A', dB = B_{t+1} - B. Sizes are root mean squares.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import optimizers
from benchmarks.lab.stability import planted_task
from benchmarks.lab.stability.planted_task import Planted
from stablelora_kernels.pairs import LoRAPair

BATCH = 64
PROBES = (1, 2, 5, 10, 20, 50, 100, 200, 300)
DELTAS = ("delta_1", "delta_2", "delta_3", "delta_shrink", "delta")


@dataclass(frozen=True)
class Arm:
    """An optimizer, and how A starts."""

    name: str
    optimizer: str = optimizers.ADAMW_FUSED
    start: float = 1.0
    shrink_ratio: float = 0.0

    def build(self, pairs: Sequence[LoRAPair], lr: float) -> Any:
        options = {"shrink_ratio": self.shrink_ratio} if self.optimizer == optimizers.OURS else {}
        return optimizers.build(self.optimizer, pairs, lr=lr, **options)


ADAMW, NEAR_ZERO, LORA_PLUS = Arm("AdamW"), Arm("AdamW, A near zero", start=1e-3), Arm("LoRA+", optimizers.LORA_PLUS)
STABLE = tuple(Arm(f"Stable-LoRA {ratio:g}", optimizers.OURS, shrink_ratio=ratio) for ratio in optimizers.SHRINK_RATIOS)
ARMS = (ADAMW, NEAR_ZERO, LORA_PLUS, *STABLE)


@dataclass(frozen=True)
class Law:
    """The learning rate at a width: ``lr * (64 / n) ** power``."""

    lr: float
    power: float

    def at(self, width: int) -> float:
        return self.lr * (64 / width) ** self.power


# Fixed, as people do; the one at which the theory has all parts stable; and one at which it calls the usual start unstable.
LAWS = {"fixed": Law(1e-3, 0.0), "n^-1/2": Law(1e-2, 0.5), "n^-5/4": Law(3e-2, 1.25)}


# A run of an arm at a learning rate, with probes or without: its record and those of its steps.
Train = Callable[[Arm, float, bool], tuple[dict[str, Any], list[dict[str, Any]]]]


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@torch.no_grad()
def parts(z: Tensor, before: tuple[Tensor, Tensor], shrunk: Tensor, after: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A step's parts and, as ``delta``, the whole change; ``shrunk`` is A'."""
    (a, b), (a_next, b_next) = before, after
    d_a, d_b = a_next - shrunk, b_next - b
    changes = {
        "delta_1": z @ shrunk.t() @ d_b.t(),
        "delta_2": z @ d_a.t() @ b.t(),
        "delta_3": z @ d_a.t() @ d_b.t(),
        "delta_shrink": z @ (shrunk - a).t() @ b.t(),
        "delta": z @ a_next.t() @ b_next.t() - z @ a.t() @ b.t(),
    }
    return {name: planted_task.SCALING * change for name, change in changes.items()}


def fit(
    pairs: Sequence[LoRAPair], step_loss: Callable[[], Tensor], inputs: Callable[[], Sequence[Tensor]],
    arm: Arm, lr: float, steps: int, probe: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Train the pairs: what shrinking has done and, with ``probe``, a record for each step of ``PROBES``.

    Args:
        step_loss: the loss of the next batch.
        inputs: what each pair's layer gets of held-out examples, [samples, n], with the adapters as they are.
    """
    optimizer, records = arm.build(pairs, lr), []
    start = math.hypot(*(pair.A.norm().item() for pair in pairs))
    for step in range(1, steps + 1):
        looked_at = probe and step in PROBES
        if looked_at:
            zs, before = inputs(), [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
        optimizer.zero_grad(set_to_none=True)
        step_loss().backward()
        optimizer.step()
        if looked_at:
            records.append({"step": step, **_record(zs, before, pairs, arm, optimizer)})
    latched = [pair.latched_at for pair in optimizer.stability()] if arm.shrink_ratio else []
    shrinks = statistics.median([steps if at is None else at - 1 for at in latched] or [0])
    found = {
        "latched_at": shrinks + 1 if latched and None not in latched else None,
        "shrinks": shrinks,
        "a_left": (1 - arm.shrink_ratio) ** shrinks,
        "a_over_start": math.hypot(*(pair.A.norm().item() for pair in pairs)) / start,
    }
    return found, records


def _record(
    zs: Sequence[Tensor], before: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[LoRAPair], arm: Arm, optimizer: Any
) -> dict[str, float]:
    """Sizes of a step's parts and of what they are made of: root mean squares over the pairs."""
    stable = [found.latched for found in optimizer.stability()] if arm.shrink_ratio else [True] * len(pairs)
    sizes: dict[str, list[float]] = defaultdict(list)
    for z, (a, b), pair, latched in zip(zs, before, pairs, stable, strict=True):
        shrunk = a if latched else a * (1 - arm.shrink_ratio)
        for name, change in parts(z, (a, b), shrunk, (pair.A.detach(), pair.B.detach())).items():
            sizes[name].append(rms(change))
        for name, size in (("a_z", rms(z @ a.t())), ("a_norm", a.norm().item()), ("b_norm", b.norm().item())):
            sizes[name].append(size)
    means = {name: math.hypot(*values) / math.sqrt(len(values)) for name, values in sizes.items()}
    return means | {"stable": int(all(stable))}


def train(task: Planted, seed: int, arm: Arm, lr: float, steps: int, probe: bool) -> tuple[dict[str, Any], list[Any]]:
    """A run on the planted task: its record and, with ``probe``, those of its steps."""
    a, b = (nn.Parameter(half) for half in planted_task.start(task.width, seed, arm.start))
    count = len(task.z) - task.held_out
    starts = cycle(range(0, count, BATCH))

    def step_loss() -> Tensor:
        first = next(starts)
        return task.loss(a, b, slice(first, first + BATCH))

    z = task.z[count:][:BATCH]
    found, records = fit([LoRAPair("planted", a, b)], step_loss, lambda: [z], arm, lr, steps, probe)
    with torch.no_grad():
        loss = task.loss(a, b, slice(count, None)).item()
    return {"loss": finite(loss), **found}, records


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def unit(
    width: int, seed: int, laws: dict[str, Law], lrs: Sequence[float], run: Train
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """All runs of one width and seed: every arm at every law and learning rate."""
    for arm in ARMS:
        for law, lr in [(name, law.at(width)) for name, law in laws.items()] + [("grid", lr) for lr in lrs]:
            mine = {"width": width, "seed": seed, "arm": arm.name, "law": law, "lr": lr}
            found, records = run(arm, lr, law != "grid")
            yield mine | found, [mine | record for record in records]

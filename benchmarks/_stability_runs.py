"""Training the planted task, and what is measured on the way: the parts of each step's output change, norms and latches.

One step moves an adapted layer's output on fixed inputs Z by s (A_{t+1}, B_{t+1} against A_t, B_t), which is exactly

    delta_1 = s dB A' Z        delta_2 = s B dA Z        delta_3 = s dB dA Z        delta_shrink = s B (A' - A) Z

with A' = A (1 - lambda) where the pair shrank, A elsewhere, and dA = A_{t+1} - A', dB = B_{t+1} - B. Sizes are root mean squares.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _planted, optimizers
from benchmarks._planted import Planted
from stablelora_kernels.pairs import LoRAPair

RATIOS = (5e-4, 1e-3, 2e-3, 5e-3)
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
STABLE = tuple(Arm(f"Stable-LoRA {ratio:g}", optimizers.OURS, shrink_ratio=ratio) for ratio in RATIOS)
ARMS = (ADAMW, NEAR_ZERO, LORA_PLUS, *STABLE)


@dataclass(frozen=True)
class Law:
    """How the learning rate goes with width: ``lr * (64 / n) ** power``."""

    lr: float
    power: float

    def at(self, width: int) -> float:
        return self.lr * (64 / width) ** self.power


# Fixed, as people do; the one at which the theory has all parts stable; and one at which it calls the usual start unstable.
LAWS = {"fixed": Law(1e-3, 0.0), "n^-1/2": Law(1e-2, 0.5), "n^-5/4": Law(3e-2, 1.25)}


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
    return {name: _planted.SCALING * change for name, change in changes.items()}


def train(task: Planted, seed: int, arm: Arm, lr: float, steps: int, probe: bool) -> tuple[dict[str, Any], list[Any]]:
    """The run's record and, with ``probe``, one for each step of ``PROBES``."""
    width = task.width
    a, b = (nn.Parameter(half) for half in _planted.start(width, seed, arm.start))
    optimizer = arm.build([LoRAPair("planted", a, b)], lr)
    count = len(task.z) - task.held_out
    held_out, records = slice(count, None), []
    z = task.z[held_out][:BATCH]
    initial = a.norm().item()
    for step in range(1, steps + 1):
        first = (step - 1) * BATCH % count
        optimizer.zero_grad(set_to_none=True)
        task.loss(a, b, slice(first, first + BATCH)).backward()
        looked_at = probe and step in PROBES
        before = (a.detach().clone(), b.detach().clone()) if looked_at else None
        optimizer.step()
        if before is not None:
            stable = not arm.shrink_ratio or optimizer.stability()[0].stable
            shrunk = before[0] if stable else before[0] * (1 - arm.shrink_ratio)
            changes = parts(z, before, shrunk, (a.detach(), b.detach()))
            record = {"step": step, **{name: rms(change) for name, change in changes.items()}}
            record |= {
                "a_z": rms(z @ before[0].t()),
                "a_norm": before[0].norm().item(),
                "b_norm": before[1].norm().item(),
                "stable": int(stable),
            }
            records.append(record)
    with torch.no_grad():
        loss = task.loss(a, b, held_out).item()
    return summary(loss, arm, optimizer, steps) | {"a_over_start": a.norm().item() / initial}, records


def summary(loss: float, arm: Arm, optimizer: Any, steps: int) -> dict[str, Any]:
    """A run's loss, and what shrinking has done: the median over its pairs."""
    latched = [pair.latched_at for pair in optimizer.stability()] if arm.shrink_ratio else []
    shrinks = statistics.median([steps if at is None else at - 1 for at in latched] or [0])
    return {
        "loss": loss if math.isfinite(loss) else math.inf,
        "latched_at": shrinks + 1 if latched and None not in latched else None,
        "shrinks": shrinks,
        "a_left": (1 - arm.shrink_ratio) ** shrinks,
    }


def unit(width: int, seed: int, lrs: tuple[float, ...], steps: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """All runs of one width and seed, on one task: every arm at every law and learning rate."""
    task = _planted.plant(width, seed)
    for arm in ARMS:
        for law, lr in [(name, law.at(width)) for name, law in LAWS.items()] + [("grid", lr) for lr in lrs]:
            key = {"width": width, "seed": seed, "arm": arm.name, "law": law, "lr": lr}
            run, records = train(task, seed, arm, lr, steps, probe=law != "grid")
            yield key | run, [key | record for record in records]

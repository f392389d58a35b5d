"""The same small trainings by one process and by several, and their results compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

import stablelora_kernels as slk

STEPS, ROWS = 6, 8
# Far above Adam's usual eps: a step is lr g / (sqrt(v) + eps), so that a small eps carries the
# rounding of a gradient near zero into the parameters, a thousand times its size, and hides a
# gradient that is wrong by a factor.
EPS = 0.03
# At this rate the pairs latch on the way, not all at once.
TRAINING: dict[str, Any] = {"lr": 0.1, "eps": EPS, "shrink_ratio": 0.1, "seed": 7}


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids, targets = (torch.randint(11, (STEPS, ROWS, 5), generator=generator) for _ in range(2))
    return ids, targets


def fit(
    model: torch.nn.Module,
    optimizer: slk.StableLoRAAdamW,
    rank: int,
    world: int,
    steps: range = range(STEPS),
) -> dict[str, Any]:
    """Train on this rank's part of every batch; return what has become of the adapters."""
    ids, targets = batches()
    share = ROWS // world
    mine = slice(rank * share, (rank + 1) * share)
    for step in steps:
        logits = model(ids[step, mine]).flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits, targets[step, mine].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: gather(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"params": trained, "latches": [s.latched_at for s in optimizer.stability()]}


def gather(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def compare(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["latches"] == expected["latches"] and any(got["latches"])
    assert got["params"].keys() == expected["params"].keys()
    for name, value in expected["params"].items():
        # Gradients are averaged in another order: at EPS that moves a parameter by less than a
        # twentieth of this, over 60 seeds of batches in halves and in quarters.
        torch.testing.assert_close(got["params"][name], value, rtol=1e-4, atol=1e-5)

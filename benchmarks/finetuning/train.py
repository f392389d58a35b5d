"""Fine-tuning of all arms in lockstep: each batch goes to every arm in turn, and each part of a step is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common.data import Batch
from benchmarks.common.measure import shuffled, synchronize
from benchmarks.common.models import autocast
from benchmarks.finetuning.arms import Arm

PHASES = ("forward", "backward", "optimizer")


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def forward(arm: Arm, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """The loss."""
    with autocast(batch["input_ids"].device, dtype):
        logits = arm.model(batch["input_ids"], batch["attention_mask"])
    return F.cross_entropy(logits, batch["labels"])


def rehearse(arms: list[Arm], batches: Iterable[Batch], dtype: torch.dtype) -> float:
    """The mean seconds of a step of all arms together, measured on forward and backward passes that train nothing.

    This also gets one-time costs (choosing and compiling kernels, filling allocators) out of the timed steps. They fall on the
    first batch, which does not count.
    """
    times = []
    for batch in batches:
        start = time.perf_counter()
        for arm in arms:
            arm.model.train()
            forward(arm, batch, dtype).backward()
            arm.model.zero_grad(set_to_none=True)
        synchronize()
        times.append(time.perf_counter() - start)
    return sum(times[1:]) / len(times[1:])


def train(arms: list[Arm], batches: Iterator[Batch], steps: int, seed: int, dtype: torch.dtype) -> Iterator[int]:
    """Take ``steps`` steps of all arms and yield each one's number. What an interrupt leaves is in the arms' series."""
    device = next(arms[0].model.parameters()).device
    for arm in arms:
        arm.model.train()
    for step in range(steps):
        batch = to_device(next(batches), device)
        for arm in shuffled(arms, step):
            # Equal masks in all arms if dropout is the backbone's alone. LoRA's own draws differ from arm to arm.
            torch.manual_seed(seed * 1_000_003 + step)
            arm.series.loss.append(_timed_step(arm, batch, dtype))
            if arm.scheduler:
                arm.scheduler.step()
        yield step


def phases(arm: Arm, batch: Batch, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The parts of a step, to be called in order: forward, which returns the loss, backward, optimizer."""
    outcome: list[torch.Tensor] = []

    def run_forward() -> torch.Tensor:
        outcome.append(forward(arm, batch, dtype))
        return outcome[0].detach()

    return zip(PHASES, (run_forward, lambda: outcome.pop().backward(), arm.step), strict=True)


def _timed_step(arm: Arm, batch: Batch, dtype: torch.dtype) -> float:
    results = {}
    synchronize()
    for phase, run in phases(arm, batch, dtype):
        start = time.perf_counter()
        results[phase] = run()
        synchronize()
        getattr(arm.series, f"{phase}_ms").append(1e3 * (time.perf_counter() - start))
    return results["forward"].item()


@torch.no_grad()
def evaluate(arm: Arm, batches: Iterable[Batch], dtype: torch.dtype) -> dict[str, float]:
    """The mean ``loss`` and ``accuracy`` over all labels of held-out batches."""
    arm.model.eval()
    device = next(arm.model.parameters()).device
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        batch = to_device(batch, device)
        with autocast(device, dtype):
            logits = arm.model(batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return {"loss": loss / count, "accuracy": right / count}

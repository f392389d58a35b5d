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
from benchmarks.finetuning.arms import Arm, Recipe

PHASES = ("forward", "backward", "optimizer")
NORMS_EVERY = 2
# L2 penalty on the probe's weights, over standardized features.
_PROBE_PENALTY = 1e-2


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def forward(arm: Arm, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the features under the head."""
    with autocast(batch["input_ids"].device, dtype):
        logits, features = arm.model(batch["input_ids"], batch["attention_mask"])
    return F.cross_entropy(logits, batch["labels"]), features.detach()


def rehearse(arms: list[Arm], batches: list[Batch], dtype: torch.dtype) -> float:
    """The mean seconds of a step of all arms together, measured on forward and backward passes that train nothing.

    This also gets one-time costs (choosing and compiling kernels, filling allocators) out of the timed steps. They fall on the
    first batch, which does not count.
    """
    for arm in arms:
        arm.model.train()
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:
            start = time.perf_counter()
        for arm in arms:
            forward(arm, batch, dtype)[0].backward()
            arm.optimizer.zero_grad(set_to_none=True)
        synchronize()
    return (time.perf_counter() - start) / max(1, len(batches) - 1)


def train(
    arms: list[Arm],
    batches: Iterator[Batch],
    recipe: Recipe,
    dtype: torch.dtype,
    features: list[tuple[torch.Tensor, torch.Tensor]],
    after_step: Callable[[int], bool],
) -> None:
    """Take ``recipe.steps`` steps, each recorded in the arms' ``series``, so that an interrupt loses one step at most.

    ``after_step`` returns whether to go on. ``features`` collects the first arm's features and the labels of every batch, for
    :func:`probe`.
    """
    device = next(arms[0].model.parameters()).device
    _record_norms(arms, 0)
    for step in range(recipe.steps):
        batch = to_device(next(batches), device)
        for arm in shuffled(arms, step):
            # Equal masks in all arms if dropout is the backbone's alone. LoRA's own draws differ from arm to arm.
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            loss, pooled = _timed_step(arm, batch, dtype)
            arm.series.loss.append(loss)
            if arm is arms[0]:
                features.append((pooled, batch["labels"]))
            arm.scheduler.step()
        if (step + 1) % NORMS_EVERY == 0 or step + 1 == recipe.steps:
            _record_norms(arms, step + 1)
        if not after_step(step):
            break


def phases(arm: Arm, batch: Batch, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The parts of a step, to be called in order: forward (the loss and the features), backward, optimizer."""
    outcome: list[torch.Tensor] = []

    def run_forward() -> tuple[torch.Tensor, torch.Tensor]:
        loss, features = forward(arm, batch, dtype)
        outcome.append(loss)
        return loss.detach(), features

    def run_optimizer() -> None:
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)

    return zip(PHASES, (run_forward, lambda: outcome.pop().backward(), run_optimizer), strict=True)


def _timed_step(arm: Arm, batch: Batch, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    results = {}
    synchronize()
    for phase, run in phases(arm, batch, dtype):
        start = time.perf_counter()
        results[phase] = run()
        synchronize()
        getattr(arm.series, f"{phase}_ms").append(1e3 * (time.perf_counter() - start))
    loss, features = results["forward"]
    return loss.item(), features


def _record_norms(arms: list[Arm], step: int) -> None:
    for arm in arms:
        if arm.pairs:
            arm.series.norms.append({"step": step, **arm.norms()})


@torch.no_grad()
def evaluate(
    arm: Arm, batches: Iterable[Batch], dtype: torch.dtype, after_batch: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Per held-out example, on the CPU: ``correct``, ``loss``, and the ``features`` and ``labels``."""
    arm.model.eval()
    device = next(arm.model.parameters()).device
    parts: dict[str, list[torch.Tensor]] = {"correct": [], "loss": [], "features": [], "labels": []}
    for batch in batches:
        batch = to_device(batch, device)
        with autocast(device, dtype):
            logits, features = arm.model(batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"]
        parts["correct"].append(logits.argmax(1) == labels)
        parts["loss"].append(F.cross_entropy(logits, labels, reduction="none"))
        parts["features"].append(features)
        parts["labels"].append(labels)
        after_batch(len(labels))
    arm.model.train()
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def probe(
    train_features: torch.Tensor, train_labels: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, classes: int
) -> torch.Tensor:
    """Which examples a logistic regression gets right, fitted to convergence on frozen features.

    It is the best that a linear head can do with the frozen model's features and the training examples the arms have seen.
    """
    mean, std = train_features.mean(0), train_features.std(0) + 1e-6
    inputs = ((train_features - mean) / std).double()
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), train_labels) + _PROBE_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return F.linear(((features - mean) / std).double(), weight, bias).argmax(1) == labels

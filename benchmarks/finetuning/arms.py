"""The compared arms: the frozen model, the ``peft`` package with torch's AdamW, and this library in its two ways.

This library's arms train with ``StableLoRAAdamW``. They differ in their layers: ``accelerate_peft`` runs PEFT's model on this
library's ops, ``apply_lora`` puts this library's layers in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.models import Classifier, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FROZEN, PEFT, ACCELERATED, STABLE = "frozen", "peft", "accelerated", "stable"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters that all arms share."""

    target_modules: tuple[str, ...]
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lr: float = 3e-3
    weight_decay: float = 1e-2
    steps: int = 100
    warmup_steps: int = 10
    seed: int = 0

    def schedule(self, step: int) -> float:
        """The factor on the learning rate at a 0-based step: linear warm-up, then linear decay to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))


@dataclass
class Series:
    """An arm's training, step by step."""

    loss: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    # One record every NORMS_EVERY steps: step, a_norm, b_norm, latched.
    norms: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Arm:
    """One model with its own optimizer and schedule."""

    name: str
    label: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    pairs: list[slk.LoRAPair]
    shrink_ratio: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=Series)

    def norms(self) -> dict[str, float]:
        """The pairs' mean ||A||_F and ||B||_F, and how many stopped shrinking. It synchronizes with the device."""
        if not self.pairs:
            return {}
        with torch.no_grad():
            a, b = (torch.stack([getattr(pair, x).float().norm() for pair in self.pairs]).mean().item() for x in "AB")
        latched = sum(item.stable for item in self.optimizer.stability()) if self.shrink_ratio is not None else 0
        return {"a_norm": a, "b_norm": b, "latched": latched}


def arm_name(layers: str, shrink_ratio: float) -> str:
    """The name of an arm of this library: ``layers`` is ``ACCELERATED`` or ``STABLE``."""
    return f"{layers}-{shrink_ratio:g}"


def build_arm(name: str, backbone: PreTrainedModel, classes: int, recipe: Recipe, device: torch.device) -> Arm:
    """An arm over the weights of ``backbone``: "frozen", "peft", "accelerated-<shrink ratio>" or "stable-<shrink ratio>"."""
    hidden = backbone.config.hidden_size
    own = share(backbone)
    # build_arms copies the first arm's A to the others.
    torch.manual_seed(recipe.seed)
    layers, _, ratio = name.partition("-")
    shrink_ratio = float(ratio) if ratio else None
    if name == FROZEN:
        label = "frozen"
        let_gradients_reach(own, recipe.target_modules)
    elif name == PEFT:
        label = "PEFT + AdamW"
        own = _peft_model(own, recipe)
    elif layers == ACCELERATED and ratio:
        label = f"accelerate_peft λ={ratio}"
        own = _peft_model(own, recipe)
        # Strict: the arm's name would be untrue of a layer that PEFT's own forward computes.
        slk.accelerate_peft(own, strict=True)
    elif layers == STABLE and ratio:
        label = f"apply_lora λ={ratio}"
        slk.apply_lora(own, slk.LoRAConfig(**_lora_fields(recipe)))
    else:
        known = f"{FROZEN!r}, {PEFT!r}, '{ACCELERATED}-<shrink ratio>' or '{STABLE}-<shrink ratio>'"
        raise ValueError(f"arm must be {known}, got {name!r}")
    model = Classifier(own, hidden, classes, recipe.seed).to(device)
    optimizer, notes = _optimizer(model, recipe, shrink_ratio)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    return Arm(name, label, model, optimizer, scheduler, slk.lora_pairs(model), shrink_ratio, notes)


def _lora_fields(recipe: Recipe) -> dict[str, Any]:
    """What PEFT's config and ours both take."""
    return {
        "r": recipe.r,
        "lora_alpha": recipe.lora_alpha,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": list(recipe.target_modules),
    }


def _peft_model(model: nn.Module, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**_lora_fields(recipe)))


def build_arms(
    names: Sequence[str], backbone: PreTrainedModel, classes: int, recipe: Recipe, device: torch.device
) -> list[Arm]:
    """The arms, with equal A and zero B at the start."""
    arms = [build_arm(name, backbone, classes, recipe, device) for name in names]
    adapted = [arm for arm in arms if arm.pairs]
    for arm in adapted[1:]:
        with torch.no_grad():
            for mine, first in zip(arm.pairs, adapted[0].pairs, strict=True):
                mine.A.copy_(first.A)
    return arms


def let_gradients_reach(model: nn.Module, targets: Sequence[str]) -> None:
    """Make the frozen model's backward pass as deep as LoRA's, so that the difference is LoRA's own cost.

    LoRA needs the gradient of every adapted layer's output; the frozen model alone would not compute the first one's.
    """

    def ask(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            module.register_forward_hook(ask)


def _optimizer(
    model: Classifier, recipe: Recipe, shrink_ratio: float | None
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    notes: dict[str, Any] = {"trainable": sum(p.numel() for _, p in named)}
    if shrink_ratio is not None:
        return slk.StableLoRAAdamW(named, shrink_ratio=shrink_ratio, **common), notes
    parameters = [p for _, p in named]
    try:
        # The rival at its best: one fused call, if this build of torch has it for the device.
        notes["fused"] = True
        return torch.optim.AdamW(parameters, fused=True, **common), notes
    except RuntimeError:
        notes["fused"] = False
        return torch.optim.AdamW(parameters, foreach=True, **common), notes


def shrinkage(latched_at: Sequence[int | None], shrink_ratio: float, steps: int) -> dict[str, float]:
    """How many steps shrank A before the latch, and the share of ||A|| that they alone left."""
    counts = [steps if at is None else at - 1 for at in latched_at]
    mean = sum(counts) / len(counts)
    factor = sum((1 - shrink_ratio) ** count for count in counts) / len(counts)
    return {
        "shrinks_mean": mean,
        "shrinks_min": min(counts),
        "shrinks_max": max(counts),
        "a_factor": factor,
        "latched": sum(at is not None for at in latched_at),
    }


def earliest_latch(pairs: Sequence[slk.LoRAPair], lr: float) -> int:
    """About the first step at which a latch is possible, at the full learning rate and PEFT's start (median over pairs).

    ||B||_F / m grows by at most about lr·sqrt(r / m) a step and meets ||A0||_F / n = sqrt(r / 3) / n.
    """
    steps = sorted(math.sqrt(pair.B.shape[0] / 3) / (pair.A.shape[1] * lr) for pair in pairs)
    return math.ceil(steps[len(steps) // 2])

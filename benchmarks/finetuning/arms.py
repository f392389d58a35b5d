"""The compared arms: the frozen model, PEFT with torch's AdamW, PEFT with one more line, and this library's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.models import share
from benchmarks.finetuning.tasks import Head, hidden_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FROZEN, PEFT, ACCELERATED, STABLE = "frozen", "peft", "accelerated", "stable"
LABELS = {
    FROZEN: "frozen",
    PEFT: "PEFT",
    ACCELERATED: "PEFT + one line",
    STABLE: "our layers, Stable-LoRA",
}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of all arms. ``shrink_ratio`` is Stable-LoRA's λ, ``head_lr`` the rate of a new head."""

    target_modules: tuple[str, ...]
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    lr: float = 1e-3
    head_lr: float = 3e-3
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    shrink_ratio: float = 5e-4
    steps: int = 30

    def schedule(self, step: int) -> float:
        """The factor on the learning rate at a 0-based step: linear warm-up over a tenth of the steps, then decay to zero."""
        warmup = max(1, self.steps // 10)
        return (step + 1) / warmup if step < warmup else (self.steps - step) / max(1, self.steps - warmup)


@dataclass
class Series:
    """An arm's training with one seed, step by step."""

    loss: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)


@dataclass
class Arm:
    """One model with its optimizer. ``step`` updates the parameters and clears the gradients; the frozen model's does nothing."""

    name: str
    model: nn.Module
    pairs: list[slk.LoRAPair] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip: Callable[[], Any] = lambda: None
    series: Series = field(default_factory=Series)

    def step(self) -> None:
        if self.optimizer:
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """The pairs' mean ||A||_F and ||B||_F."""
        sizes = [torch.stack([getattr(pair, x).float().norm() for pair in self.pairs]).mean().item() for x in "AB"]
        return dict(zip(("a_norm", "b_norm"), sizes, strict=True))


def adapt(name: str, model: nn.Module, recipe: Recipe) -> nn.Module:
    """Put an arm's adapters into ``model``, as a user would.

    Raises:
        ValueError: there is no such arm, or ``model`` has a layer that this library would leave to PEFT.
    """
    adapters: dict[str, Any] = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
    adapters["target_modules"] = list(recipe.target_modules)
    if name == FROZEN:
        let_gradients_reach(model, recipe.target_modules)
    elif name in (PEFT, ACCELERATED):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**adapters))
        if name == ACCELERATED:
            # Strict: the arm's name would be untrue of a layer that PEFT's own forward computes.
            slk.accelerate_peft(model, strict=True, fuse_mlp=True)
    elif name == STABLE:
        slk.apply_lora(model, slk.LoRAConfig(**adapters), fuse_mlp=True)
    else:
        raise ValueError(f"arm must be one of {', '.join(LABELS)}, got {name!r}")
    return model


def build_arm(name: str, backbone: PreTrainedModel, head: Head, recipe: Recipe, seed: int, device: torch.device) -> Arm:
    """An arm over the weights of ``backbone``, which all arms share."""
    torch.manual_seed(seed)
    model = head.put_on(adapt(name, share(backbone), recipe), hidden_size(backbone), seed).to(device)
    arm = Arm(name, model, slk.lora_pairs(model))
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return arm
    added = [(key, p) for key, p in trained if key.startswith("head.")]
    groups = [{"params": [item for item in trained if item not in added]}, {"params": added, "lr": recipe.head_lr}]
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    parameters: list[Any] = [group for group in groups if group["params"]]
    if name == STABLE:
        more = {"shrink_ratio": recipe.shrink_ratio, "max_grad_norm": recipe.max_grad_norm}
        arm.optimizer = slk.StableLoRAAdamW(parameters, **common, **more)
    else:
        # The rival at its best: one fused call.
        arm.optimizer = torch.optim.AdamW(parameters, fused=True, **common)
        arm.clip = lambda: nn.utils.clip_grad_norm_([p for _, p in trained], recipe.max_grad_norm)
    arm.scheduler = torch.optim.lr_scheduler.LambdaLR(arm.optimizer, recipe.schedule)
    return arm


def build_arms(names: Sequence[str], *args: Any) -> list[Arm]:
    """The arms of :func:`build_arm`, with equal A and zero B at the start."""
    arms = [build_arm(name, *args) for name in names]
    first, *others = [arm for arm in arms if arm.pairs] or [None]
    for arm in others:
        with torch.no_grad():
            for mine, theirs in zip(arm.pairs, first.pairs, strict=True):
                mine.A.copy_(theirs.A)
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

"""The compared arms and their training in lockstep: frozen, PEFT with torch's AdamW, PEFT with one
more line, our own layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import stablelora_kernels as slk
from benchmarks.common import arms as common
from benchmarks.common.data import Batch
from benchmarks.common.measure import seconds_of, shuffled
from benchmarks.common.memory import MIB, saved_for_backward, status_mib
from benchmarks.common.models import Classifier, NextToken, autocast, load_model, share
from benchmarks.finetuning.recipe import ACCELERATED, FROZEN, PEFT, STABLE, Recipe

PHASES = ("forward", "backward", "optimizer")
SAVED, PEAK = "MiB saved for backward", "MiB at the peak"
LAYERS = {
    FROZEN: common.FROZEN,
    PEFT: common.PEFT,
    ACCELERATED: common.ACCELERATED + common.MLP_FUSED,
    STABLE: common.OURS + common.MLP_FUSED,
}


@dataclass
class Arm:
    """One model with its optimizer. ``step`` updates the parameters and clears the gradients; the
    frozen model's does nothing.
    """

    name: str
    model: nn.Module
    pairs: list[slk.LoRAPair] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip: Callable[[], Any] = lambda: None
    # The last forward pass's, without its graph.
    loss: torch.Tensor | None = None

    def step(self) -> None:
        if self.optimizer:
            self.clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def build_arm(
    name: str, backbone: Any, classes: int | None, recipe: Recipe, seed: int, device: torch.device
) -> Arm:
    """An arm over the weights of ``backbone``, which all arms share, with a new head unless
    ``classes`` is None.

    Raises:
        ValueError: ``backbone`` has a layer that this library would leave to PEFT.
    """
    torch.manual_seed(seed)
    adapters = {"r": recipe.r, "alpha": recipe.lora_alpha, "dropout": recipe.lora_dropout}
    # A model need not have MLPs that can be fused.
    model = common.adapt(share(backbone), LAYERS[name], recipe.targets, **adapters, every_mlp=False)
    hidden_size = backbone.config.get_text_config().hidden_size
    model = NextToken(model) if classes is None else Classifier(model, hidden_size, classes, seed)
    arm = Arm(name, model.to(device), slk.lora_pairs(model))
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return arm
    added = [(key, p) for key, p in trained if key.startswith("head.")]
    groups = [
        {"params": [item for item in trained if item not in added]},
        {"params": added, "lr": recipe.head_lr},
    ]
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    parameters: list[Any] = [group for group in groups if group["params"]]
    if name == STABLE:
        options |= {"shrink_ratio": recipe.shrink_ratio, "max_grad_norm": recipe.max_grad_norm}
        arm.optimizer = slk.StableLoRAAdamW(parameters, **options)
    else:
        # The rival at its best: one fused call.
        arm.optimizer = torch.optim.AdamW(parameters, fused=True, **options)
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


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def forward(arm: Arm, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """The loss."""
    return F.cross_entropy(_logits(arm.model, batch, dtype), batch["labels"])


def _logits(model: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    with autocast(batch["input_ids"].device, dtype):
        return model(batch["input_ids"], batch["attention_mask"])


def phases(arm: Arm, batch: Batch, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The parts of a step, to be called in order: forward, which returns the loss, backward,
    optimizer.
    """
    graph: list[torch.Tensor] = []

    def run_forward() -> torch.Tensor:
        graph.append(forward(arm, batch, dtype))
        arm.loss = graph[0].detach()
        return arm.loss

    return zip(PHASES, (run_forward, lambda: graph.pop().backward(), arm.step), strict=True)


def train(
    arms: Sequence[Arm], batches: Iterator[Batch], recipe: Recipe, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Take the recipe's steps with all arms. Yields each one's rows, one an arm: its loss, and the
    milliseconds of each part.
    """
    device = next(arms[0].model.parameters()).device
    for arm in arms:
        arm.model.train()
    for step in range(recipe.steps):
        batch, rows = to_device(next(batches), device), []
        for arm in shuffled(arms, step):
            # Equal masks in all arms if dropout is the backbone's alone. LoRA's own draws differ
            # from arm to arm.
            torch.manual_seed(seed * 1_000_003 + step)
            seconds = seconds_of(dict(phases(arm, batch, getattr(torch, recipe.dtype))), PHASES)
            times = {f"{phase}_ms": 1e3 * value for phase, value in seconds.items()}
            rows.append(
                {"arm": arm.name, "seed": seed, "step": step + 1, "loss": arm.loss.item(), **times}
            )
            if arm.scheduler:
                arm.scheduler.step()
        yield rows


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], dtype: torch.dtype) -> dict[str, float]:
    """The mean ``loss`` and ``accuracy`` over all labels of held-out batches that are not -100."""
    model.eval()
    device = next(model.parameters()).device
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        batch = to_device(batch, device)
        logits, labels = _logits(model, batch, dtype), batch["labels"]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += int((labels >= 0).sum())
    return {"loss": loss / count, "accuracy": right / count}


def peak_memory(
    arm: Arm, batch: Batch, dtype: torch.dtype, device: torch.device, steps: int = 2
) -> dict[str, float]:
    """The peak over whole steps, and how far it is above the memory held between steps, in MiB;
    nothing if unknown.
    """
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    else:
        # Have glibc give back what was freed, or the process would seem to hold it. Without glibc
        # the figure above the idle process is a little low.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            # Linux: reset the high-water mark, which loading the model has raised.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return {}
        before = status_mib("VmRSS") or 0.0
    for _ in range(steps):
        for _, run in phases(arm, batch, dtype):
            run()
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu else status_mib("VmHWM")
    return {} if peak is None else {"peak_mib": round(peak, 1), "step_mib": round(peak - before, 1)}


def footprint(
    name: str, classes: int | None, recipe: Recipe, batch: Batch, threads: int
) -> dict[str, float]:
    """The memory of a step of an arm that is alone in this process, in MiB."""
    # Every arm's process holds the same packages, so that peaks differ by the arms alone.
    import peft  # noqa: F401

    torch.set_num_threads(threads)
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    backbone, _ = load_model(recipe.model, causal=classes is None)
    arm = build_arm(name, backbone.to(device, dtype), classes, recipe, 0, device)
    batch = to_device(batch, device)
    arm.model.train()
    for _, run in phases(arm, batch, dtype):
        run()
    peak = peak_memory(arm, batch, dtype, device)
    owned = [*arm.model.parameters(), *arm.model.buffers(), *batch.values()]
    saved = saved_for_backward(lambda: forward(arm, batch, dtype), owned) / MIB
    above = f"{PEAK}, above the idle process"
    return {SAVED: round(saved, 2)} | (
        {PEAK: peak["peak_mib"], above: peak["step_mib"]} if peak else {}
    )

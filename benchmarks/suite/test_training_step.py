"""A whole training step: forward with its loss, backward, optimizer. The ``pretrained`` case takes every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.finetuning.arms import let_gradients_reach
from benchmarks.suite.layers import (
    ACCELERATED,
    AUTOCAST,
    DTYPE_NAMES,
    PEFT,
    PEFT_COMPILED,
    autocast,
    compiled,
    stored_dtype,
)
from benchmarks.suite.llama import TARGETS, Sizes, fill, llama, our_model, peft_model
from benchmarks.suite.pretrained import PretrainedCase
from benchmarks.suite.rivals import Case, Parts

FROZEN, OURS, OURS_COMPILED, OURS_FUSED = "frozen", "ours", "ours compiled", "ours, projections fused"


@dataclass(frozen=True)
class TrainingCase(Case):
    base = FROZEN
    rival = PEFT
    ours = (OURS, OURS_FUSED, OURS_COMPILED, ACCELERATED)
    arms = (FROZEN, PEFT, PEFT_COMPILED, *ours)
    phases: ClassVar = {"step": ("forward", "backward", "optimizer")}

    sizes: Sizes
    batch: int
    length: int
    r: int
    dtype: str
    device: torch.device

    @property
    def name(self) -> str:
        return f"training {self.sizes} batch {self.batch}x{self.length} r{self.r} {self.dtype}"

    def open(self) -> None:
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.sizes.vocabulary, (self.batch, self.length), generator=generator)
        self.shared["ids"] = ids.to(self.device)

    def build(self, arm: str) -> Parts:
        model = llama(self.sizes, self.device, stored_dtype(self.dtype))
        optimizer: Any = None
        if arm == FROZEN:
            let_gradients_reach(model, TARGETS)
        else:
            model = self._adapted(arm, model)
            fill(model)
            ours = arm in self.ours
            name = optimizers.OURS if ours else optimizers.ADAMW_FUSED
            optimizer = optimizers.build(name, slk.lora_pairs(model), lr=1e-5)
        return self._parts(
            compiled(model) if arm in (PEFT_COMPILED, OURS_COMPILED) else model, model.train(), optimizer
        )

    def _adapted(self, arm: str, model: nn.Module) -> nn.Module:
        if arm in (OURS, OURS_COMPILED, OURS_FUSED):
            return our_model(model, self.r, fuse_projections=arm == OURS_FUSED)
        model = peft_model(model, self.r)
        if arm == ACCELERATED:
            slk.accelerate_peft(model, strict=True)
        return model

    def _parts(self, call: Any, model: nn.Module, optimizer: Any) -> Parts:
        ids, loss = self.shared["ids"], []
        trained = [p for p in model.parameters() if p.requires_grad]

        def prepare() -> None:
            loss.clear()
            for parameter in trained:
                parameter.grad = None

        def forward() -> None:
            with autocast(self.device, self.dtype):
                logits = call(ids).logits
            loss.append(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

        step = optimizer.step if optimizer else lambda: None
        return {"prepare": prepare, "forward": forward, "backward": lambda: loss[0].backward(), "optimizer": step}


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [
            TrainingCase(Sizes(1, 32, 64), 2, 8, 2, "fp32", device),
            PretrainedCase("random", "query-value", "fp32", device),
        ]
    quick = [TrainingCase(Sizes(2, 512), 4, 128, 8, dtype, device) for dtype in ("fp32", AUTOCAST)]
    pretrained = [
        PretrainedCase("smollm2", targets, dtype, device)
        for targets in ("query-value", "all-linear")
        for dtype in ("fp32", AUTOCAST)
    ]
    full = [TrainingCase(Sizes(4, 768), 4, 128, r, dtype, device) for r in (8, 64) for dtype in DTYPE_NAMES]
    return [*quick, *pretrained, *(full if suite == "full" else [])]


def test_training(compare: Callable[[], None]) -> None:
    compare()

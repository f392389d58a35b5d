"""A whole training step: forward with its loss, backward, optimizer. The ``pretrained`` case takes
every optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.arms import (
    ACCELERATED,
    FROZEN,
    OURS,
    PEFT,
    PLAIN,
    PROJECTIONS_FUSED,
    adapt,
)
from benchmarks.common.models import linear_names, load_model, query_value_names, share
from benchmarks.suite import layers
from benchmarks.suite.layers import AUTOCAST, COMPILED, OURS_COMPILED, PEFT_COMPILED, STORED, Sizes
from benchmarks.suite.rivals import Case, Parts


@dataclass(frozen=True)
class TrainingCase(Case):
    """A causal language model on random tokens, the same in every arm. All pairs keep shrinking:
    Stable-LoRA costs most then.
    """

    base = FROZEN
    rival = PEFT
    ours = (OURS, OURS + PROJECTIONS_FUSED, OURS_COMPILED, ACCELERATED)
    arms = (FROZEN, PEFT, PLAIN, PEFT_COMPILED, *ours)
    phases: ClassVar = {"step": ("forward", "backward", "optimizer")}

    # Random weights of these sizes, or the name of a pretrained model.
    model: Sizes | str
    batch: int
    length: int
    r: int
    dtype: str
    device: torch.device
    targets: str = "all-linear"

    @property
    def name(self) -> str:
        targets = f" {self.targets}" if self.mark else ""
        return f"training {self.model}{targets} batch {self.batch}x{self.length} r{self.r} {self.dtype}"

    def adapters_and_optimizer(self, arm: str) -> tuple[str, str]:
        return layers.ADAPTERS.get(
            arm, arm
        ), optimizers.OURS if arm in self.ours else optimizers.ADAMW_FUSED

    def open(self) -> None:
        torch._dynamo.reset()
        if isinstance(self.model, Sizes):
            base = layers.llama(self.model, self.device, STORED[self.dtype])
        else:
            base = load_model(self.model, causal=True)[0].to(self.device, STORED[self.dtype])
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(base.config.vocab_size, (self.batch, self.length), generator=generator)
        names = linear_names(base) if self.targets == "all-linear" else query_value_names(base)
        self.shared.update(base=base, ids=ids.to(self.device), names=names, optimizers={})

    def build(self, arm: str) -> Parts:
        ids, loss = self.shared["ids"], []
        adapters, name = self.adapters_and_optimizer(arm)
        model = adapt(share(self.shared["base"]), adapters, self.shared["names"], r=self.r).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        call: Any = layers.compiled(model) if arm in COMPILED else model
        optimizer = optimizers.build(name, slk.lora_pairs(model), lr=1e-5) if trained else None
        self.shared["optimizers"][arm] = optimizer

        def prepare() -> None:
            loss.clear()
            for parameter in trained:
                parameter.grad = None

        def forward() -> None:
            with layers.autocast(self.device, self.dtype):
                logits = call(ids).logits
            loss.append(
                nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
                )
            )

        step = optimizer.step if optimizer else lambda: None
        return {
            "prepare": prepare,
            "forward": forward,
            "backward": lambda: loss[0].backward(),
            "optimizer": step,
        }

    def notes(self, arm: str) -> dict[str, Any]:
        optimizer = self.shared["optimizers"][arm]
        return {"state_bytes": optimizers.state_bytes(optimizer) if optimizer else 0}


# Percent over AdamW's training time for 0.5 billion parameters, from the paper (arXiv 2603.05204).
PAPER = {
    optimizers.ADAMW_FUSED: 0.0,
    optimizers.LORA_PLUS: 0.0,
    optimizers.OURS: 0.6,
    optimizers.RIEMANNIAN: 8.3,
    optimizers.RITE: 46.0,
}
OURS_WHOLE = "this library: layers and optimizer"
EVERY = {f"{PEFT}, {name}": (PEFT, name) for name in (*PAPER, optimizers.NAIVE_FOREACH)}
EVERY[OURS_WHOLE] = OURS, optimizers.OURS


@dataclass(frozen=True)
class PretrainedCase(TrainingCase):
    """What each optimizer adds to a step: the paper's overhead table, and our row in it.

    The base is what most people run today: PEFT's layers and torch's fused AdamW. Forward and
    backward of two arms with equal layers differ by noise alone; ``optimizer added_percent``
    compares the optimizers alone.
    """

    base = f"{PEFT}, {optimizers.ADAMW_FUSED}"
    rival = base
    ours = (OURS_WHOLE, f"{PEFT}, {optimizers.OURS}")
    arms = tuple(EVERY)
    mark = "pretrained"

    def adapters_and_optimizer(self, arm: str) -> tuple[str, str]:
        return EVERY[arm]

    def notes(self, arm: str) -> dict[str, Any]:
        name = EVERY[arm][1]
        return super().notes(arm) | ({"paper_percent": PAPER[name]} if name in PAPER else {})


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        sizes = Sizes(1, 32, 64)
        return [
            TrainingCase(sizes, 2, 8, 2, "fp32", device),
            PretrainedCase(sizes, 2, 8, 2, "fp32", device, "query-value"),
        ]
    found: list[Case] = [
        TrainingCase(Sizes(2, 512), 4, 128, 8, dtype, device) for dtype in ("fp32", AUTOCAST)
    ]
    for targets, dtype in product(("query-value", "all-linear"), ("fp32", AUTOCAST)):
        found.append(PretrainedCase("smollm2", 4, 32, 8, dtype, device, targets))
    if suite == "full":
        found += [
            TrainingCase(Sizes(4, 768), 4, 128, r, dtype, device)
            for r, dtype in product((8, 64), STORED)
        ]
    return found


def test_training(compare: Callable[[], None]) -> None:
    compare()

"""What each optimizer adds to a training step of SmolLM2-135M: the paper's overhead table, and our row in it.

Each arm trains adapters of its own over the same frozen weights, on the same batches. All pairs keep shrinking: the method
costs most then. The base is what most people run today: PEFT's layers and torch's fused AdamW. Forward and backward of two arms
with equal layers differ by noise alone; ``parts.optimizer.added_percent`` compares the optimizers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar

import torch

from benchmarks.common import optimizers
from benchmarks.common.data import load_dataset, training_batches
from benchmarks.common.models import linear_names, load_model, query_value_names
from benchmarks.finetuning.arms import PEFT, STABLE, Recipe, build_arm
from benchmarks.finetuning.tasks import Head
from benchmarks.finetuning.train import forward, to_device
from benchmarks.suite.layers import AUTOCAST
from benchmarks.suite.llama import Sizes, llama
from benchmarks.suite.rivals import Case, Parts

# Percent over AdamW's training time for 0.5 billion parameters, from the paper (arXiv 2603.05204).
PAPER = {
    optimizers.ADAMW_FUSED: 0.0,
    optimizers.LORA_PLUS: 0.0,
    optimizers.OURS: 0.6,
    optimizers.RIEMANNIAN: 8.3,
    optimizers.RITE: 46.0,
}
OURS_WHOLE = "this library: layers and optimizer"
OPTIMIZERS = (*PAPER, optimizers.NAIVE_FOREACH)
ARMS = {f"PEFT, {name}": (PEFT, name) for name in OPTIMIZERS} | {OURS_WHOLE: (STABLE, optimizers.OURS)}
BASE = f"PEFT, {optimizers.ADAMW_FUSED}"
BATCH, BATCHES, R = 16, 40, 8


@dataclass(frozen=True)
class PretrainedCase(Case):
    base = BASE
    rival = BASE
    ours = (OURS_WHOLE, f"PEFT, {optimizers.OURS}")
    arms = tuple(ARMS)
    phases: ClassVar = {"step": ("forward and backward", "optimizer")}
    mark = "pretrained"

    # "random" is a Llama of random weights on random tokens: it needs no download.
    model: str
    targets: str
    dtype: str
    device: torch.device

    @property
    def name(self) -> str:
        return f"training {self.model} {self.targets} batch {BATCH} r{R} {self.dtype}"

    def open(self) -> None:
        if self.model == "random":
            backbone, batches = llama(Sizes(2, 32, 64), self.device, torch.float32).model, _random_batches()
        else:
            backbone, tokenizer = load_model(self.model)
            dataset = load_dataset("sarcasm", seed=0, held_out=600)
            batches = [*islice(training_batches(dataset, tokenizer, batch_size=BATCH, seed=0), BATCHES)]
        targets = linear_names(backbone) if self.targets == "all-linear" else query_value_names(backbone)
        self.shared.update(
            backbone=backbone.to(self.device),
            batches=[to_device(batch, self.device) for batch in batches],
            recipe=Recipe(targets, r=R, lora_alpha=2 * R, lora_dropout=0.0, lr=1e-4),
            optimizers={},
        )

    def build(self, arm: str) -> Parts:
        layers, name = ARMS[arm]
        recipe = self.shared["recipe"]
        made = build_arm(layers, self.shared["backbone"], Head(2), recipe, 0, self.device)
        # Only pairs are trained.
        made.model.head.requires_grad_(False)
        made.model.train()
        optimizer = optimizers.build(name, made.pairs, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.shared["optimizers"][arm] = optimizer
        batches = cycle(self.shared["batches"])
        dtype = torch.bfloat16 if self.dtype == AUTOCAST else torch.float32
        return {
            "prepare": lambda: optimizer.zero_grad(set_to_none=True),
            "forward and backward": lambda: forward(made, next(batches), dtype).backward(),
            "optimizer": optimizer.step,
        }

    def notes(self, arm: str) -> dict[str, Any]:
        # PEFT's optimizers wrap torch's own.
        states = self.shared["optimizers"][arm].state.values()
        tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.dim()]
        return {"state_bytes": sum(t.nbytes for t in tensors), "paper_percent": PAPER.get(ARMS[arm][1])}


def _random_batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 2}]

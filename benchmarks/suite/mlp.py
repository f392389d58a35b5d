"""A Llama's gated MLP with an adapter on each projection: PEFT's layers, ours one by one, and ours in one op (``fuse_mlp``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from benchmarks.suite.llama import fill
from benchmarks.suite.rivals import Case, Parts, size
from stablelora_kernels.testing import DTYPES

FROZEN, PEFT, APART, PROJECTIONS = "frozen MLP", "PEFT", "ours, one by one", "ours, projections fused"
FUSED, ACCELERATED = "ours, MLP fused", "accelerated PEFT, MLP fused"
TARGETS = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class MLPCase(Case):
    base = FROZEN
    rival = PEFT
    ours = (FUSED, PROJECTIONS, APART, ACCELERATED)
    arms = (FROZEN, PEFT, APART, PROJECTIONS, FUSED, ACCELERATED)
    phases: ClassVar = {"both": ("forward", "backward")}
    mark = "mlp"

    rows: int
    k: int
    inner: int
    r: int
    # Of weights and activations; adapters are float32, PEFT's default and ours.
    dtype: str
    device: torch.device
    dropout: float = 0.0

    @property
    def name(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"mlp {size(self.rows, self.k, self.inner)} r{self.r} {self.dtype}{dropout}"

    def open(self) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": self.device, "dtype": DTYPES[self.dtype]}
        config = LlamaConfig(hidden_size=self.k, intermediate_size=self.inner, num_attention_heads=1)
        self.shared.update(
            frozen=LlamaMLP(config).to(**options).requires_grad_(False),
            x=torch.randn(1, self.rows, self.k, **options).requires_grad_(),
            grad=torch.randn(1, self.rows, self.k, **options),
            mlps={},
        )

    def build(self, arm: str) -> Parts:
        x, grad, out = self.shared["x"], self.shared["grad"], []
        mlp = self.shared["mlps"][arm] = self._mlp(arm)
        trained = [p for p in mlp.parameters() if p.requires_grad]

        def prepare() -> None:
            out.clear()
            for tensor in (x, *trained):
                tensor.grad = None

        return {
            "prepare": prepare,
            "forward": lambda: out.append(mlp(x)),
            "backward": lambda: out[0].backward(grad),
        }

    def _mlp(self, arm: str) -> nn.Module:
        """The arm's MLP over the shared frozen weights."""
        holder = nn.Module()
        with torch.device("meta"):
            holder.mlp = LlamaMLP(self.shared["frozen"].config)
        for name, layer in self.shared["frozen"].named_children():
            if isinstance(layer, nn.Linear):
                getattr(holder.mlp, name).weight = layer.weight
        options: dict[str, Any] = {"r": self.r, "lora_alpha": 2 * self.r, "lora_dropout": self.dropout}
        adapted: nn.Module = holder
        if arm in (PEFT, ACCELERATED):
            from peft import LoraConfig, get_peft_model

            adapted = get_peft_model(holder, LoraConfig(target_modules=TARGETS, **options))
            if arm == ACCELERATED:
                slk.accelerate_peft(adapted, strict=True, fuse_mlp=True)
        elif arm != FROZEN:
            config = slk.LoRAConfig(target_modules=TARGETS, **options)
            slk.apply_lora(holder, config, fuse_projections=arm == PROJECTIONS, fuse_mlp=arm == FUSED)
        fill(adapted)
        return holder.mlp.train()

    def notes(self, arm: str) -> dict[str, Any]:
        mlp, x = self.shared["mlps"][arm], self.shared["x"]
        return {"saved_bytes": saved_for_backward(lambda: mlp(x), [*mlp.parameters()])}

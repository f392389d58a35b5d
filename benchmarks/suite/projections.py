"""Projections of one x (q, k, v; gate, up): computed one by one, and together by ``lora_linear_group``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.suite.rivals import Case, Parts, size
from stablelora_kernels.functional import lora_linear_group
from stablelora_kernels.testing import DTYPES

FROZEN, APART, TOGETHER = "frozen nn.Linear", "ours, one by one", "ours, together"


@dataclass(frozen=True)
class ProjectionsCase(Case):
    base = FROZEN
    rival = APART
    ours = (TOGETHER,)
    arms = (FROZEN, APART, TOGETHER)
    phases: ClassVar = {"both": ("forward", "backward")}

    rows: int
    k: int
    ns: tuple[int, ...]
    r: int
    dtype: str
    device: torch.device
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return f"projections {size(self.rows, self.k)}x{'+'.join(map(str, self.ns))} r{self.r} {self.dtype}"

    def open(self) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": self.device, "dtype": DTYPES[self.dtype]}
        frozen = [nn.Linear(self.k, n, bias=False, **options).requires_grad_(False) for n in self.ns]
        lora = {"r": self.r, "lora_alpha": 2 * self.r, "lora_dropout": self.dropout, "lora_dtype": options["dtype"]}
        layers = [slk.LoRALinear.from_linear(linear, **lora) for linear in frozen]
        for layer in layers:
            nn.init.normal_(layer.lora_B, std=0.02)
        self.shared.update(
            x=torch.randn(self.rows, self.k, **options).requires_grad_(),
            grads=[torch.randn(self.rows, n, **options) for n in self.ns],
            frozen=frozen,
            layers=layers,
        )

    def build(self, arm: str) -> Parts:
        x, grads, layers = (self.shared[name] for name in ("x", "grads", "layers"))
        weights, lora_As, lora_Bs = (
            [getattr(layer, name) for layer in layers] for name in ("weight", "lora_A", "lora_B")
        )
        scalings = [layer.scaling for layer in layers]
        calls: dict[str, Callable[[], Sequence[Tensor]]] = {
            FROZEN: lambda: [linear(x) for linear in self.shared["frozen"]],
            APART: lambda: [layer(x) for layer in layers],
            TOGETHER: lambda: lora_linear_group(
                x, weights, [None] * len(layers), lora_As, lora_Bs, scalings, self.dropout
            ),
        }
        out: list[Tensor] = []

        def prepare() -> None:
            out.clear()
            for tensor in (x, *lora_As, *lora_Bs):
                tensor.grad = None

        return {
            "prepare": prepare,
            "forward": lambda: out.extend(calls[arm]()),
            "backward": lambda: torch.autograd.backward(out, grads),
        }

"""The host's time of a call: its Python, Triton's, and Triton's C launcher, over a CUDA library
that does nothing.

It needs no GPU, and no time of CUDA's driver or allocator is in it. "Triton" takes its launches
from real sizes, on tensors of the CPU that no kernel touches. The other arms compute on tiny
tensors, whose arithmetic takes a few microseconds.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.arms import ACCELERATED, MLP_FUSED, OURS, PEFT, PROJECTIONS_FUSED
from benchmarks.common.measure import seconds_of
from benchmarks.common.null_driver import null_driver, null_driver_problem
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite.layers import (
    EAGER,
    FROZEN,
    OURS_TORCH,
    OURS_TRITON,
    PROJECTIONS,
    adapted,
    gated_mlp,
    linears,
)
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.functional import lora_branch
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import make_pairs

LINEAR = "nn.Linear"
# Timed at once: one call is as short as reading the clock twice.
CALLS = 20
# Sizes of arms that compute, and of those that do not.
SMALL_WIDTH, SMALL_ROWS, WIDTH, R = 16, 4, 1024, 16
FUSED = {"group": PROJECTIONS_FUSED, "mlp": MLP_FUSED}
# Dtype of the frozen weight and of A and B, and autocast's.
PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp32 autocast": (torch.float32, torch.bfloat16),
    "bf16 autocast": (torch.bfloat16, torch.bfloat16),
}
# glibc's mallopt: keep freed memory, and take large blocks from it too. CUDA's allocator calls no
# system either.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT = -1, -3, 1 << 30


@dataclass(frozen=True)
class HostCase(Case):
    mark = "host"

    device: torch.device

    def open(self) -> None:
        stack = self.shared["stack"] = ExitStack()
        if null_driver_problem() is None:
            stack.enter_context(null_driver())
        # Threads would wait for each other, and a collection visits a million objects.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.callback(gc.enable)
        gc.collect()
        gc.disable()
        libc = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD) if hasattr(libc, "mallopt") else ():
            libc.mallopt(parameter, _KEPT)
        for name in ("_fused_adamw_", "_foreach_add_"):
            # PyTorch's fused AdamW, and the increment of its step counters: each a launch on a GPU.
            stack.enter_context(mock.patch.object(torch, name, lambda *args, **kwargs: None))

    def close(self) -> None:
        self.shared["stack"].close()
        super().close()

    def check_triton(self) -> None:
        """Raises :class:`Unavailable` if the null driver can't run."""
        if problem := null_driver_problem():
            raise Unavailable(f"the null driver can't run: {problem}")


@dataclass(frozen=True)
class HostLayerCase(HostCase):
    """Layers of which no arm's time is arithmetic."""

    base = LINEAR
    rival = PEFT
    ours = (OURS_TRITON, OURS_TORCH, ACCELERATED)
    arms = (LINEAR, EAGER, PEFT, OURS_TORCH, OURS_TRITON, ACCELERATED)
    phases: ClassVar = {
        name: (name,) for name in ("forward, no gradient", "forward", "forward and backward")
    }
    calls = CALLS

    rows: int = 1
    # "layer", "group" for three projections of one x, "mlp" for a gated MLP, "branch" onto another
    # layer's output, or "96 layers" in turn, whose Python objects are in no cache of the processor.
    kind: str = "layer"
    dropout: float = 0.0
    precision: str = "bf16"

    @property
    def name(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"host {self.kind} {self.rows} rows {self.precision}{dropout}"

    def build(self, arm: str) -> Parts:
        on_triton = arm in (OURS_TRITON, ACCELERATED)
        if on_triton:
            self.check_triton()
        dtype, autocast = PRECISIONS[self.precision]
        # Autocast casts a float32 weight in each call, which is arithmetic.
        ours = SMALL_WIDTH if autocast is not None and autocast != dtype else WIDTH
        rows, width = (self.rows, ours) if on_triton else (SMALL_ROWS, SMALL_WIDTH)
        modules = self._modules(arm, width, dtype)
        x = torch.randn(rows, width, device=self.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, width, device=self.device, dtype=autocast or dtype)
        if self.kind == "branch" and arm in (OURS_TRITON, OURS_TORCH):
            modules = [_Branch(modules[0], x.detach())]
        together = [modules] if self.kind == "group" else [[module] for module in modules]
        leaves = [
            [x, *(p for module in now for p in module.parameters() if p.requires_grad)]
            for now in together
        ]
        turns = cycle(zip(together, leaves, strict=True))

        def forward(clear: bool = False) -> list[Tensor]:
            now, tensors = next(turns)
            for tensor in tensors if clear else ():
                tensor.grad = None
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                return [module(x) for module in now]

        def both() -> None:
            out = forward(clear=True)
            torch.autograd.backward(out, [grad] * len(out))

        def repeated(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                with slk.settings(backend="triton" if on_triton else "torch"):
                    for _ in range(CALLS):
                        call()

            return run

        self.shared[arm] = forward
        calls = (torch.no_grad()(forward), forward, both)
        return {name: repeated(call) for name, call in zip(self.phases, calls, strict=True)}

    def _modules(self, arm: str, width: int, dtype: torch.dtype) -> list[nn.Module]:
        names = {"group": PROJECTIONS[3], "96 layers": [f"layer{i}" for i in range(96)]}.get(
            self.kind, ["layer"]
        )
        frozen = (
            gated_mlp(width, width)
            if self.kind == "mlp"
            else linears(names, width, [width] * len(names))
        )
        frozen = frozen.to(self.device, dtype).requires_grad_(False)
        name = {LINEAR: FROZEN, OURS_TORCH: OURS, OURS_TRITON: OURS}.get(arm, arm)
        fused = FUSED.get(self.kind, "") if name in (OURS, ACCELERATED) else ""
        return [*adapted(frozen, name + fused, R, self.dropout).children()]

    def notes(self, arm: str) -> dict[str, Any]:
        """How many times a later forward's time the first one takes, which plans, and the second
        one, which prepares launches.
        """
        if arm != OURS_TRITON or self.kind != "layer" or self.precision != "bf16":
            return {}
        calls, found = dict.fromkeys(("first", "second", "later"), self.shared[arm]), []
        with slk.settings(backend="triton"):
            for _ in range(CALLS):
                plans.clear()
                found.append(seconds_of(calls, calls))
        return {
            f"{name}_over_later": [row[name] / row["later"] for row in found]
            for name in ("first", "second")
        }


class _Branch(nn.Module):
    """A layer's branch onto another one's product: that one's host time is a small one's, and its
    output is ``out``.
    """

    def __init__(self, layer: slk.LoRALinear, out: Tensor) -> None:
        super().__init__()
        self.layer, self.out, self.small = layer, out, out[:SMALL_ROWS, :SMALL_WIDTH].clone()
        self.base = nn.Linear(
            SMALL_WIDTH, SMALL_WIDTH, device=out.device, dtype=out.dtype
        ).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.base(self.small)
        layer: Any = self.layer
        return lora_branch(
            self.out, x, layer.lora_A, layer.lora_B, layer.scaling, layer.lora_dropout
        )


@dataclass(frozen=True)
class HostStepCase(HostCase):
    """An optimizer's step, with gradients at the addresses of the last step, or elsewhere each
    time.
    """

    base = optimizers.ADAMW_FUSED
    rival = optimizers.ADAMW_FUSED
    ours = (optimizers.OURS,)
    arms = (optimizers.ADAMW_FUSED, optimizers.OURS)
    phases: ClassVar = {"step": ("step",)}

    pairs: int = 4
    gradients: str = "kept"
    r: int = 2
    width: int = 8

    @property
    def name(self) -> str:
        return f"host step {2 * self.pairs} tensors r{self.r} width {self.width}, gradients {self.gradients}"

    def build(self, arm: str) -> Parts:
        if arm == optimizers.OURS:
            self.check_triton()
        pairs = make_pairs(self.pairs, self.r, self.width, self.device, False)
        params = [half for pair in pairs for half in (pair.A, pair.B)]
        step = optimizers.build(arm, pairs, lr=optimizers.LR).step
        # Two sets in turn: neither lies where the other does.
        sets = [
            [torch.zeros_like(p) for p in params]
            for _ in range(2 if self.gradients == "moved" else 1)
        ]

        def prepare() -> None:
            sets.reverse()
            for p, grad in zip(params, sets[0], strict=True):
                p.grad = grad

        def run() -> None:
            with slk.settings(backend="triton"):
                step()

        return {"prepare": prepare, "step": run}

"""The optimizer's cases: one step of every arm, and fewer bits for moments and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import DTYPES, make_pairs

FP32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8


@dataclass(frozen=True)
class OptimizerCase(Case):
    """Pairs that all shrink, or that have all latched; gradients are written anew before each step."""

    base = optimizers.ADAMW_FUSED
    rival = optimizers.ADAMW_FUSED
    ours = (optimizers.OURS,)
    arms = optimizers.ARMS
    phases: ClassVar = {"step": ("step",)}

    pairs: int
    r: int
    width: int
    state: str
    dtype: str
    device: torch.device

    @property
    def name(self) -> str:
        axis = f"{self.axis}: " if self.axis else ""
        return f"{axis}optimizer {self.pairs} pairs r{self.r} width {self.width} {self.dtype} {self.state}"

    def facts(self) -> dict[str, Any]:
        sizes = {"pairs": self.pairs, "parameters": 2 * self.pairs * self.r * self.width}
        return {"axis": f"{self.axis}, {self.state}", "size": sizes[self.axis]} if self.axis else {}

    def build(self, arm: str) -> Parts:
        pairs = make_pairs(self.pairs, self.r, self.width, self.device, self.state == "latched")
        halves = [half for pair in pairs for half in (pair.A, pair.B)]
        grads = [half.grad.to(DTYPES[self.dtype]) for half in halves if half.grad is not None]
        for half, grad in zip(halves, grads, strict=True):
            half.grad, half.data = None, half.data.to(grad.dtype)
            half.grad = grad.clone()
        optimizer = self.shared[arm] = optimizers.build(arm, pairs, lr=optimizers.LR)

        def prepare() -> None:
            # Riemannian preconditioning multiplies gradients in place; and training has just written all of them.
            for half, grad in zip(halves, grads, strict=True):
                half.grad.copy_(grad)

        return {"prepare": prepare, "step": optimizer.step}

    def check(self) -> None:
        """All pairs kept their state throughout."""
        for arm, optimizer in self.shared.items():
            if arm in (optimizers.NAIVE, optimizers.NAIVE_FOREACH):
                found = set(optimizer.stable)
            elif arm == optimizers.OURS:
                found = {pair.latched for pair in optimizer.stability()}
            else:
                continue
            if found != {self.state == "latched"}:
                raise RuntimeError(f"all pairs of {arm!r} must stay {self.state}, got latched {sorted(found)}")


# The parameters' dtype, the moments' dtype, and whether a float32 master is kept.
STORAGE: dict[str, tuple[torch.dtype, torch.dtype, bool]] = {
    "fp32, moments fp32": (FP32, FP32, False),
    "fp32, moments bf16": (FP32, BF16, False),
    "fp32, moments 8 bits": (FP32, UINT8, False),
    "bf16, moments fp32, master": (BF16, FP32, True),
    "bf16, moments fp32": (BF16, FP32, False),
    "bf16, moments bf16": (BF16, BF16, False),
    "bf16, moments 8 bits": (BF16, UINT8, False),
    "bf16, moments 8 bits, master": (BF16, UINT8, True),
}


@dataclass(frozen=True)
class StorageCase(Case):
    """A pair learns a product of its own rank, on the same batches in every arm; products are float32."""

    base = "fp32, moments fp32"
    rival = base
    ours = ("fp32, moments 8 bits",)
    arms = tuple(STORAGE)
    phases: ClassVar = {"step": ("step",)}
    mark = "storage"

    width: int
    r: int
    steps: int
    seeds: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"storage width {self.width} r{self.r}, {self.steps} steps"

    def build(self, arm: str) -> Parts:
        pair, optimizer = self._start(arm, seed=0)
        for half in (pair.A, pair.B):
            half.grad = torch.full_like(half, 1e-3)
        return {"step": optimizer.step}

    def _start(self, arm: str, seed: int) -> tuple[LoRAPair, slk.StableLoRAAdamW]:
        dtype, moments, master = STORAGE[arm]
        a = torch.randn(self.r, self.width, generator=torch.Generator().manual_seed(seed)) / self.width**0.5
        b = torch.zeros(self.width, self.r)
        pair = LoRAPair("pair", *(half.to(self.device, dtype).requires_grad_() for half in (a, b)))
        return pair, slk.StableLoRAAdamW([pair], lr=2e-3, moments_dtype=moments, master_weights=master, seed=seed)

    def notes(self, arm: str) -> dict[str, Any]:
        """The mean loss over the last tenth of the steps, by seed, and bytes of parameters, moments and masters per element."""
        losses = []
        for seed in range(self.seeds):
            pair, optimizer = self._start(arm, seed)
            generator = torch.Generator().manual_seed(1000 + seed)

            def draw(*size: int, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(size, generator=generator).to(self.device)

            target, found = draw(self.width, self.r) @ draw(self.r, self.width) / self.width**0.5, []
            for _ in range(self.steps):
                x = draw(64, self.width)
                loss = (x @ pair.A.float().t() @ pair.B.float().t() - x @ target.t()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            last = found[-max(self.steps // 10, 1) :]
            losses.append(sum(last) / len(last))
        kept = [pair.A, pair.B]
        for half in (pair.A, pair.B):
            kept += [t for key, t in optimizer.state[half].items() if key.startswith(("exp_avg", "master"))]
        elements = pair.A.numel() + pair.B.numel()
        return {"bytes_per_element": sum(t.nbytes for t in kept) / elements, "loss": losses}

"""One optimizer step against rivals; marked cases: its host time, how it grows, and fewer bits for
its state.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.suite.host import HostStepCase
from benchmarks.suite.layers import STORED
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import make_pairs

# Pairs, rank, width. torchao compiles its step for all pairs together: a minute for 64 of them.
QUICK = [(16, 8, 2048)]
FULL = [
    *QUICK,
    (64, 8, 2048),
    (14, 16, 512),
    *((pairs, *size) for pairs in (32, 224) for size in ((8, 64), (16, 576))),
]
STATES = ("shrinking", "latched")
PAIRS = (8, 32, 128, 512, 2000)
# Widths of 64 pairs of rank 8: 100 thousand to 100 million parameters.
WIDTHS = (98, 977, 9766, 97656)
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
        grads = [half.grad.to(STORED[self.dtype]) for half in halves if half.grad is not None]
        for half, grad in zip(halves, grads, strict=True):
            half.grad, half.data = None, half.data.to(grad.dtype)
            half.grad = grad.clone()
        optimizer = self.shared[arm] = optimizers.build(arm, pairs, lr=optimizers.LR)

        def prepare() -> None:
            # Riemannian preconditioning multiplies gradients in place; and training has just
            # written all of them.
            for half, grad in zip(halves, grads, strict=True):
                half.grad.copy_(grad)

        return {"prepare": prepare, "step": optimizer.step}

    def check(self) -> None:
        """All pairs kept their state throughout."""
        for arm, optimizer in self.shared.items():
            states = optimizers.latches_of(arm, optimizer)
            if states is not None and {*states} != {self.state == "latched"}:
                raise RuntimeError(
                    f"all pairs of {arm!r} must stay {self.state}, got latched {states}"
                )


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
    """A pair learns a product of its own rank, on the same batches in every arm; products are
    float32.
    """

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
        a = (
            torch.randn(self.r, self.width, generator=torch.Generator().manual_seed(seed))
            / self.width**0.5
        )
        b = torch.zeros(self.width, self.r)
        pair = LoRAPair("pair", *(half.to(self.device, dtype).requires_grad_() for half in (a, b)))
        return pair, slk.StableLoRAAdamW(
            [pair], lr=2e-3, moments_dtype=moments, master_weights=master, seed=seed
        )

    def _loss(self, arm: str, seed: int) -> tuple[float, float]:
        """The mean loss over the last tenth of the steps, and bytes of parameters, moments and
        masters per element.
        """
        pair, optimizer = self._start(arm, seed)
        torch.manual_seed(1000 + seed)
        b, a = torch.randn(self.width, self.r), torch.randn(self.r, self.width)
        target, losses = (b @ a / self.width**0.5).to(self.device), []
        for _ in range(self.steps):
            x = torch.randn(64, self.width).to(self.device)
            loss = (x @ pair.A.float().t() @ pair.B.float().t() - x @ target.t()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        kept = pair.A.nbytes + pair.B.nbytes + optimizers.state_bytes(optimizer)
        return statistics.fmean(losses[-max(self.steps // 10, 1) :]), kept / (
            pair.A.numel() + pair.B.numel()
        )

    def notes(self, arm: str) -> dict[str, Any]:
        losses, kept = zip(*(self._loss(arm, seed) for seed in range(self.seeds)), strict=True)
        return {"bytes_per_element": kept[0], "loss": losses}


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [
            OptimizerCase(2, 2, 32, "shrinking", "fp32", device),
            *(
                OptimizerCase(pairs, 2, 32, "latched", "fp32", device, axis="pairs")
                for pairs in (1, 2, 4)
            ),
            HostStepCase(device, 4, "kept"),
            HostStepCase(device, 4, "moved"),
            StorageCase(16, 2, 3, 1, device),
        ]
    shapes, dtypes = (QUICK, ["fp32"]) if suite == "quick" else (FULL, ["fp32", "bf16"])
    found: list[Case] = [
        OptimizerCase(*shape, state, dtype, device)
        for shape, state, dtype in product(shapes, STATES, dtypes)
    ]
    for state in STATES:
        found += [
            OptimizerCase(pairs, 8, 256, state, "fp32", device, axis="pairs") for pairs in PAIRS
        ]
        found += [
            OptimizerCase(64, 8, width, state, "fp32", device, axis="parameters")
            for width in WIDTHS
        ]
    found += [
        HostStepCase(device, pairs, how)
        for pairs, how in product((*PAIRS[:3], 224, *PAIRS[3:]), ("kept", "moved"))
    ]
    found += [HostStepCase(device, 224, "kept", r, 4096) for r in (8, 16)]
    return [*found, StorageCase(256, 16, 600, 3, device)]


def test_optimizer(compare: Callable[[], None]) -> None:
    compare()

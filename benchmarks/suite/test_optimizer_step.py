"""One optimizer step over pairs that all shrink, or that have all latched; the gradients are new before every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.common import optimizers
from benchmarks.common.optimizers import LR
from benchmarks.conftest import Entry
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import DTYPES, make_pairs

# Pairs, rank, width. torchao compiles its step for all of them together, which takes a minute for 64 pairs.
QUICK = [(16, 8, 2048)]
FULL = [*QUICK, (64, 8, 2048), (14, 16, 512)]
STATES = ("shrinking", "latched")


@dataclass(frozen=True)
class OptimizerCase(Case):
    base: ClassVar[str] = optimizers.ADAMW_FUSED
    rival: ClassVar[str] = optimizers.ADAMW_FUSED
    ours: ClassVar[tuple[str, ...]] = (optimizers.OURS,)
    arms: ClassVar[tuple[str, ...]] = optimizers.ARMS
    phases: ClassVar[dict[str, tuple[str, ...]]] = {"step": ("step",)}

    pairs: int
    r: int
    width: int
    state: str
    dtype: str
    device: torch.device
    _built: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"optimizer {self.pairs} pairs r{self.r} width {self.width} {self.dtype} {self.state}"

    def facts(self) -> dict[str, Any]:
        shape = {"pairs": self.pairs, "r": self.r, "width": self.width}
        return {"shape": shape, "dtype": self.dtype, "state": self.state, "device": str(self.device)}

    def build(self, arm: str) -> Parts:
        pairs = [
            self._cast(pair)
            for pair in make_pairs(self.pairs, self.r, self.width, self.device, self.state == "latched")
        ]
        halves = [half for pair in pairs for half in (pair.A, pair.B)]
        grads = [half.grad.clone() for half in halves if half.grad is not None]
        optimizer = self._built[arm] = optimizers.build(arm, pairs, lr=LR)

        def prepare() -> None:
            # Riemannian preconditioning multiplies them in place; and in training all have just been written.
            for half, grad in zip(halves, grads, strict=True):
                half.grad.copy_(grad)

        return {"prepare": prepare, "step": optimizer.step}

    def _cast(self, pair: LoRAPair) -> LoRAPair:
        if self.dtype == "fp32":
            return pair
        halves = [torch.nn.Parameter(half.detach().to(DTYPES[self.dtype])) for half in (pair.A, pair.B)]
        for half, of in zip(halves, (pair.A, pair.B), strict=True):
            half.grad = of.grad.to(half.dtype)
        return LoRAPair(pair.name, *halves)

    def close(self) -> None:
        built = dict(self._built)
        self._built.clear()
        latched = self.state == "latched"
        for arm in {optimizers.NAIVE, optimizers.NAIVE_FOREACH} & built.keys():
            self._check(arm, set(built[arm].stable), latched)
        if optimizers.OURS in built:
            self._check(optimizers.OURS, {pair.stable for pair in built[optimizers.OURS].stability()}, latched)

    def _check(self, arm: str, found: set[bool], latched: bool) -> None:
        if found != {latched}:
            raise RuntimeError(f"all pairs of {arm!r} were to be {self.state} throughout, got latched {sorted(found)}")


def cases(suite: str, device: torch.device) -> list[OptimizerCase]:
    if suite == "tiny":
        return [OptimizerCase(2, 2, 32, "shrinking", "fp32", device)]
    shapes, dtypes = (QUICK, ["fp32"]) if suite == "quick" else (FULL, ["fp32", "bf16"])
    return [OptimizerCase(*shape, state, dtype, device) for shape, state, dtype in product(shapes, STATES, dtypes)]


def test_optimizer(entry: Entry, benchmark: pytest.FixtureRequest) -> None:
    entry.record(benchmark)

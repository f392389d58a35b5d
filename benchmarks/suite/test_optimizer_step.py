"""One optimizer step against rivals; marked cases: its host time, how it grows, and fewer bits for its state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from benchmarks.suite.host import HostStepCase
from benchmarks.suite.rivals import Case
from benchmarks.suite.steps import OptimizerCase, StorageCase

# Pairs, rank, width. torchao compiles its step for all pairs together: a minute for 64 of them.
QUICK = [(16, 8, 2048)]
FULL = [*QUICK, (64, 8, 2048), (14, 16, 512)]
STATES = ("shrinking", "latched")
PAIRS = (8, 32, 128, 512, 2000)
# Widths of 64 pairs of rank 8: 100 thousand to 100 million parameters.
WIDTHS = (98, 977, 9766, 97656)


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [
            OptimizerCase(2, 2, 32, "shrinking", "fp32", device),
            *(OptimizerCase(pairs, 2, 32, "latched", "fp32", device, axis="pairs") for pairs in (1, 2, 4)),
            HostStepCase(device, 4, "kept"),
            HostStepCase(device, 4, "moved"),
            StorageCase(16, 2, 3, 1, device),
        ]
    shapes, dtypes = (QUICK, ["fp32"]) if suite == "quick" else (FULL, ["fp32", "bf16"])
    found: list[Case] = [
        OptimizerCase(*shape, state, dtype, device) for shape, state, dtype in product(shapes, STATES, dtypes)
    ]
    for state in STATES:
        found += [OptimizerCase(pairs, 8, 256, state, "fp32", device, axis="pairs") for pairs in PAIRS]
        found += [OptimizerCase(64, 8, width, state, "fp32", device, axis="parameters") for width in WIDTHS]
    found += [
        HostStepCase(device, pairs, how) for pairs, how in product((*PAIRS[:3], 224, *PAIRS[3:]), ("kept", "moved"))
    ]
    found += [HostStepCase(device, 224, "kept", r, 4096) for r in (8, 16)]
    return [*found, StorageCase(256, 16, 600, 3, device)]


def test_optimizer(compare: Callable[[], None]) -> None:
    compare()

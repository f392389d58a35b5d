"""One layer: forward, backward and both, over shapes, ranks and dtypes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.conftest import Entry
from benchmarks.suite.layers import DTYPE_NAMES, LayerCase

# Rows, in_features, out_features, rank: the targets' two, and where rows are few.
QUICK = [(1024, 1024, 1024, 8), (512, 2048, 2048, 16), (16, 2048, 2048, 16)]
FULL = [*QUICK, (2048, 576, 576, 8), (1024, 576, 192, 8), (1024, 1024, 1024, 64), (1, 2048, 2048, 16)]


def cases(suite: str, device: torch.device) -> list[LayerCase]:
    if suite == "tiny":
        return [LayerCase(8, 16, 24, 2, "fp32", device)]
    found = [
        LayerCase(*shape, dtype, device) for shape, dtype in product(QUICK if suite == "quick" else FULL, DTYPE_NAMES)
    ]
    dropout = [LayerCase(*shape, dtype, device, 0.1) for shape, dtype in product(FULL, DTYPE_NAMES)]
    return found if suite == "quick" else found + dropout


def test_layer(entry: Entry, benchmark: pytest.FixtureRequest) -> None:
    entry.record(benchmark)

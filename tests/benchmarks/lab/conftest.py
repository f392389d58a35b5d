"""What several tests of benchmarks.lab take."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def dropout_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operator for dropout on a GPU, whose mask is bool."""
    drop = torch.native_dropout
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: drop(x, p, training)[0],
    )

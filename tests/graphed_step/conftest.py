"""Without a GPU a capture is recorded and a replay runs what was recorded. Real graphs:
tests/gpu/test_graphed_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stablelora_kernels as slk


@pytest.fixture(autouse=True)
def on_triton(one_thread: None) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("a GPU has real graphs: tests/gpu/test_graphed_step.py")
    with slk.settings(backend="triton"):
        yield


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    from tests.helpers.graphed_steps import use_graphs

    return use_graphs(monkeypatch)

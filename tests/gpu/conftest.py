"""Tests that need a CUDA GPU. Without one they are skipped.

``SLK_GPU_DRY_RUN=1`` runs them on a CPU instead, in Triton's interpreter at small sizes, to show that their code works.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.gpu_checks import SMALL

DRY_RUN = os.environ.get("SLK_GPU_DRY_RUN") == "1"
# cuBLAS reads this when it starts. Deterministic algorithms, which poisoned_outputs turns on, require it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SMALL and not DRY_RUN and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA GPU (SLK_GPU_DRY_RUN=1 runs it on a CPU at small sizes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # benchmarks.lab.gpu limits the time. The timed shapes are many, large, and nearest to what the other tests cover.
    items.sort(key=lambda item: "timed_shapes" in item.name)


@pytest.fixture(scope="session")
def stream() -> None:
    """Put all work on one stream of its own, because the default stream cannot be captured."""
    if not SMALL:
        torch.cuda.set_stream(torch.cuda.Stream())


@pytest.fixture(autouse=True)
def triton_backend(stream: None) -> Iterator[None]:
    """Use the Triton backend, and end this process if the test leaves the GPU unusable, as an illegal address does."""
    with slk.use_backend("triton"):
        yield
    if SMALL:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # pytest-xdist starts another worker for the tests that are left.
            os._exit(1)
        pytest.exit(f"the GPU is unusable after this test: {error}", returncode=3)

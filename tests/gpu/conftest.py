"""Tests that need a CUDA GPU. Without one they are skipped.

``SLK_GPU_DRY_RUN=1`` runs them on a CPU instead, in Triton's interpreter at small sizes, to show
that their code works.

A kernel may wait forever. So a test that neither ends nor compiles for ``SLK_GPU_WATCHDOG`` seconds
(30; 0: no limit) ends its process, with every thread's stack on standard error.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.gpu_checks import SMALL

DRY_RUN = os.environ.get("SLK_GPU_DRY_RUN") == "1"
WATCHDOG = float(os.environ.get("SLK_GPU_WATCHDOG", "30"))
# cuBLAS reads this when it starts. Deterministic algorithms, which poisoned_outputs turns on,
# require it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SMALL and not DRY_RUN and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA GPU (SLK_GPU_DRY_RUN=1 runs it on a CPU at small sizes)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # pytest calls this for the tests of every directory.
    if not WATCHDOG or not item.get_closest_marker("gpu"):
        return (yield)
    from triton import knobs

    # pytest captures standard error within a test's phases only.
    stderr = os.dup(2)

    def start_again(**compiled: object) -> None:
        faulthandler.dump_traceback_later(WATCHDOG, exit=True, file=stderr)

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, start_again
    start_again()
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        knobs.runtime.jit_post_compile_hook = before
        os.close(stderr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # benchmarks.lab.gpu limits the time. The timed shapes are many, large, and nearest to what the
    # other tests cover.
    items.sort(key=lambda item: "timed_shapes" in item.name)


@pytest.fixture(scope="session")
def stream() -> None:
    """Put all work on one stream of its own, because the default stream cannot be captured."""
    if not SMALL:
        torch.cuda.set_stream(torch.cuda.Stream())


def counters_left() -> dict[object, list[int]]:
    """Return which counters are not 0, by stream, and set them to 0 for the tests to come. No
    launch may be under way.
    """
    from stablelora_kernels.launch import workspace

    found = {}
    for stream, counts in workspace._in_use.items():
        if bool(counts.any()):
            found[stream] = counts.nonzero().flatten().tolist()
            counts.zero_()
    return found


@pytest.fixture(autouse=True)
def triton_backend(stream: None) -> Iterator[None]:
    """Use the Triton backend. Afterwards every launch has set its counters and chains back to 0.

    End this process if the test leaves the GPU unusable, as an illegal address does.
    """
    with slk.settings(backend="triton"):
        yield
    try:
        if not SMALL:
            torch.cuda.synchronize()
        left = counters_left()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # pytest-xdist starts another worker for the tests that are left.
            os._exit(1)
        pytest.exit(f"the GPU is unusable after this test: {error}", returncode=3)
    assert not left, f"counters that are not 0 after the test, by stream: {left}"

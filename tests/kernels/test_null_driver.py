"""Prepared launches through Triton's own compiler and launcher, over a CUDA library that does
nothing.

In a process of its own: this one has Triton's interpreter.
"""

from __future__ import annotations

import sys

import pytest

from stablelora_kernels.testing.cases import DEVICE
from tests.helpers.processes import python

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")


@pytest.mark.skipif(
    DEVICE == "cuda", reason="runs on machines without a GPU; tests/gpu has launches that run"
)
@pytest.mark.skipif(
    sys.platform != "linux", reason="runs on Linux, whose shared library the null driver is"
)
@pytest.mark.parametrize(
    "only_mlp", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["", "mlp"]
)
def test_prepared_launches_pass_what_triton_passes(only_mlp: bool) -> None:
    done = python(
        f"from tests.helpers.null_driver_checks import main; raise SystemExit(main({only_mlp}))"
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr

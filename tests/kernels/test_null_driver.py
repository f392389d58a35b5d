"""Prepared launches through Triton's own compiler and launcher, over a CUDA library that does nothing.

In a process of its own: this one has Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.inputs import DEVICE

pytest.importorskip("triton", reason="Triton is not installed on this platform")
SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "null_driver_checks.py"


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the null driver's tensors are on the CPU; tests/gpu has launches that run"
)
@pytest.mark.skipif(sys.platform != "linux", reason="the null driver is a shared library of Linux")
@pytest.mark.parametrize("what", [[], pytest.param(["mlp"], marks=pytest.mark.nightly)], ids=["", "mlp"])
def test_prepared_launches_pass_what_triton_passes(what: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = SCRIPT.parents[2]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *what],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr

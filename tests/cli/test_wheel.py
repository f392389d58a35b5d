"""The wheel, installed elsewhere: its commands run without this repository's tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stablelora_kernels as slk
from tests.helpers.small_models import Model, lora_config
from tests.helpers.wheel import build_wheel

pytest.importorskip("safetensors")
pytest.importorskip("setuptools", minversion="77", reason="builds the wheel without a network")


def run(directory: Path, *command: str | Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("STABLELORA", "TRITON"))}
    environment |= {"PYTHONPATH": str(directory / "target"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_its_commands(tmp_path: Path) -> None:
    """doctor by the program, inspect as a module."""
    target, wheel = tmp_path / "target", build_wheel(tmp_path, "--no-build-isolation")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"stablelora_kernels"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    report = json.loads(run(tmp_path, target / "bin" / "stablelora-kernels", "doctor", "--device", "cpu", "--json"))
    assert report["ok"] and report["versions"]["installed in"] == str(target)

    model = Model()
    slk.apply_lora(model, lora_config())
    slk.save_adapter(model, tmp_path / "adapter")
    out = run(tmp_path, sys.executable, "-m", "stablelora_kernels", "inspect", str(tmp_path / "adapter"))
    assert "0 of 4" in out and "unstable" in out

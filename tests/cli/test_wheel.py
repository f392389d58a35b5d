"""The wheel, installed elsewhere: its commands run without this repository's tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.small_models import Model, lora_config
from tests.helpers.wheel import build_wheel

pytest.importorskip("safetensors")
pytest.importorskip("setuptools", minversion="77", reason="builds the wheel without a network")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory that the wheel was installed to, and from which nothing of the repository is seen."""
    base = tmp_path_factory.mktemp("wheel")
    target = base / "target"
    wheel = build_wheel(base, "--no-build-isolation")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"stablelora_kernels"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    return target


def run(installed: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("STABLELORA", "TRITON"))}
    environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_doctor(installed):
    done = run(installed, installed / "bin" / "stablelora-kernels", "doctor", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["versions"]["installed in"] == str(installed)
    assert report["versions"]["torch"] == torch.__version__


def test_inspect_as_a_module(installed, tmp_path):
    model = Model()
    slk.apply_lora(model, lora_config())
    slk.save_adapter(model, tmp_path / "adapter")
    done = run(installed, sys.executable, "-m", "stablelora_kernels", "inspect", str(tmp_path / "adapter"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 4" in done.stdout and "unstable" in done.stdout

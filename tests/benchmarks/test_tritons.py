"""Running a command again under another release of Triton."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.common import tritons
from tests.helpers.processes import ROOT

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory with a Triton 0.1.2 that has nothing but its metadata."""
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    directory = tmp_path / "triton-0.1.2"
    information = directory / "triton-0.1.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.1.2\n")
    return directory


def test_the_command_runs_under_the_release_with_its_arguments(
    unpacked: Path, tmp_path: Path
) -> None:
    (tmp_path / "command.py").write_text(
        "import sys; from importlib.metadata import version; print(version('triton'), *sys.argv[1:])"
    )
    code = "from benchmarks.common.tritons import run_again; run_again('command', '0.1.2', ['--triton', '0.1.2', 'b c'])"
    environment = {
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "STABLELORA_CACHE": str(tmp_path),
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "0.1.2 --triton 0.1.2 b c\n", done.stderr


def test_every_pinned_release_is_one_that_the_metadata_allows() -> None:
    requirement = next(
        text for text in metadata.requires("stablelora-kernels") or () if text.startswith("triton")
    )
    from packaging.requirements import Requirement

    specifier = Requirement(requirement).specifier
    assert [version for version in tritons.PINNED if version not in specifier] == []

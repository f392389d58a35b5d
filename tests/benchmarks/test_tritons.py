"""Running a command again under another release of Triton."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.common import tritons
from tests.helpers.processes import ROOT, printed

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")


def test_the_command_runs_under_the_release_with_its_arguments(tmp_path: Path) -> None:
    """A release that has nothing but its metadata."""
    information = tmp_path / "triton-0.1.2" / "triton-0.1.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.1.2\n")
    (tmp_path / "command.py").write_text(
        "import sys; from importlib.metadata import version; print(version('triton'), *sys.argv[1:])"
    )
    code = "from benchmarks.common.tritons import run_again; run_again('command', '0.1.2', ['b c'])"
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "STABLELORA_CACHE": str(tmp_path)}
    assert printed(code, **path) == "0.1.2 b c"
    # The installed release needs no other process.
    code = "from benchmarks.common.tritons import run_again; run_again('none', {!r}, []); print('here')"
    assert printed(code.format(metadata.version("triton"))) == "here"


def test_every_pinned_release_is_one_that_the_metadata_allows() -> None:
    needed = [Requirement(text) for text in metadata.requires("stablelora-kernels") or ()]
    (triton,) = (requirement for requirement in needed if requirement.name == "triton")
    assert [version for version in tritons.PINNED if version not in triton.specifier] == []

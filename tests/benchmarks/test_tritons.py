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


@pytest.mark.parametrize("version", [None, metadata.version("triton")])
def test_the_installed_release_needs_no_other_process(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tritons, "directory_of", lambda version: pytest.fail("fetched"))
    tritons.run_again("command", version, [])


def test_a_release_that_python_does_not_import_is_an_error(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(unpacked))
    monkeypatch.setattr(tritons.metadata, "version", lambda name: "3.9.0")
    with pytest.raises(
        tritons.TritonError, match=r"Triton 0\.1\.2 is in .*, but Python imports Triton 3\.9\.0"
    ):
        tritons.run_again("command", "0.1.2", [])


def test_a_release_that_pip_cannot_fetch_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess(
        [], 1, "", "ERROR: first\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(tritons.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(
        tritons.TritonError, match=r"Triton 9\.9\.9 could not be fetched: ERROR: No matching"
    ):
        tritons.directory_of("9.9.9")
    assert not [*tmp_path.iterdir()]


def test_every_pinned_release_is_one_that_the_metadata_allows() -> None:
    requirement = next(
        text for text in metadata.requires("stablelora-kernels") or () if text.startswith("triton")
    )
    from packaging.requirements import Requirement

    specifier = Requirement(requirement).specifier
    assert [version for version in tritons.PINNED if version not in specifier] == []

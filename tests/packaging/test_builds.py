"""The sdist and the wheel hold the package and no tests; the wheel's commands run without this
repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

SOURCES = (
    "pyproject.toml",
    "setup.py",
    "setup.cfg",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)


def copy_sources(target: Path) -> Path:
    """Copy what builds the package: a build in the repository would take along what earlier ones
    left in .build.
    """
    shutil.copytree(
        ROOT / "stablelora_kernels",
        target / "stablelora_kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in SOURCES:
        shutil.copyfile(ROOT / name, target / name)
    return target


def build_wheel(directory: Path, *options: str) -> Path:
    """Build the wheel in a new ``directory``, with these options of pip."""
    source = copy_sources(directory / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", *options, "-w", directory, source], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


pytest.importorskip(
    "setuptools",
    minversion="77",
    reason="runs where setuptools 77 is installed: it builds without a network",
)


def run(directory: Path, *command: str | Path) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("STABLELORA", "TRITON"))}
    kept["PYTHONPATH"] = str(directory / "target")
    done = subprocess.run(command, cwd=directory, env=kept, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_the_sdist_is_the_package(tmp_path: Path) -> None:
    source = copy_sources(tmp_path / "source")
    # setuptools adds tests/test*.py of its own accord.
    (source / "tests").mkdir()
    (source / "tests" / "test_import_rules.py").touch()
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()} - {""}
    tops = {file.partition("/")[0] for file in files}
    assert tops == {*SOURCES, "PKG-INFO", "stablelora_kernels", "stablelora_kernels.egg-info"}
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "stablelora_kernels").rglob("*.py")}
    assert ours | {"stablelora_kernels/py.typed"} <= files


@pytest.mark.nightly
def test_the_wheels_commands(tmp_path: Path) -> None:
    """doctor by the program and as a module."""
    target, wheel = tmp_path / "target", build_wheel(tmp_path, "--no-build-isolation")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"stablelora_kernels"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True
    )
    program = target / "bin" / "stablelora-kernels"
    for command in ([program], [sys.executable, "-m", "stablelora_kernels"]):
        report = json.loads(run(tmp_path, *command, "doctor", "--device", "cpu", "--json"))
        assert report["ok"] and report["versions"]["installed in"] == str(target)

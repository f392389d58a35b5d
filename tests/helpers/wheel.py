"""This repository's wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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

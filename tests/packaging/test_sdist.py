"""The sdist holds what builds the package, and no tests that could not run there."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.wheel import SOURCES, copy_sources


def test_the_sdist_is_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds the sdist without a network")
    source = copy_sources(tmp_path / "source")
    # setuptools adds tests/test*.py of its own accord.
    (source / "tests").mkdir()
    (source / "tests" / "test_import_rules.py").touch()
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()} - {""}
    tops = {file.partition("/")[0] for file in files}
    assert tops == {*SOURCES, "PKG-INFO", "stablelora_kernels", "stablelora_kernels.egg-info"}
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "stablelora_kernels").rglob("*.py")}
    assert ours | {"stablelora_kernels/py.typed"} <= files

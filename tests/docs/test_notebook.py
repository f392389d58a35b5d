"""The notebook for a first GPU runs from top to bottom, here on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

for module in ("peft", "transformers"):
    pytest.importorskip(module, reason=f"runs where {module} is installed: pip install .[test]")

NOTEBOOK = ROOT / "examples/first_gpu.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_a_notebook_without_outputs():
    """As format 4.5 wants it: each cell has an id of its own."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def run(program: str, folder: Path, script: Path) -> str:
    """What the cells print as plain Python in one process, started in ``folder`` of the clone."""
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder, capture_output=True, text=True, timeout=900, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.nightly
def test_it_runs_and_ends_with_the_text_of_an_issue(tmp_path):
    out = run("\n".join(cells("code")), ROOT / "examples", tmp_path / "notebook.py")
    issue = out[out.rindex("First run on a CPU") :]
    for title in ("doctor", "compare"):
        assert f"### {title}\n" in issue
    assert issue.count("exit status 0") == 1
    assert "checks passed." in issue and "times PEFT's speed" in issue


def test_it_finds_the_clone_from_its_root_too(tmp_path):
    assert f"clone: {ROOT}" in run(cells("code")[0], ROOT, tmp_path / "notebook.py")


def environment() -> dict[str, str]:
    """A user's: tests set Triton's interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }


def test_pages_name_it():
    assert "examples/first_gpu.ipynb" in (ROOT / "README.md").read_text()
    assert Path(NOTEBOOK).stat().st_size < 20_000

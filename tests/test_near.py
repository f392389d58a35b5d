"""``python -m tests.near``: which tests it takes for a file, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import near
from tests.mutants.__main__ import PLANTED, read


def names(step: near.Step) -> list[str]:
    return [Path(argument).name for argument in step.arguments]


def test_the_nearest_tests_come_first():
    modules, *planted, folder = near.steps_of(near.PACKAGE / "ops/lora_rows/triton.py")
    assert names(modules) == ["test_lora_rows.py"]
    assert any("USE5" in step.words for step in planted)
    assert folder.arguments == ["tests/ops"]
    # It has no folder of tests.
    assert "the folder" not in [step.words for step in near.steps_of(near.PACKAGE / "quantized.py")]


def test_every_planted_fault_is_near_its_file():
    faults = [*read(PLANTED.read_text(encoding="utf-8"))]
    for file in {fault.file for fault in faults}:
        words = " ".join(step.words for step in near.steps_of(near.PACKAGE / file))
        assert all(fault.id in words for fault in faults if fault.file == file), file


@pytest.mark.parametrize(
    ("file", "problem"),
    [("README.md", "must be a file of"), ("stablelora_kernels/no_such_file.py", "must be a file of")],
)  # fmt: skip
def test_another_file_is_refused(file, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        near.main([str(near.ROOT / file)])
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_it_stops_at_the_first_failure(monkeypatch, capsys):
    steps = [
        near.Step("missing", ["tests/no_such_test.py"]),
        near.Step("the folder", ["tests/ops"]),
    ]
    monkeypatch.setattr(near, "steps_of", lambda path: steps)
    assert near.main([str(near.PACKAGE / "pairs.py")]) == 1
    assert "the folder" not in capsys.readouterr().out

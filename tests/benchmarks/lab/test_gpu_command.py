"""``benchmarks.lab.gpu``: its dry run end to end, its sections and their processes, and what ends them early."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytest.importorskip("peft", reason="PEFT is one of the arms")

from benchmarks.lab.gpu import __main__ as command
from benchmarks.lab.gpu import correctness
from benchmarks.lab.gpu.report import PRODUCT, S_ALONE, VENDOR
from benchmarks.lab.gpu.section import Clock, Table, Unit, run_units
from stablelora_kernels.dispatch import backend

# On a GPU the command itself is the test. A dry run hides the GPU from its processes, but this process cannot.
pytestmark = pytest.mark.skipif(not backend.INTERPRETING, reason="the dry run uses the interpreter")
ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.lab.gpu", "--dry-run", "--out", str(out), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dry_run(out: Path, *arguments: str, sections: Sequence[str] = tuple(command.SECTIONS)) -> dict[str, Any]:
    """The rows of each section after a dry run, which has measured nothing and written nothing elsewhere."""
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    # So much time that a busy machine reaches everything.
    process = start(out, "--budget", "3000", *arguments)
    printed, progress = process.communicate(timeout=600)
    assert process.returncode == 0, printed + progress
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
    assert {path.name for path in out.glob("*.csv")} == {f"{name}.csv" for name in sections}
    rows = {name: table(out / f"{name}.csv") for name in sections}
    for name, found in rows.items():
        assert found and tuple(found[0]) == import_module(f"benchmarks.lab.gpu.{command.SECTIONS[name].module}").COLUMNS
        assert {row["dry"] for row in found} == {"dry"}
        assert {row["status"] for row in found} <= {"ok", "dry"}, [row for row in found if row["status"] == "failed"]
        assert f"{name}" in printed and f"{name}: begins" in progress
    summary = (out / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0] and "DRY RUN" in printed.splitlines()[-1]
    assert " met: " not in summary and " missed: " not in summary
    return rows


def check_steps(rows: list[dict[str, str]]) -> None:
    assert {row["arm"] for row in rows} == {"naive", "foreach", "fused", "ours", "ours, graph", "fused, graph"}
    assert {row["state"] for row in rows} == {"shrinking", "latched"}


def test_the_dry_run_of_a_section(tmp_path):
    check_steps(dry_run(tmp_path, "--only", "step", sections=["step"])["step"])


@pytest.mark.nightly
def test_the_dry_run_executes_every_section_and_measures_nothing(tmp_path):
    rows = dry_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{name}.csv" for name in command.SECTIONS), "summary.md"}
    assert list(dict.fromkeys(row["stage"] for row in rows["bringup"])) == list(correctness.STAGES)
    checked = Counter(row["check"] for row in rows["bringup"] + rows["correctness"])
    assert len(checked) == 42 and "test_every_kernel_matches_float64" in checked
    by_kernel = [row["case"] for row in rows["correctness"] if row["check"] == "test_every_kernel_matches_float64"]
    assert {case.split("-")[0] for case in by_kernel} == {"auto", "fused", "chained", "split", "vendor"}
    figures = [row for row in rows["correctness"] if row["bound"]]
    assert len(figures) > 20 and all(0 <= float(row["figure"]) <= float(row["bound"]) for row in figures)
    arms = {"frozen", "eager", "peft", "compiled", "ours"}
    per_shape = Counter((row["m"], row["mode"], row["direction"]) for row in rows["layer"])
    assert len(per_shape) == 12 and set(per_shape.values()) == {len(arms)}
    assert all(float(row["us"]) > 0 and float(row["over_frozen"]) > 0 for row in rows["layer"])
    parts = {PRODUCT, VENDOR, S_ALONE}
    assert {row["kernel"] for row in rows["regret"]} == {"fused", "chained", "split", "vendor"} | parts
    assert {row["arm"] for row in rows["captured"]} == {"eager", "captured"}
    mlp_arms = {"eager", "three layers", "one op", "one op, in one kernel", "one op, vendor's products"}
    assert {row["arm"] for row in rows["mlp"]} == mlp_arms
    check_steps(rows["step"])
    checks = {(row["check"], row["status"]) for row in rows["profile"]}
    assert checks >= {(name, "dry") for name in ("launches", "dram")}
    counted = [row for row in rows["profile"] if row["what"] == "launch_counts"]
    assert len(counted) == 5 and all(row["figure"] == row["expected"] for row in counted)


def test_an_interrupt_keeps_the_rows_and_lists_what_was_not_reached(tmp_path):
    sections = ("bringup", "layer")
    process = start(tmp_path, "--only", *sections)
    path, until = tmp_path / "bringup.csv", time.monotonic() + 120
    while time.monotonic() < until and not (path.exists() and len(path.read_text().splitlines()) > 3):
        time.sleep(0.05)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    printed, progress = process.communicate(timeout=120)
    assert process.returncode == 130, printed + progress
    rows = table(path)
    assert len(rows) >= 2 and all(row["status"] in ("ok", "begun") and row["dry"] == "dry" for row in rows)
    assert not (tmp_path / "layer.csv").exists()
    summary = (tmp_path / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0] and "INTERRUPTED" in summary.splitlines()[0]
    assert "layer" in summary and "not reached" in summary and "did not end" not in summary
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def children_of(parent: int) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            # The process's name stands in parentheses, and may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(pid)
    return found


def test_a_spent_budget_reaches_no_section(tmp_path):
    process = start(tmp_path, "--budget", "0.01", "--only", "layer", "step")
    printed, progress = process.communicate(timeout=120)
    assert process.returncode == 0, printed + progress
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]
    assert len(re.findall(r"^(layer|step) .*not reached$", printed, re.MULTILINE)) == 2


def test_a_dry_run_does_not_write_among_the_results():
    process = start(RESULTS / "h100")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "--out" in errors and not (RESULTS / "h100").exists()


# Sections.


def test_units_fail_alone_and_do_not_begin_when_time_is_up():
    rows = []

    def fail():
        yield {"figure": 1}
        raise ValueError("broken here")

    def good():
        yield {"figure": 2}

    units = [Unit({"check": "a"}, fail, 1.0), Unit({"check": "b"}, good, 1.0), Unit({"check": "c"}, good, 1e9)]
    run_units(units, rows.append, Clock(time.monotonic() + 60), lambda: None)
    assert [(row["check"], row["status"]) for row in rows] == [
        ("a", "ok"), ("a", "failed"), ("b", "ok"), ("c", "not reached"),
    ]  # fmt: skip
    assert "ValueError: broken here" in rows[1]["note"]


def test_an_unusable_gpu_ends_its_section():
    def unusable():
        raise RuntimeError("an illegal memory access was encountered")

    rows, units = [], [Unit({"check": name}, lambda: iter([{}])) for name in "ab"]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_units(units, rows.append, Clock(time.monotonic() + 60), unusable)
    assert [row["check"] for row in rows] == ["a"]


PROGRAM = """#!{python}
import os, subprocess, sys, time
with open(sys.argv[3], "w") as file:
    file.write("m,status\\n4,ok\\n")
print("dying words", file=sys.stderr, flush=True)
{end}
"""


def stand_in(monkeypatch, tmp_path, end: str) -> Path:
    """Let ``end`` be the end of each section's program, which has written one row."""
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable, end=end))
    program.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(program))
    return tmp_path / "section.csv"


def test_a_section_that_crashes_keeps_its_rows_and_its_last_words(monkeypatch, tmp_path):
    path = stand_in(monkeypatch, tmp_path, "os._exit(7)")
    problem = command.run_section("layer", path, 60.0, dry=True)
    assert "exit status 7" in problem and "dying words" in problem
    assert command.read(path) == [{"m": 4, "status": "ok"}]


def test_a_section_that_hangs_is_stopped_with_its_own_processes(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    hang = f"child = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    path = stand_in(monkeypatch, tmp_path, hang)
    monkeypatch.setattr(command, "GRACE", 2.0)
    problem = command.run_section("layer", path, 1.0, dry=True)
    assert "stopped 2 s after its time" in problem and command.read(path) == [{"m": 4, "status": "ok"}]
    # The kernel takes a moment to end a killed process, which may then wait as a zombie for its new parent.
    state, until = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 30
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, state.read_text()
        time.sleep(0.05)


@pytest.fixture
def quick(monkeypatch):
    """The command in this process, without looking at the machine. It replaces signal handlers, so restore them."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(command, "machine", lambda dry: {"gpu": None, "commit": "abc"})
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def test_a_failed_row_sets_the_exit_status_and_other_rows_go_on(quick, monkeypatch, tmp_path, capsys):
    def fake(name, path, seconds, dry):
        rows = Table(path, correctness.COLUMNS, dry)
        rows.add({"check": "oracle", "case": "split", "status": "failed", "note": "AssertionError: Y is off"})
        rows.add({"check": "oracle", "case": "fused", "status": "ok", "figure": 0.2, "bound": 1.0})
        return ""

    monkeypatch.setattr(command, "run_section", fake)
    assert command.main(["--dry-run", "--only", "correctness", "--out", str(tmp_path)]) == 1
    assert len(table(tmp_path / "correctness.csv")) == 2
    assert all("Y is off" in text for text in ((tmp_path / "summary.md").read_text(), capsys.readouterr().out))


def test_a_crash_fails_the_run_and_later_sections_go_on(quick, monkeypatch, tmp_path, capsys):
    seen = []

    def crash(name, path, seconds, dry):
        seen.append(name)
        return "" if seen[1:] else "the process ended: exit status 7\ndying words"

    monkeypatch.setattr(command, "run_section", crash)
    # Rows of an earlier run do not pass for this one's.
    (tmp_path / "layer.csv").write_text("m,status\n4,ok\n")
    assert command.main(["--dry-run", "--only", "layer", "step", "--out", str(tmp_path)]) == 1
    assert seen == ["layer", "step"] and not (tmp_path / "layer.csv").exists()
    assert "layer: the section's process: dying words" in capsys.readouterr().out


def test_a_failed_bring_up_ends_the_run_with_the_test_that_hung(quick, monkeypatch, tmp_path, capsys):
    def hang(name, path, seconds, dry):
        rows = Table(path, correctness.COLUMNS, dry)
        first, second = (
            correctness.key_of(f"tests/gpu/test_bring_up.py::{test}") for test in ("test_shrink", "test_mlp[0.1]")
        )
        rows.begin("a", first)
        rows.begin("b", second)
        rows.add({**first, "status": "ok"})
        rows.end("a")
        return "the process ended: exit status 1"

    monkeypatch.setattr(command, "run_section", hang)
    assert command.main(["--dry-run", "--only", "bringup", "layer", "--out", str(tmp_path)]) == 1
    printed, progress = capsys.readouterr()
    assert [row["status"] for row in table(tmp_path / "bringup.csv")] == ["ok", "begun"]
    assert "bringup failed, so the run ends here" in progress and not (tmp_path / "layer.csv").exists()
    assert "gated MLP test_mlp 0.1: it began and did not end" in printed
    assert re.search(r"^layer .*not reached$", printed, re.MULTILINE)


def test_deadlines_share_the_budget_in_order():
    ends = command.deadlines(list(command.SECTIONS), 520)
    assert list(ends) == list(command.SECTIONS) and list(ends.values()) == sorted(ends.values())
    assert ends["profile"] == pytest.approx(520)
    assert command.deadlines(["step"], 100) == {"step": pytest.approx(100)}
    assert command.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# The first section's rows, which pytest's plugin adds.

TESTS = """
import os, pytest
def test_good(record_property):
    record_property("figure", 0.5)
@pytest.mark.parametrize("case", ["4x4 r2"])
def test_bad(case):
    raise ValueError("broken here")
def test_skipped():
    pytest.skip("no memory")
def test_crash():
    os._exit(3)
"""
HANGING = """
import pytest, time
def test_on_a_cpu():
    time.sleep(2.5)
@pytest.fixture
def device():
    yield
    time.sleep(600)
@pytest.mark.gpu
def test_hangs(device):
    pass
def test_later():
    pass
"""


def run_pytest(tmp_path: Path, tests: str, *arguments: str, **variables: str) -> tuple[str, list[dict[str, str]]]:
    """Run tests with the plugin. Return what pytest wrote to standard error, and the rows."""
    (tmp_path / "test_some.py").write_text(tests)
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.lab.gpu.correctness", "--rows", str(path)]
    command += ["--until", "1e18", "--rootdir", str(tmp_path), str(tmp_path), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )
    return done.stderr, table(path)


@pytest.mark.nightly
def test_each_test_has_a_row_as_it_ends(tmp_path):
    pytest.importorskip("xdist", reason="only another process survives a crash")
    rows = {row["check"]: row for row in run_pytest(tmp_path, TESTS, "-n", "1")[1]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "test_good": "ok", "test_bad": "failed", "test_skipped": "skipped", "test_crash": "failed",
    }  # fmt: skip
    assert rows["test_good"]["figure"] == "0.5" and rows["test_bad"]["case"] == "4x4 r2"
    assert "ValueError: broken here" in rows["test_bad"]["note"] and rows["test_skipped"]["note"] == "no memory"
    assert "crashed" in rows["test_crash"]["note"]


def test_a_test_that_hangs_leaves_its_name_and_its_stack(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.gpu.conftest import pytest_runtest_protocol")
    stderr, rows = run_pytest(tmp_path, HANGING, "--capture=sys", SLK_GPU_WATCHDOG="2")
    assert [(row["check"], row["status"]) for row in rows] == [
        ("test_on_a_cpu", "ok"), ("test_hangs", "ok"), ("test_hangs", "begun"),
    ]  # fmt: skip
    assert "Timeout" in stderr and "in device" in stderr


def test_no_test_begins_behind_a_stage_that_failed(tmp_path):
    rows = correctness.Rows(Table(tmp_path / "rows.csv", correctness.COLUMNS, True))
    bad, same, later = (
        SimpleNamespace(nodeid=f"tests/gpu/test_bring_up.py::{test}")
        for test in ("test_shrink[1]", "test_shrink[2]", "test_mlp")
    )
    rows.pytest_runtest_setup(bad)
    place = ("a.py", 1, "")
    rows.pytest_runtest_logreport(pytest.TestReport(bad.nodeid, place, {}, "failed", "AssertionError", "call"))
    rows.pytest_runtest_setup(same)
    with pytest.raises(pytest.skip.Exception, match="not reached"):
        rows.pytest_runtest_setup(later)


def test_every_path_of_the_bring_up_exists():
    """One that does not would end pytest before the first test."""
    for path in correctness.PATHS:
        file, _, test = path.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), path


def test_no_test_begins_when_time_is_up():
    item = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: time.monotonic() - 1))
    with pytest.raises(pytest.skip.Exception, match="not reached") as skip:
        correctness.pytest_runtest_setup(item)
    report = pytest.TestReport(
        "a.py::test_some", ("a.py", 1, ""), {}, "skipped", ("a.py", 1, f"Skipped: {skip.value}"), "setup"
    )
    assert correctness.row_of(report)["status"] == "not reached"


def test_a_missing_pytest_is_a_skipped_row(monkeypatch, tmp_path, capsys):
    path = tmp_path / "correctness.csv"
    monkeypatch.setattr(sys, "argv", ["correctness", str(path), "--until", "1e18"])
    monkeypatch.setattr(correctness, "find_spec", lambda name: None)
    assert correctness.main() == 0
    (row,) = command.read(path)
    assert row["status"] == "skipped" and "pytest is not installed" in row["note"]
    assert "pytest is not installed" in capsys.readouterr().out

"""``benchmarks.lab.gpu``: its dry run, its sections' processes, and its verdicts."""

from __future__ import annotations

import subprocess
import sys
import tarfile

import pandas as pd
import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab.gpu import __main__ as command
from benchmarks.lab.gpu import report, stages
from stablelora_kernels.dispatch import backend
from tests.gpu.test_nvidia_tools import WATCHED
from tests.helpers.processes import python

# On a GPU the command itself is the test. A dry run hides the GPU from its processes, but this
# process cannot.
pytestmark = pytest.mark.skipif(
    not backend.INTERPRETING,
    reason="the dry run uses the interpreter: runs on machines without a GPU",
)


LAYER_ARMS = {"frozen nn.Linear", "eager LoRA", "PEFT", "ours", "one_launch", "branch_first"}
ARMS = {
    "step": {"AdamW fused", "StableLoRAAdamW"},
    "layer": LAYER_ARMS | {"few_rows"},
    "headline": LAYER_ARMS | {"addmm_, beta 0", "addmm_, beta 1", "branch alone"},
}


@pytest.mark.nightly
def test_a_dry_run_executes_every_section_and_measures_nothing(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    words = ["-m", "benchmarks.lab.gpu", "--dry-run", "--out", str(tmp_path), "--budget", "3000"]
    done = subprocess.run(
        [sys.executable, *words], cwd=command.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
    summary = (tmp_path / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0]
    assert "\nmet: " not in summary and "\nmissed: " not in summary
    found = {path.stem: read_records(path) for path in tmp_path.glob("*.csv")}
    assert {*found} == {"versions", *command.SECTIONS}
    assert all(
        {*rows.dry} == {"dry"} and {*rows.status} <= {"ok", "skipped"} for rows in found.values()
    )
    graphs = pd.concat(found.values()).query("metric == 'us' and mode == 'graph' and median > 0")
    arms = graphs.groupby("section").arm.agg(set)
    sections = {"headline", "apart", "layer", "mlp", "projections", "captured", "step"}
    assert {*arms.index} == sections and dict(arms[[*ARMS]]) == ARMS


def test_a_dry_run_does_not_write_among_the_results(capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry-run", "--out", str(RESULTS / "h100")])
    assert "--out must lie outside" in capsys.readouterr().err and not (RESULTS / "h100").exists()


def test_the_headline_is_timed_first_and_the_sanitizers_come_last():
    sections = [*command.SECTIONS]
    assert sections[:2] == ["smoke", "headline"]
    assert sections[-4:] == ["memcheck", "synccheck", "initcheck", "racecheck"]
    shares = [share for share, _ in command.SECTIONS.values()]
    # Seconds until it has been timed.
    assert command.BUDGET * sum(shares[:2]) / sum(shares) <= 300


@pytest.mark.nightly
def test_the_first_tests_are_there_and_none_is_left_out():
    """The section "correctness" leaves out the first tests' files."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *command.FILES]
    done = subprocess.run(words, cwd=command.ROOT, capture_output=True, text=True, check=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    stage = (*stages.DOCTOR, *stages.KERNELS, *stages.LAUNCHES)
    assert [name for name in names if not name.startswith(stage)] == []
    for first in (*stage, *stages.SMOKE, *WATCHED["kernels"], *WATCHED["launches"]):
        assert any(name.startswith(first) for name in names), first


TESTS = """
import os, subprocess, time
def test_good(record_property):
    record_property("row", {{"case": "a", "metric": "us", "median": 2.5, "m": 16384}})
def test_bad():
    raise ValueError("broken here")
def test_ends():
    {}
def test_later(): pass
"""
ENDS = {
    "failed": ("os._exit(7)", 300.0, "exit status 7"),
    "begun": ("subprocess.Popen(['sleep', '6789']); time.sleep(600)", 60.0, "time was up"),
}


@pytest.fixture
def run_sections(tmp_path, monkeypatch):
    """Run sections of these names and shares of pytest's arguments, in which a test does ``end``."""

    def run(end: str, sections: dict[str, list[str]], budget: float) -> pd.DataFrame:
        file, out = tmp_path / "test_some.py", tmp_path / "gpu"
        file.write_text(TESTS.format(end))
        out.mkdir()
        arguments = [str(file), "--rootdir", str(tmp_path)]
        all_of_them = {name: (1.0, [*arguments, *more]) for name, more in sections.items()}
        monkeypatch.setattr(command, "SECTIONS", all_of_them)
        first = {"section": "versions", "case": "torch, Triton, ptxas", "status": "ok", "note": ""}
        return command.run([*sections], out, budget, {"gpu": "x"}, dry=False, first=first)

    return run


# A test that hangs takes all of its section's time.
@pytest.mark.parametrize("status", ["failed", pytest.param("begun", marks=pytest.mark.nightly)])
def test_a_section_leaves_a_row_for_each_test_that_began(status, run_sections):
    end, seconds, note = ENDS[status]
    rows = run_sections(end, {"smoke": [], "b": []}, 2 * seconds)
    # A failure in the first ends the run.
    assert {*rows.section} == {"versions", "smoke"} and rows.note.dropna().iloc[-1].endswith(note)
    found = rows.set_index(rows.test.fillna(rows.case)).status
    assert (found["a"], found["test_bad"], found["test_ends"]) == ("ok", "failed", status)
    assert "test_later" not in found
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 6789" not in shown.stdout


def test_a_sanitizers_failure_ends_nothing_and_the_archive_has_every_section(
    tmp_path, run_sections
):
    rows = run_sections("pass", {"memcheck": [], "dram": ["-k", "good"]}, 600.0)
    out, of_memcheck = tmp_path / "gpu", rows[rows.section == "memcheck"]
    assert [*of_memcheck.status].count("failed") == 1 and "test_later" in [*of_memcheck.test]
    assert [*rows[rows.section == "dram"].status] == ["ok"], rows.note.dropna().iloc[-1]
    failed = "memcheck test_bad  : E   ValueError: broken here"
    assert failed in report.failures(rows) and failed in (out / "summary.md").read_text()
    assert "16384" in (out / "memcheck.csv").read_text()
    # It does not hold itself.
    with tarfile.open(out / "gpu.tar.gz") as archive:
        names = archive.getnames()
    kept = (path.relative_to(tmp_path) for path in out.iterdir() if path.suffix != ".gz")
    assert sorted(names) == sorted(map(str, kept)) and "gpu/dram.csv" in names


ROLES = {"ours": "ours", "frozen nn.Linear": "base", "eager LoRA": "rival", "PEFT": "rival"}


def timed(
    arm: str, us: float, m: int, phase: str, p: float = 0.1, **more: str
) -> dict[str, object]:
    sizes = {"m": m, "n_out": 4096, "k": 4096, "r": 16, "dropout": p, "case": f"M {m}, {p}"}
    about = {"section": "layer", "metric": "us", "mode": "graph", "status": "ok", "phase": phase}
    return {**about, **sizes, "arm": arm, "role": ROLES.get(arm, ""), "median": us, **more}


def results(eager: float, frozen: float, count: int, gib: float, us: float) -> pd.DataFrame:
    """Invented rows, in which ours takes 1 us."""
    shapes = [(m, phase, 0.1) for m in report.MANY for phase in ("both", "backward")]
    shapes += [(m, "forward", 0.0) for m in report.FEW]
    arms = {"ours": 1.0, "eager LoRA": eager, "frozen nn.Linear": frozen}
    launches = {"test": report.LAUNCHES, "figure": count}
    step = {"test": "test_a_step_of_many_tensors_is_one_launch"}
    return pd.DataFrame(
        [timed(*arm, *shape) for shape in shapes for arm in arms.items()]
        + [launches | {"case": f"{m}-0.0-forward"} for m in report.FEW]
        + [step | {"figure": count, "waits": count - 1}, {"test": report.BYTES, "figure": gib}]
        + [timed("ours", us, 0, "step", section="step", state="shrinking", dtype="float32")]
    )


def test_a_layer_taken_apart_has_differences_of_two_launches():
    took = {"dX": 90.0, "dX and dA": 120.5, "S": 9.0}
    rows = [
        timed(arm, us + (phase == report.ONE_LAUNCH), 2048, phase, section="apart")
        for phase in (report.MANY_LAUNCHES, report.ONE_LAUNCH)
        for arm, us in took.items()
    ]
    us = report.taken_apart(pd.DataFrame(rows))
    assert [*us.index] == ["dX", "dX and dA", "S", "dA's tail"]
    many = us[0.1, 2048, report.MANY_LAUNCHES]
    assert many.tolist() == [90.0, 120.5, 9.0, 30.5]
    assert us[0.1, 2048, report.ONE_LAUNCH].tolist() == [91.0, 121.5, 10.0, 30.5]
    assert "dA's tail" in report.page(pd.DataFrame(rows), {"gpu": "x"}, dry=False)


LAUNCHED = """
import torch
from benchmarks.common.null_driver import null_driver, null_driver_problem
if problem := null_driver_problem():
    print(problem)
    raise SystemExit(77)
from benchmarks.lab.gpu import parts
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.launch.base import launch_counts

def make(*size, dtype):
    return (torch.randn if dtype.is_floating_point else torch.zeros)(*size, dtype=dtype)

with null_driver():
    shape = parts.Shape(300, 512, 256, 16, {})
    runs = parts.runs(DEVICES["sm_90"], torch.device("cpu"), shape, make)
    for build in runs.values():
        before = sum(launch_counts.values())
        run = build()
        run()
        assert sum(launch_counts.values()) > before or run.func == parts.run_all
print(*runs, sep="\\n")
"""


@pytest.mark.parametrize("dropout", [0.1, pytest.param(0.0, marks=pytest.mark.nightly)])
def test_every_part_launches_over_the_null_driver(dropout: float) -> None:
    """Triton's own launcher takes the arguments of each."""
    done = python(LAUNCHED.format(dropout))
    if done.returncode == 77:
        pytest.skip(f"the null driver can't run: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    of_differences = {part for pair in report.DIFFERENCES.values() for part in pair}
    without_mask = {"S, its mask not stored"} if not dropout else set()
    assert of_differences - without_mask <= {*done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (results(1.5, 0.95, 1, 0.9, 400.0), ["met"] * 9),
        (results(1.1, 0.8, 2, 1.2, 500.0), ["missed"] * 9),
    ],
    ids=["met", "missed"],
)
def test_targets_are_met_missed_or_not_measured(rows, expected):
    page = report.page(rows, {"gpu": "x"}, dry=False)
    verdicts = page.partition("## Targets")[2].partition("##")[0].strip("`\n ").splitlines()
    assert [line.partition(":")[0] for line in verdicts] == expected


def test_losses_and_regret():
    arms = {"frozen nn.Linear": 1.0, "eager LoRA": 4.0, "PEFT": 2.5, "ours": 5.0, "one_launch": 4.0}
    times = pd.DataFrame([timed(*arm, m, "forward") for arm in arms.items() for m in (64, 16)])
    times.loc[(times.arm == "one_launch") & (times.m == 16), "median"] = 5.0
    lost = report.losses(times[times.m == 64])
    assert lost[["arm", "ratio"]].to_numpy().tolist() == [["PEFT", 2.0], ["eager LoRA", 1.25]]
    assert report.regrets(times).loc["forward"].tolist() == [2, 0.125, 0.25]

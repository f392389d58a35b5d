"""``benchmarks.lab.gpu``: its dry run, its sections' processes and what ends them early, and its
verdicts.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab.gpu import __main__ as command
from benchmarks.lab.gpu import report, stages, times
from stablelora_kernels.cli.self_test import checks
from stablelora_kernels.dispatch import backend
from tests.gpu.test_nvidia_tools import WATCHED
from tests.helpers.processes import python

# On a GPU the command itself is the test. A dry run hides the GPU from its processes, but this
# process cannot.
pytestmark = pytest.mark.skipif(
    not backend.INTERPRETING,
    reason="the dry run uses the interpreter: runs on machines without a GPU",
)


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "benchmarks.lab.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.Popen(
        words, cwd=command.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


LAYER_ARMS = {"frozen nn.Linear", "eager LoRA", "PEFT", "ours", "one_launch", "branch_first"}
ARMS = {
    "step": {"AdamW fused", "StableLoRAAdamW"},
    "layer": LAYER_ARMS | {"few_rows"},
    "headline": LAYER_ARMS | {"addmm_, beta 0", "addmm_, beta 1", "branch alone"},
}


@pytest.mark.nightly
def test_a_dry_run_executes_every_section_and_measures_nothing(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    process = start(tmp_path, "--budget", "3000")
    printed, _ = process.communicate(timeout=1500)
    assert (
        process.returncode == 0
        and {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
    ), printed
    summary = (tmp_path / "summary.md").read_text()
    assert (
        "DRY RUN" in summary.splitlines()[0]
        and "\nmet: " not in summary
        and "\nmissed: " not in summary
    )
    found = {path.stem: read_records(path) for path in tmp_path.glob("*.csv")}
    assert {*found} == {"versions", *command.SECTIONS}
    assert all(
        {*rows.dry} == {"dry"} and {*rows.status} <= {"ok", "skipped"} for rows in found.values()
    )
    graphs = pd.concat(found.values()).query("metric == 'us' and mode == 'graph' and median > 0")
    arms = graphs.groupby("section").arm.agg(set)
    sections = {"headline", "apart", "layer", "mlp", "projections", "captured", "step"}
    assert {*arms.index} == sections and dict(arms[[*ARMS]]) == ARMS


@pytest.mark.nightly
def test_an_interrupt_keeps_the_rows_and_ends_the_processes(tmp_path):
    process, path = start(tmp_path, "--only", "kernels", "layer"), tmp_path / "kernels.csv"
    until = time.monotonic() + 300
    while time.monotonic() < until and not (path.exists() and path.read_text().count(",ok") > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "INTERRUPTED" in process.communicate(timeout=120)[0] and process.returncode == 130
    assert {"ok", "interrupted"} <= {*read_records(path).status} <= {"ok", "begun", "interrupted"}
    assert not (tmp_path / "layer.csv").exists() and str(tmp_path) not in processes()


def test_a_dry_run_does_not_write_among_the_results(capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry-run", "--out", str(RESULTS / "h100")])
    assert "--out must lie outside" in capsys.readouterr().err and not (RESULTS / "h100").exists()


def collected(*arguments: str) -> list[str]:
    """The names of the tests that pytest would run, in order."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *arguments]
    printed = subprocess.run(
        words, cwd=command.ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [line.partition("::")[2] for line in printed.splitlines() if "::" in line]


@pytest.mark.nightly
def test_the_first_sections_leave_out_no_test():
    first = collected(*stages.DOCTOR, *stages.KERNELS, *stages.LAUNCHES)
    # The section "correctness" leaves out these files.
    assert sorted(first) == sorted(collected(*command.FILES))
    assert {*collected(*WATCHED["kernels"], *WATCHED["launches"])} < {*first}


class Ran(Exception):
    """A section would begin."""


@pytest.fixture
def gpu(monkeypatch):
    """This machine seems to have an H100, and no section runs."""

    def begins(*arguments):
        raise Ran

    monkeypatch.setattr(
        command, "environment", lambda: {"gpu": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0"}
    )
    monkeypatch.setattr(command, "run", begins)
    monkeypatch.setattr(command.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(command.torch.cuda, "current_device", lambda: 0)


def test_the_first_row_has_the_versions(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(backend, "verdict_of", lambda index: backend.UNKNOWN)
    with pytest.raises(Ran):
        command.main(["--out", str(tmp_path)])
    (row,) = read_records(tmp_path / "versions.csv").to_dict("records")
    assert re.fullmatch(
        r"torch 2\.11\.0, Triton 3\.6\.0, ptxas \d+\.\d+\.\d+ for sm_90", row["case"]
    )
    assert row["case"] in capsys.readouterr().err and row["status"] == "ok"


def test_a_triton_that_is_known_to_be_wrong_ends_the_run_unless_anyway(
    gpu, monkeypatch, tmp_path, capsys
):
    wrong = "Triton 3.6.0 makes wrong code of these kernels for compute capability 9.0 (H100, H200, GH200)"
    monkeypatch.setattr(
        backend,
        "verdict_of",
        lambda index: backend.Verdict(wrong, "install Triton 3.7.1 or newer", ""),
    )
    assert command.main(["--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"{wrong}; install Triton 3.7.1 or newer. --anyway runs it all the same."
    )
    with pytest.raises(Ran):
        command.main(["--out", str(tmp_path), "--anyway"])
    first = read_records(tmp_path / "versions.csv")
    assert [*first.note] == [wrong]
    versions = (
        report.page(first, {"gpu": "x"}, dry=False).partition("## Versions")[2].partition("##")[0]
    )
    assert wrong in versions and "ptxas" in versions


def test_without_a_usable_triton_nothing_runs(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(backend, "TRITON_PROBLEM", "Triton is not installed")
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "can't run here: Triton is not installed" in capsys.readouterr().err


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
    "ok": ("pass", 300.0, "broken here"),
}


FIRST_ROW = {"section": "versions", "case": "torch, Triton, ptxas", "status": "ok", "note": ""}


def run_sections(names: list[str], out: Path, budget: float) -> pd.DataFrame:
    return command.run(names, out, budget, {"gpu": "x"}, dry=False, first=FIRST_ROW)


# A test that hangs takes all of its section's time.
@pytest.mark.parametrize(
    "status", ["failed", "ok", pytest.param("begun", marks=pytest.mark.nightly)]
)
def test_a_section_leaves_a_row_for_each_test_that_began(status, tmp_path, monkeypatch):
    end, seconds, note = ENDS[status]
    (tmp_path / "test_some.py").write_text(TESTS.format(end))
    sections = {
        name: (1.0, [str(tmp_path / "test_some.py"), "--rootdir", str(tmp_path)])
        for name in ("smoke", "b")
    }
    monkeypatch.setattr(command, "SECTIONS", sections)
    rows = run_sections(["smoke", "b"], tmp_path, 2 * seconds)
    # A failure in the first ends the run.
    assert {*rows.section} == {"versions", "smoke"} and rows.note.dropna().iloc[-1].endswith(note)
    found = rows.set_index(rows.test.fillna(rows.case)).status
    assert (found["a"], found["test_bad"], found["test_ends"]) == ("ok", "failed", status)
    assert ("test_later" in found) == (status == "ok")
    assert "smoke test_bad  : E   ValueError: broken here" in report.failures(rows)
    assert "16384" in (tmp_path / "smoke.csv").read_text() and "sleep 6789" not in processes()


LATER = """
import pathlib, tarfile
OUT = pathlib.Path({!r})
def test_what_is_on_disk_by_now():
    assert "memcheck test_bad" in (OUT / "summary.md").read_text()
    with tarfile.open(OUT / (OUT.name + ".tar.gz")) as archive:
        names = archive.getnames()
    assert {{OUT.name + "/memcheck.csv", OUT.name + "/memcheck.log", OUT.name + "/summary.md"}} <= {{*names}}
"""


def test_a_sanitizers_failure_ends_nothing_and_each_section_leaves_a_summary_and_an_archive(
    tmp_path, monkeypatch
):
    out = tmp_path / "gpu"
    out.mkdir()
    (tmp_path / "test_some.py").write_text(TESTS.format("pass"))
    (tmp_path / "test_later.py").write_text(LATER.format(str(out)))
    files = {"memcheck": "test_some.py", "dram": "test_later.py"}
    sections = {
        name: (1.0, [str(tmp_path / file), "--rootdir", str(tmp_path)])
        for name, file in files.items()
    }
    monkeypatch.setattr(command, "SECTIONS", sections)
    rows = run_sections([*files], out, 600.0)
    assert [*rows[rows.section == "memcheck"].status].count("failed") == 1
    assert [*rows[rows.section == "dram"].status] == ["ok"], rows.note.dropna().iloc[-1]
    # The archive has the last section too, and does not hold itself.
    with tarfile.open(out / "gpu.tar.gz") as archive:
        names = archive.getnames()
    kept = (path.relative_to(tmp_path) for path in out.iterdir() if path.suffix != ".gz")
    assert sorted(names) == sorted(map(str, kept)) and "gpu/dram.csv" in names


def test_what_decides_most_comes_first():
    sections = [*command.SECTIONS]
    assert sections[:3] == ["smoke", "headline", "job"]
    assert sections[-4:] == ["memcheck", "synccheck", "initcheck", "racecheck"]
    assert command.ENDING == ("smoke",)
    shares = [share for share, _ in command.SECTIONS.values()]
    # Seconds until the headline has been timed.
    assert command.BUDGET * sum(shares[:2]) / sum(shares) <= 300
    headline = [*times.SECTIONS[times.headline][1]]
    assert sorted(headline) == sorted(
        (m, 4096, 4096, 16, p) for m in (2048, 8192) for p in (0.0, 0.1)
    )
    # The one with most rows and dropout is the first, and first among all layers.
    assert headline[0] == (8192, 4096, 4096, 16, 0.1) == next(iter(times.SECTIONS[times.layer][1]))


def test_three_checks_of_doctor_are_the_first_tests():
    (doctor,) = stages.DOCTOR
    of_doctor = {f"{doctor}[{check.family}, {check.case}]" for check in checks()}
    assert len({*stages.SMOKE}) == 3 and {*stages.SMOKE} < of_doctor


ROLES = {"ours": "ours", "frozen nn.Linear": "base", "eager LoRA": "rival", "PEFT": "rival"}


def timed(
    arm: str, us: float, m: int, phase: str, p: float = 0.1, **more: str
) -> dict[str, object]:
    sizes = {"m": m, "n_out": 4096, "k": 4096, "r": 16, "dropout": p, "case": f"M {m}, {p}"}
    about = {
        "section": "layer",
        "metric": "us",
        "mode": "graph",
        "status": "ok",
        "role": ROLES.get(arm, ""),
    }
    return {**about, **sizes, "phase": phase, "arm": arm, "median": us, **more}


def results(
    eager: float, frozen: float, count: int, gib: float, us: float
) -> list[dict[str, object]]:
    """Invented rows, in which ours takes 1 us."""
    shapes = [(m, phase, 0.1) for m in report.MANY for phase in ("both", "backward")]
    shapes += [(m, "forward", 0.0) for m in report.FEW]
    arms = {"ours": 1.0, "eager LoRA": eager, "frozen nn.Linear": frozen}
    rows = [timed(*arm, *shape) for shape in shapes for arm in arms.items()]
    rows += [
        {"test": report.LAUNCHES, "case": f"{m}-0.0-forward", "figure": count} for m in report.FEW
    ]
    rows += [
        {"test": "test_a_step_of_many_tensors_is_one_launch", "figure": count, "waits": count - 1}
    ]
    rows += [{"test": report.BYTES, "figure": gib}]
    return [*rows, timed("ours", us, 0, "step", section="step", state="shrinking", dtype="float32")]


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
    page = report.page(pd.DataFrame(rows), {"gpu": "x"}, dry=False)
    verdicts = page.partition("## Targets")[2].partition("##")[0].strip("`\n ").splitlines()
    assert [line.partition(":")[0] for line in verdicts] == expected


def test_losses_and_regret():
    arms = {"frozen nn.Linear": 1.0, "eager LoRA": 4.0, "PEFT": 2.5, "ours": 5.0, "one_launch": 4.0}
    times = pd.DataFrame([timed(*arm, m, "forward") for arm in arms.items() for m in (64, 16)])
    times.loc[(times.arm == "one_launch") & (times.m == 16), "median"] = 5.0
    lost = report.losses(times[times.m == 64])
    assert lost[["arm", "ratio"]].to_numpy().tolist() == [["PEFT", 2.0], ["eager LoRA", 1.25]]
    assert report.regrets(times).loc["forward"].tolist() == [2, 0.125, 0.25]

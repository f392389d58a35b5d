"""``benchmarks.lab.gpu``: its dry run, its sections' processes and what ends them early, its verdicts, and its CUDA calls."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab.gpu import __main__ as command
from benchmarks.lab.gpu import device, report
from stablelora_kernels.dispatch import backend

# On a GPU the command itself is the test. A dry run hides the GPU from its processes, but this process cannot.
pytestmark = pytest.mark.skipif(not backend.INTERPRETING, reason="the dry run uses the interpreter")


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "benchmarks.lab.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.Popen(words, cwd=command.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


STEP = {"AdamW fused", "StableLoRAAdamW"}
LAYER = {"frozen nn.Linear", "eager LoRA", "PEFT", "ours", "fused", "chained", "split", "vendor", *report.PARTS}


@pytest.mark.parametrize(
    ("section", "arms"),
    [("step", STEP), *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in (("layer", LAYER), ("", set())))],
)
def test_a_dry_run_executes_a_section_and_measures_nothing(section, arms, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    process = start(tmp_path, "--budget", "3000", *(["--only", section] if section else []))
    printed, _ = process.communicate(timeout=1500)
    assert process.returncode == 0 and {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before, printed
    summary = (tmp_path / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0] and "\nmet: " not in summary and "\nmissed: " not in summary
    found = {path.stem: read_records(path) for path in tmp_path.glob("*.csv")}
    assert {*found} == ({section} if section else {*command.SECTIONS})
    assert all({*rows.dry} == {"dry"} and {*rows.status} <= {"ok", "skipped"} for rows in found.values())
    graphs = pd.concat(found.values()).query("metric == 'us' and mode == 'graph' and median > 0")
    assert {*graphs.arm} == arms or not section


def test_an_interrupt_keeps_the_rows_and_ends_the_processes(tmp_path):
    process, path, until = (
        start(tmp_path, "--only", "bringup", "layer"),
        tmp_path / "bringup.csv",
        time.monotonic() + 300,
    )
    while time.monotonic() < until and not (path.exists() and path.read_text().count(",ok") > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "INTERRUPTED" in process.communicate(timeout=120)[0] and process.returncode == 130
    assert {"ok", "interrupted"} <= {*read_records(path).status} <= {"ok", "begun", "interrupted"}
    assert not (tmp_path / "layer.csv").exists() and str(tmp_path) not in processes()


def test_a_dry_run_does_not_write_among_the_results():
    assert (
        "--out must lie outside" in start(RESULTS / "h100").communicate(timeout=120)[0]
        and not (RESULTS / "h100").exists()
    )


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


@pytest.mark.parametrize(
    ("end", "seconds", "status", "note"),
    [
        ("os._exit(7)", 60.0, "failed", "exit status 7"),
        ("subprocess.Popen(['sleep', '6789']); time.sleep(600)", 20.0, "begun", "time was up"),
        ("pass", 60.0, "ok", ""),
    ],
)
def test_a_section_leaves_a_row_for_each_test_that_began(end, seconds, status, note, tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(TESTS.format(end))
    sections = {name: (1.0, [str(tmp_path / "test_some.py"), "--rootdir", str(tmp_path)]) for name in ("memcheck", "b")}
    monkeypatch.setattr(command, "SECTIONS", sections)
    rows = command.run(["memcheck", "b"], tmp_path, 2 * seconds, {"gpu": "x"}, dry=False)
    # A failure in the first ends the run.
    assert {*rows.section} == {"memcheck"} and (status == "ok" or rows.note.iloc[-1].endswith(note))
    found = rows.set_index(rows.test.fillna(rows.case)).status
    assert (found["a"], found["test_bad"], found["test_ends"]) == ("ok", "failed", status)
    assert ("test_later" in found) == (
        status == "ok"
    ) and "memcheck test_bad  : E   ValueError: broken here" in report.failures(rows)
    assert "16384" in (tmp_path / "memcheck.csv").read_text() and "sleep 6789" not in processes()


def timed(m: int, phase: str, arm: str, us: float, p: float = 0.1, **more: object) -> dict[str, object]:
    sizes = {"m": m, "n_out": 4096, "k": 4096, "r": 16, "dropout": p, "case": f"M {m}, {p}", "phase": phase, "arm": arm}
    role = "ours" if arm == "ours" else "base" if "frozen" in arm else "rival"
    return {
        **sizes,
        "section": "layer",
        "metric": "us",
        "mode": "graph",
        "status": "ok",
        "median": us,
        "role": role,
        **more,
    }


def results(eager: float, frozen: float, count: int, gib: float, us: float) -> list[dict[str, object]]:
    """Invented rows, in which ours takes 1 us."""
    shapes = [(m, phase, 0.1) for m in report.MANY for phase in ("both", "backward")] + [
        (m, "forward", 0.0) for m in report.FEW
    ]
    arms = {"ours": 1.0, "eager LoRA": eager, "frozen nn.Linear": frozen}
    tests = [(report.LAUNCHES, f"{m}-0.0-forward", count) for m in report.FEW] + [(report.STEP, None, count)]
    tests += [("test_fewer_bytes_than_eager", None, gib)]
    rows = [
        {"test": test, "case": case, "figure": figure, "waits": count - 1, "status": "ok"}
        for test, case, figure in tests
    ]
    rows += [timed(m, phase, arm, us, p) for m, phase, p in shapes for arm, us in arms.items()]
    return [*rows, timed(0, "step", "ours", us, section="step", state="shrinking", dtype="float32")]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (results(1.5, 0.95, 1, 0.9, 400.0), ["met"] * 9),
        (results(1.1, 0.8, 2, 1.2, 500.0), ["missed"] * 9),
        ([{"section": "a", "status": "ok"}], ["not measured"] * 9),
        # One figure of three can miss a target, but not meet it.
        ([timed(2048, "both", "ours", 1.0), timed(2048, "both", "eager LoRA", 1.39), timed(2048, "both", "frozen nn.Linear", 1.0)],
         ["missed", *["not measured"] * 8]),
    ],
)  # fmt: skip
def test_targets_are_met_missed_or_not_measured(rows, expected):
    page = report.page(pd.DataFrame(rows), {"gpu": "x"}, dry=False)
    verdicts = page.partition("## Targets")[2].partition("##")[0].strip("`\n ").splitlines()
    assert [line.partition(":")[0] for line in verdicts] == expected


def test_losses_and_regret():
    arms = {"frozen nn.Linear": 1.0, "eager LoRA": 4.0, "PEFT": 2.5, "ours": 5.0}
    rows = [timed(64, "forward", arm, us) for arm, us in arms.items()]
    for m, split, fused in ((64, 6.0, 5.0), (16, 1.0, 2.0)):
        kernels = {"split": split, "fused": fused, report.S_ALONE: 0.1}
        rows += [timed(m, "forward", arm, us, role="", chosen_forward="split") for arm, us in kernels.items()]
    times = pd.DataFrame(rows).assign(chosen_backward="fused")
    assert report.losses(times)[["arm", "ratio"]].to_numpy().tolist() == [["PEFT", 2.0], ["eager LoRA", 1.25]]
    assert report.regrets(times).loc["forward"].tolist() == [2, pytest.approx(0.1), pytest.approx(0.2)]


def test_cuda_calls_come_in_order(monkeypatch):
    log: list[str] = []

    class Fake:
        """Stands in for an event, a graph, its capture, a stream and the GPU's properties."""

        L2_cache_size = 64
        __init__ = lambda self, *_, **given: None  # noqa: E731
        record, replay = (lambda self, word=word: log.append(word) for word in ("record", "replay"))
        elapsed_time = lambda self, end: 2.0  # noqa: E731
        __enter__, __exit__ = (lambda self, *_, word=word: log.append(word) for word in ("capture", "captured"))

    fakes = dict.fromkeys(("Event", "CUDAGraph", "graph", "Stream", "get_device_properties"), Fake)
    fakes |= {"set_stream": lambda stream: log.append("set_stream"), "synchronize": lambda: log.append("wait")}
    fakes |= {"current_device": lambda: 0, "graph_pool_handle": lambda: 0}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device, real=torch.empty: real(4, dtype=dtype))
    monkeypatch.setattr(device, "reading", lambda: log.append("load") or [(1410, 640_000, 4 | 32), (1980, 500_000, 1)])
    gpu = device.Device(dry=False)
    assert log == ["set_stream"] and [gpu.replicas(each) for each in (1, 32, 1000)] == [device.MOST_CALLS, 4, 1]
    graph = gpu.capture([lambda: log.append("one"), lambda: log.append("two")], most=3)
    assert log[1:] == ["one", "two", "one", "two", "wait", "one", "wait", "capture", "one", "two", "one", "captured"]
    for arm, before in ((graph, []), ((graph[0], 0), ["wait"])):
        log.clear()
        samples, load = gpu.time({"a": arm}, 0.0)
        turn = [*before, "record", "replay", "record", "load", "wait"]
        assert log == ["replay"] * device.WARMUP + ["wait"] + turn * device.LEAST
        assert samples["a"][0] == [pytest.approx(2e-3 / max(1, arm[1]))] * device.LEAST and len(samples["a"][1]) == 5
        assert load == {"sm_mhz": 1410, "watts": 640.0, "throttle": "power cap, thermal"}

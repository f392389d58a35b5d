"""``benchmarks.lab.gpu``: its dry run end to end, what ends it early, its verdicts, and the GPU's half against a fake."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytest.importorskip("peft", reason="PEFT is one of the arms")

import stablelora_kernels as slk
from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu import __main__, correctness, graphs, offsets, report, tools
from benchmarks.lab.gpu import checks as _gpu_checks
from benchmarks.lab.gpu import device as _gpu_device
from benchmarks.lab.gpu import layer as _gpu_layer
from benchmarks.lab.gpu import process as _gpu_process
from benchmarks.lab.gpu import profile as _gpu_profile
from benchmarks.lab.gpu.checks import Case, keep_rows
from benchmarks.lab.gpu.process import Progress, run_section
from benchmarks.lab.gpu.section import SECTIONS, Clock, Unit, module, run_units
from stablelora_kernels.dispatch import backend
from stablelora_kernels.reference import dropout_keep_ref

# On a GPU the command itself is the test; a dry run hides the GPU from its processes, this process can't.
pytestmark = pytest.mark.skipif(not backend.INTERPRETING, reason="the dry run is in the interpreter")
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


def test_the_dry_run_goes_through_every_section_and_measures_nothing(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    process = start(tmp_path)
    printed, progress = process.communicate(timeout=400)
    assert process.returncode == 0, printed + progress
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"{name}.csv" for name in SECTIONS), "summary.md", "times.png", "choices.png"]
    )
    rows = {name: table(tmp_path / f"{name}.csv") for name in SECTIONS}
    for name, found in rows.items():
        assert found and tuple(found[0]) == module(name).COLUMNS
        assert {row["dry"] for row in found} == {"dry"}
        assert {row["status"] for row in found} <= {"ok", "dry"}, [row for row in found if row["status"] == "failed"]
        assert f"{name}" in printed and f"{name}: begins" in progress
    assert {row["check"] for row in rows["correctness"]} == {"oracle", "mask", "repeats", "graph", "offsets"}
    assert {row["kernel"] for row in rows["correctness"]} == {"auto", "fused", "split", "vendor"}
    assert all(0 <= float(row["figure"]) <= float(row["bound"]) for row in rows["correctness"])
    arms = {"frozen", "eager", "peft", "compiled", "ours"}
    per_shape = Counter((row["m"], row["mode"], row["direction"]) for row in rows["layer"])
    assert len(per_shape) == 12 and set(per_shape.values()) == {len(arms)}
    assert all(float(row["us"]) > 0 and float(row["over_frozen"]) > 0 for row in rows["layer"])
    assert {row["kernel"] for row in rows["regret"]} == {"fused", "split", "vendor"}
    assert {row["arm"] for row in rows["step"]} == {"naive", "foreach", "fused", "ours", "ours, graph", "fused, graph"}
    assert {row["state"] for row in rows["step"]} == {"shrinking", "latched"}
    checks = {(row["check"], row["status"]) for row in rows["profile"]}
    assert checks >= {(name, "dry") for name in ("launches", "waiting", "memory", "dram", "sanitizer")}
    counted = [row for row in rows["profile"] if row["what"] == "launch_counts"]
    assert len(counted) == 5 and all(row["figure"] == row["expected"] for row in counted)
    summary = (tmp_path / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0] and "DRY RUN" in printed.splitlines()[-1]
    assert " met: " not in summary and " missed: " not in summary


def test_an_interrupt_keeps_the_rows_and_says_what_was_not_reached(tmp_path):
    process = start(tmp_path)
    path, until = tmp_path / "correctness.csv", time.monotonic() + 120
    while time.monotonic() < until and not (path.exists() and len(path.read_text().splitlines()) > 3):
        time.sleep(0.05)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    printed, progress = process.communicate(timeout=120)
    assert process.returncode == 130, printed + progress
    rows = table(path)
    assert len(rows) >= 2 and all(row["status"] == "ok" and row["dry"] == "dry" for row in rows)
    assert table(tmp_path / "layer.csv") == []
    summary = (tmp_path / "summary.md").read_text()
    assert "DRY RUN" in summary.splitlines()[0] and "INTERRUPTED" in summary.splitlines()[0]
    assert summary.count("not reached") >= len(SECTIONS)
    # Nobody is left behind.
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def children_of(parent: int) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            # The name before it, in parentheses, may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(pid)
    return found


def test_a_spent_budget_is_said(tmp_path):
    process = start(tmp_path, "--budget", "0.01", "--only", "layer", "step")
    printed, progress = process.communicate(timeout=120)
    assert process.returncode == 0, printed + progress
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer.csv", "step.csv", "summary.md"]
    assert table(tmp_path / "layer.csv") == [] and printed.count("not reached") == 2


def test_a_dry_run_does_not_write_among_the_results():
    process = start(RESULTS / "h100")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "--out" in errors and not (RESULTS / "h100").exists()


def test_units_fail_alone_and_are_left_out_when_time_is_up():
    messages = []

    def fail():
        yield {"figure": 1}
        raise ValueError("broken here")

    def good():
        yield {"figure": 2}

    units = [Unit({"check": "a"}, fail, 1.0), Unit({"check": "b"}, good, 1.0), Unit({"check": "c"}, good, 1e9)]
    run_units(units, messages.append, Clock(time.monotonic() + 60), 0, lambda: None)
    rows = [message["row"] for message in messages if "row" in message]
    assert [(row["check"], row["status"]) for row in rows] == [("a", "ok"), ("a", "failed"), ("b", "ok")]
    assert "ValueError: broken here" in rows[1]["note"]
    assert [message["name"] for message in messages if "late" in message] == ["c"]
    assert messages[-1] == {"end": True}


CRASHING = """
import os, sys, json
from benchmarks.lab.gpu.section import Unit, Clock, run_units
pipe, skip = int(sys.argv[sys.argv.index("--pipe") + 1]), int(sys.argv[sys.argv.index("--skip") + 1])
def good(): yield {"figure": 1}
def crash():
    print("dying words", flush=True)
    os._exit(7)
    yield
units = [Unit({"check": name}, run) for name, run in (("a", good), ("b", crash), ("c", good))]
with os.fdopen(pipe, "w", buffering=1) as file:
    run_units(units, lambda m: file.write(json.dumps(m) + "\\n"), Clock(1e18), skip, lambda: None)
"""


def test_a_process_that_dies_is_started_again_behind_what_killed_it(monkeypatch, tmp_path):
    program = tmp_path / "child.py"
    program.write_text(CRASHING)
    whole = subprocess.Popen

    def crashing(command, **options):
        return whole(
            [command[0], str(program), *command[3:]], **{**options, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
        )

    monkeypatch.setattr(_gpu_process.subprocess, "Popen", crashing)
    rows, progress = [], Progress()
    run_section("correctness", 60.0, 1, True, rows.append, lambda text: None, {"check": "process"}, progress)
    assert [(row["check"], row["status"]) for row in rows] == [("a", "ok"), ("b", "failed"), ("c", "ok")]
    assert "exit status 7" in rows[1]["note"] and "dying words" in rows[1]["note"]
    assert (progress.planned, progress.done) == (3, 3)


def test_a_failed_row_sets_the_exit_status_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fake(section, seconds, workers, dry, take, say, fatal_key, progress):
        progress.begun, progress.planned, progress.done = True, 2, 2
        take({"check": "oracle", "kernel": "split", "status": "failed", "note": "AssertionError: Y is off"})
        take({"check": "oracle", "kernel": "fused", "status": "ok", "figure": 0.2, "bound": 1.0})

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(__main__, "run_section", fake)
    monkeypatch.setattr(__main__, "machine", lambda dry, seconds: {"gpu": None, "commit": "abc"})
    try:
        status = __main__.main(["--dry-run", "--only", "correctness", "--out", str(tmp_path)])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert status == 1
    assert len(table(tmp_path / "correctness.csv")) == 2
    assert "Y is off" in (tmp_path / "summary.md").read_text() and "Failed (1)" in capsys.readouterr().out


def test_deadlines_share_the_budget_out_in_order():
    ends = __main__.deadlines(list(SECTIONS), 520)
    assert list(ends) == list(SECTIONS) and list(ends.values()) == sorted(ends.values())
    assert ends["profile"] == pytest.approx(520)
    assert __main__.deadlines(["step"], 100) == {"step": pytest.approx(100)}
    assert __main__.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# Verdicts, from rows made up.


def layer_row(m, direction, arm, us, p=0.1, **more):
    return {
        "m": m, "n": 4096, "k": 4096, "r": 16, "dropout": p, "mode": "graph", "direction": direction, "arm": arm,
        "status": "ok", "us": us, **more,
    }  # fmt: skip


def results(speedup: float, over: float, gib: float, ms: float, launches: int) -> dict[str, list[dict[str, object]]]:
    layer = [
        layer_row(m, direction, "ours", 1.0, eager_over=speedup, over_frozen=over)
        for m in (2048, 4096, 8192)
        for direction in ("both", "backward")
    ] + [layer_row(m, "forward", "ours", 1.0, 0.0, over_frozen=over, eager_over=1.0) for m in (1, 16, 64)]
    status = "ok" if launches == 1 else "failed"
    profile = [
        {"check": "launches", "what": what, "subject": subject, "status": status, "figure": figure}
        for subject in (*(f"forward {m}x4096x4096 r16 p0" for m in (1, 16, 64)), "step of 448 tensors")
        for what, figure in (("kernels", launches), ("syncs", launches - 1))
    ] + [{"check": "dram", "what": "ours", "status": "ok", "figure": gib}]
    step = [
        {"set": "8B model", "tensors": 448, "dtype": "float32", "state": "shrinking", "arm": "ours, graph",
         "device_us": ms * 1e3, "status": "ok"}
    ]  # fmt: skip
    return {"layer": layer, "profile": profile, "step": step}


def test_targets_are_met_missed_or_not_measured():
    met = report.targets(results(1.5, 1.05, 0.9, 0.4, 1))
    assert len(met) == 9 and {result for _, result, _ in met} == {"met"}
    missed = report.targets(results(1.1, 1.3, 1.2, 0.5, 2))
    assert {result for _, result, _ in missed} == {"missed"}
    assert any("1.200 GiB" in figures for _, _, figures in missed)
    nothing = report.targets({})
    assert len(nothing) == 9 and {result for _, result, _ in nothing} == {"not measured"}


def test_one_figure_of_three_can_miss_a_target_but_not_meet_it():
    few = results(1.5, 1.05, 0.9, 0.4, 1)
    few["layer"] = [row for row in few["layer"] if row["m"] != 8192]
    assert [result for _, result, _ in report.targets(few)][:3] == ["not measured"] * 3
    few["layer"][0]["eager_over"] = 1.39
    assert [result for _, result, _ in report.targets(few)][:3] == ["missed", "not measured", "not measured"]


def test_losses_are_against_rivals_only_and_worst_first():
    rows = [
        layer_row(64, "forward", arm, us) for arm, us in (("frozen", 1.0), ("eager", 4.0), ("peft", 2.5), ("ours", 5.0))
    ]
    rows += [layer_row(2048, "both", arm, us) for arm, us in (("eager", 9.0), ("ours", 5.0))]
    rows.append({**layer_row(64, "both", "compiled", 1.0), "status": "skipped"})
    found = report.losses(rows)
    assert [round(ratio, 2) for ratio, _ in found] == [2.0, 1.25]
    assert "peft 2.5" in found[0][1] and "M 64" in found[0][1]


def test_regrets_are_of_the_chosen_kernel():
    rows = [
        {"direction": "forward", "status": "ok", "kernel": kernel, "chosen": "split", "regret": regret}
        for kernel, regret in (("split", 0.2), ("fused", 0.0), ("vendor", 0.9), ("split", 0.0))
    ]
    assert report.regrets(rows) == {"forward": (2, pytest.approx(0.1), 0.2)}


# What other programs print.


def test_traces_are_counted_by_category():
    events = [
        {"cat": "kernel", "name": "_lora_shrink_kernel"}, {"cat": "kernel", "name": "_lora_shrink_kernel"},
        {"cat": "gpu_memset", "name": "Memset (Device)"}, {"cat": "gpu_user_annotation", "name": "Optimizer.step"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"}, {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cpu_op", "name": "aten::mm"}, {"name": "process_name"},
    ]  # fmt: skip
    found = _gpu_profile.counts_of({"traceEvents": events})
    assert {kind: counter.total() for kind, counter in found.items()} == {"kernels": 2, "copies": 1, "syncs": 1}


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","byte","byte"
"0","1","void erfinv_kernel_cuda(float)","32","0"
"1","1","gemm","1,073,741,824","0"
"2","1","void erfinv_kernel_cuda(float)","32","0"
"3","1","gemm","100","28"
"4","1","add","10","2"
"5","1","void erfinv_kernel_cuda(float)","32","0"
"6","1","_lora_linear_tma_kernel","5","6"
"""


def test_ncu_is_read_by_arm():
    found = tools.by_arm(tools.parse_ncu(NCU))
    assert {name: sum(moved for _, moved in kernels) for name, kernels in found.items()} == {
        "frozen": 2**30, "eager": 140.0, "ours": 11.0,
    }  # fmt: skip
    assert tools.parse_ncu("==ERROR== permission") == []
    with pytest.raises(ValueError, match="2 markers"):
        tools.by_arm(tools.parse_ncu(NCU)[:4])


def test_sanitizers_summaries_are_read():
    assert tools.SUMMARY["memcheck"].search("========= ERROR SUMMARY: 12 errors")[1] == "12"
    text = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert tools.SUMMARY["racecheck"].search(text)[1] == "0"


# The oracle's parts.


def test_some_rows_of_the_mask_are_the_references():
    rows = torch.tensor([0, 3, 6])
    assert torch.equal(keep_rows(rows, 13, 0.3, 99), dropout_keep_ref(7, 13, 0.3, 99)[rows])


def test_the_targets_shapes_come_first():
    shapes = _gpu_layer.shapes(False)
    assert len(shapes) == len(set(shapes)) == 6 * 8 * 4 * 2
    assert set(shapes[:6]) == {Shape(m, 4096, 4096, 16, True) for m in (2048, 4096, 8192)} | {
        Shape(m, 4096, 4096, 16, False) for m in (1, 16, 64)
    }


# The GPU's half, against a stand-in for torch.cuda that writes down what is called.

USED = (
    "CUDAGraph", "Event", "Stream", "current_device", "empty_cache", "get_device_properties", "graph", "is_available",
    "max_memory_allocated", "mem_get_info", "memory_allocated", "profiler", "reset_peak_memory_stats", "set_stream",
    "set_sync_debug_mode", "synchronize",
)  # fmt: skip


def test_everything_that_is_used_of_torch_cuda_exists():
    source = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("_gpu_*.py"))
    words = set(re.findall(r"torch\.cuda\.([A-Za-z_]+)", source))
    assert words <= set(USED), words - set(USED)
    assert all(hasattr(torch.cuda, name) for name in USED)
    assert callable(torch.cuda.profiler.start) and callable(torch.cuda.profiler.stop)


class FakeCuda:
    def __init__(self, monkeypatch):
        log = self.log = []

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                log.append("record")

            def elapsed_time(self, end):
                return 2.0

        class CUDAGraph:
            def replay(self):
                log.append("replay")

        class graph:
            def __init__(self, captured, stream=None):
                assert isinstance(captured, CUDAGraph) and stream is not None

            def __enter__(self):
                log.append("capture")

            def __exit__(self, *error):
                log.append("captured")

        properties = type(
            "Properties", (), {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "L2_cache_size": 64}
        )
        fakes = {
            "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "Stream": lambda: "stream",
            "current_device": lambda: 0, "get_device_properties": lambda index: properties,
            "set_stream": lambda stream: log.append("set_stream"), "synchronize": lambda: log.append("synchronize"),
            "memory_allocated": lambda: 10, "max_memory_allocated": lambda: 25,
            "reset_peak_memory_stats": lambda: log.append("reset"),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        real = torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, dtype, device: real(4, dtype=dtype))


def test_the_gpus_half_calls_torch_cuda_in_the_right_order(monkeypatch):
    fake = FakeCuda(monkeypatch)
    device = _gpu_device.CudaDevice()
    assert fake.log == ["set_stream"] and device.arch == "sm_90" and _gpu_layer.known_gpu(device).arch == "sm_90"
    monkeypatch.setattr(device, "flush", lambda: fake.log.append("flush"))
    fake.log.clear()
    found = device.time({"a": lambda: fake.log.append("a")}, 0.0, queued=False, least=2)
    warm = ["a"] * _gpu_device.WARMUP + ["synchronize"]
    assert fake.log == warm + ["flush", "synchronize", "record", "a", "record", "synchronize"] * 2
    assert found == {"a": [2e-3, 2e-3]}
    fake.log.clear()
    device.time({"a": lambda: fake.log.append("a")}, 0.0, queued=True, least=1)
    assert fake.log == [*warm, "flush", "record", "a", "record", "synchronize"]
    fake.log.clear()
    captured = device.capture(lambda: fake.log.append("run"), warmup=1)
    captured.replay()
    assert fake.log == ["run", "synchronize", "capture", "run", "captured", "replay"]
    fake.log.clear()
    assert device.peak_bytes(lambda: fake.log.append("run")) == 15
    assert fake.log == ["run", "synchronize", "reset", "run", "synchronize"]


def test_a_dry_capture_computes_at_replays_into_the_same_tensors():
    x, calls = torch.ones(3), []

    def run():
        calls.append(1)
        return (x * 2,)

    captured = _gpu_device.DryDevice().capture(run)
    assert not calls
    captured.replay()
    (first,) = captured.outputs
    x.fill_(5)
    captured.replay()
    assert captured.outputs[0] is first and first.tolist() == [10, 10, 10]


# Checks that could not fail would be worth nothing.

DRY = _gpu_device.DryDevice()


def test_a_wrong_result_fails_the_oracle(monkeypatch):
    case = Case(9, 40, 24, 3)
    right = _gpu_checks.lora_linear
    with slk.use_backend("triton"):
        assert next(correctness.check_oracle(DRY, case, "auto"))["figure"] <= 1
        monkeypatch.setattr(_gpu_checks, "lora_linear", lambda *arguments: right(*arguments) * 1.05)
        with pytest.raises(AssertionError, match="Y is off"):
            next(correctness.check_oracle(DRY, case, "auto"))


def test_another_mask_than_the_references_fails(monkeypatch):
    monkeypatch.setattr(correctness, "dropout_keep_ref", lambda m, n, p, seed: dropout_keep_ref(m, n, p, seed + 1))
    with slk.use_backend("triton"), pytest.raises(AssertionError, match="elements of the mask differ"):
        next(correctness.check_mask(DRY, 9, 32, "split"))


def test_results_that_change_from_run_to_run_fail(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with slk.use_backend("triton"), pytest.raises(AssertionError, match="differs in"):
        next(correctness.check_repeats(DRY, Case(9, 48, 40, 16, 0.5), "auto"))


class Stale(_gpu_device.DryDevice):
    """Its graphs compute once."""

    def capture(self, run, warmup=0):
        captured = super().capture(run, warmup)
        captured.replay()
        captured.replay = lambda: None
        return captured


def test_a_replay_that_reads_no_new_inputs_fails():
    found = dict(graphs.checks(True))
    with slk.use_backend("triton"):
        for name, check in found.items():
            with pytest.raises(AssertionError):
                list(check(Stale()))
            assert list(check(DRY)), name


def test_rows_out_of_place_fail(monkeypatch):
    right = offsets.spread

    def shifted(inputs, span):
        wide, memory = right(inputs, span)
        wide["x"] = wide["x"].flip(0)
        return wide, memory

    monkeypatch.setattr(offsets, "spread", shifted)
    with slk.use_backend("triton"), pytest.raises(AssertionError, match="differs in"):
        list(offsets.check_spread(40, "auto", DRY))

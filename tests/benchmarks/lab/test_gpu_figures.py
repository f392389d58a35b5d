"""``benchmarks.lab.gpu``: its verdicts, what it reads from other programs, and its CUDA calls against a fake."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.lab.gpu import correctness, device, layer, load, profile, regret, report, sanitizers, tools
from benchmarks.lab.gpu.section import Clock
from benchmarks.lab.predict.rivals import Shape
from stablelora_kernels.dispatch import backend
from tests.helpers import gpu_checks

pytestmark = pytest.mark.skipif(not backend.INTERPRETING, reason="the fake replaces torch.cuda")
ROOT = Path(__file__).resolve().parents[3]

# Verdicts on invented rows.


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


def test_stages_end_with_the_first_that_failed():
    def row(check, status):
        return {**correctness.key_of(f"tests/gpu/test_bring_up.py::{check}"), "status": status}

    shrink, pointers, tma = (
        row("test_shrink[1]", "ok"),
        row("test_product_by_pointers[0.0]", "skipped"),
        "test_product_by_tma[0.1]",
    )
    assert report.stages([shrink, pointers])[-1] == "- product by TMA: not reached. The bring-up is not complete."
    *_, failed, verdict = report.stages([shrink, pointers, row(tma, "failed"), row("test_mlp", "not reached")])
    assert failed == f"- product by TMA: FAILED, {tma}" and verdict == "- The bring-up stops here: product by TMA."


def test_products_alone_and_loads_are_summed_up():
    shape = {"m": 2048, "n": 4096, "k": 4096, "r": 16, "dropout": 0.1, "direction": "forward", "status": "ok"}
    load = {"sm_mhz": 1410, "watts": 640.0, "throttle": "power cap"}
    parts = {report.PRODUCT: 90.0, report.VENDOR: 80.0, report.S_ALONE: 11.0, "split": 99.0}
    rows = [{**shape, "kernel": kernel, "us": us, **load} for kernel, us in parts.items()]
    (line,) = report.products(rows)
    assert "1.125 of the vendor's time, 80.0 us" in line and "dropout 0.1: 11.0 us" in line
    assert report.loads({"regret": rows}) == ["- 1410 to 1410 MHz in 4 rows", "- 4 rows: power cap"]


# The output of other programs.


def test_traces_are_counted_by_category():
    events = [
        {"cat": "kernel", "name": "_lora_shrink_kernel"}, {"cat": "kernel", "name": "_lora_shrink_kernel"},
        {"cat": "gpu_memset", "name": "Memset (Device)"}, {"cat": "gpu_user_annotation", "name": "Optimizer.step"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"}, {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cpu_op", "name": "aten::mm"}, {"name": "process_name"},
    ]  # fmt: skip
    found = profile.counts_of({"traceEvents": events})
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


SANITIZED = """========= COMPUTE-SANITIZER
tests/gpu/test_bring_up.py::test_shrink[1-0.0] PASSED
tests/gpu/test_bring_up.py::test_mlp[0.1] ========= Invalid __global__ read of size 4 bytes
=========     at _lora_gate_up_kernel+0x1d0 in gate_up.py:120
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Error: Race reported between Write access at _lora_shrink_kernel+0x90
=========     and Read access at _lora_shrink_kernel+0xa0 [4 hazards]
========= Warning: Race reported between Write access at _lora_shrink_kernel+0x90
=========     and Read access at _lora_shrink_kernel+0xa0 [4 hazards]
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void cutlass_gemm+0x10
========= ERROR SUMMARY: 3 errors
"""


def test_errors_in_our_kernels_are_told_from_others():
    ours, others = sanitizers.reports(SANITIZED)
    assert others == 2 and list(ours) == [
        "test_mlp[0.1], _lora_gate_up_kernel: Invalid __global__ read of size 4 bytes",
        "test_mlp[0.1], _lora_shrink_kernel: Error: Race reported between Write access at _lora_shrink_kernel+0x90",
    ]
    assert sanitizers.SUMMARY.search("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


def sanitized(monkeypatch, status: int | None, printed: str) -> dict[str, object]:
    """The row of a run of the tool that ended with ``status``."""
    monkeypatch.setattr(sanitizers, "find", lambda program: program)
    monkeypatch.setattr(sanitizers, "watch", lambda command, seconds, **variables: (status, printed))
    (row,) = sanitizers.check(SimpleNamespace(dry=False), "memcheck", Clock(0.0))
    return row


def test_a_sanitizer_that_found_nothing_must_have_finished(monkeypatch):
    clean = "tests/gpu/test_bring_up.py::test_mlp[0.1] PASSED\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitized(monkeypatch, 0, clean)["status"] == "ok"
    assert sanitized(monkeypatch, 1, clean)["status"] == "failed"
    assert sanitized(monkeypatch, 0, "no device")["status"] == "failed"
    late = sanitized(monkeypatch, None, clean)
    assert late["status"] == "skipped" and "time was up in test_mlp[0.1]" in str(late["note"])


def test_the_targets_shapes_come_first():
    shapes = layer.shapes(False)
    assert len(shapes) == len(set(shapes)) == 6 * 8 * 4 * 2
    assert set(shapes[:6]) == {Shape(m, 4096, 4096, 16, True, False) for m in (2048, 4096, 8192)} | {
        Shape(m, 4096, 4096, 16, False, False) for m in (1, 16, 64)
    }


# CUDA calls, against a stand-in for torch.cuda that records them.

USED = (
    "CUDAGraph", "Event", "Stream", "current_device", "current_stream", "default_stream", "device_count", "empty_cache",
    "get_device_properties", "graph", "is_available", "max_memory_allocated", "mem_get_info", "memory_allocated", "profiler",
    "reset_peak_memory_stats", "set_stream", "stream", "synchronize",
)  # fmt: skip


def test_every_function_used_of_torch_cuda_exists():
    files = [*(ROOT / "benchmarks/lab/gpu").glob("*.py"), *(ROOT / "tests/gpu").glob("*.py"), Path(gpu_checks.__file__)]
    words = set(re.findall(r"torch\.cuda\.([A-Za-z_]+)", "".join(path.read_text() for path in files)))
    assert words == set(USED)
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
            "Properties",
            (),
            {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "L2_cache_size": 64, "uuid": "1"},
        )
        fakes = {
            "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "Stream": lambda: "stream",
            "current_device": lambda: 0, "current_stream": lambda: "stream", "get_device_properties": lambda index: properties,
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
    gpu = device.CudaDevice()
    assert fake.log == ["set_stream"]
    monkeypatch.setattr(gpu, "flush", lambda: fake.log.append("flush"))
    monkeypatch.setattr(gpu.load, "read", lambda: fake.log.append("load"))
    monkeypatch.setattr(gpu.load, "columns", lambda: {"sm_mhz": 1410})
    warm = ["a"] * device.WARMUP + ["synchronize"]
    fake.log.clear()
    found = gpu.time({"a": lambda: fake.log.append("a")}, 0.0, queued=False, least=2)
    assert fake.log == warm + ["flush", "synchronize", "record", "a", "record", "load", "synchronize"] * 2
    assert found == {"a": ([2e-3, 2e-3], {"sm_mhz": 1410})}
    fake.log.clear()
    gpu.time({"a": lambda: fake.log.append("a")}, 0.0, queued=True, least=1)
    assert fake.log == [*warm, "flush", "record", "a", "record", "load", "synchronize"]
    fake.log.clear()
    graph = gpu.capture([lambda: fake.log.append("one"), lambda: fake.log.append("two")], most=3)
    graph()
    warm = ["one", "one", "two", "two", "synchronize", "one", "synchronize"]
    assert fake.log == [*warm, "capture", "one", "two", "one", "captured", "replay"]
    assert gpu.time({"three calls": graph}, 0.0, queued=True, least=1)["three calls"].seconds == [
        pytest.approx(2e-3 / 3)
    ]
    fake.log.clear()
    assert gpu.peak_bytes(lambda: fake.log.append("run")) == 15
    assert fake.log == ["run", "synchronize", "reset", "run", "synchronize"]


def test_weights_used_in_turn_are_larger_than_l2(monkeypatch):
    FakeCuda(monkeypatch)
    gpu = device.CudaDevice()
    assert gpu._cache == 64 and [gpu.rotation(each) for each in (1, 32, 1000)] == [device.MOST_CALLS, 5, 2]


class FakeNvml:
    """Stands in for libnvidia-ml.so.1, whose functions write into what the last argument refers to and return 0, or fail."""

    def __init__(self, **values: object) -> None:
        self.values = {"nvmlInit_v2": None, "nvmlDeviceGetHandleByUUID": 7} | values

    def __getattr__(self, name: str) -> object:
        def call(*arguments: Any) -> int:
            value = self.values.get(name, "fails")
            if value not in (None, "fails"):
                arguments[-1]._obj.value = value
            return int(value == "fails")

        return call


def test_the_load_is_the_lowest_clock_the_highest_power_and_every_reason(monkeypatch):
    FakeCuda(monkeypatch)
    fake = FakeNvml(
        nvmlDeviceGetClockInfo=1980, nvmlDeviceGetPowerUsage=512_300, nvmlDeviceGetCurrentClocksThrottleReasons=1 | 4
    )
    monkeypatch.setattr(load.ctypes, "CDLL", lambda name: fake)
    gpu = load.Load(torch.device("cuda", 0))
    gpu.read()
    fake.values |= {
        "nvmlDeviceGetClockInfo": 1410, "nvmlDeviceGetPowerUsage": 400_000, "nvmlDeviceGetCurrentClocksThrottleReasons": 32
    }  # fmt: skip
    gpu.read()
    assert gpu.columns() == {"sm_mhz": 1410, "watts": 512.3, "throttle": "power cap, thermal"}
    assert gpu.columns() == {} and gpu.max_mhz() is None
    fake.values["nvmlDeviceGetHandleByUUID"] = "fails"
    assert load.Load(torch.device("cuda", 0)).max_mhz() is None


def test_the_tests_on_a_gpu_capture_and_wait(monkeypatch):
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(gpu_checks, "SMALL", False)
    captured = gpu_checks.capture(lambda: fake.log.append("run") or "output", warmup=1)
    captured.replay()
    assert fake.log == ["run", "synchronize", "capture", "run", "captured", "replay", "synchronize"]
    assert captured.outputs == "output"


def test_regret_begins_with_what_is_in_doubt():
    class Fake:
        dry = False

    found = [tuple(unit.key[name] for name in ("m", "r")) for unit in regret.units(Fake(), None)]
    assert found[:8:2] == [(m, 16) for m in (2048, 4096, 8192, 16384)]
    assert len(found) == len({(*unit.key.values(),) for unit in regret.units(Fake(), None)})

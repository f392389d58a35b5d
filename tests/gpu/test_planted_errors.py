"""The GPU tests fail on planted errors. This runs without a GPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.reference import dropout_keep_ref
from tests.gpu import (
    test_bring_up,
    test_cuda_graphs,
    test_large_offsets,
    test_launches,
    test_nvidia_tools,
    test_oracle,
)
from tests.helpers import gpu_checks, oracle
from tests.helpers.gpu_checks import FP32, Captured, Case

pytestmark = pytest.mark.skipif(not gpu_checks.SMALL, reason="runs at small sizes, in the interpreter")


def ignore(name: str, value: object) -> None:
    """Stand in for pytest's ``record_property``."""


def test_a_wrong_result_fails(monkeypatch, poisoned_outputs):
    case = Case(9, 40, 24, 3)
    right = oracle.lora_linear
    test_oracle.check(case, "auto", ignore)
    monkeypatch.setattr(oracle, "lora_linear", lambda *arguments: right(*arguments) * 1.05)
    with pytest.raises(AssertionError, match="Y is off"):
        test_oracle.check(case, "auto", ignore)


def test_another_mask_than_the_reference_fails(monkeypatch):
    wrong = lambda m, n, p, seed: dropout_keep_ref(m, n, p, seed + 1)  # noqa: E731
    monkeypatch.setattr(test_oracle, "dropout_keep_ref", wrong)
    with pytest.raises(AssertionError, match="elements of the mask differ"):
        test_oracle.test_kernels_draw_the_reference_mask(9, 32, "split")


def test_results_that_change_from_run_to_run_fail(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with pytest.raises(AssertionError, match="differs in"):
        test_oracle.check(Case(9, 48, 40, 16, 0.5), "auto", ignore)


def test_a_graph_that_computes_only_once_fails(monkeypatch):
    right = gpu_checks.capture

    def stale(function, warmup=2):
        captured = right(function, warmup)
        captured.replay()
        return Captured(lambda: None, captured.outputs)

    monkeypatch.setattr(test_cuda_graphs, "capture", stale)
    with pytest.raises(AssertionError, match="Y differs in"):
        test_cuda_graphs.test_a_call(test_cuda_graphs.SIZES[0], gpu_checks.RESULTS)
    with pytest.raises(AssertionError, match="different seeds"):
        test_cuda_graphs.test_each_replay_draws_its_own_dropout_mask(test_cuda_graphs.SIZES[0], ignore)
    with pytest.raises(AssertionError, match="after step"):
        test_cuda_graphs.test_optimizer_step(FP32, ignore)


def test_rows_out_of_place_fail(monkeypatch):
    right = test_large_offsets.spread

    def shifted(inputs):
        wide, memory = right(inputs)
        wide["x"] = wide["x"].flip(0)
        return wide, memory

    monkeypatch.setattr(test_large_offsets, "spread", shifted)
    with pytest.raises(AssertionError, match="differs in"):
        test_large_offsets.test_spread_rows(40, "auto")


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "sm_120"))
@pytest.mark.parametrize(("size", "kernel"), test_bring_up.LAUNCHED)
def test_on_a_gpu_the_first_tests_launch_the_kernels_that_they_name(size, kernel, arch):
    """No dry run sees their large sizes."""
    # Without a GPU the tests name the kernels of one that has tensor descriptors.
    own = "linear_tma" if DEVICES[arch].tma else "linear"
    expected = {own if name == test_bring_up.TMA else name for name in test_bring_up.LAUNCHED[size, kernel]}
    for p in (0.0,) if kernel == "fused" else (0.0, 0.1):
        with slk.use_backend("triton"), slk.use_kernel(kernel):
            found = slk.explain(*test_bring_up.SIZES[size], dropout_p=p, device=arch)
        assert {step.kernel.removeprefix("lora_") for step in found.forward + found.backward} == expected


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","byte","byte"
"0","1","gemm","1,073,741,824","0"
"1","1","_lora_linear_tma_kernel","536870912","536870912"
==PROF== Disconnected
"""
SANITIZED = """========= COMPUTE-SANITIZER
tests/gpu/test_bring_up.py::test_mlp[0.1] ========= Invalid __global__ read of size 4 bytes
=========     at _lora_gate_up_kernel+0x1d0 in gate_up.py:120
=========
========= Warning: Race reported between Write access at _lora_shrink_kernel+0x90
=========     and Read access at _lora_shrink_kernel+0xa0 [4 hazards]
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void cutlass_gemm+0x10
========= ERROR SUMMARY: 3 errors
"""


def test_what_nvidias_tools_print_is_read():
    assert test_nvidia_tools.gib_moved(NCU) == 2.0
    ours, others = test_nvidia_tools.errors(SANITIZED)
    assert others == 2 and [*ours] == ["test_mlp[0.1], _lora_gate_up_kernel: Invalid __global__ read of size 4 bytes"]


@pytest.mark.parametrize(
    ("status", "printed", "outcome"),
    [
        (0, "", None),
        (0, SANITIZED, AssertionError),
        (1, "", AssertionError),
        (0, "no device", AssertionError),
        (None, "", pytest.skip.Exception),
    ],
)
def test_a_sanitizer_that_found_nothing_must_have_finished(status, printed, outcome, monkeypatch):
    printed = printed or "========= ERROR SUMMARY: 0 errors"
    monkeypatch.setattr(test_nvidia_tools, "run_tool", lambda *_, **__: (status, printed))
    with pytest.raises(outcome) if outcome else nullcontext():
        test_nvidia_tools.test_no_errors_in_our_kernels("memcheck", ignore)


def test_launches_and_waits_are_counted(monkeypatch):
    names = {"kernel": "_k", "cuda_runtime": "cudaStreamSynchronize", "cuda_driver": "cuLaunchKernel", "cpu_op": "mm"}
    trace = {"traceEvents": [{"cat": cat, "name": name} for cat, name in names.items()] * 2}
    found = test_launches.counts_of(trace)
    assert {kind: counter.total() for kind, counter in found.items()} == {"kernels": 2, "waits": 2}
    monkeypatch.setattr(test_launches, "own_waits", Counter)
    monkeypatch.setattr(test_launches, "profile", lambda run: found)
    with pytest.raises(AssertionError, match="the host waits"):
        test_launches.check(lambda: None, 0, 2, ignore)

"""The GPU tests run, and fail on planted errors. This needs no GPU."""

from __future__ import annotations

import pytest

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.testing import cases
from tests.gpu import test_bring_up, test_cuda_graphs, test_nvidia_tools, test_oracle
from tests.helpers import gpu_checks
from tests.helpers.gpu_checks import Captured, linear

pytestmark = pytest.mark.skipif(
    not gpu_checks.SMALL, reason="runs at small sizes, in the interpreter"
)


def ignore(name: str, value: object) -> None:
    """Stand in for pytest's ``record_property``."""


@pytest.mark.parametrize("p", (0.0, 0.1))
@pytest.mark.parametrize("splits", (1, 2))
def test_the_test_of_one_launch_runs(splits, p, monkeypatch):
    """It takes the launch from its launcher, whose arguments may change. All others call the public
    functions.
    """
    test_bring_up.test_down(splits, p, monkeypatch)


def test_a_wrong_result_fails(monkeypatch, poisoned_outputs):
    right = cases.ours
    test_oracle.check(linear(9, 40, 24, 3), ignore)
    monkeypatch.setattr(
        cases.run, "__defaults__", (None, lambda case, leaf: [y * 1.05 for y in right(case, leaf)])
    )
    with pytest.raises(AssertionError, match="Y0 is off"):
        test_oracle.check(linear(9, 40, 24, 3), ignore)


def test_a_graph_that_computes_only_once_fails(monkeypatch):
    right = gpu_checks.capture

    def stale(function, warmup=2):
        captured = right(function, warmup)
        captured.replay()
        return Captured(lambda: None, captured.outputs)

    monkeypatch.setattr(test_cuda_graphs, "capture", stale)
    with pytest.raises(AssertionError, match="Y0: "):
        test_cuda_graphs.test_a_call(test_cuda_graphs.SIZES[0], None)


# Architecture, processors, and the shared memory that a program may have: NVIDIA's data sheets.
GPUS = {
    "A100": ("sm_80", 108, 166_912), "A100, a slice of 42 processors": ("sm_80", 42, 166_912), "A30": ("sm_80", 56, 166_912),
    "RTX 3060": ("sm_86", 28, 101_376), "RTX 3080": ("sm_86", 68, 101_376), "RTX 3090": ("sm_86", 82, 101_376),
    "A10": ("sm_86", 72, 101_376), "A40": ("sm_86", 84, 101_376), "L4": ("sm_89", 58, 101_376),
    "RTX 4070": ("sm_89", 46, 101_376), "RTX 4080": ("sm_89", 76, 101_376), "RTX 4090": ("sm_89", 128, 101_376),
    "L40S": ("sm_89", 142, 101_376), "H100 SXM, H200": ("sm_90", 132, 232_448), "H100 PCIe": ("sm_90", 114, 232_448),
    "H20": ("sm_90", 78, 232_448), "H100, a slice of 16 processors": ("sm_90", 16, 232_448),
    "H100, a slice of 60 processors": ("sm_90", 60, 232_448), "B200": ("sm_100", 148, 232_448),
    "RTX 5070 Ti": ("sm_120", 70, 101_376), "RTX 5080": ("sm_120", 84, 101_376), "RTX 5090": ("sm_120", 170, 101_376),
    "GB10": ("sm_121", 48, 101_376),
}  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
def test_on_a_gpu_the_first_tests_launch_the_kernels_that_they_name(gpu):
    """No dry run sees their large sizes."""
    device = Device(*GPUS[gpu])
    # Without a GPU the tests name the kernels of one that has tensor descriptors.
    of_whole_tiles = "linear_tma" if device.tma else "linear"
    for size, strategy, p in test_bring_up.CALLS:
        launched = test_bring_up.listed_by_dispatch(device, test_bring_up.SIZES[size], strategy, p)
        if (size, strategy) in test_bring_up.ASKED:
            assert launched & {of_whole_tiles, "linear_split_k"}, (size, strategy, p)
            continue
        named = test_bring_up.LAUNCHED[size, strategy]
        expected = {of_whole_tiles if name == test_bring_up.TMA else name for name in named}
        assert launched == expected, (size, strategy, p)


@pytest.mark.parametrize("gpu", ("A100", "H100 SXM, H200", "B200", "RTX 4090", "RTX 5090"))
def test_programs_share_sums_in_the_tests_that_ask_dispatch(gpu):
    for size, strategy in test_bring_up.ASKED:
        sizes = test_bring_up.SIZES[size]
        launched = test_bring_up.listed_by_dispatch(Device(*GPUS[gpu]), sizes, strategy, 0.0)
        assert "linear_split_k" in launched, (size, strategy)


SANITIZED = """========= COMPUTE-SANITIZER
tests/gpu/test_bring_up.py::test_mlp[0.1] ========= Invalid __global__ read of size 4 bytes
=========     at _lora_gate_up_kernel+0x1d0 in gate_up.py:120
=========
========= Warning: Race reported between Write access at _lora_down_kernel+0x90
=========     and Read access at _lora_down_kernel+0xa0 [4 hazards]
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void cutlass_gemm+0x10
========= ERROR SUMMARY: 3 errors
"""


def test_what_the_sanitizer_prints_is_read():
    ours, others = test_nvidia_tools.errors(SANITIZED)
    assert others == 2 and [*ours] == [
        "test_mlp[0.1], _lora_gate_up_kernel: Invalid __global__ read of size 4 bytes"
    ]

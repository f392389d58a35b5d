"""The GPU tests run, and fail on planted errors. This needs no GPU."""

from __future__ import annotations

import pytest

import stablelora_kernels as slk
from stablelora_kernels.dispatch.problem import DEVICES
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


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "sm_120"))
def test_on_a_gpu_the_first_tests_launch_the_kernels_that_they_name(arch):
    """No dry run sees their large sizes."""
    # Without a GPU the tests name the kernels of one that has tensor descriptors.
    own = "linear_tma" if DEVICES[arch].tma else "linear"
    for size, kernel, p in test_bring_up.CALLS:
        expected = {
            own if name == test_bring_up.TMA else name
            for name in test_bring_up.LAUNCHED[size, kernel]
        }
        with slk.use_backend("triton"), slk.use_kernel(kernel):
            found = slk.explain(*test_bring_up.SIZES[size], dropout_p=p, device=arch)
        launched = {step.kernel.removeprefix("lora_") for step in found.forward + found.backward}
        assert launched == expected, (size, kernel, p)


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

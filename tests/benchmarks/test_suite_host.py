"""The suite's host cases launch nothing, and count what the Triton step keeps in memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="an arm of the benchmark; the bench extra brings it")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import stablelora_kernels as slk
from benchmarks.suite import host
from benchmarks.suite.host import HostLayerCase, HostStepCase
from stablelora_kernels.dispatch import backend
from stablelora_kernels.launch.base import launch_counts
from stablelora_kernels.testing import make_pairs
from tests.benchmarks.test_suite import measured

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not backend.INTERPRETING, reason="Triton's interpreter is off"),
]


@pytest.mark.parametrize("case", [HostLayerCase(1, CPU), HostStepCase(4, "kept", CPU), HostStepCase(4, "moved", CPU)])
def test_host_time_leaves_launches_out(case: host.HostCase) -> None:
    before = launch_counts.copy()
    reports = measured(case)
    for phase, report in reports.items():
        assert phase in case.phases and set(report["arms"]) == set(case.arms)
        assert all(figures["ms"]["median"] > 0 for figures in report["arms"].values())
    assert launch_counts == before


def test_nothing_is_launched_within() -> None:
    layer = slk.LoRALinear(16, 16, r=3)
    x = torch.randn(2, 16)
    before = launch_counts.total()
    with slk.use_backend("triton"):
        with host.without_launches():
            layer(x)
        assert launch_counts.total() == before
        layer(x)
    assert launch_counts.total() > before


@pytest.mark.parametrize("r", [16, 64])
def test_memory_beyond_adamw_is_a_thousandth_of_the_parameters(r: int) -> None:
    """As CUDA's allocator counts, of which AdamW's step counters take 512 bytes each."""
    found = host.memory_beyond_adamw(make_pairs(8, r, 4096, "cpu", False))
    chunks = 8 * 2 * r * 4096 // 4096
    # Each chunk has 21 bytes, each tensor a row of 21 and an address with its variant; the rest is small and fixed.
    assert 0 <= found["kept_bytes"] - (21 * chunks + 16 * (168 + 16)) < 3000
    # The seven linear layers of 32 blocks.
    found = host.memory_beyond_adamw(make_pairs(224, r, 4096, "cpu", False))
    assert found["allocated_beyond_percent"] <= 0.1

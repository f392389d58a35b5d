"""The suite's host cases run over the null driver, and count what the Triton step keeps in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="an arm of the benchmark; the bench extra brings it")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.common.null_driver import null_driver_problem
from benchmarks.suite import host
from benchmarks.suite.layers import OURS_TRITON
from stablelora_kernels.dispatch import backend
from stablelora_kernels.testing import make_pairs
from tests.benchmarks.test_suite import run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not backend.INTERPRETING, reason="Triton's interpreter is off"),
]


def test_the_host_cases_run_where_no_gpu_is(tmp_path: Path) -> None:
    """In a process without the interpreter, as a user runs them."""
    path = tmp_path / "host.json"
    status, printed = run("benchmarks", "-m", "host", "--rounds", "2", f"--benchmark-json={path}", tmp_path=tmp_path)
    assert status == 0, printed
    reports = [case["extra_info"] for case in json.loads(path.read_text())["benchmarks"]]
    assert {report["case"].split()[1] for report in reports} == {"layer", "step"}
    for report in reports:
        assert not report["skipped"] and not report["failed"]
        assert all(figures["ms"]["median"] > 0 for figures in report["arms"].values())
    (parts, *_) = (report["arms"][OURS_TRITON]["parts_us"] for report in reports if OURS_TRITON in report["arms"])
    assert (
        parts["forward: launch"] > 0 and parts["backward: launch"] > 0 and parts["a first forward"] > parts["forward"]
    )


def test_the_null_driver_says_why_it_cannot_run() -> None:
    assert null_driver_problem() == "TRITON_INTERPRET is set, and Triton's interpreter launches nothing"


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

"""The optimizer's benchmarks run, and what they count that no clock decides."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks import bench_stable_adamw, bench_stable_adamw_scale

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are small runs on a CPU"),
]


@pytest.mark.parametrize("r", [16, 64])
def test_memory_beyond_adamw_is_a_thousandth_of_the_parameters(r: int) -> None:
    """As CUDA's allocator counts, of which AdamW's step counters take 512 bytes each."""
    row = bench_stable_adamw_scale.memory_of(8, r, 4096)
    assert row["parameter_bytes"] == 8 * 2 * r * 4096 * 4
    chunks = row["parameter_bytes"] // 4 // 4096
    # Each chunk has 21 bytes, each tensor a row of 21 and an address with its variant; the rest is small and fixed.
    assert 0 <= row["ours"] - (21 * chunks + 16 * (168 + 16)) < 3000
    # The seven linear layers of 32 blocks.
    assert bench_stable_adamw_scale.memory_of(224, r, 4096)["allocated_beyond_percent"] <= 0.1


def test_host_time_leaves_the_launch_out() -> None:
    from stablelora_kernels.launch.base import launch_counts

    before = launch_counts.copy()
    row = bench_stable_adamw_scale.host_time_of(4, "cpu", 2)
    assert launch_counts == before and row["tensors"] == 8
    assert all(row[f"{arm}, median"] > 0 for arm in ("fused, kept", "ours, kept"))


def test_the_scaling_run(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_stable_adamw_scale, "PAIRS", (2, 4, 8, 16))
    monkeypatch.setattr(
        "sys.argv", ["bench", "--iters", "1", "--most", "100000", "--json", str(tmp_path / "scale.json")]
    )
    bench_stable_adamw_scale.main()
    report = json.loads((tmp_path / "scale.json").read_text())
    printed = capsys.readouterr().out
    assert [row["pairs"] for row in report["time_by_pairs"]] == [2, 4, 8, 16]
    assert len(report["memory"]) == 4 and "Host time until the launch" in printed
    assert report["time_by_parameters_latched"][0]["ours_GB_per_s"] > 0


def test_the_step_beside_others(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--pairs", "2", "--width", "32", "--warmup", "1", "--iters", "2", "--json", str(tmp_path / "step.json")]
    monkeypatch.setattr("sys.argv", ["bench", *options])
    bench_stable_adamw.main()
    report = json.loads((tmp_path / "step.json").read_text())
    for state in ("shrinking", "latched"):
        assert set(report["milliseconds"][state]) == {
            *bench_stable_adamw.NAIVE,
            bench_stable_adamw.FUSED,
            bench_stable_adamw.OURS,
        }

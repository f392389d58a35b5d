"""``python -m benchmarks.bench_host``: it launches nothing, and what it times is the call."""

from __future__ import annotations

import json

import pytest
import torch

from stablelora_kernels.launch import base

pytest.importorskip("peft", reason="an arm of the benchmark; the bench extra brings it")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import stablelora_kernels as slk
from benchmarks import bench_host
from stablelora_kernels.dispatch import backend


def test_the_table_and_the_figures(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "host.json"
    try:
        bench_host.main(["--rows", "1", "--iters", "2", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in bench_host.ARMS.values())
    found = json.loads(path.read_text())
    assert found["rows"].keys() == {"1"}
    for phase in bench_host.PHASES:
        assert found["rows"]["1"][phase].keys() == bench_host.ARMS.keys()
        assert all(value["median"] > 0 for value in found["rows"]["1"][phase].values())
    with pytest.raises(SystemExit):
        bench_host.main(["--iters", "0"])
    assert "must be at least 1, got [1, 256], 8 and 0" in capsys.readouterr().err


@pytest.mark.skipif(not backend.INTERPRETING, reason="Triton's interpreter is off")
def test_nothing_is_launched_within():
    layer = slk.LoRALinear(16, 16, r=3)
    x = torch.randn(2, 16)
    before = base.launch_counts.total()
    with slk.use_backend("triton"):
        with bench_host.without_launches():
            layer(x)
        assert base.launch_counts.total() == before
        layer(x)
    assert base.launch_counts.total() > before

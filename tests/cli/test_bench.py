"""``bench`` runs small, reports what it measured, tells where this library loses, and refuses what
can't be timed.
"""

from __future__ import annotations

import json

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import bench, main

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ["--device", "cpu", "--backend", "torch"]
SIZES = {"M": 8, "N": 12, "K": 16, "r": 2, "pairs": 2, "iters": 3}
SMALL = [*CPU, *(text for name, value in SIZES.items() for text in (f"--{name}", str(value)))]


def test_it_times_every_arm(capsys):
    before = slk.settings.backend
    assert main(["bench", *SMALL, "--json", "--dtype", "bf16", "--dropout", "0.25"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert slk.settings.backend == before
    assert report["settings"] == SIZES | {
        "dtype": "bf16",
        "dropout": 0.25,
        "device": "cpu",
        "backend": "torch",
    }
    assert list(report["layer"]) == [bench.FROZEN, bench.EAGER, bench.FUSED_LAYER]
    assert list(report["optimizer"]) == [bench.ADAMW, bench.SHRINKING, bench.LATCHED]
    for arm in (*report["layer"].values(), *report["optimizer"].values()):
        assert 0 < arm["ms"]["q1"] <= arm["ms"]["median"] <= arm["ms"]["q3"]


def test_the_arms_compute_the_same():
    frozen, eager, ours = bench.layer_arms(16, 12, 2, 0.0, torch.float64, torch.device("cpu"))
    x, results = torch.randn(8, 16, dtype=torch.float64, requires_grad=True), []
    for arm in (eager, ours):
        bench.forward_backward(arm, x, torch.ones(8, 12, dtype=torch.float64))()
        results.append((arm(x).detach(), x.grad, arm.lora_A.grad, arm.lora_B.grad))
    torch.testing.assert_close(*results)
    assert (results[0][0] - frozen(x)).abs().max() > 1e-3


# Ours in three rounds in which the frozen layer takes 1, 2, 3 and eager LoRA 2, 4, 9, and the
# median over eager LoRA.
ROUNDS = {
    "The layer is FASTER than eager LoRA": ([1.0, 2.0, 4.5], 0.5),
    "The layer is SLOWER than eager LoRA": ([4.0, 8.0, 18.0], 2.0),
    "The layer and eager LoRA can't be told apart": ([1.0, 6.0, 9.0], 1.0),
}


@pytest.mark.parametrize("verdict", ROUNDS)
def test_ratios_are_taken_round_by_round_and_it_says_where_it_loses(verdict, capsys, monkeypatch):
    ours, over_eager = ROUNDS[verdict]
    layer = {bench.FROZEN: [1.0, 2.0, 3.0], bench.EAGER: [2.0, 4.0, 9.0], bench.FUSED_LAYER: ours}
    timed = bench.interleave
    monkeypatch.setattr(
        bench, "interleave", lambda arms, **kw: layer if bench.EAGER in arms else timed(arms, **kw)
    )
    assert main(["bench", *SMALL]) == 0
    assert verdict in " ".join(capsys.readouterr().out.split())
    assert main(["bench", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["layer"]
    assert found[bench.EAGER]["over_base"]["median"] == 2
    assert found[bench.FUSED_LAYER]["over_eager"]["median"] == over_eager


def test_a_long_run_latches_no_pair(monkeypatch):
    """Without timing: as many steps as --iters 5000 takes, of sizes at which they latched before."""

    def run(arms, warmup, iters):
        for _ in range(warmup + iters if bench.ADAMW in arms else 0):
            for arm in arms.values():
                arm()
        return {name: [1.0] * iters for name in arms}

    monkeypatch.setattr(bench, "interleave", run)
    sizes = ["--N", "2", "--K", "512", "--r", "2", "--pairs", "1", "--iters", "5000"]
    assert main(["bench", *CPU, *sizes]) == 0

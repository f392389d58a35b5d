"""The suite's optimizers over a pretrained model, here a random one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the suite's extra brings it")

from benchmarks.common import optimizers
from benchmarks.suite import pretrained
from benchmarks.suite.pretrained import PretrainedCase
from benchmarks.suite.rivals import Race
from tests.benchmarks.test_suite import CPU, Benchmark


def test_every_arm_trains_its_own_pairs_and_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {}
    real = pretrained.build_arm
    monkeypatch.setattr(
        pretrained, "build_arm", lambda layers, *rest: built.setdefault(len(built), real(layers, *rest))
    )
    case = PretrainedCase("random", "query-value", "fp32", CPU)
    race = Race(case)
    assert not race.failed and not race.skipped
    before = [[p.detach().clone() for p in arm.model.parameters()] for arm in built.values()]
    report = race.measure(Benchmark(), "step", 2)
    for arm, old in zip(built.values(), before, strict=True):
        named = zip(arm.model.named_parameters(), old, strict=True)
        changed = {key for (key, p), start in named if not torch.equal(p, start)}
        assert changed == {key for key, _ in arm.model.named_parameters() if "lora_" in key}
    base, ours = (report["arms"][arm] for arm in (pretrained.BASE, f"PEFT, {optimizers.OURS}"))
    assert base["parts"]["optimizer"]["added_percent"] == dict.fromkeys(("median", "q1", "q3"), 0.0)
    # Two moments of every A and B.
    trained = sum(p.numel() for p in built[0].model.parameters() if p.requires_grad)
    assert base["state_bytes"] == ours["state_bytes"] == 8 * trained and ours["paper_percent"] == 0.6
    race.close()

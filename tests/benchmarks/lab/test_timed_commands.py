"""The commands that time arms in turns, at small sizes: their ratios are of their own times."""

from __future__ import annotations

import time
from functools import partial
from itertools import accumulate, cycle
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")

from benchmarks.common.arms import FROZEN, PEFT
from benchmarks.lab import adapters_of_rows, cpu, experts, head_loss, shrink_cost
from benchmarks.lab.adapters_of_rows import ARMS, Case

TINY = Case(3, 5, torch.float32, True, layers=1, width=192, vocabulary=32)


@pytest.mark.filterwarnings("ignore")
def test_arms_train_the_same_adapters():
    """After a step of each arm every adapter has moved by as much."""
    moved = {}
    original = adapters_of_rows.model_of
    for arm in ARMS:
        models: list[torch.nn.Module] = []

        def made(case: Case, models: list[torch.nn.Module] = models) -> torch.nn.Module:
            models.append(original(case))
            return models[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapters_of_rows, "model_of", made)
            adapters_of_rows.step_of(TINY, arm)()
        (model,) = models
        moved[arm] = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    for name, p in moved[ARMS[0]].items():
        assert p.any()
        for arm in ARMS[1:]:
            torch.testing.assert_close(moved[arm][name], p, rtol=1e-3, atol=1e-7, msg=name)


Rows = list[dict[str, Any]]


def of_adapters(patch: pytest.MonkeyPatch) -> Rows:
    return adapters_of_rows.measure("tiny", TINY, 3, time.process_time)


def of_experts(patch: pytest.MonkeyPatch) -> Rows:
    for name, size in {"H": 32, "I": 16, "TOP": 2}.items():
        patch.setattr(experts, name, size)
    options = {"tokens": 8, "skewed": False, "dtype": torch.float32, "experts": 4}
    make = partial(experts.experts_step, **options)
    patch.setitem(experts.CASES, "tiny", (tuple(experts.ARMS), make))
    patch.setattr(experts, "peak_mib", lambda case, arm: 1.0)
    return experts.measure("tiny", 3, time.process_time)


def of_head(patch: pytest.MonkeyPatch) -> Rows:
    for name, size in {"VOCABULARY": 50, "WIDTH": 32}.items():
        patch.setattr(head_loss, name, size)
    patch.setattr(head_loss, "peak_mib", lambda arm, tokens: 1.0)
    return head_loss.measure(8, 3, time.process_time)


def of_cpu(patch: pytest.MonkeyPatch) -> Rows:
    patch.setattr(cpu, "IN_A_ROW", 2)
    return cpu.measure("8 rows, forward and backward, float32, dropout 0.05, all", 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "measure", "base", "rival"),
    [
        (adapters_of_rows, of_adapters, "", PEFT),
        (experts, of_experts, FROZEN, PEFT),
        (head_loss, of_head, head_loss.LOGITS, head_loss.LOGITS_PEFT),
        (cpu, of_cpu, "", PEFT),
    ],
    ids=["adapters_of_rows", "experts", "head_loss", "cpu"],
)
def test_ratios_are_of_the_same_rounds(
    module: Any, measure: Any, base: str, rival: str, monkeypatch
) -> None:
    samples: dict[tuple[str, str], list[float]] = {}
    record = module.record

    def remembered(case: str, phase: str, arm: str, metric: str, values: Any, role: str) -> Any:
        samples[arm, metric] = values
        return record(case, phase, arm, metric, values, role)

    monkeypatch.setattr(module, "record", remembered)
    rows = measure(monkeypatch)
    for row in rows:
        assert row["n"] == 1 or row["q1"] <= row["median"] <= row["q3"]
    ratios = [(arm, metric) for arm, metric in samples if "over" in metric]
    for arm, metric in ratios:
        other = base if metric == "over_base" else rival
        timed = "cpu_ms" if metric.startswith("cpu_") else "ms"
        both = zip(samples[arm, timed], samples[other, timed], strict=True)
        assert samples[arm, metric] == pytest.approx([one / two for one, two in both])
        assert len(samples[arm, metric]) == 3
    text = module.table(rows)
    assert len(ratios) >= 3 and all(arm in text for arm, _ in samples)


def test_a_line_of_shrink_cost_has_its_quotient(monkeypatch) -> None:
    """By a clock on which the arms take 1, 2 and 4 s."""
    reads = accumulate(cycle([0, 1, 0, 2, 0, 4]))
    monkeypatch.setattr(shrink_cost.time, "thread_time", lambda: next(reads))
    lines = [*shrink_cost.rows(((2, 4, 64),), 3)]
    assert lines == [
        f"2 pairs r4 width 64, {state}: {arm} {1e3 * took:.2f} ms, "
        f"{took}.00 ({took}.00 to {took}.00) of AdamW fused"
        for state in ("shrinking", "latched")
        for arm, took in zip(shrink_cost.ARMS, (1, 2, 4), strict=True)
    ]

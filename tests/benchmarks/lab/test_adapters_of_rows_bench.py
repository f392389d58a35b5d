"""The benchmark of several adapters in one step, on a tiny model."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")

from benchmarks.lab import adapters_of_rows
from benchmarks.lab.adapters_of_rows import ARMS, Case, measure, table

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


@pytest.mark.filterwarnings("ignore")
def test_table():
    rows = measure("tiny", TINY, 2, time.process_time)
    text = table(rows)
    assert all(f"| tiny | {arm} |" in text for arm in ARMS) and "1.00 (1.00 to 1.00)" in text

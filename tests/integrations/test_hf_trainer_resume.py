"""Trainer, SFTTrainer and accelerate, with dropout, warm-up and accumulated gradients: resumed in a fresh process to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("transformers", "peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(module, reason="the test extra brings the trainers")

from tests.helpers import trainer_runs  # noqa: E402
from tests.helpers.trainer_runs import CASES, STEPS  # noqa: E402

# By day every two of trainer, kind of model and way to give the optimizer meet.
DAY = [
    (trainer, kind, via)
    for trainer, kind, via in CASES
    if trainer == "accelerate" or ((trainer == "Trainer") != (kind == "peft")) == (via == "optimizers")
]
RESUMED = [case if case in DAY else pytest.param(case, marks=pytest.mark.nightly) for case in CASES]


@pytest.fixture(scope="module")
def runs(
    one_thread: None, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[dict[Any, Any], dict[Any, Any], Path]:
    """Every case trained in one go here, and resumed from its middle in another process; by day only some are resumed."""
    place = tmp_path_factory.mktemp("trainers")
    whole = {case: trainer_runs.train_whole(place, case) for case in CASES}

    resumed = CASES if "nightly" in pytestconfig.option.markexpr else DAY
    command = [sys.executable, "-m", "tests.helpers.trainer_runs", str(place), *map("/".join, resumed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return whole, torch.load(place / "resumed.pt"), place


def assert_same_bits(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and bool(torch.equal(a, b)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("case", RESUMED, ids=", ".join)
def test_resumes_to_the_bit(runs, case):
    whole, resumed, _ = runs
    assert_same_bits(whole[case], resumed[case])
    assert whole[case]["schedule"]["last_epoch"] == STEPS
    latches = whole[case]["latches"]
    assert any(step and step > STEPS // 2 for step in latches) and any(step and step <= STEPS // 2 for step in latches)


@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("kind", ["ours", "peft", "accelerated"])
def test_both_ways_to_give_the_optimizer_are_one(runs, trainer, kind):
    whole, _, _ = runs
    assert_same_bits(whole[trainer, kind, "optimizers"]["adapters"], whole[trainer, kind, "a factory"]["adapters"])


def test_what_a_checkpoint_holds(runs):
    """Of our layers the whole model, since it is the model's own state; of PEFT's the adapter."""
    from safetensors.torch import load_file

    _, _, place = runs
    for trainer in ("Trainer", "SFTTrainer"):
        folder = trainer_runs.place_of(place, (trainer, "ours", "a factory")) / f"checkpoint-{STEPS}"
        keys = load_file(folder / "model.safetensors").keys()
        assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.lora_A"} <= keys
        for kind in ("peft", "accelerated"):
            folder = trainer_runs.place_of(place, (trainer, kind, "a factory")) / f"checkpoint-{STEPS}"
            assert not (folder / "model.safetensors").exists()
            assert all(".lora_" in key for key in load_file(folder / "adapter_model.safetensors"))

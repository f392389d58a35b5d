"""Trainer and SFTTrainer, with dropout, warm-up and accumulated gradients: resumed in a fresh process to the bit."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

for module in ("transformers", "peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(module, reason="the test extra brings the trainers")

from tests.helpers import trainer_runs  # noqa: E402
from tests.helpers.trainer_runs import KINDS, STEPS  # noqa: E402

CASES = [*itertools.product(("Trainer", "SFTTrainer"), KINDS, ("optimizers", "a factory"))]
DAY = [("SFTTrainer", "accelerated", "a factory"), ("Trainer", "ours", "optimizers")]
MARKED = [case if case in DAY else pytest.param(case, marks=pytest.mark.nightly) for case in CASES]


@pytest.fixture(scope="module")
def runs(
    one_thread: None, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Any, Any, Path]:
    """Trained in one go here, and resumed from the middle in another process."""
    place, cases = tmp_path_factory.mktemp("trainers"), CASES if "nightly" in pytestconfig.option.markexpr else DAY
    whole = {case: trainer_runs.run(place, case) for case in cases}
    command = [sys.executable, "-m", "tests.helpers.trainer_runs", str(place), *map("/".join, cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return whole, torch.load(place / "resumed.pt"), place


def assert_same_bits(found: Any, expected: Any) -> None:
    found, expected = (dict(tree_flatten_with_path(tree)[0]) for tree in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        other, is_tensor = expected[path], isinstance(value, torch.Tensor)
        assert type(value) is type(other) and (not is_tensor or value.dtype == other.dtype), path
        assert torch.equal(value, other) if is_tensor else value == other, path


@pytest.mark.parametrize("case", MARKED, ids=", ".join)
def test_resumes_to_the_bit(runs, case):
    whole, resumed, place = runs
    assert_same_bits(whole[case], resumed[case])
    assert whole[case]["schedule"]["last_epoch"] == STEPS
    latches = whole[case]["latches"]
    assert any(step and step > STEPS // 2 for step in latches) and any(step and step <= STEPS // 2 for step in latches)
    if (other := (*case[:2], "optimizers")) in whole:
        assert_same_bits(whole[case]["adapters"], whole[other]["adapters"])
    # Of our layers the whole model, since it is the model's own state; of PEFT's the adapter.
    folder = trainer_runs.place_of(place, case) / f"checkpoint-{STEPS}"
    from safetensors.torch import load_file

    if case[1] == "ours":
        keys, layer = load_file(folder / "model.safetensors").keys(), "model.layers.0.self_attn.q_proj"
        assert {f"{layer}.weight", f"{layer}.lora_A"} <= keys
    else:
        assert not (folder / "model.safetensors").exists()
        assert all(".lora_" in key for key in load_file(folder / "adapter_model.safetensors"))

"""The examples' own checkpoints, killed at every file operation."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

for module in ("transformers", "peft", "accelerate", "safetensors", "tqdm"):
    pytest.importorskip(module, reason="the test extra brings what examples import")

import stablelora_kernels as slk  # noqa: E402
from examples import finetune, replace_linear  # noqa: E402
from tests.helpers.dying import kills, needs_fork  # noqa: E402

pytestmark = [pytest.mark.nightly, needs_fork]


def optimizer_of(tensors: dict[str, torch.Tensor]) -> slk.StableLoRAAdamW:
    return slk.StableLoRAAdamW([(name, torch.nn.Parameter(tensor.clone())) for name, tensor in tensors.items()])


def checkpoint_of(step: int) -> dict[str, Any]:
    """A checkpoint after one step of the optimizer, with values that tell which it is."""
    adapter = {"q.lora_A": torch.full((2, 8), float(step)), "q.lora_B": torch.full((8, 2), 10.0 + step)}
    optimizer = optimizer_of(adapter)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"adapter": adapter, "optimizer": optimizer.state_dict(), "step": step}


def step_of(saved: dict[str, Any]) -> int:
    """Which of the two checkpoints it is: whole, and one that an optimizer takes."""
    expected = checkpoint_of(saved["step"])
    assert all(torch.equal(saved["adapter"][key], value) for key, value in expected["adapter"].items())
    optimizer_of(saved["adapter"]).load_state_dict(saved["optimizer"])
    return saved["step"]


def test_replace_linear_killed_while_it_saves(tmp_path: Path) -> None:
    file = tmp_path / "run" / "checkpoint.pt"

    def prepare() -> None:
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
        replace_linear.save_checkpoint(checkpoint_of(1), file)

    save = partial(replace_linear.save_checkpoint, checkpoint_of(2), file)
    steps = [step_of(torch.load(file, weights_only=True)) for _ in kills(save, prepare)]
    assert steps == sorted(steps) and set(steps) == {1, 2}


def test_finetune_killed_while_it_saves(tmp_path: Path) -> None:
    """By torch.distributed.checkpoint: what --resume chooses is whole."""
    run = tmp_path / "run"
    arguments = finetune.arguments(["--out", str(run), "--resume"])

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "settings.json").write_text("{}")
        checkpoint.save(checkpoint_of(1), checkpoint_id=run / "step-000001", no_dist=True)

    steps = []
    for _ in kills(
        partial(checkpoint.save, checkpoint_of(2), checkpoint_id=run / "step-000002", no_dist=True), prepare
    ):
        last, saved = finetune.checkpoint_to_resume(arguments, {}), checkpoint_of(3)
        checkpoint.load(saved, checkpoint_id=last, no_dist=True)
        steps.append(step_of(saved))
        assert last.name == f"step-00000{saved['step']}"
    assert steps == sorted(steps) and set(steps) == {1, 2}

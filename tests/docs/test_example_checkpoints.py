"""The examples' own checkpoints, killed at every file operation and on a full disk."""

from __future__ import annotations

import resource
import shutil
import signal
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
from tests.helpers.dying import in_child, kills, needs_fork  # noqa: E402


@pytest.mark.nightly
@needs_fork
def test_replace_linear_killed_while_it_saves(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    old, new = checkpoint_of(1), checkpoint_of(2)

    def found() -> int:
        saved = torch.load(file, weights_only=True)
        optimizer = optimizer_of(saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        assert saved["step"] in (1, 2)
        expected = (old, new)[saved["step"] - 1]
        assert all(torch.equal(saved["adapter"][key], value) for key, value in expected["adapter"].items())
        return saved["step"]

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        replace_linear.save_checkpoint(old, file)

    steps = [found() for _ in kills(partial(replace_linear.save_checkpoint, new, file), prepare)]
    assert steps == sorted(steps) and set(steps) == {1, 2}
    for room in (0, 100, file.stat().st_size - 1):
        prepare()
        assert in_child(partial(save_with_room, room, new, file)) == signal.SIGXFSZ
        assert found() == 1
        # And a full disk, which raises.
        assert in_child(partial(fail_to_save, room, new, file)) == 0
        assert found() == 1


@pytest.mark.nightly
@needs_fork
def test_finetune_killed_while_it_saves(tmp_path: Path) -> None:
    """By torch.distributed.checkpoint: what --resume chooses is whole."""
    arguments = finetune.arguments(["--out", str(tmp_path / "run"), "--resume"])
    old, new = checkpoint_of(1), checkpoint_of(2)

    def prepare() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "settings.json").write_text("{}")
        checkpoint.save(old, checkpoint_id=tmp_path / "run" / "step-000001", no_dist=True)

    action = partial(checkpoint.save, new, checkpoint_id=tmp_path / "run" / "step-000002", no_dist=True)
    steps = []
    for _ in kills(action, prepare):
        last = finetune.checkpoint_to_resume(arguments, {})
        saved = checkpoint_of(3)
        checkpoint.load(saved, checkpoint_id=last, no_dist=True)
        assert last.name == f"step-00000{saved['step']}"
        expected = (old, new)[saved["step"] - 1]
        assert all(torch.equal(saved["adapter"][key], value) for key, value in expected["adapter"].items())
        steps.append(saved["step"])
    assert steps == sorted(steps) and set(steps) == {1, 2}


def optimizer_of(tensors: dict[str, torch.Tensor]) -> slk.StableLoRAAdamW:
    return slk.StableLoRAAdamW([(name, torch.nn.Parameter(tensor.clone())) for name, tensor in tensors.items()])


def checkpoint_of(step: int) -> dict[str, Any]:
    """A checkpoint after one step of the optimizer, with values that tell which it is."""
    adapter = {"q.lora_A": torch.full((2, 8), float(step)), "q.lora_B": torch.full((8, 2), 10.0 + step)}
    optimizer = optimizer_of(adapter)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"adapter": adapter, "optimizer": optimizer.state_dict(), "step": step}


def save_with_room(room: int, state: dict[str, Any], file: Path) -> None:
    """Save while files may grow to ``room`` bytes only, beyond which the process is killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    replace_linear.save_checkpoint(state, file)


def fail_to_save(room: int, state: dict[str, Any], file: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises((OSError, RuntimeError)):
        replace_linear.save_checkpoint(state, file)

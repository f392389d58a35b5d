"""StableLoRACallback in a Trainer that trains under DeepSpeed's ZeRO, on two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers import trainer_runs
from tests.helpers.processes import needs_gloo, spawn
from tests.optim.test_zero import config as config_of_stage
from tests.optim.test_zero import import_deepspeed, needs_deepspeed

pytestmark = [needs_gloo, needs_deepspeed]


class Left(NamedTuple):
    """What a training has left."""

    parameters: dict[str, torch.Tensor]
    stability: list[slk.PairStability]
    # StabilityCallback's entries, by step.
    logged: list[dict[str, float]]


def _train(place: Path, stage: int | None, resume: bool = False) -> Left:
    """Train in a stage of ZeRO, or under DistributedDataParallel; from the checkpoint of the third
    step, or from the start.
    """
    import deepspeed
    from accelerate.state import AcceleratorState

    # It remembers the last Trainer's DeepSpeed.
    AcceleratorState._reset_state(True)
    changes: dict[str, Any] = {"ddp_backend": "gloo"}
    if stage is not None:
        sizes = (
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
        )
        config = config_of_stage(stage) | dict.fromkeys(sizes, "auto")
        changes = {"deepspeed": config, "save_strategy": "steps", "save_steps": 3}
    model = trainer_runs.llama("peft")
    callback = slk.StableLoRACallback(shrink_ratio=0.15)
    trainer = trainer_runs.make_trainer(
        model,
        place,
        settings=None,
        callbacks=[callback],
        learning_rate=0.05,
        # Adam divides by small gradients, whose last bits differ.
        adam_epsilon=1e-7,
        max_grad_norm=0.0,
        logging_steps=1,
        **changes,
    )
    trainer.add_callback(slk.StabilityCallback(trainer))
    trainer.train(resume_from_checkpoint=str(place / "checkpoint-3") if resume else None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(trained.values(), enabled=stage == 3):
        parameters = {name: p.detach().clone() for name, p in trained.items()}
    logged = [
        {name: value for name, value in entry.items() if name.startswith("stability")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return Left(parameters, callback.shrink.stability(), logged)


def _all(rank: int, world: int, directory: Path) -> dict[str, Left]:
    import_deepspeed()
    # What torchrun sets.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", LOCAL_WORLD_SIZE=str(world))
    left = {"ddp": _train(directory / "ddp", None)}
    for stage in (2, 3):
        left[f"{stage}"] = _train(directory / str(stage), stage)
        left[f"{stage}, resumed"] = _train(directory / str(stage), stage, resume=True)
    return left


def test_trainer_shrinks_under_zero(tmp_path: Path) -> None:
    """Every stage trains as DistributedDataParallel, and goes on from its checkpoint to the bit."""
    for left in spawn(_all, 2, tmp_path):
        latches = [pair.latched_at for pair in left["ddp"].stability]
        assert any(step and step <= 3 for step in latches), latches
        assert any(not step or step > 3 for step in latches), latches
        for stage in ("2", "3"):
            got, resumed = left[stage], left[f"{stage}, resumed"]
            assert [pair.latched_at for pair in got.stability] == latches
            for name, value in left["ddp"].parameters.items():
                # Gradients are averaged in another order.
                torch.testing.assert_close(got.parameters[name], value, rtol=1e-4, atol=1e-4)
                assert torch.equal(resumed.parameters[name], got.parameters[name])
            assert resumed.stability == got.stability
            assert resumed.logged == got.logged
            for entry, other in zip(got.logged, left["ddp"].logged, strict=True):
                assert entry == pytest.approx(other, rel=1e-3) and len(entry) == 6

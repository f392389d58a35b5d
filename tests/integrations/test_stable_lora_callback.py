"""StableLoRACallback in Hugging Face's Trainer: A shrinks before the step of any optimizer, and a run
resumed is the whole one to the bit.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import llama as small_llama
from tests.helpers.trainer_runs import (
    KINDS,
    STEPS,
    WORDS,
    arguments,
    llama,
    make_trainer,
    trained,
    transformers,
)
from tests.integrations.test_hf_trainer import assert_same_bits
from tests.integrations.test_stability_callback import KEYS, Reporter, expected_values

pytestmark = pytest.mark.usefixtures("one_thread")
RATIO, HALF = 0.2, STEPS // 2
# The first layer's pairs latch in the first half, the second's in the other, where the checkpoint is.
ARGS: dict[str, Any] = {"learning_rate": 0.2, "lr_scheduler_type": "linear", "warmup_steps": 2}
OPTIMIZERS = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adafactor": {"learning_rate": 0.1},
    "sgd": {"learning_rate": 20.0},
    "adamw_bnb_8bit": {},
}


def model_of(kind: str, other: bool = False, dropout: float = 0.0) -> nn.Module:
    """A model; an ``other`` one has other adapters."""
    model = llama(kind, 9 if other and kind == "ours" else 0, 7 if other else 0, dropout)
    for pair in slk.lora_pairs(model):
        nn.init.normal_(pair.A, std=0.05 if "layers.0" in pair.name else 0.5)
    return model


def train(
    place: Path,
    kind: str = "peft",
    resume: int | None = None,
    whole: Path | None = None,
    dropout: float = 0.0,
    callbacks: Any = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """The trainer and its callback, after training; with ``resume`` from that step of the run in
    ``whole``, in a model whose adapters are others.
    """
    model = model_of(kind, bool(resume), dropout)
    callback = slk.StableLoRACallback(shrink_ratio=changes.pop("shrink_ratio", RATIO))
    callbacks = [callback] if callbacks is None else callbacks
    trainer = make_trainer(model, place, settings=None, callbacks=callbacks, **ARGS | changes)
    trainer.train(resume_from_checkpoint=str(whole / f"checkpoint-{resume}") if whole else None)
    return trainer, callback


class ByHand(transformers.TrainerCallback):
    """Algorithm 1 before the step, on the values before it, in float64."""

    def __init__(self) -> None:
        self.latched: dict[str, int] = {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for pair in slk.lora_pairs(model):
            if pair.name in self.latched or pair.A.grad is None:
                continue
            a, b = (
                pair.A.double().norm() / pair.A.shape[1],
                pair.B.double().norm() / pair.B.shape[0],
            )
            if a > b:
                pair.A.copy_((1 - RATIO) * pair.A.double())
            else:
                self.latched[pair.name] = state.global_step + 1


def by_day(values: Iterable[str], *kept: str) -> list[Any]:
    """Parameters, of which all but ``kept`` are the night's."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.nightly)
        for value in values
    ]


def latches(callback: Any) -> dict[str, int | None]:
    return {pair.name: pair.latched_at for pair in callback.shrink.stability()}


def assert_close(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Each of six steps moves a value by up to 0.2 of a gradient that is the sum over 28 tokens, in
    float32: 2 * 28 roundings of the whole way. A step more of shrinkage takes a fifth of A away.
    """
    bound = 2 * 28 * 2**-24 * STEPS * ARGS["learning_rate"]
    for name, value in trained(other).items():
        torch.testing.assert_close(trained(model)[name], value, rtol=1e-5, atol=bound, msg=name)


@pytest.mark.parametrize("optim", by_day(OPTIMIZERS, "adamw_torch_fused", "sgd"))
def test_a_shrinks_by_the_rule_under_any_optimizer(tmp_path, optim):
    """With accumulated gradients, clipping and the Trainer's schedule."""
    changes = OPTIMIZERS[optim] | {"optim": optim, "max_grad_norm": 0.5}
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    by_hand = ByHand()
    expected, _ = train(tmp_path, callbacks=[by_hand], **changes)
    trainer, callback = train(tmp_path, **changes)
    assert_close(trainer.model, expected.model)
    found = latches(callback)
    assert {name: step for name, step in found.items() if step} == by_hand.latched
    assert len({*found.values()}) > 1
    assert [pair.steps for pair in callback.shrink.stability()] == [STEPS] * 4


@pytest.mark.parametrize("kind", by_day(KINDS, "ours"))
def test_with_adamw_it_is_stable_lora_adamw(tmp_path, kind):
    trainer, callback = train(tmp_path, kind)
    args = transformers.TrainingArguments(**arguments(tmp_path, **ARGS))
    factory = slk.StableLoRAAdamWFactory.from_args(args, shrink_ratio=RATIO)
    model = model_of(kind)
    other = make_trainer(model, tmp_path, settings=factory, **ARGS)
    other.train()
    assert_close(trainer.model, model)
    assert [*latches(callback).values()] == [
        pair.latched_at for pair in other.optimizer.optimizer.stability()
    ]


# Resuming


def state_of(trainer: Any, callback: Any) -> dict[str, Any]:
    """All that must be equal to the bit."""
    return {
        "adapters": trained(trainer.model),
        "optimizer": trainer.optimizer.optimizer.state_dict(),
        "latches": latches(callback),
    }


@pytest.mark.parametrize(
    ("kind", "optim"),
    [
        ("accelerated", "adamw_torch"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [(kind, "adamw_torch") for kind in ("ours", "peft")]
            + [("peft", optim) for optim in ("sgd", "adamw_bnb_8bit")]
        ),
    ],
)
def test_resumes_to_the_bit(tmp_path, kind, optim):
    """With dropout, in a model whose adapters were others, and the generators' states, too."""
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    options = OPTIMIZERS[optim] | {"optim": optim, "dropout": 0.2}
    whole = train(tmp_path, kind, save_strategy="steps", save_steps=HALF, **options)
    torch.manual_seed(1234)
    resumed = train(tmp_path / "resumed", kind, HALF, tmp_path, **options)
    assert_same_bits(state_of(*resumed), state_of(*whole))
    steps = [step for step in latches(whole[1]).values() if step]
    assert min(steps) <= HALF and (optim == "sgd" or max(steps) > HALF)
    saved = torch.load(tmp_path / f"checkpoint-{HALF}" / "optimizer.pt")
    group = saved["param_groups"][0]
    assert group["latched_at"].any() and group["shrink_ratio"] == RATIO


def told_in(action: Any) -> tuple[Any, list[str]]:
    """What the action returns, and the warnings of this library."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = action()
    said = [str(warning.message) for warning in told]
    return result, [text for text in said if "shrink" in text or "StableLoRA" in text]


def test_a_checkpoint_without_the_callback_goes_on_with_a_warning(tmp_path):
    train(tmp_path, callbacks=[], save_strategy="steps", save_steps=HALF)
    (_, callback), told = told_in(lambda: train(tmp_path / "x", resume=HALF, whole=tmp_path))
    assert len(told) == 1 and "saved without StableLoRACallback, so no pair has latched" in told[0]
    assert [pair.steps for pair in callback.shrink.stability()] == [HALF] * 4
    # With it nothing is said.
    _, told = told_in(lambda: train(tmp_path / "y", save_strategy="steps", save_steps=HALF))
    assert not told
    _, told = told_in(lambda: train(tmp_path / "z", resume=HALF, whole=tmp_path / "y"))
    assert not told


def test_a_run_with_the_callback_resumes_without(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=HALF)
    trainer, _ = train(tmp_path / "x", resume=HALF, whole=tmp_path, callbacks=[])
    assert trainer.state.global_step == STEPS


def test_the_ratio_of_the_checkpoint_goes_on(tmp_path):
    whole = train(tmp_path, save_strategy="steps", save_steps=HALF)
    resumed, told = told_in(
        lambda: train(tmp_path / "x", resume=HALF, whole=tmp_path, shrink_ratio=0.5)
    )
    assert len(told) == 1 and f"shrink_ratio is {RATIO}" in told[0] and "not 0.5" in told[0]
    assert_same_bits(state_of(*resumed), state_of(*whole))


@pytest.mark.nightly
def test_training_twice_goes_on_with_one_shrink(tmp_path):
    """Also from a checkpoint, which the second training loads into the hooked optimizer."""
    trainer, callback = train(tmp_path, save_strategy="steps", save_steps=HALF)
    first, once = callback.shrink, state_of(trainer, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert_same_bits(state_of(trainer, callback), once)
    trainer.train()
    assert callback.shrink is first
    assert [pair.steps for pair in first.stability()] == [2 * STEPS] * 4
    # Another trainer has another optimizer.
    train(tmp_path, callbacks=[callback])
    assert callback.shrink is not first
    assert [pair.steps for pair in callback.shrink.stability()] == [STEPS] * 4


# Beside other callbacks


@pytest.mark.parametrize("stability_first", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_beside_stability_callback(tmp_path, stability_first):
    """In either order, and beside AccelerateCallback."""
    shrink, reporter = slk.StableLoRACallback(shrink_ratio=RATIO), Reporter()
    callbacks = [reporter, slk.AccelerateCallback()]
    trainer = make_trainer(
        model_of("peft"), tmp_path, settings=None, callbacks=callbacks, logging_steps=2, **ARGS
    )
    both = [slk.StabilityCallback(trainer), shrink]
    for callback in both if stability_first else both[::-1]:
        trainer.add_callback(callback)
    _, told = told_in(trainer.train)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6] and not told
    assert {key: entries[-1][key] for key in KEYS} == pytest.approx(expected_values(shrink.shrink))
    assert [{key: logs[key] for key in KEYS} for logs in reporter.logs if "loss" in logs] == [
        {key: entry[key] for key in KEYS} for entry in entries
    ]
    plain, _ = train(tmp_path)
    assert_close(trainer.model, plain.model)


def test_the_log_goes_on_in_a_resumed_run(tmp_path):
    """A callback behind ours opens it, once the StableShrink exists."""

    class Log(transformers.TrainerCallback):
        def __init__(self, callback: Any) -> None:
            self.callback = callback

        def on_train_begin(self, *args, **kwargs):
            self.log = slk.StabilityLogger(self.callback.shrink, tmp_path / "log.csv", every=1)

        def on_train_end(self, *args, **kwargs):
            self.log.close()

    for resume in (None, HALF):
        callback = slk.StableLoRACallback(shrink_ratio=RATIO)
        train(
            tmp_path, resume=resume, whole=tmp_path if resume else None, max_steps=HALF if not resume else STEPS,
            callbacks=[callback, Log(callback)], save_strategy="steps", save_steps=HALF,
        )  # fmt: skip
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1 + i // 4 for i in range(4 * STEPS)]
    assert [row["latched_at"] for row in rows[-4:]] == [
        str(pair.latched_at or "") for pair in callback.shrink.stability()
    ]


# Errors


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'shrinkratio'"):
        slk.StableLoRACallback(shrinkratio=0.1)
    with pytest.raises(ValueError, match=r"shrink_ratio .*1\.5"):
        slk.StableLoRACallback(shrink_ratio=1.5)
    with pytest.raises(TypeError, match=r"shrink_ratio .*'0\.1'"):
        slk.StableLoRACallback(shrink_ratio="0.1")
    with pytest.raises(TypeError, match="seed"):
        slk.StableLoRACallback(seed=0.5)
    callback = slk.StableLoRACallback()
    trainer = make_trainer(model_of("ours"), tmp_path, settings={"lr": 1e-3}, callbacks=[callback])
    with pytest.raises(TypeError, match="optimizer is a StableLoRAAdamW, which shrinks A in its"):
        trainer.train()
    plain = small_llama(vocab_size=WORDS, pad_token_id=0)
    trainer = make_trainer(plain, tmp_path, settings=None, callbacks=[slk.StableLoRACallback()])
    with pytest.raises(ValueError, match="no trainable LoRA pair"):
        trainer.train()
    assert callback.shrink is None and isinstance(callback, transformers.TrainerCallback)


# Two processes


def trained_on(rank: int, world: int, place: Path) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    trainer, callback = train(place / str(rank), "accelerated", ddp_backend="gloo")
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return {"adapters": trained(trainer.model), "latches": latches(callback)}


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    # As many rows a step on one process as on two.
    trainer, callback = train(tmp_path, "accelerated", gradient_accumulation_steps=4)
    alone, latched = trained(trainer.model), latches(callback)
    assert any(latched.values())
    for found in spawn(trained_on, 2, tmp_path):
        assert found["latches"] == latched
        for name, value in alone.items():
            torch.testing.assert_close(found["adapters"][name], value, rtol=1e-4, atol=1e-5)

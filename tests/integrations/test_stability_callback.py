"""StabilityCallback: the pairs' stability in the Trainer's own log entries, for whatever reports
them.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from stablelora_kernels.integrations import hf_trainer
from tests.helpers.optimizers import make_pairs
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import IDS, Model, fill_b, lora_options
from tests.helpers.trainer_runs import llama, make_trainer, trained, transformers

SETTINGS = {"lr": 0.1, "shrink_ratio": 0.3}
KEYS = {
    f"stability/{name}"
    for name in ("a_norm", "b_norm", "latched_fraction", "ratio_mean", "ratio_min", "ratio_max")
}


class Reporter(transformers.TrainerCallback):
    """Stands where the Trainer puts TensorBoard's and wandb's callbacks: before the user's."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


class Metrics(transformers.Trainer):
    """With a log of its own, as TRL's trainers, which add their metrics to the entry and start
    over.
    """

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log({**logs, "seen": self.seen}, start_time)
        self.seen = 0


class Bare:
    """What a callback needs of a trainer."""

    optimizer = None

    def log(self) -> None: ...


def test_it_is_pickled_with_its_trainer():
    trainer = Bare()
    trainer.callback = slk.StabilityCallback(trainer)
    for each in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        assert type(each.callback) is type(trainer.callback)
        assert each is not trainer and each.callback.trainer is each


def test_the_optimizer_is_found_in_wrappers_of_wrappers():
    optimizer = slk.StableLoRAAdamW(make_pairs())
    twice = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert hf_trainer._stable_optimizer(twice) is optimizer


def in_training(entries) -> list[dict[str, float]]:
    return [entry for entry in entries if "loss" in entry]


def expected_values(optimizer) -> dict[str, float]:
    stable = optimizer if hasattr(optimizer, "stability") else optimizer.optimizer
    pairs = stable.stability()
    ratios = [pair.b_norm / pair.a_norm for pair in pairs]
    means = {
        "a_norm": [p.a_norm for p in pairs],
        "b_norm": [p.b_norm for p in pairs],
        "ratio_mean": ratios,
    }
    means["latched_fraction"] = [pair.latched for pair in pairs]
    values = {name: sum(found) / len(pairs) for name, found in means.items()}
    return {
        f"stability/{name}": v
        for name, v in (values | {"ratio_min": min(ratios), "ratio_max": max(ratios)}).items()
    }


@pytest.mark.parametrize(
    ("settings", "warns"), [({}, True), ({"lr": 2e-4}, False), ({"lr": torch.tensor(1e-4)}, False)]
)
def test_a_learning_rate_of_the_arguments_that_does_not_count_is_told(
    settings, warns, tmp_path, recwarn
):
    """An optimizer that is made without a rate has the default, whatever the Trainer's arguments
    say.
    """
    trainer = make_trainer(
        llama("ours"),
        tmp_path,
        "optimizers",
        settings,
        max_steps=1,
        learning_rate=3e-2,
        # The first step's rate is zero.
        warmup_steps=1,
    )
    trainer.add_callback(slk.StabilityCallback(trainer))
    trainer.train()
    text = (
        "the optimizer's lr is 0.0001, its default, and not learning_rate=0.03 of TrainingArguments"
    )
    assert any(text in str(warning.message) for warning in recwarn) == warns


@pytest.mark.covering(1)
@pytest.mark.parametrize("made", [transformers.Trainer, Metrics])
@pytest.mark.parametrize("via", ["a factory", "optimizers"])
@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_values_are_in_the_trainers_own_entries(tmp_path, kind, via, made):
    reporter, found = Reporter(), []
    for with_callback in (True, False):
        model = llama(kind)
        trainer = make_trainer(
            model,
            tmp_path,
            via,
            SETTINGS,
            made,
            callbacks=[reporter][:with_callback],
            logging_steps=2,
        )
        if with_callback:
            trainer.add_callback(slk.StabilityCallback(trainer))
        trainer.train()
        found.append(trainer.state.log_history)
        if with_callback:
            last_values = expected_values(trainer.optimizer)
    entries = in_training(found[0])
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert {key: entries[-1][key] for key in KEYS} == pytest.approx(last_values)
    first, last = entries[0], entries[-1]
    assert (
        0
        < first["stability/ratio_min"]
        < first["stability/ratio_mean"]
        < first["stability/ratio_max"]
    )
    assert first["stability/latched_fraction"] < last["stability/latched_fraction"]
    # A reporter gets the same values, as numbers, in the entry of the loss.
    reported = [{key: logs[key] for key in ("step", *KEYS)} for logs in in_training(reporter.logs)]
    assert reported == [{key: entry[key] for key in ("step", *KEYS)} for entry in entries]
    assert all(type(logs[key]) is float for logs in reported for key in KEYS)
    # No entry more than without the callback, no value else, and a trainer's own log is called once
    # for each.
    for entry, own in zip(*found, strict=True):
        assert entry.keys() == own.keys() | (KEYS if "loss" in own else set())
        assert all(entry.get(key) == own.get(key) for key in ("loss", "grad_norm", "seen"))


def test_what_is_refused(tmp_path):
    plain = make_trainer(llama("ours"), tmp_path, settings=None)
    plain.add_callback(slk.StabilityCallback(plain))
    before = trained(plain.model)
    with pytest.raises(
        TypeError, match="trainer must be a Trainer of transformers, got TrainingArguments"
    ):
        slk.StabilityCallback(plain.args)
    with pytest.raises(
        TypeError,
        match="trainer must train with a StableLoRAAdamW or a StableLoRACallback, got AdamW",
    ):
        plain.train()
    assert all(torch.equal(before[name], p) for name, p in trained(plain.model).items())


def values_of(optimizer) -> dict[str, float]:
    """What an entry of the loss gets, and one of an evaluation does not."""
    trainer = SimpleNamespace(optimizer=optimizer, log=print)
    callback, state = slk.StabilityCallback(trainer), SimpleNamespace(log_history=[{}])
    entry, other = {"loss": 1.0}, {"eval_loss": 1.0}
    for logs in (entry, other):
        callback.on_log(None, state, None, logs=logs)
    assert other == {"eval_loss": 1.0} and entry == {"loss": 1.0, **state.log_history[0]}
    return state.log_history[0]


def test_an_a_of_zero_has_no_ratio():
    first, second = make_pairs([(2, 4, 6)] * 2)
    with torch.no_grad():
        first.A.zero_()
    values = values_of(slk.StableLoRAAdamW([first, second]))
    (_, other) = slk.StableLoRAAdamW([first, second]).stability()
    assert (
        values["stability/ratio_min"]
        == values["stability/ratio_max"]
        == other.b_norm / other.a_norm
    )
    ratios = {f"stability/ratio_{name}" for name in ("mean", "min", "max")}
    assert values_of(slk.StableLoRAAdamW([first])).keys() == KEYS - ratios


def values_of_shards(world: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, **lora_options())
    fill_b(model)
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-2)
    model(IDS).square().sum().backward()
    optimizer.step()
    return values_of(optimizer)


def two(rank: int, world: int, place: Path) -> dict[str, float]:
    return values_of_shards(world)


@needs_gloo
def test_two_processes(tmp_path):
    """The norms of shards take a collective, for which every process asks."""
    alone = values_of_shards(1)
    assert alone.keys() == KEYS and spawn(two, 2, tmp_path) == [pytest.approx(alone, rel=1e-5)] * 2

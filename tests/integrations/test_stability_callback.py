"""StabilityCallback: the pairs' stability in the Trainer's own log entries, for whatever reports them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from tests.helpers.optimizers import make_pairs
from tests.helpers.processes import needs_gloo, printed, spawn
from tests.helpers.small_models import IDS, Model, fill_b, lora_config

transformers = pytest.importorskip("transformers", reason="the test extra brings the trainers")
pytest.importorskip("accelerate", reason="the test extra brings the trainers")
peft = pytest.importorskip("peft", reason="the test extra brings the trainers")

from tests.helpers.trainer_runs import llama, make_trainer, trained  # noqa: E402

SETTINGS = {"lr": 0.1, "shrink_ratio": 0.3}
KEYS = {
    f"stability/{name}" for name in ("a_norm", "b_norm", "latched_fraction", "ratio_mean", "ratio_min", "ratio_max")
}


class Reporter(transformers.TrainerCallback):
    """Stands where the Trainer puts TensorBoard's and wandb's callbacks: before the user's."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.logs.append((state.global_step, dict(logs)))


def make(place, model=None, callback=True, settings=SETTINGS, **options):
    reporter, options = Reporter(), {"logging_steps": 2} | options
    trainer = make_trainer(model or llama("ours"), place, settings=settings, callbacks=[reporter], **options)
    if callback:
        trainer.add_callback(slk.StabilityCallback(trainer))
    return trainer, reporter


def in_training(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def expected_values(optimizer) -> dict[str, float]:
    pairs = getattr(optimizer, "optimizer", optimizer).stability()
    ratios = [pair.b_norm / pair.a_norm for pair in pairs]
    means = {"a_norm": [p.a_norm for p in pairs], "b_norm": [p.b_norm for p in pairs], "ratio_mean": ratios}
    means["latched_fraction"] = [pair.latched for pair in pairs]
    values = {name: sum(found) / len(pairs) for name, found in means.items()}
    return {
        f"stability/{name}": v for name, v in (values | {"ratio_min": min(ratios), "ratio_max": max(ratios)}).items()
    }


@pytest.mark.parametrize("via", ["a factory", "optimizers"])
@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_values_are_in_the_trainers_own_entries(tmp_path, kind, via):
    (trainer, reporter), (plain, _) = (make(tmp_path, llama(kind), which, via=via) for which in (True, False))
    trainer.train(), plain.train()
    entries = in_training(trainer)
    assert [entry["step"] for entry in entries] == [2, 4, 6] and all(entry.keys() >= KEYS for entry in entries)
    assert {key: entries[-1][key] for key in KEYS} == pytest.approx(expected_values(trainer.optimizer))
    first, last = entries[0], entries[-1]
    assert 0 < first["stability/ratio_min"] < first["stability/ratio_mean"] < first["stability/ratio_max"]
    assert first["stability/latched_fraction"] < last["stability/latched_fraction"]
    # A reporter gets the same values, as numbers, in the entry of the loss.
    reported = [(step, {key: logs[key] for key in KEYS}) for step, logs in reporter.logs if "loss" in logs]
    assert reported == [(entry["step"], {key: entry[key] for key in KEYS}) for entry in entries]
    assert all(type(value) is float for _, logs in reported for value in logs.values())
    # No entry more than without the callback, and no value else.
    for own, entry in zip(plain.state.log_history, trainer.state.log_history, strict=True):
        assert own.keys() == entry.keys() - KEYS
        assert own.get("loss") == entry.get("loss") and own.get("grad_norm") == entry.get("grad_norm")


class Metrics(transformers.Trainer):
    """With a log of its own, as TRL's trainers, which add their metrics to the entry and start over."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log({**logs, "seen": self.seen}, start_time)
        self.seen = 0


def test_a_trainers_log_of_its_own_is_called_once(tmp_path):
    trainer, reporter = make(tmp_path, made=Metrics)
    trainer.train()
    assert len(in_training(trainer)) == 3 and all(entry.keys() >= KEYS for entry in in_training(trainer))
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any(entry.keys() & KEYS for entry in others)
    assert [logs["seen"] for _, logs in reporter.logs if "loss" in logs] == [4, 4, 4]


def fails(*args, **kwargs):
    raise ZeroDivisionError


def test_the_trainers_log_is_its_own_again(tmp_path, monkeypatch):
    """After a run and after an error, once around it for each run; one that a user has put there is put back."""
    trainer, _ = make(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "training_step", fails)
        trainer.train()
    trainer.train()
    assert "log" not in vars(trainer)
    own, seen = trainer.log, []

    def mine(logs, *more):
        seen.append(logs)
        own(logs, *more)

    trainer.log = mine
    trainer.train()
    assert vars(trainer)["log"] is mine and any("stability/ratio_mean" in logs for logs in seen)
    # Of a run that raised something is left behind, which does nothing once the callback is gone.
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer, "training_step", fails)
        trainer.train()
    assert isinstance(trainer.pop_callback(slk.StabilityCallback), transformers.TrainerCallback)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["loss"] == 1.0 and not trainer.state.log_history[-1].keys() & KEYS


def test_what_is_refused(tmp_path):
    plain, _ = make(tmp_path, settings=None)
    before = trained(plain.model)
    with pytest.raises(TypeError, match="trainer must be a Trainer of transformers, got TrainingArguments"):
        slk.StabilityCallback(plain.args)
    with pytest.raises(TypeError, match="trainer must train with a StableLoRAAdamW, got AdamW"):
        plain.train()
    assert all(torch.equal(before[name], p) for name, p in trained(plain.model).items()) and "log" not in vars(plain)


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\nimport stablelora_kernels as slk\n"
        "try: slk.StabilityCallback(None)\nexcept ImportError as error: print(error)"
    )
    assert printed(code).startswith("StabilityCallback needs transformers: pip install 'stablelora-kernels[peft]' (")


class Trainer:
    """As much of a Trainer as the callback uses."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.logs = optimizer, []

    def log(self, logs, start_time=None):
        self.logs.append(logs)

    def callback_events(self) -> dict[str, float]:
        callback = slk.StabilityCallback(self)
        callback.on_train_begin(None, None, None)
        self.log({"loss": 1.0}, 0.0)
        self.log({"eval_loss": 1.0})
        callback.on_train_end(None, None, None)
        assert self.logs[1] == {"eval_loss": 1.0} and self.logs[0].pop("loss") == 1.0
        return self.logs[0]


def test_an_a_of_zero_has_no_ratio():
    first, second = make_pairs([(2, 4, 6)] * 2)
    with torch.no_grad():
        first.A.zero_()
    values = Trainer(slk.StableLoRAAdamW([first, second])).callback_events()
    (_, other) = slk.StableLoRAAdamW([first, second]).stability()
    assert values["stability/ratio_min"] == values["stability/ratio_max"] == other.b_norm / other.a_norm
    ratios = {f"stability/ratio_{name}" for name in ("mean", "min", "max")}
    assert Trainer(slk.StableLoRAAdamW([first])).callback_events().keys() == KEYS - ratios


def values_of_shards(world: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, lora_config())
    fill_b(model)
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-2)
    model(IDS).square().sum().backward()
    optimizer.step()
    return Trainer(optimizer).callback_events()


def two(rank: int, world: int, place: Path) -> dict[str, float]:
    return values_of_shards(world)


@needs_gloo
def test_two_processes(tmp_path):
    """The norms of shards take a collective, for which every process asks."""
    alone = values_of_shards(1)
    assert alone.keys() == KEYS and spawn(two, 2, tmp_path) == [pytest.approx(alone, rel=1e-5)] * 2

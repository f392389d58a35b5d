"""StabilityCallback: the pairs' stability in the Trainer's own log entries, for whatever reports them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from tests.helpers.optimizers import make_pairs
from tests.helpers.processes import needs_gloo, printed, spawn
from tests.helpers.small_models import IDS, Model, fill_b, llama, lora_config

transformers = pytest.importorskip("transformers", reason="the test extra brings the trainers")
pytest.importorskip("accelerate", reason="the test extra brings the trainers")
peft = pytest.importorskip("peft", reason="the test extra brings the trainers")

STEPS, SETTINGS = 6, {"lr": 0.1, "shrink_ratio": 0.3}
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


def adapted(kind: str = "ours") -> torch.nn.Module:
    torch.manual_seed(0)
    model = llama()
    if kind == "ours":
        slk.apply_lora(model, lora_config())
        return model
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    slk.accelerate_peft(model)
    return model


def make_trainer(path, model=None, via="a factory", callback=True, trainer_class=transformers.Trainer, **kwargs):
    model = adapted() if model is None else model
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (4 * STEPS, 5), generator=generator)]
    arguments = {
        "output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": STEPS, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2, "gradient_accumulation_steps": 2, "seed": 3,
    }  # fmt: skip
    if via == "optimizers":
        extra = {"optimizers": (slk.StableLoRAAdamW.from_model(model, **SETTINGS), None)}
    else:
        extra = {"optimizer_cls_and_kwargs": (slk.StableLoRAAdamWFactory, SETTINGS)}
    reporter = Reporter()
    arguments = transformers.TrainingArguments(**arguments | kwargs)
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, callbacks=[reporter], **extra)
    if callback:
        trainer.add_callback(slk.StabilityCallback(trainer))
    return trainer, reporter


def in_training(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def expected_values(optimizer) -> dict[str, float]:
    pairs = getattr(optimizer, "optimizer", optimizer).stability()
    ratios = [pair.b_norm / pair.a_norm for pair in pairs]
    mean = {name: sum(values) / len(pairs) for name, values in (
        ("a_norm", [pair.a_norm for pair in pairs]), ("b_norm", [pair.b_norm for pair in pairs]),
        ("latched_fraction", [pair.latched for pair in pairs]), ("ratio_mean", ratios),
    )}  # fmt: skip
    return {
        f"stability/{name}": value
        for name, value in (mean | {"ratio_min": min(ratios), "ratio_max": max(ratios)}).items()
    }


@pytest.mark.parametrize("via", ["a factory", "optimizers"])
@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_values_are_in_the_trainers_own_entries(tmp_path, kind, via):
    trainer, reporter = make_trainer(tmp_path, adapted(kind), via)
    trainer.train()
    entries = in_training(trainer)
    assert [entry["step"] for entry in entries] == [2, 4, 6] and all(entry.keys() >= KEYS for entry in entries)
    assert {key: entries[-1][key] for key in KEYS} == pytest.approx(expected_values(trainer.optimizer))
    first, last = entries[0], entries[-1]
    assert 0 < first["stability/ratio_min"] < first["stability/ratio_mean"] < first["stability/ratio_max"]
    assert first["stability/latched_fraction"] < last["stability/latched_fraction"]
    # A reporter gets the same values, as numbers, in the entry of the loss.
    reported = [(step, logs) for step, logs in reporter.logs if "loss" in logs]
    assert [step for step, _ in reported] == [2, 4, 6]
    for (_, logs), entry in zip(reported, entries, strict=True):
        assert {key: logs[key] for key in KEYS} == {key: entry[key] for key in KEYS}
        assert all(type(logs[key]) is float for key in KEYS)
    # No entry more than without the callback, and no value else.
    plain, _ = make_trainer(tmp_path, adapted(kind), via, callback=False)
    plain.train()
    for own, entry in zip(plain.state.log_history, trainer.state.log_history, strict=True):
        assert own.keys() == entry.keys() - KEYS
        assert own.get("loss") == entry.get("loss") and own.get("grad_norm") == entry.get("grad_norm")


@pytest.mark.parametrize("strategy", [{"logging_strategy": "epoch"}, {"logging_first_step": True, "logging_steps": 4}])
def test_it_follows_the_trainers_schedule_of_logs(tmp_path, strategy):
    trainer, _ = make_trainer(tmp_path, eval_strategy="no", **strategy)
    trainer.train()
    assert in_training(trainer) and all(entry.keys() >= KEYS for entry in in_training(trainer))
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any(entry.keys() & KEYS for entry in others)


def test_the_log_of_a_trainer_that_has_its_own(tmp_path):
    """As TRL's trainers, which add their metrics to the entry and start over."""

    class Metrics(transformers.Trainer):
        seen = 0

        def training_step(self, *args, **kwargs):
            self.seen += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, start_time=None):
            super().log({**logs, "seen": self.seen}, start_time)
            self.seen = 0

    trainer, reporter = make_trainer(tmp_path, trainer_class=Metrics)
    trainer.train()
    assert [entry["seen"] for entry in in_training(trainer)] == [4, 4, 4]
    assert all(logs.keys() >= KEYS | {"seen"} for _, logs in reporter.logs if "loss" in logs)


def test_a_resumed_run_goes_on(tmp_path):
    whole, _ = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed, _ = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert [entry["step"] for entry in in_training(resumed)] == [2, 4, 6]
    # The Trainer's own loss of step 4 has lost what came before the checkpoint.
    for key in KEYS:
        assert [e[key] for e in in_training(resumed)] == pytest.approx([e[key] for e in in_training(whole)]), key
    saved = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["log_history"][-1].keys() >= KEYS


def test_the_trainers_log_is_its_own_again(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer.train()
    assert "log" not in vars(trainer)
    # After an error, and once around it for each run.
    trainer.training_step, step = (lambda *args, **kwargs: 1 / 0), trainer.training_step
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert "log" not in vars(trainer)
    assert isinstance(trainer.pop_callback(slk.StabilityCallback), slk.StabilityCallback)
    trainer.train()
    assert in_training(trainer) and not any(entry.keys() & KEYS for entry in in_training(trainer))


def test_a_log_that_a_user_has_put_there_is_put_back(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    own, seen = trainer.log, []

    def mine(logs, *more):
        seen.append(logs)
        own(logs, *more)

    trainer.log = mine
    trainer.train()
    assert vars(trainer)["log"] is mine and any("stability/ratio_mean" in logs for logs in seen)


def test_after_a_run_that_raised_a_removed_callback_does_nothing(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer.training_step, step = (lambda *args, **kwargs: 1 / 0), trainer.training_step
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.training_step = step
    trainer.pop_callback(slk.StabilityCallback)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["loss"] == 1.0


def test_what_is_refused(tmp_path):
    trainer, _ = make_trainer(tmp_path, callback=False)
    with pytest.raises(TypeError, match="trainer must be a Trainer of transformers, got TrainingArguments"):
        slk.StabilityCallback(trainer.args)
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = transformers.Trainer(model=model, args=trainer.args, train_dataset=trainer.train_dataset)
    plain.add_callback(slk.StabilityCallback(plain))
    with pytest.raises(TypeError, match="trainer must train with a StableLoRAAdamW, got AdamW"):
        plain.train()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()) and "log" not in vars(plain)


def test_it_is_a_callback_of_transformers(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    callback = trainer.callback_handler.callbacks[-1]
    assert isinstance(callback, transformers.TrainerCallback) and isinstance(callback, slk.StabilityCallback)
    assert type(callback).__name__ == "StabilityCallback"


def test_transformers_is_imported_by_the_first_callback_alone():
    code = "import sys, stablelora_kernels as slk; print('transformers' in sys.modules, slk.StabilityCallback.__name__)"
    assert printed(code) == "False StabilityCallback"
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
    assert Trainer(slk.StableLoRAAdamW([first])).callback_events().keys() == KEYS - {
        f"stability/ratio_{name}" for name in ("mean", "min", "max")
    }


def sharded(rank: int, world: int, place: Path | None = None) -> dict[str, float]:
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


@needs_gloo
def test_shards_are_those_of_the_whole(tmp_path):
    """The norms of shards take a collective, for which every process asks."""
    alone = sharded(0, 1)
    assert alone.keys() == KEYS
    assert spawn(sharded, 2, tmp_path) == [pytest.approx(alone, rel=1e-5)] * 2


def in_ddp(rank: int, world: int, place: Path) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    trainer, reporter = make_trainer(place, ddp_backend="gloo")
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return {"entries": in_training(trainer), "reported": reporter.logs}


@needs_gloo
def test_ddp_reports_on_the_first_rank(tmp_path):
    first, second = spawn(in_ddp, 2, tmp_path)
    assert [entry["step"] for entry in first["entries"]] == [2, 4, 6]
    for mine, other in zip(first["entries"], second["entries"], strict=True):
        assert {key: mine[key] for key in KEYS} == {key: other[key] for key in KEYS}
    assert second["reported"] == []
    assert [step for step, logs in first["reported"] if logs.keys() >= KEYS] == [2, 4, 6]

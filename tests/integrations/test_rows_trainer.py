"""``RowsTrainer``: each adapter trains as by a Trainer of its own under plain PEFT; and what it
refuses.
"""

from __future__ import annotations

import copy
import os
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import llama
from tests.helpers.trainer_runs import WORDS, arguments, peft, transformers

CONFIGS: dict[str, dict[str, Any]] = {
    "x": {"r": 4, "lora_alpha": 8},
    "y": {"r": 3, "lora_alpha": 8, "use_rslora": True},
    "z": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "x": {"lr": 1e-2},
    "y": {"lr": 3e-3, "shrink_ratio": 0.05},
    "z": {"lr": 5e-3, "shrink_ratio": 0.0, "weight_decay": 0.1},
}
MICRO_BATCH = ["z", "x", "y", "z", "y", "z"]
STEPS = 10
ACCUMULATED = 2
# It clips most steps of each adapter, of "z" not all of them.
NORM = 0.2


def three_adapters() -> nn.Module:
    torch.manual_seed(0)
    base = llama(vocab_size=WORDS, pad_token_id=0)
    model: Any = None
    for name, changes in CONFIGS.items():
        options = {"target_modules": "all-linear", "init_lora_weights": False} | changes
        config = peft.LoraConfig(**options, task_type="CAUSAL_LM")
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.train()


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Rows of 4 to 9 tokens, whose first ones are a prompt."""
    generator = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for name in names:
        ids = torch.randint(3, WORDS, (number(4, 10),), generator=generator).tolist()
        prompt = number(0, 3)
        labels = [-100] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "labels": labels, "adapter": name})
    return made


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch: dict[str, list[Any]] = {name: [] for name in padded}
    for row in rows:
        row = row | {"attention_mask": [1] * len(row["input_ids"])}
        for name, value in padded.items():
            batch[name].append(row[name] + [value] * (longest - len(row["input_ids"])))
    return {name: torch.tensor(values) for name, values in batch.items()}


def training_arguments(place: Path, batch: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": ACCUMULATED, "max_steps": STEPS,
        "max_grad_norm": NORM, "logging_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 2,
        "weight_decay": 0.01, "adam_beta2": 0.98, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return transformers.TrainingArguments(**arguments(place, **settings | changes))


def together(model: nn.Module, place: Path, data: Any, batch: int = 6, **options: Any) -> Any:
    changes = options.pop("changes", {})
    given = {"adapters": SETTINGS, "data_collator": pad, "train_dataset": data}
    return slk.RowsTrainer(model, training_arguments(place, batch, **changes), **given | options)


def alone(model: nn.Module, name: str, place: Path, data: Any, **changes: Any) -> Any:
    """A Trainer of one adapter under plain PEFT, with the same rows in each micro-batch."""
    model.set_adapter(name)
    of_adapter = [row for row in data if row["adapter"] == name]
    args = training_arguments(place, MICRO_BATCH.count(name), **changes)
    hyper = {"weight_decay": args.weight_decay, "betas": (args.adam_beta1, args.adam_beta2)}
    optimizer = slk.StableLoRAAdamW.from_model(model, **hyper | SETTINGS[name])
    given = {"data_collator": pad, "train_dataset": of_adapter, "eval_dataset": of_adapter[:4]}
    return transformers.Trainer(model, args, **given, optimizers=(optimizer, None))


def of_adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key}


def assert_near(found: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each parameter, relative to its norm."""
    assert expected
    for key, value in expected.items():
        error = (found.get_parameter(key) - value).norm() / value.norm()
        assert error <= tolerance, (key, error)


def entries(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("fuse", "checkpointing"),
    [
        (True, True),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in product((False, True), (False, True)) if not all(case)),
    ],
)  # fmt: skip
def test_each_adapter_trains_as_by_a_trainer_of_its_own(tmp_path, fuse, checkpointing):
    """Ten clipped steps of two micro-batches in float32, with other numbers of rows and tokens."""
    changes = {"gradient_checkpointing": checkpointing}
    model = three_adapters()
    plain = copy.deepcopy(model)
    slk.accelerate_peft(model, fuse_loss=fuse, strict=True)
    data = rows(MICRO_BATCH * ACCUMULATED * STEPS)
    trainer = together(model, tmp_path, data, changes=changes)
    losses_of_rows = slk.losses_of_rows
    with mock.patch("stablelora_kernels.integrations.rows_trainer.losses_of_rows") as losses:
        losses.side_effect = losses_of_rows
        trainer.train()
    # Losses of tokens without logits, or logits.
    assert {call.args[0].dim() for call in losses.call_args_list} == {2 if fuse else 3}
    for name in CONFIGS:
        other = alone(copy.deepcopy(plain), name, tmp_path / name, data, **changes)
        other.train()
        moved = of_adapter(plain, name)
        for key, p in of_adapter(model, name).items():
            assert (p - moved[key]).norm() > 1e-2 * p.norm(), key
        assert_near(model, of_adapter(other.model, name))
        pairs = [*zip(entries(trainer), entries(other), strict=True)]
        assert len(pairs) == STEPS and any(wanted["grad_norm"] > NORM for _, wanted in pairs)
        for entry, wanted in pairs:
            assert entry[f"{name}/loss"] == pytest.approx(wanted["loss"], rel=1e-6)
            assert entry[f"{name}/grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    for entry in entries(trainer):
        assert entry["loss"] == pytest.approx(sum(entry[f"{name}/loss"] for name in CONFIGS))
        norms = torch.tensor([entry[f"{name}/grad_norm"] for name in CONFIGS])
        assert entry["grad_norm"] == pytest.approx(norms.norm().item())


def test_steps_without_rows_of_an_adapter_leave_it_as_it_is(tmp_path):
    """Of four steps, "x" has rows in the first and the last, and there in one micro-batch of two."""
    model = three_adapters()
    plain = copy.deepcopy(model)
    # A Trainer would divide the loss by the micro-batches.
    model.base_model.model.accepts_loss_kwargs = False
    slk.accelerate_peft(model, strict=True)
    without = ["z", "z", "y", "y", "z", "z"]
    data = rows([*MICRO_BATCH, *without, *without * 4, *without, *MICRO_BATCH])
    seen: list[dict[str, Tensor]] = []

    class Sees(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(of_adapter(model, "x"))

    # Its own learning rates, which go on, would be others than those of a trainer with two steps.
    changes = {"max_steps": 4, "lr_scheduler_type": "constant", "logging_steps": 2}
    trainer = together(model, tmp_path, data, changes=changes, callbacks=[Sees()])
    trainer.train()
    for step, is_equal in ((1, True), (2, True), (3, False)):
        for key, value in seen[step - 1].items():
            assert torch.equal(value, seen[step][key]) == is_equal, key
    states = trainer.optimizer.state
    assert {int(states[model.get_parameter(key)]["step"]) for key in seen[0]} == {2}
    changes |= {"max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
    other = alone(plain, "x", tmp_path / "alone", data, **changes)
    other.train()
    assert_near(model, of_adapter(other.model, "x"))
    # The mean over the steps that it had since the last entry.
    for entry, wanted in zip(entries(trainer), entries(other), strict=True):
        assert entry["x/loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    first, last = entries(trainer)
    wanted = entries(other)[1]["grad_norm"]
    assert "x/grad_norm" not in first and last["x/grad_norm"] == pytest.approx(wanted, rel=1e-4)


def test_it_resumes_from_files_of_peft_to_the_bit(tmp_path):
    datasets = pytest.importorskip(
        "datasets", reason="runs where datasets is installed: pip install .[test]"
    )
    data = datasets.Dataset.from_list(rows(MICRO_BATCH * ACCUMULATED * 4))
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = three_adapters(), three_adapters()
    for model, resume in ((whole, None), (resumed, str(tmp_path / "checkpoint-2"))):
        slk.accelerate_peft(model, strict=True)
        trainer = together(model, tmp_path, data, changes=changes)
        assert [row["adapter"] for row in trainer.by_adapter(data)["y"]] == ["y"] * 16
        if resume is not None:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.mul_(2 if "lora_" in name else 1)
        trainer.train(resume_from_checkpoint=resume)
    for name in CONFIGS:
        for key, value in of_adapter(whole, name).items():
            assert torch.equal(resumed.get_parameter(key), value), key
        torch.manual_seed(0)
        base = llama(vocab_size=WORDS, pad_token_id=0)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-4" / name, name)
        assert_near(loaded, of_adapter(whole, name), 0.0)


def test_each_adapter_is_evaluated_on_its_own_rows(tmp_path):
    model = three_adapters()
    plain = copy.deepcopy(model)
    slk.accelerate_peft(model, strict=True)
    data = rows(MICRO_BATCH * 4)
    changes = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = together(model, tmp_path, data, changes=changes, eval_dataset=data)
    found = trainer.evaluate()
    for name in CONFIGS:
        other = alone(copy.deepcopy(plain), name, tmp_path, data)
        mine = [row for row in data if row["adapter"] == name]
        assert found[f"eval_{name}_loss"] == pytest.approx(
            other.evaluate(mine)["eval_loss"], rel=1e-6
        )
        predicted, wanted = trainer.predict(trainer.by_adapter(data)[name]), other.predict(mine)
        torch.testing.assert_close(predicted.predictions, wanted.predictions, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"the rows of one adapter at a time, got 'x', 'y', 'z': .*by_adapter"
    ):
        trainer.predict(data)
    trainer.train()
    assert {f"eval_{name}_loss" for name in CONFIGS} <= {
        key for entry in trainer.state.log_history for key in entry
    }


@pytest.mark.parametrize("way", ["optimizer", pytest.param("factory", marks=pytest.mark.nightly)])
def test_another_optimizer_trains_all_adapters(tmp_path, way):
    """Also one that was made while PEFT had frozen two of three."""
    model = three_adapters()
    plain = copy.deepcopy(model)
    slk.accelerate_peft(model, strict=True)
    data = rows(MICRO_BATCH * ACCUMULATED * 2)
    changes = {"max_steps": 2, "learning_rate": 1e-2}
    options: dict[str, Any] = {"adapters": None}
    if way == "optimizer":
        parameters = [p for name, p in model.named_parameters() if "lora_" in name]
        options["optimizers"] = (torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.98)), None)
    else:
        args = training_arguments(tmp_path, 6, **changes)
        options["optimizer_cls_and_kwargs"] = slk.StableLoRAAdamWFactory.from_args(
            args, shrink_ratio=0.0
        )
    trainer = together(model, tmp_path, data, changes=changes, **options)
    trainer.train()
    for name in CONFIGS:
        with mock.patch.dict(
            SETTINGS[name], {"lr": 1e-2, "shrink_ratio": 0.0, "weight_decay": 0.01}
        ):
            other = alone(copy.deepcopy(plain), name, tmp_path, data, **changes)
        other.train()
        assert_near(model, of_adapter(other.model, name))
    # PEFT's set_adapter freezes the others again.
    model.set_adapter("y")
    trainer.train()
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def train_in_processes(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Two micro-batches of three rows a step in all; "x" has rows in the first process alone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    model = three_adapters()
    slk.accelerate_peft(model, strict=True)
    data = rows(["z", "x", "y", "z", "y", "z"] * 2 * 3)
    changes = {"gradient_accumulation_steps": 4 // world, "ddp_backend": "gloo", "max_steps": 3}
    trainer = together(model, place / str(rank), data, 3, changes=changes, eval_dataset=data[:7])
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    trained = {key: value for name in CONFIGS for key, value in of_adapter(model, name).items()}
    return {"trained": trained, "entries": entries(trainer), "metrics": trainer.evaluate()}


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    (one,) = spawn(train_in_processes, 1, tmp_path)
    for found in spawn(train_in_processes, 2, tmp_path):
        for key, value in one["trained"].items():
            assert (found["trained"][key] - value).norm() <= 1e-6 * value.norm(), key
        for entry, wanted in zip(found["entries"], one["entries"], strict=True):
            for key in ("loss", "x/loss", "z/loss", "x/grad_norm", "y/grad_norm"):
                assert entry[key] == pytest.approx(wanted[key], rel=1e-4), key
        assert found["metrics"].keys() == one["metrics"].keys()


# Refusals.


def refused(place: Path, **options: Any) -> None:
    """Try to train a model by a trainer that does not fit."""
    model = three_adapters()
    slk.accelerate_peft(model)
    if options.pop("trains_a_norm", False):
        model.base_model.model.model.norm.weight.requires_grad_(True)
    if options.pop("has_routers", False):
        model.config.output_router_logits = True
    if options.pop("plain", False):
        slk.restore_peft(model)
    flags = [p.requires_grad for p in model.parameters()]
    try:
        together(model, place, rows(MICRO_BATCH * 2), **options).train()
    except (TypeError, ValueError):
        # The model is as it was, unless the error is of a batch.
        assert "data_collator" in options or flags == [p.requires_grad for p in model.parameters()]
        raise


NAMELESS = [{"input_ids": [3, 4], "labels": [3, 4]}] * 6
UNKNOWN = [{"input_ids": [3, 4], "labels": [3, 4], "adapter": "w"}] * 6
BASE = [{"input_ids": [3, 4], "labels": [3, 4], "adapter": "__base__"}] * 6


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"adapters": {"x": {}, "w": {}}}, ValueError, "adapters names 'w', but the model's adapters are 'x', 'y', 'z'"),
        ({"adapters": ["x"]}, TypeError, r"adapters must be a dict .* got \['x'\]"),
        ({"adapters": {"x": {"lrs": 1.0}}}, ValueError, "may have the keys lr, .* got 'lrs'"),
        ({"adapters": {"y": {}}}, ValueError, r"train nothing but the adapters 'y', got '.*lora_A\.x\.weight', which req"),
        ({"trains_a_norm": True}, ValueError, r"the adapters 'x', 'y', 'z', got '.*norm\.weight', which requires"),
        ({"plain": True}, ValueError, "adapters_of_rows cannot run .*q_proj"),
        ({"has_routers": True}, ValueError, "cannot take model.config.output_router_logits=True: an adapter's loss"),
        ({"names_column": "tenant"}, ValueError, "names_column='tenant', got one with 'input_ids', 'labels', 'adapter'$"),
        ({"train_dataset": NAMELESS}, ValueError, "names_column='adapter', got one with 'input_ids', 'labels'$"),
        ({"train_dataset": UNKNOWN}, ValueError, "'adapter' must name adapters that train, 'x', 'y', 'z', got 'w'"),
        ({"train_dataset": BASE}, ValueError, "adapters that train, 'x', 'y', 'z', got '__base__'"),
        ({"eval_dataset": UNKNOWN}, ValueError, "adapters that train, 'x', 'y', 'z', got 'w'"),
        ({"data_collator": lambda rows: {"input_ids": torch.ones(6, 2)}}, ValueError, "must give labels, got 'input_ids'$"),
        ({"compute_loss_func": len}, ValueError, "cannot take compute_loss_func=<built-in function len>: an adapter's"),
        ({"changes": {"label_smoothing_factor": 0.1}}, ValueError, "cannot take args.label_smoothing_factor=0.1: an"),
        ({"changes": {"optim": "adafactor"}}, ValueError, "cannot take args.optim='adafactor': StableLoRAAdamW trains"),
        ({"changes": {"optim": "adamw_torch_8bit"}}, ValueError, "cannot take args.optim='adamw_torch_8bit'"),
        (
            {"changes": {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}},
            ValueError, "cannot take args.load_best_model_at_end=True: each adapter has a best step",
        ),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
            ValueError, r"cannot take adapters=\{'x': \{'lr': 0.01\}, .*: an optimizer of your own",
        ),
    ],
)  # fmt: skip
def test_it_refuses(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        refused(tmp_path, **options)


def test_an_optimizer_must_have_all_adapters(tmp_path):
    """As PEFT leaves it, the active one alone trains: that was silent before."""
    model = three_adapters()
    slk.accelerate_peft(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = together(
        model, tmp_path, rows(MICRO_BATCH * 2), adapters=None, optimizers=(optimizer, None)
    )
    with pytest.raises(
        ValueError, match=r"the adapters 'x', 'y', 'z', got none for '.*lora_A\.y\.weight'"
    ):
        trainer.train()


def test_deepspeed_and_fsdp_are_refused(tmp_path):
    model = three_adapters()
    slk.accelerate_peft(model)
    for flag, name in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):

        def enable(trainer: Any, flag: str = flag) -> None:
            trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
            setattr(trainer, flag, True)

        with (
            mock.patch.object(transformers.Trainer, "create_accelerator_and_postprocess", enable),
            pytest.raises(ValueError, match=f"under DistributedDataParallel, got {name}, which"),
        ):
            together(model, tmp_path, rows(MICRO_BATCH))

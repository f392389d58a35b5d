"""AccelerateCallback: one argument of a Trainer in place of a call of accelerate_peft."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import stablelora_kernels as slk
from stablelora_kernels.utils.tensors import is_sharded, whole
from tests.helpers.op_calls import Calls, counted_ops
from tests.helpers.processes import ROOT, needs_gloo, printed, spawn
from tests.helpers.trainer_runs import (
    STEPS,
    arguments,
    llama,
    make_trainer,
    peft,
    rows,
    tokenizer,
    trained,
    transformers,
)


def linear_classes(model: torch.nn.Module) -> set[type]:
    """The classes of the layers that have adapters."""
    return {type(module) for module in model.modules() if hasattr(module, "lora_A")}


OF_PEFT = {peft.tuners.lora.Linear}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("restore", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_it_trains_as_a_model_that_was_accelerated_before(tmp_path, capsys, restore, calls: Calls):
    expected = llama("accelerated", dropout=0.2)
    make_trainer(expected, tmp_path).train()
    capsys.readouterr()
    calls.clear()
    model = llama("peft", dropout=0.2)
    callback = slk.AccelerateCallback(restore=restore, fuse_mlp=False, strict=True)
    trainer = make_trainer(model, tmp_path, callbacks=[callback])
    trainer.train()
    assert_same_bits(trained(model), trained(expected))
    assert calls.layers["lora_linear"], "the callback must have put the layers on the ops"
    assert (linear_classes(model) == OF_PEFT) == restore
    # A second training begins anew, and prints no second report.
    trainer.train()
    printed_lines = capsys.readouterr().out.splitlines()
    reports = [line for line in printed_lines if line.startswith("accelerate_peft: LoRA on 4")]
    assert len(reports) == 1


def test_it_resumes_to_the_bit(tmp_path):
    """Also into a model that nobody has accelerated before the checkpoint is loaded."""
    schedule = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = llama("peft", dropout=0.2)
    callbacks = [slk.AccelerateCallback()]
    make_trainer(whole, tmp_path, callbacks=callbacks, **schedule).train()
    resumed = llama("peft", adapter_seed=7, dropout=0.2)
    trainer = make_trainer(resumed, tmp_path / "resumed", callbacks=[slk.AccelerateCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_bits(trained(resumed), trained(whole))


def test_a_class_in_place_of_an_instance_takes_the_defaults(tmp_path):
    model = llama("peft")
    make_trainer(model, tmp_path, callbacks=[slk.AccelerateCallback], max_steps=1).train()
    assert linear_classes(model).isdisjoint(OF_PEFT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse_mpl": True}, "AccelerateCallback has no argument 'fuse_mpl'; did you mean 'fuse_mlp'"),
        ({"fuse_mlp": 1}, "fuse_mlp must be a bool, got 1 of type int"),
        ({"restore": "yes"}, "restore must be a bool, got 'yes' of type str"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(TypeError, match=message):
        slk.AccelerateCallback(**options)


class Named(slk.AccelerateCallback):
    """A user's own."""


@pytest.mark.parametrize("kind", [slk.AccelerateCallback, Named])
def test_it_is_pickled_and_copied(kind, tmp_path):
    """As spawn, joblib and Ray Tune do with a Trainer's callbacks."""
    callback = kind(restore=True, fuse_mlp=True)
    for each in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert type(each) is type(callback) and isinstance(each, transformers.TrainerCallback)
        assert each is not callback and vars(each) == vars(callback)
    model = llama("peft")
    callback = pickle.loads(pickle.dumps(kind()))
    make_trainer(model, tmp_path, callbacks=[callback], max_steps=1).train()
    assert linear_classes(model).isdisjoint(OF_PEFT)


@pytest.mark.nightly
def test_a_fresh_process_unpickles_it(tmp_path):
    file = tmp_path / "callback"
    file.write_bytes(pickle.dumps(slk.AccelerateCallback(fuse_mlp=True)))
    code = f"import pickle; print(pickle.loads(open({str(file)!r}, 'rb').read()).options)"
    assert printed(code).splitlines()[-1] == "{'fuse_mlp': True}"


def test_a_model_without_lora_is_an_error_before_the_first_step(tmp_path):
    torch.manual_seed(0)
    model = llama("ours")
    trainer = make_trainer(model, tmp_path, callbacks=[slk.AccelerateCallback()])
    before = trained(model)
    with pytest.raises(ValueError, match="model must have PEFT LoRA layers"):
        trainer.train()
    assert_same_bits(trained(model), before)


# All that the callback reads of TrainingArguments.
ARGS = SimpleNamespace(prediction_loss_only=False)
FUSED = {"fuse_mlp": True, "fuse_projections": True}


def adapted_llama(**options) -> torch.nn.Module:
    """A Llama with adapters on all linear layers, whose branches are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(llama("peft").unload(), config)


def two(rank: int, world: int, place: Path, way: str) -> tuple[list[torch.Tensor], Counter[str]]:
    """A step's gradients under DistributedDataParallel, or with fully_shard, gathered; and how many
    layers, groups and MLPs the ops have computed.
    """
    model = adapted_llama()
    if way == "fully_shard":
        mesh = init_device_mesh("cpu", (world,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    callback = slk.AccelerateCallback(strict=True, **FUSED)
    state = transformers.TrainerState(is_world_process_zero=rank == 0)
    callback.on_train_begin(ARGS, state, None, model=model)
    ids = torch.tensor([row["input_ids"] for row in rows()[2 * rank : 2 * rank + 2]])
    with counted_ops() as calls:
        wrapped(input_ids=ids, labels=ids).loss.backward()
    counted = Counter(
        layers=sum(calls.layers.values()), groups=len(calls.groups), mlps=len(calls.mlps)
    )
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    if way == "fully_shard":  # as docs/guides/training.md saves
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        values = get_model_state_dict(model, options=options)
        if rank == 0:
            model.save_pretrained(place / "adapter", state_dict=values)
    return gradients, counted


@needs_gloo
@pytest.mark.parametrize("way", ["fully_shard", "DistributedDataParallel"])
def test_two_processes(tmp_path, way):
    """The Trainer wraps or shards the model before training begins."""
    (first, calls), (second, _) = spawn(two, 2, tmp_path, way)
    # Each of two blocks: q, k and v, o_proj, and the MLP.
    assert calls == {"layers": 2, "groups": 2, "mlps": 2}
    model = adapted_llama()
    ids = torch.tensor([row["input_ids"] for row in rows()[:4]])
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for one, other, alone in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-7)
    if way == "fully_shard":
        loaded = peft.PeftModel.from_pretrained(llama("peft").unload(), tmp_path / "adapter")
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(loaded.get_parameter(name), p)


def one(rank: int, world: int, place: Path) -> None:
    """DTensors of tensor parallelism stay DTensors in forward, where PEFT's own forward is right."""
    model = adapted_llama()
    mesh = init_device_mesh("cpu", (world,))
    for module in [m for m in model.modules() if hasattr(m, "lora_A")]:
        for pair in (module.lora_A, module.lora_B):
            linear = pair["default"]
            weight = distribute_tensor(linear.weight.detach(), mesh, [Replicate()])
            linear.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"lora_A of adapter 'default' is not a plain nn\.Linear"):
        slk.accelerate_peft(model, strict=True)


@needs_gloo
def test_tensors_that_stay_distributed_are_not_taken_for_shards(tmp_path):
    spawn(one, 1, tmp_path)


def trained_by_trainer(rank: int, world: int, place: Path, way: str) -> list[float]:
    """The losses of a Trainer with the callback and the optimizer, under DistributedDataParallel or
    as accelerate's plugin for FSDP2 prepares the model.

    accelerate chooses that plugin on GPUs alone, so it is put into the accelerator's state by hand.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    model = adapted_llama()
    # Of a branch that starts large, the pairs would latch at once.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    trainer = make_trainer(
        model, place / way, callbacks=[slk.AccelerateCallback(strict=True, **FUSED)],
        logging_steps=1, max_steps=3, gradient_accumulation_steps=1, ddp_backend="gloo",
    )  # fmt: skip
    if way == "the plugin for FSDP2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], reshard_after_forward=True,
        )  # fmt: skip
        state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        vars(trainer.accelerator.state).update(state)
        trainer.is_fsdp_enabled = True
    trainer.train()
    are_shards = {is_sharded(parameter) for parameter in model.parameters()}
    assert are_shards == {way == "the plugin for FSDP2"}
    assert linear_classes(model).isdisjoint(OF_PEFT)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.nightly
@needs_gloo
def test_accelerates_plugin_for_fsdp2_trains_as_ddp_does(tmp_path):
    (tmp_path / "ddp").mkdir()
    (tmp_path / "fsdp").mkdir()
    expected, _ = spawn(trained_by_trainer, 2, tmp_path / "ddp", "DistributedDataParallel")
    found, _ = spawn(trained_by_trainer, 2, tmp_path / "fsdp", "the plugin for FSDP2")
    assert len(found) == 3 and len({*found}) == 3
    assert found == pytest.approx(expected, rel=1e-6)


SCRIPT = """
from transformers import trainer
from trl.scripts.sft import main, make_parser

import stablelora_kernels as slk

trainer.DEFAULT_CALLBACKS.append(slk.AccelerateCallback(tile_mlp=True))
main(*make_parser().parse_args_and_config())
"""


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_trls_preference_trainers_train_as_with_peft(name, tmp_path, calls: Calls):
    """They call ``disable_adapter`` for the reference policy, and GRPOTrainer generates."""
    datasets, trl = (
        pytest.importorskip(module, reason=f"runs where {module} is installed: pip install .[test]")
        for module in ("datasets", "trl")
    )
    from tokenizers import pre_tokenizers

    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    data = {"prompt": ["w3 w4", "w5 w6 w7"] * 8}
    # An Adam's step would make much of a gradient's last bits.
    settings = arguments(tmp_path, optim="sgd", learning_rate=30.0, max_steps=3)
    options: dict[str, Any] = {"processing_class": words}
    if name == "DPO":
        data |= {"chosen": [" w8 w9 w3"] * 16, "rejected": [" w9"] * 16}
    else:
        settings |= {"num_generations": 2, "max_completion_length": 6}
        options["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    changes = []
    for callbacks in ([], [slk.AccelerateCallback(tile_mlp=True)]):
        calls.clear()
        trainer = getattr(trl, f"{name}Trainer")(
            llama("peft"), args=getattr(trl, f"{name}Config")(**settings), callbacks=callbacks,
            train_dataset=datasets.Dataset.from_dict(data), **options,
        )  # fmt: skip
        before = trained(trainer.model)
        trainer.train()
        changes.append({key: p - before[key] for key, p in trained(trainer.model).items()})
        assert any(calls.layers.values()) == bool(callbacks)
    for key, change in changes[0].items():
        assert change.any(), key
        torch.testing.assert_close(changes[1][key], change, rtol=0, atol=1e-3 * change.abs().max())


@pytest.mark.nightly
def test_trls_command_line_in_four_lines(tmp_path):
    """The script of docs/guides/trainers.md, for those who start trl sft."""
    assert SCRIPT.strip() in (ROOT / "docs/guides/trainers.md").read_text()
    torch.manual_seed(0)
    base = llama("peft").unload()
    base.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    words = " ".join(f"w{i}" for i in range(3, 20))
    lines = [json.dumps({"text": words})] * 8
    (tmp_path / "data/train.jsonl").write_text("\n".join(lines))
    (tmp_path / "sft.py").write_text(SCRIPT)
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out",
        "use_peft": "true", "lora_r": 3, "lora_target_modules": "all-linear", "max_steps": 2, "report_to": "none",
        "use_cpu": "true", "bf16": "false", "per_device_train_batch_size": 2,
    }  # fmt: skip
    words_of_command = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sft.py"), *words_of_command],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accelerate_peft: LoRA on 14 modules" in done.stdout
    assert "computed in one op each: 2 x" in done.stdout
    peft.PeftModel.from_pretrained(base, tmp_path / "out")

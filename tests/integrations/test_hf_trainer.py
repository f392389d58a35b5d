"""Hugging Face's Trainer and TRL's: A shrinks, on PEFT's models and on ours, and a run resumed is
the whole one to the bit.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

import stablelora_kernels as slk
from tests.helpers import trainer_runs
from tests.helpers.processes import needs_gloo, printed, spawn
from tests.helpers.small_models import llama as small_llama
from tests.helpers.trainer_runs import (
    KINDS,
    STEPS,
    WORDS,
    arguments,
    llama,
    make_trainer,
    peft,
    trained,
    transformers,
)

SETTINGS = {"lr": 1e-2, "shrink_ratio": 0.05}
# What of the arguments the Trainer's own AdamW takes.
OF_ARGS = {
    "learning_rate": 3e-2, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3,
    "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1,
}  # fmt: skip


def train(model, place, settings, via="a factory", resume=None, **changes):
    trainer = make_trainer(model, place, via, settings, **OF_ARGS | changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_args(place, **kwargs):
    return slk.StableLoRAAdamWFactory.from_args(
        transformers.TrainingArguments(**arguments(place, **OF_ARGS)), **kwargs
    )


def inner(optimizer) -> slk.StableLoRAAdamW:
    """Ours, without what a trainer has put around it."""
    return getattr(optimizer, "optimizer", optimizer)


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    for name, value in trained(expected).items():
        assert torch.allclose(trained(found)[name], value, rtol=rtol, atol=atol), name


@pytest.mark.covering(1)
@pytest.mark.parametrize("via", ["optimizers", "a factory"])
@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_it_trains_as_a_plain_loop(tmp_path, kind, via):
    """The very steps of a loop by hand over the Trainer's own batches, learning rates of its
    schedule included.
    """
    model, by_hand, plain = llama(kind), llama(kind), llama(kind)
    trainer = train(model, tmp_path, SETTINGS, via, lr_scheduler_type="linear")
    optimizer = slk.StableLoRAAdamW.from_model(by_hand, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    transformers.set_seed(3)
    for batch, _ in zip(trainer.get_train_dataloader(), range(STEPS), strict=False):
        by_hand(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_close(model, by_hand, rtol=1e-5, atol=1e-7)
    train(plain, tmp_path, SETTINGS | {"shrink_ratio": 0.0}, via, lr_scheduler_type="linear")
    norms = [
        sum(p.norm() for name, p in trained(each).items() if "lora_A" in name)
        for each in (model, plain)
    ]
    assert norms[0] < 0.9 * norms[1] and len(inner(trainer.optimizer).pairs) == 4


def test_names_that_were_lost_are_an_error(tmp_path):
    """The Trainer gives a class unnamed groups: that is refused, and so is a factory used as a
    class.
    """
    model = llama("peft")
    before = trained(model)
    with pytest.raises(TypeError, match="optimizers="):
        slk.StableLoRAAdamWFactory([{"params": list(model.parameters())}], lr=1e-3)
    with pytest.raises(TypeError, match="without a name"):
        train(model, tmp_path, (slk.StableLoRAAdamW, {"lr": 1e-3}))
    assert all(torch.equal(before[name], after) for name, after in trained(model).items())
    with pytest.raises(ValueError, match="no LoRA pair"):
        slk.StableLoRAAdamWFactory()(torch.nn.Linear(3, 3), lr=1e-3)


def with_norms_and_biases() -> torch.nn.Module:
    """PEFT's, which trains a norm and biases too."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], bias="all", modules_to_save=["input_layernorm"]
    )
    return peft.get_peft_model(small_llama(attention_bias=True), lora)


def test_from_args_is_the_trainers_adamw(tmp_path, recwarn):
    """Without shrinking: weight decay, betas, eps and the parameters without decay are all that of
    the Trainer's own AdamW.
    """
    theirs, ours = with_norms_and_biases(), with_norms_and_biases()
    expected = train(theirs, tmp_path, None)
    found = train(ours, tmp_path, by_args(tmp_path, shrink_ratio=0.0))
    assert not [warning for warning in recwarn if "StableLoRAAdamW" in str(warning.message)]
    groups, wanted = inner(found.optimizer).param_groups, expected.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert (
        [len(group["params"]) for group in groups]
        == [len(group["params"]) for group in wanted]
        == [8, 10]
    )
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert [group[key] for group in groups] == [group[key] for group in wanted], key
    assert_close(ours, theirs)


def test_from_args_lets_keywords_win_and_the_factory_warns_without(tmp_path):
    factory, kwargs = by_args(tmp_path, lr=1.0, shrink_ratio=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (group, rest) = factory()(llama("peft"), **kwargs).param_groups
    assert (group["lr"], group["eps"], group["shrink_ratio"], len(rest["params"])) == (
        1.0,
        1e-3,
        0.1,
        0,
    )
    with pytest.warns(UserWarning, match="the optimizer's defaults: .*from_args"):
        factory()(llama("peft"), lr=1.0)


def test_from_args_refuses_an_unknown_keyword_at_once(tmp_path):
    with pytest.raises(TypeError, match="no argument 'shrinkratio'; did you mean 'shrink_ratio'"):
        by_args(tmp_path, shrinkratio=0.1)
    with pytest.raises(
        TypeError, match=r"no argument 'x', which takes lr, betas, eps, .* moments_dtype$"
    ):
        by_args(tmp_path, x=1)


@pytest.mark.parametrize("kind", ["peft", pytest.param("ours", marks=pytest.mark.nightly)])
def test_a_checkpoint_of_the_trainers_adamw_goes_on(tmp_path, kind):
    """With from_args to what AdamW alone reaches; without it an error says what the file is and
    what to do.
    """
    whole, resumed = llama(kind), llama(kind)
    train(whole, tmp_path, None, save_strategy="steps", save_steps=STEPS // 2)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    message = r"torch.optim.AdamW's with 2 parameter groups, this optimizer has 1.*from_args"
    with pytest.raises(ValueError, match=message):
        given = {"lr": 3e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}
        train(llama(kind), tmp_path / "plain", given, resume=checkpoint)
    trainer = train(
        resumed, tmp_path / "resumed", by_args(tmp_path, shrink_ratio=0.0), resume=checkpoint
    )
    assert {int(entry["step"]) for entry in inner(trainer.optimizer).state.values()} == {STEPS}
    assert_close(resumed, whole)


# Resuming.

CASES = [*itertools.product(("Trainer", "SFTTrainer"), KINDS, ("optimizers", "a factory"))]
DAY = [("SFTTrainer", "accelerated", "a factory")]
MARKED = [case if case in DAY else pytest.param(case, marks=pytest.mark.nightly) for case in CASES]


@pytest.fixture(scope="module")
def runs(
    one_thread: None, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Any, Any, Path]:
    """Trained in one go here, and resumed from the middle in another process, with dropout, warm-up
    and accumulated gradients.
    """
    for module in ("trl", "datasets"):
        pytest.importorskip(module, reason=f"runs where {module} is installed: pip install .[test]")
    place = tmp_path_factory.mktemp("trainers")
    cases = CASES if "nightly" in pytestconfig.option.markexpr else DAY
    whole = {case: trainer_runs.run(place, case) for case in cases}
    command = [
        sys.executable,
        "-m",
        "tests.helpers.trainer_runs",
        str(place),
        *map("/".join, cases),
    ]
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
    assert any(step and step > STEPS // 2 for step in latches) and any(
        step and step <= STEPS // 2 for step in latches
    )
    if (other := (*case[:2], "optimizers")) in whole:
        assert_same_bits(whole[case]["adapters"], whole[other]["adapters"])
    # Of our layers the whole model, since it is the model's own state; of PEFT's the adapter.
    folder = trainer_runs.place_of(place, case) / f"checkpoint-{STEPS}"
    from safetensors.torch import load_file

    if case[1] == "ours":
        keys = load_file(folder / "model.safetensors").keys()
        layer = "model.layers.0.self_attn.q_proj"
        assert {f"{layer}.weight", f"{layer}.lora_A"} <= keys
    else:
        assert not (folder / "model.safetensors").exists()
        assert all(".lora_" in key for key in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("keeps_dtype", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_adapters_in_bfloat16_resume_to_the_bit_or_with_a_warning(tmp_path, keeps_dtype):
    """PEFT's load_adapter makes them float32, by which the Trainer resumes; training.md has the line
    that keeps them.
    """

    def in_bfloat16():
        torch.manual_seed(0)
        model = small_llama(vocab_size=trainer_runs.WORDS).bfloat16()
        config = trainer_runs.peft.LoraConfig(
            r=3, target_modules=["q_proj"], init_lora_weights=False
        )
        torch.manual_seed(0)
        return trainer_runs.peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    whole = train(in_bfloat16(), tmp_path / "whole", SETTINGS, save_strategy="steps", save_steps=3)
    resumed = in_bfloat16()
    if keeps_dtype:
        resumed.load_adapter = functools.partial(resumed.load_adapter, autocast_adapter_dtype=False)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(resumed, tmp_path / "resumed", SETTINGS, resume=checkpoint)
    named = [w for w in told if "was torch.bfloat16 and is torch.float32 now" in str(w.message)]
    assert len(named) == (not keeps_dtype)
    if keeps_dtype:
        of_whole = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
        for name, p in resumed.named_parameters():
            assert not p.requires_grad or p.equal(of_whole[name])


def trained_without_peft(rank: int, world: int, place: Path) -> dict[str, torch.Tensor]:
    """LoRALinear layers by a Trainer with the flags that it sets itself, evaluated between steps;
    checkpointed, and not.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    results = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small_llama(vocab_size=WORDS, pad_token_id=0)
        slk.apply_lora(
            model, "all-linear", r=3, fuse_projections=True, fuse_mlp=True, fuse_loss=True
        )
        # As many rows a step on one process as on two.
        trainer = make_trainer(
            model, place / str(rank), gradient_accumulation_steps=4 // world, ddp_backend="gloo",
            made=with_evaluation, eval_strategy="steps", eval_steps=2, max_steps=4,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        results |= {f"{name} {checkpointing}": p for name, p in trained(model).items()}
    return results


def with_evaluation(**options: Any) -> Any:
    return transformers.Trainer(**options, eval_dataset=options["train_dataset"])


@needs_gloo
def test_without_peft_two_processes_train_as_one(tmp_path):
    (alone,) = spawn(trained_without_peft, 1, tmp_path)
    assert len(alone) == 2 * 2 * 14
    for found in spawn(trained_without_peft, 2, tmp_path):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_without_transformers_each_class_says_what_to_install():
    """In one process: importing torch takes two seconds."""
    names = ("AccelerateCallback", "StabilityCallback", "StableLoRACallback", "RowsTrainer")
    code = f"""
import sys; sys.modules["transformers"] = None
import stablelora_kernels as slk
for name in {names!r}:
    try: getattr(slk, name)(*[None] * (name in ("StabilityCallback", "RowsTrainer")))
    except ImportError as error: print(error)
"""
    said = printed(code).splitlines()
    for name, line in zip(names, said, strict=True):
        assert line.startswith(
            f"{name} needs transformers: pip install 'stablelora-kernels[peft]' ("
        )

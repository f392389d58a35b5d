"""Hugging Face's Trainer and accelerate: A shrinks in each, on PEFT's models and on ours, and nothing becomes plain AdamW."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.small_models import llama

transformers = pytest.importorskip("transformers", reason="the bench extra brings the trainers")
accelerate = pytest.importorskip("accelerate", reason="the bench extra brings the trainers")
peft = pytest.importorskip("peft", reason="the bench extra brings the trainers")

SHRINK, STEPS = 0.05, 6


def adapted(kind: str) -> torch.nn.Module:
    """A tiny Llama with adapters on q_proj and v_proj: PEFT's or ours."""
    torch.manual_seed(0)
    model = llama()
    if kind == "peft":
        return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    slk.apply_lora(model, slk.LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]))
    return model


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(32, (2 * STEPS, 7), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(path, **kwargs):
    common = {
        "output_dir": str(path), "per_device_train_batch_size": 2, "max_steps": STEPS, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**common, **kwargs})


def trained(path, model, settings, via: str, **kwargs):
    """A Trainer that has trained ``model``."""
    if via == "optimizers":
        extra = {"optimizers": (slk.StableLoRAAdamW.from_model(model, **settings), None)}
    else:
        extra = {"optimizer_cls_and_kwargs": (slk.StableLoRAAdamWFactory, settings)}
    trainer = transformers.Trainer(model=model, args=arguments(path, **kwargs), train_dataset=texts(), **extra)
    trainer.train()
    return trainer


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def inner(optimizer) -> slk.StableLoRAAdamW:
    """Ours, without what a trainer has put around it."""
    return getattr(optimizer, "optimizer", optimizer)


# Resuming is in test_hf_trainer_resume.py.


@pytest.mark.parametrize("via", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_trainer_shrinks(tmp_path, kind, via):
    """At a learning rate of zero nothing but shrinking changes A, and B stays zero, so that no pair latches."""
    model = adapted(kind)
    before = adapters(model)
    assert len(before) == 8
    trainer = trained(tmp_path, model, {"lr": 0.0, "shrink_ratio": SHRINK}, via)
    for name, after in adapters(model).items():
        expected = before[name] * (1 - SHRINK) ** STEPS
        assert torch.allclose(after, expected, rtol=1e-5, atol=0), name
    optimizer = inner(trainer.optimizer)
    assert isinstance(optimizer, slk.StableLoRAAdamW) and len(optimizer.pairs) == 4


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_trainer_trains_as_a_plain_loop(tmp_path, kind):
    """The very steps of a loop by hand over the Trainer's own batches, learning rates of its schedule included."""
    settings = {"lr": 1e-2, "shrink_ratio": SHRINK}
    model, by_hand = adapted(kind), adapted(kind)
    trainer = trained(tmp_path, model, settings, "optimizer_cls_and_kwargs", lr_scheduler_type="linear")
    optimizer = slk.StableLoRAAdamW.from_model(by_hand, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    transformers.set_seed(3)
    for batch in trainer.get_train_dataloader():
        by_hand(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    ours, theirs = adapters(by_hand), adapters(model)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7) for name in ours)
    plain = adapted(kind)
    trained(tmp_path, plain, {"lr": 1e-2, "shrink_ratio": 0.0}, "optimizers", lr_scheduler_type="linear")
    norms = [sum(p.norm() for name, p in adapters(m).items() if "lora_A" in name) for m in (model, plain)]
    assert norms[0] < 0.9 * norms[1]


def test_names_that_were_lost_are_an_error(tmp_path):
    """The Trainer gives a class unnamed groups: that is refused, and so is a factory used as a class."""
    model = adapted("peft")
    before = adapters(model)
    with pytest.raises(TypeError, match="optimizers="):
        slk.StableLoRAAdamWFactory([{"params": list(model.parameters())}], lr=1e-3)
    given = (slk.StableLoRAAdamW, {"lr": 1e-3})
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path), train_dataset=texts(), optimizer_cls_and_kwargs=given
    )
    with pytest.raises(TypeError, match="without a name"):
        trainer.train()
    assert all(torch.equal(before[name], after) for name, after in adapters(model).items())


def test_a_model_without_pairs_is_an_error():
    with pytest.raises(ValueError, match="no LoRA pair"):
        slk.StableLoRAAdamWFactory()(torch.nn.Linear(3, 3), lr=1e-3)


OF_ARGS = {
    "learning_rate": 3e-2, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "save_strategy": "no",
}  # fmt: skip


def with_norms_and_biases() -> torch.nn.Module:
    """Ours, which trains a norm and biases too."""
    torch.manual_seed(0)
    model = llama(attention_bias=True)
    norms, pairs = ["input_layernorm"], ["q_proj", "v_proj"]
    slk.apply_lora(model, slk.LoRAConfig(r=3, target_modules=pairs, bias="all", modules_to_save=norms))
    return model


def train(path, model, given=None, resume=None, **kwargs):
    extra = {} if given is None else {"optimizer_cls_and_kwargs": given}
    args = arguments(path, **{**OF_ARGS, **kwargs})
    trainer = transformers.Trainer(model=model, args=args, train_dataset=texts(), **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_from_args_is_the_trainers_adamw(tmp_path, recwarn):
    """Without shrinking: weight decay, betas, eps and the parameters without decay are all that of the Trainer's own AdamW."""
    theirs, ours = with_norms_and_biases(), with_norms_and_biases()
    expected = train(tmp_path, theirs)
    given = slk.StableLoRAAdamWFactory.from_args(arguments(tmp_path, **OF_ARGS), shrink_ratio=0.0)
    found = train(tmp_path, ours, given)
    assert not [warning for warning in recwarn if "StableLoRAAdamW" in str(warning.message)]
    groups, wanted = inner(found.optimizer).param_groups, expected.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in wanted] == [8, 10]
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert [group[key] for group in groups] == [group[key] for group in wanted], key
    for name, value in adapters(theirs).items():
        torch.testing.assert_close(adapters(ours)[name], value, rtol=1e-4, atol=1e-6)


def test_from_args_lets_keywords_win(tmp_path):
    factory, kwargs = slk.StableLoRAAdamWFactory.from_args(arguments(tmp_path, **OF_ARGS), lr=1.0, shrink_ratio=0.1)
    (group, rest) = factory()(adapted("peft"), **kwargs).param_groups
    assert (group["lr"], group["eps"], group["shrink_ratio"], len(rest["params"])) == (1.0, 1e-3, 0.1, 0)


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_a_checkpoint_of_the_trainers_adamw_goes_on(tmp_path, kind):
    """With from_args to what AdamW alone reaches; without it an error says what the file is and what to do."""
    whole, resumed = adapted(kind), adapted(kind)
    train(tmp_path, whole, save_strategy="steps", save_steps=STEPS // 2)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    with pytest.raises(
        ValueError, match=r"torch.optim.AdamW's with 2 parameter groups, this optimizer has 1.*from_args"
    ):
        given = (slk.StableLoRAAdamWFactory, {"lr": 3e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3})
        train(tmp_path / "plain", adapted(kind), given, checkpoint)
    given = slk.StableLoRAAdamWFactory.from_args(arguments(tmp_path, **OF_ARGS), shrink_ratio=0.0)
    trainer = train(tmp_path / "resumed", resumed, given, checkpoint)
    assert {int(entry["step"]) for entry in inner(trainer.optimizer).state.values()} == {STEPS}
    for name, value in adapters(whole).items():
        torch.testing.assert_close(adapters(resumed)[name], value, rtol=1e-4, atol=1e-6)


def test_an_adapter_loaded_frozen_gets_a_hint(tmp_path):
    adapted("peft").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="unless is_trainable=True"):
        slk.StableLoRAAdamW.from_model(model)
    assert (
        len(slk.StableLoRAAdamW.from_model(peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)).pairs)
        == 4
    )


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_accelerate_shrinks(kind):
    accelerator = accelerate.Accelerator(cpu=True)
    model = adapted(kind)
    before = adapters(model)
    model, optimizer = accelerator.prepare(model, slk.StableLoRAAdamW.from_model(model, lr=0.0, shrink_ratio=SHRINK))
    for row in texts()[:3]:
        accelerator.backward(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert len(inner(optimizer).pairs) == 4
    for name, after in adapters(model).items():
        assert torch.allclose(after, before[name] * (1 - SHRINK) ** 3, rtol=1e-5, atol=0), name

"""Hugging Face's Trainer: A shrinks, on PEFT's models and on ours, and nothing becomes plain AdamW."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.small_models import llama as small_llama

transformers = pytest.importorskip("transformers", reason="the bench extra brings the trainers")
accelerate = pytest.importorskip("accelerate", reason="the bench extra brings the trainers")
peft = pytest.importorskip("peft", reason="the bench extra brings the trainers")

from tests.helpers.trainer_runs import STEPS, arguments, llama, make_trainer, trained  # noqa: E402

# Resuming is in test_hf_trainer_resume.py.
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
    return slk.StableLoRAAdamWFactory.from_args(transformers.TrainingArguments(**arguments(place, **OF_ARGS)), **kwargs)


def inner(optimizer) -> slk.StableLoRAAdamW:
    """Ours, without what a trainer has put around it."""
    return getattr(optimizer, "optimizer", optimizer)


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    for name, value in trained(expected).items():
        assert torch.allclose(trained(found)[name], value, rtol=rtol, atol=atol), name


@pytest.mark.parametrize("via", ["optimizers", "a factory"])
@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_it_trains_as_a_plain_loop(tmp_path, kind, via):
    """The very steps of a loop by hand over the Trainer's own batches, learning rates of its schedule included."""
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
    norms = [sum(p.norm() for name, p in trained(each).items() if "lora_A" in name) for each in (model, plain)]
    assert norms[0] < 0.9 * norms[1] and len(inner(trainer.optimizer).pairs) == 4


def test_names_that_were_lost_are_an_error(tmp_path):
    """The Trainer gives a class unnamed groups: that is refused, and so is a factory used as a class."""
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
    """Ours, which trains a norm and biases too."""
    torch.manual_seed(0)
    model, norms = small_llama(attention_bias=True), ["input_layernorm"]
    slk.apply_lora(model, slk.LoRAConfig(r=3, target_modules=["q_proj", "v_proj"], bias="all", modules_to_save=norms))
    return model


def test_from_args_is_the_trainers_adamw(tmp_path, recwarn):
    """Without shrinking: weight decay, betas, eps and the parameters without decay are all that of the Trainer's own AdamW."""
    theirs, ours = with_norms_and_biases(), with_norms_and_biases()
    expected, found = train(theirs, tmp_path, None), train(ours, tmp_path, by_args(tmp_path, shrink_ratio=0.0))
    assert not [warning for warning in recwarn if "StableLoRAAdamW" in str(warning.message)]
    groups, wanted = inner(found.optimizer).param_groups, expected.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in wanted] == [8, 10]
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert [group[key] for group in groups] == [group[key] for group in wanted], key
    assert_close(ours, theirs)


def test_from_args_lets_keywords_win_and_the_factory_warns_without(tmp_path):
    factory, kwargs = by_args(tmp_path, lr=1.0, shrink_ratio=0.1)
    (group, rest) = factory()(llama("peft"), **kwargs).param_groups
    assert (group["lr"], group["eps"], group["shrink_ratio"], len(rest["params"])) == (1.0, 1e-3, 0.1, 0)
    with pytest.warns(UserWarning, match="the optimizer's defaults: .*from_args"):
        factory()(llama("peft"), lr=1.0)


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_a_checkpoint_of_the_trainers_adamw_goes_on(tmp_path, kind):
    """With from_args to what AdamW alone reaches; without it an error says what the file is and what to do."""
    whole, resumed = llama(kind), llama(kind)
    train(whole, tmp_path, None, save_strategy="steps", save_steps=STEPS // 2)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    message = r"torch.optim.AdamW's with 2 parameter groups, this optimizer has 1.*from_args"
    with pytest.raises(ValueError, match=message):
        given = {"lr": 3e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}
        train(llama(kind), tmp_path / "plain", given, resume=checkpoint)
    trainer = train(resumed, tmp_path / "resumed", by_args(tmp_path, shrink_ratio=0.0), resume=checkpoint)
    assert {int(entry["step"]) for entry in inner(trainer.optimizer).state.values()} == {STEPS}
    assert_close(resumed, whole)

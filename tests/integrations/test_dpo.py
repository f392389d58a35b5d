"""DPO without a second model: by hand, and by TRL, which disables PEFT's adapters and asks our layers before it trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.small_models import IDS, llama, lora_config

for module in ("transformers", "peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(module, reason="the test extra brings the trainers")

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402

from tests.helpers.trainer_runs import tokenizer  # noqa: E402

STEPS = 3
TARGETS = ["q_proj", "v_proj"]


def adapted(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = llama(pad_token_id=0)
    if kind == "ours":
        slk.apply_lora(model, lora_config(target_modules=TARGETS))
        return model
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    slk.accelerate_peft(model, strict=True)
    return model


def preferences() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32, (4 * STEPS, 3, 4), generator=generator).tolist()
    rows = [[" ".join(f"w{i}" for i in part) for part in row] for row in ids]
    return datasets.Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])


def words() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of the other trainers, which splits a text at its spaces."""
    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return made


@pytest.mark.parametrize("kind", ["ours", "PEFT, accelerated"])
def test_it_starts_at_the_reference_and_leaves_it(tmp_path, kind):
    model = adapted(kind)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False, precompute_ref_log_probs=kind == "ours",
    )  # fmt: skip
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.1)
    trainer = trl.DPOTrainer(
        model=model, args=config, train_dataset=preferences(), processing_class=words(), optimizers=(optimizer, None)
    )
    trainer.add_callback(slk.StabilityCallback(trainer))
    trainer.train()
    assert trainer.ref_model is None
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = entries[0], entries[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert last["rewards/chosen"] != 0 and last["stability/ratio_mean"] > first["stability/ratio_mean"] > 0
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)


def log_probs(model, ids=IDS):
    out = model(ids)
    logits = getattr(out, "logits", out)
    return log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def models_for_dpo(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ours":
        model = llama()
        slk.apply_lora(model, lora_config(target_modules="all-linear", lora_dropout=0.0))
        return model
    model = make_peft(model=llama(), init_lora_weights=True)
    slk.accelerate_peft(model, strict=True)
    return model


@pytest.mark.parametrize("kind", ["ours", "PEFT, accelerated"])
def test_dpo_starts_at_a_log_ratio_of_zero(kind):
    """B is zero, so policy and reference agree to the bit. Gradients come from the policy alone."""
    model = models_for_dpo(kind).train()
    rejected = IDS.flip(1)

    def ratios():
        policy = log_probs(model), log_probs(model, rejected)
        with torch.no_grad(), slk.disable_lora(model):
            reference = log_probs(model), log_probs(model, rejected)
        return [p - r for p, r in zip(policy, reference, strict=True)]

    def loss_of(chosen, other):
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - other)).mean()

    first = ratios()
    assert all(bool((ratio == 0).all()) for ratio in first)
    loss = loss_of(*first)
    assert loss.item() == pytest.approx(0.6931471805599453)
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-2)
    loss.backward()
    assert all(bool(pair.B.grad.any()) for pair in optimizer.pairs)
    optimizer.step()
    after = loss_of(*ratios())
    assert after < loss
    # A reference with gradients adds none to A and B either.
    optimizer.zero_grad()
    with slk.disable_lora(model):
        assert not log_probs(model).requires_grad

"""DPO without a second model, by TRL, which disables PEFT's adapters and asks our layers before it trains."""

from __future__ import annotations

import math

import pytest
import torch

import stablelora_kernels as slk

for module in ("transformers", "peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(module, reason="the test extra brings the trainers")

import datasets  # noqa: E402
import trl  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402

from tests.helpers.trainer_runs import WORDS, arguments, llama, tokenizer  # noqa: E402

STEPS = 3


def preferences() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (4 * STEPS, 3, 4), generator=generator).tolist()
    rows = [[" ".join(f"w{i}" for i in part) for part in row] for row in ids]
    return datasets.Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_it_starts_at_the_reference_and_leaves_it(tmp_path, kind):
    """B is zero, so policy and reference agree to the bit."""
    model, words = llama(kind), tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "logging_steps": 1}
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**arguments(tmp_path, **settings), precompute_ref_log_probs=kind == "ours"),
        train_dataset=preferences(),
        processing_class=words,
        optimizers=(slk.StableLoRAAdamW.from_model(model, lr=0.1), None),
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

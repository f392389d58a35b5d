"""What a mixture's experts keep for backward, by formula and by hooks."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import stablelora_kernels as slk
from benchmarks.common.arms import ACCELERATED, FROZEN, PEFT
from benchmarks.common.memory import saved_for_backward
from benchmarks.lab import mixtures
from benchmarks.lab.memory import FUSED
from benchmarks.lab.mixtures import MIXTURES

TOKENS = 256


@pytest.mark.parametrize("arm", [FROZEN, PEFT, ACCELERATED, FUSED])
def test_experts_keep_what_the_formula_says(arm):
    """Up to indices and routing weights, and for PEFT its copies of A and B. Each is counted with
    ``grouped_mm``, transformers' default.
    """
    small = MIXTURES["Qwen3 30B-A3B"]._replace(
        config=Qwen3MoeConfig(
            vocab_size=100,
            hidden_size=512,
            moe_intermediate_size=256,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=1,
            num_attention_heads=4,
        ),
        inner=256,
        chosen=2,
        experts=4,
    )
    model: Any = Qwen3MoeForCausalLM(small.config).bfloat16().requires_grad_(False)
    if arm != FROZEN:
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=mixtures.RANK, target_modules=[], target_parameters=names)
        model = peft.get_peft_model(model, config)
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapters == small.stack_adapters
    if arm in (ACCELERATED, FUSED):
        slk.accelerate_peft(model, fuse_mlp=arm == FUSED)
    experts = next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    x = torch.randn(TOKENS, small.hidden).bfloat16().requires_grad_()
    index = torch.stack([torch.randperm(small.experts)[: small.chosen] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, small.chosen).bfloat16().requires_grad_()
    owned = [*model.parameters(), *model.buffers()]
    if arm != FUSED:
        # Only ours with fuse_mlp keeps x itself, which in a model is the output of a norm.
        owned.append(x)
    kept = saved_for_backward(lambda: experts(x, index, weights), owned)
    formula = mixtures.kept_by_experts(small, arm)
    expected = formula.at_once + TOKENS * formula.a_token
    assert expected <= kept <= 1.03 * expected + (4 * small.stack_adapters if arm == PEFT else 0)

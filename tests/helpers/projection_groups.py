"""Models with fused projections, ours and PEFT's, and a count of their groups' calls."""

from __future__ import annotations

import peft
import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.small_models import fill_b, llama

# Above 64 tokens, below which projections are computed one by one.
IDS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_llama():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    model = llama(**sizes, attn_implementation="eager")
    torch.manual_seed(1)
    return model


def ours(fused, dropout=0.0):
    model = make_llama()
    config = slk.LoRAConfig(r=4, target_modules=TARGETS, lora_dropout=dropout)
    report = slk.apply_lora(model, config, fuse_projections=fused)
    torch.manual_seed(2)
    fill_b(model)
    return model.train(), report


def theirs(fused, dropout=0.0):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(make_llama(), config)
    return model.train(), slk.accelerate_peft(model, fuse_projections=fused)


def step(model, seed=5, ids=IDS):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, grad in found[1].items():
        other = expected[1][name]
        assert (grad - other).abs().max() <= 1e-4 * other.abs().max(), name


def count_groups(monkeypatch):
    """The list that each call of the groups' op appends its number of projections to."""
    from stablelora_kernels.integrations import peft_layers
    from stablelora_kernels.nn import mlp_operands

    counts: list[int] = []
    original = mlp_operands.lora_linear_group

    def counting(x, weights, *rest):
        counts.append(len(weights))
        return original(x, weights, *rest)

    monkeypatch.setattr(mlp_operands, "lora_linear_group", counting)
    monkeypatch.setattr(peft_layers, "lora_linear_group", counting)
    return counts

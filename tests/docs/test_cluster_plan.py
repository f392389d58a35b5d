"""``examples.cluster_plan``: its memory is what a layer keeps."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from examples import cluster_plan
from tests.helpers.small_models import llama

R, TOKENS = 4, 24


def test_memory_is_the_models() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama(**sizes, head_dim=16, attn_implementation="sdpa").to(torch.bfloat16)
    slk.apply_lora(model, slk.LoRAConfig(r=R, target_modules="all-linear"))
    plan = cluster_plan.count(model.config.to_dict(), R, "all-linear")
    trainable, total = slk.count_parameters(model)
    assert (plan.frozen, plan.adapters) == (total - trainable, trainable)
    hidden = torch.zeros(1, TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])

    def layers() -> torch.Tensor:
        out = hidden
        for layer in model.model.layers:
            out = layer(out, position_embeddings=positions)
        return out

    kept = saved_for_backward(layers, [*model.parameters(), *model.buffers(), *positions])
    # The casts of A and B, which the PyTorch path keeps.
    counted = cluster_plan.activations(plan, TOKENS, checkpointing=False) + cluster_plan.BF16 * plan.adapters
    assert kept == pytest.approx(counted, rel=0.02)

"""The plan of a run over several machines: its memory is what a model's layers keep."""

from __future__ import annotations

import pytest
import torch

for module in ("transformers", "pandas"):
    pytest.importorskip(module, reason=f"runs where {module} is installed: pip install .[test]")

import stablelora_kernels as slk  # noqa: E402
from benchmarks.common.memory import saved_for_backward  # noqa: E402
from benchmarks.lab import cluster_plan  # noqa: E402
from tests.helpers.small_models import llama  # noqa: E402


def test_the_cluster_plans_memory_is_what_layers_keep() -> None:
    r, tokens = 4, 24
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = llama(**sizes, head_dim=16, attn_implementation="sdpa").to(torch.bfloat16)
    report = slk.apply_lora(model, "all-linear", r=r)
    plan = cluster_plan.count(model.config.to_dict(), r, "all-linear")
    assert plan.frozen == report.total - report.trainable
    assert plan.adapters == report.trainable
    hidden = torch.zeros(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(tokens)[None])

    def layers() -> torch.Tensor:
        out = hidden
        for layer in model.model.layers:
            out = layer(out, position_embeddings=positions)
        return out

    kept = saved_for_backward(layers, [*model.parameters(), *model.buffers(), *positions])
    counted = cluster_plan.activations(plan, tokens, checkpointing=False)
    assert kept == pytest.approx(counted, rel=0.02)

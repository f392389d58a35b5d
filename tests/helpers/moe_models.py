"""Tiny mixtures of experts of transformers, in float64 with random weights, and LoRA on their
experts by PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
transformers = pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[test]"
)

H, I, E, TOP, VOCABULARY = 32, 48, 4, 2, 64
_COMMON = {
    "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": TOP,
}  # fmt: skip
_EXPERTS, _LOCAL, _ROUTED = {"num_experts": E}, {"num_local_experts": E}, {"n_routed_experts": E}
_SHARED = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": I,
}
_FULL = {"layer_types": ["full_attention"]}
_DEEPSEEK = {
    **_ROUTED, **_SHARED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
# By model type: what its config needs beyond the common part.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": I, "decoder_sparse_step": 1},
    "gpt_oss": {**_LOCAL, **_FULL},
    "llama4_text": {
        **_LOCAL,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": I,
    },
    "nemotron_h": {
        **_ROUTED,
        **_SHARED,
        "moe_shared_expert_intermediate_size": I,
        "num_hidden_layers": 2,
        "layers_block_type": ["attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "mixtral": _LOCAL,
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": I,
        "shared_expert_intermediate_size": I,
        "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        **_EXPERTS,
        **_FULL,
        "moe_intermediate_size": I,
        "shared_expert_intermediate_size": I,
        "decoder_sparse_step": 1,
    },
    "olmoe": _EXPERTS,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {**_ROUTED, **_SHARED},
    "granitemoe": _LOCAL,
    "phimoe": _LOCAL,
    "ernie4_5_moe": {
        "moe_num_experts": E,
        "moe_k": TOP,
        "moe_intermediate_size": I,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "minimax_m2": _LOCAL,
    "dots1": {**_ROUTED, **_SHARED, **_FULL},
    "lfm2_moe": {**_EXPERTS, **_FULL, "moe_intermediate_size": I, "num_dense_layers": 0},
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": TOP},
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_LOCAL, "kv_channels": 8},
}

# The sizes of experts, in configs.
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
)

BY_DAY = ("qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h")


def build(
    family: str, implementation: str = "eager", dtype: torch.dtype = torch.float64, width: int = 0
) -> Any:
    """A model with one layer of experts. ``implementation``: how transformers computes them.
    ``width``: both sizes of the experts, if given.
    """
    sizes = _COMMON | FAMILIES[family]
    if width:
        sizes |= {key: width for key in sizes if key in _WIDTHS}
        if "v_head_dim" not in sizes:
            sizes["head_dim"] = width // 4
    config = transformers.CONFIG_MAPPING[family](**sizes)
    chosen = (
        {} if family in ("llama4_text", "jetmoe") else {"experts_implementation": implementation}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", **chosen
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.15)
    return model


def stacks(model: nn.Module) -> list[str]:
    """The names by which PEFT's ``target_parameters`` find a model's stacks of experts."""
    names = [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name]
    return sorted({name.partition("layers.")[2].partition(".")[2] for name in names})


def with_lora(model: Any, **options: Any) -> Any:
    """LoRA of rank 3 on a model's experts, no branch of which is zero."""
    given = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [],
        "target_parameters": stacks(model),
        "init_lora_weights": False,
    }
    torch.manual_seed(1)
    # In evaluation, since some routers draw noise in training.
    return peft.get_peft_model(model, peft.LoraConfig(**given | options)).eval()


IDS = torch.arange(3, 17).view(2, 7)


def results(model: Any) -> dict[str, torch.Tensor]:
    """The logits for IDS, and the gradient of all that trains."""
    model.zero_grad()
    y = model(input_ids=IDS).logits
    if not y.requires_grad:
        return {"Y": y}
    (y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {"Y": y.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def routing(tokens: int = 9, width: int = H) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of experts without a model: x, the experts of each token and their weights, in float64."""
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)])
    x, weights = (
        torch.rand(size, generator=generator, dtype=torch.float64)
        for size in ((tokens, width), (tokens, 2))
    )
    return x.requires_grad_(), index, weights.requires_grad_()


def assert_copies_and_compiles(module: nn.Module, given: Sequence[Tensor]) -> None:
    """A copy computes what ``module`` does and shares nothing with it, also compiled in one graph.

    Some of ``given`` require a gradient. The module's parameters are zeros afterwards.
    """
    leaves = [t for t in given if t.requires_grad]
    expected = module(*given)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    torch._dynamo.reset()
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    for call in (copied, compiled):
        y = call(*given)
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        torch.testing.assert_close(gradients, expected_gradients)

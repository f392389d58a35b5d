"""A small Llama with random weights, for training steps and adapter files."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Sizes(NamedTuple):
    layers: int
    width: int
    vocabulary: int = 2048

    def __str__(self) -> str:
        return f"{self.layers} layers width {self.width}"


def llama(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The frozen model, the same every time."""
    heads = max(2, sizes.width // 64)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to(device, dtype).requires_grad_(False)

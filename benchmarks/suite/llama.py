"""A small Llama with random weights, and its adapters, for training steps and adapter files."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import stablelora_kernels as slk

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def peft_model(base: nn.Module, r: int) -> nn.Module:
    """Adapters are float32 for any dtype of the model: PEFT's default and ours."""
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS))


def our_model(base: nn.Module, r: int, fuse_projections: bool = False) -> nn.Module:
    config = slk.LoRAConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    slk.apply_lora(base, config, fuse_projections=fuse_projections)
    return base


def fill(model: nn.Module) -> None:
    """Fill all arms' adapters with equal numbers; a zero B would make gradients zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pair in slk.lora_pairs(model):
            for half in (pair.A, pair.B):
                half.copy_(torch.randn(half.shape, generator=generator) * 0.02)

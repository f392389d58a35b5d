"""A Llama's MLP and small models, adapted by PEFT and by this library, and the bytes that they keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from benchmarks.lab.mlp_memory.formula import ACCELERATED, FROZEN, FUSED, PEFT, PROJECTIONS, SEPARATE, Sizes

# The arms that this machine can build.
COUNTED = (FROZEN, PEFT, SEPARATE, PROJECTIONS, FUSED, ACCELERATED)
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def adapt(model: nn.Module, arm: str, targets: tuple[str, ...], r: int, dropout: float) -> nn.Module:
    """``model`` with float32 adapters by one of ``COUNTED``; it changes ``model``.

    Raises:
        RuntimeError: an MLP that the arm should fuse was not fused.
    """
    if arm == FROZEN:
        return model
    options: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": [*targets]}
    if arm in (PEFT, ACCELERATED):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**options))
        if arm == PEFT:
            return model
        report: Any = slk.accelerate_peft(model, strict=True, fuse_mlp=True)
    else:
        config = slk.LoRAConfig(**options)
        report = slk.apply_lora(model, config, fuse_projections=arm == PROJECTIONS, fuse_mlp=arm == FUSED)
    if arm in (FUSED, ACCELERATED) and (not report.mlps or any(mlp.reason for mlp in report.mlps)):
        raise RuntimeError(f"every MLP must be fused, got {report.mlps}")
    return model


def llama_mlp(arm: str, sizes: Sizes, dtype: torch.dtype, dropout: float, device: str) -> nn.Module:
    """A Llama's MLP in training mode."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    holder = nn.Module()
    with torch.device(device):
        config = LlamaConfig(hidden_size=sizes.width, intermediate_size=sizes.inner, num_attention_heads=1)
        holder.mlp = LlamaMLP(config).to(dtype).requires_grad_(False)
    adapt(holder, arm, MLP_TARGETS, sizes.rank, dropout)
    return holder.train().mlp


def counted(mlp: nn.Module, tokens: int) -> int:
    """Bytes that an MLP keeps for backward, on a sequence of ``tokens`` whose gradient is needed."""
    weight = mlp.gate_proj.weight
    x = torch.randn(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    # x counts: in a model it is a norm's output, which nothing but the MLP keeps.
    return saved_for_backward(lambda: mlp(x), [*mlp.parameters()])


@contextmanager
def dropout_of_a_gpu() -> Iterator[None]:
    """PyTorch's dropout keeps what it keeps on a GPU, which has one operator for it: a mask of bool."""

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0]

    with mock.patch.object(nn.functional, "dropout", dropout):
        yield

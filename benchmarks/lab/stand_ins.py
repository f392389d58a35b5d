"""Stand-ins for GPU kernels of others, which compute nothing and allocate what the kernels' sources
allocate, so that ``benchmarks.lab.step_memory`` can count them on tensors without memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Liger-Kernel 0.8.5, src/liger_kernel/ops.


class _RMSNorm(torch.autograd.Function):
    """rms_norm.py: keeps x and a float32 number for each row; dX takes the memory of dY."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight)


class _SiLUMul(torch.autograd.Function):
    """swiglu.py: keeps G and U, whose memory dG and dU take."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


def liger_mlp(self: Any, x: Tensor) -> Tensor:
    """The forward of a gated MLP."""
    return self.down_proj(_SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


class _Rope(torch.autograd.Function):
    """rope.py: turns q and k in their own memory, and their gradients too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (dq, dk))


def liger_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: object) -> tuple[Tensor, ...]:
    """In place of ``apply_rotary_pos_emb``."""
    return _Rope.apply(q, k)


class _Loss(torch.autograd.Function):
    """fused_linear_cross_entropy.py: the gradient of the hidden states, and the logits of a chunk
    of tokens.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        gradient = torch.zeros_like(hidden)
        chunk = -(-tokens // -(-vocabulary // width))
        # The next power of two.
        rows = min(tokens, 1 << (chunk - 1).bit_length())
        logits = hidden.new_empty(rows, vocabulary)
        rest = torch.mm(logits, weight)
        del logits, rest
        ctx.save_for_backward(gradient)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Scaled in its own memory.
        return ctx.saved_tensors[0], None


def liger_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger-Kernel's cross-entropy without logits."""
    return _Loss.apply(hidden.flatten(0, 1), weight)

"""The gated MLP's mathematics, with a LoRA layer (``reference/lora.py``) for each projection. ::

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY
              dG = dH ∘ U ∘ act'(G)     dU = dH ∘ act(G)
              dX = dX of gate, for dG, + dX of up, for dU

act is SiLU, g σ(g); GELU, g Φ(g); or its approximation, g σ(2 √(2/π) (g + 0.044715 g³)), usually written with tanh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.reference.lora import lora_linear_ref


def activation_ref(g: Tensor, activation: str) -> Tensor:
    """act(g) for "silu", "gelu" or "gelu_tanh"."""
    if activation == "gelu":
        return g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    z = g if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return g * torch.sigmoid(z)


def lora_mlp_ref(
    x: Tensor,
    projections: Sequence[Sequence[Any]],
    scalings: Sequence[float],
    activation: str,
    keeps: Sequence[Tensor | None] = (None, None, None),
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [..., N] of x [..., K]. ``projections``: weight, bias, lora_A and lora_B of gate, up and down; keeps: D's masks.

    Autograd differentiates it.
    """
    gate, up, down = ([*p, s, keep, dropout_p] for p, s, keep in zip(projections, scalings, keeps, strict=True))
    return lora_linear_ref(activation_ref(lora_linear_ref(x, *gate), activation) * lora_linear_ref(x, *up), *down)

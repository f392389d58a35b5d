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

from stablelora_kernels.reference.lora import lora_linear_grads_ref, lora_linear_ref


def activation_ref(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(g) and act'(g) for "silu", "gelu" or "gelu_tanh"."""
    if activation == "gelu":
        phi = torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
        return g * below, below + g * phi
    c = 2 * math.sqrt(2 / math.pi)
    z, dz = (g, 1.0) if activation == "silu" else (c * (g + 0.044715 * g**3), c * (1 + 3 * 0.044715 * g**2))
    sigmoid = torch.sigmoid(z)
    return g * sigmoid, sigmoid + g * sigmoid * (1 - sigmoid) * dz


def lora_mlp_ref(
    x: Tensor,
    projections: Sequence[Sequence[Any]],
    scalings: Sequence[float],
    activation: str,
    keeps: Sequence[Tensor | None] = (None, None, None),
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [..., N] of x [..., K]. ``projections``: weight, bias, lora_A and lora_B of gate, up and down; keeps: D's masks."""
    gate, up, down = _layers(projections, scalings, keeps, dropout_p)
    return lora_linear_ref(activation_ref(lora_linear_ref(x, *gate), activation)[0] * lora_linear_ref(x, *up), *down)


def lora_mlp_grads_ref(
    grad: Tensor,
    x: Tensor,
    projections: Sequence[Sequence[Any]],
    scalings: Sequence[float],
    activation: str,
    keeps: Sequence[Tensor | None] = (None, None, None),
    dropout_p: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients for an incoming grad [..., N]: dX, dG and dU, and dA and dB of each projection, such as ``"gate.dA"``."""
    gate, up, down = _layers(projections, scalings, keeps, dropout_p)
    act, slope = activation_ref(lora_linear_ref(x, *gate), activation)
    u = lora_linear_ref(x, *up)
    of_down = _grads(grad, act * u, down)
    dg, du = of_down["dX"] * u * slope, of_down["dX"] * act
    of_gate, of_up = _grads(dg, x, gate), _grads(du, x, up)
    grads = {"dX": of_gate["dX"] + of_up["dX"], "dG": dg, "dU": du}
    for name, found in (("gate", of_gate), ("up", of_up), ("down", of_down)):
        grads |= {f"{name}.dA": found["dA"], f"{name}.dB": found["dB"]}
    return grads


def _layers(
    projections: Sequence[Sequence[Any]], scalings: Sequence[float], keeps: Sequence[Tensor | None], dropout_p: float
) -> list[tuple[Any, ...]]:
    """The arguments of ``lora_linear_ref`` behind x, for each projection."""
    return [(*p, s, keep, dropout_p) for p, s, keep in zip(projections, scalings, keeps, strict=True)]


def _grads(grad: Tensor, x: Tensor, layer: tuple[Any, ...]) -> dict[str, Tensor]:
    weight, _, *rest = layer
    return lora_linear_grads_ref(grad, x, weight, *rest)

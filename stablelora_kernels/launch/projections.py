"""From projections to their launches: one projection, a projection group, a lone branch, or a gated MLP.

x, ys, grads and base are matrices; a projection's scaling is s' = scaling / (1 - p), and its weight a tensor, Stored or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch import lora_branch, lora_linear, lora_linear_group, lora_linear_quantized, lora_mlp
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored


def forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], seeds: Sequence[Tensor | None], s: Tensor | None,
    ys: Sequence[Tensor], dropout_p: float, base: Tensor | None = None, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a forward. ``s`` holds every S side by side, or is None if it is not requested."""
    weights, biases, lora_As, lora_Bs, scalings = (list[Any](each) for each in zip(*projections, strict=True))
    if len(projections) > 1:
        s = scratch(x, x.shape[0], sum(a.shape[0] for a in lora_As)) if s is None else s
        given: Any = (weights, biases, lora_As, lora_Bs, s, ys, seeds, scalings, dropout_p)
        return lora_linear_group.forward_launches(device, x, *given)
    rest = (lora_As[0], lora_Bs[0], s, ys[0], seeds[0], scalings[0], dropout_p)
    if base is not None:
        return lora_branch.forward_launches(device, base, x, *rest)
    module = lora_linear_quantized if isinstance(weights[0], Stored) else lora_linear
    return module.forward_launches(device, x, weights[0], biases[0], *rest, choice)  # type: ignore[attr-defined,no-any-return]


def backward_launches(
    device: Device, x: Tensor | None, grads: Sequence[Tensor], projections: Sequence[Projection], s: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None], dropout_p: float, results: tuple[Tensor | None, Sequence[Any], Sequence[Any]],
    choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a backward for ``results``, dX, the dA's and the dB's, each None if it is not requested.

    ``s``: each projection's S. A weight is None where nothing reads it: if dX is not requested, or for a lone branch.
    """
    weights, _, lora_As, lora_Bs, scalings = (list[Any](each) for each in zip(*projections, strict=True))
    dx, das, dbs = results
    if len(projections) > 1:
        given: Any = (x, grads, weights, lora_As, lora_Bs, s, seeds, scalings, dropout_p, dx, das, dbs)
        return lora_linear_group.backward_launches(device, *given)
    weight, rest = weights[0], (lora_As[0], lora_Bs[0], s[0], seeds[0], dx, das[0], dbs[0])
    if isinstance(weight, Stored):
        given = (x, grads[0], weight, *rest, scalings[0], dropout_p, choice)
        return lora_linear_quantized.backward_launches(device, *given)
    if weight is None and dx is not None:
        return lora_branch.backward_launches(device, x, grads[0], *rest, scalings[0], dropout_p)
    numbers: Any = {"scaling": scalings[0], "dropout_p": dropout_p, "choice": choice}
    return lora_linear.backward_launches(device, x, grads[0], weight, *rest, **numbers)


def mlp_forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], seeds: Sequence[Tensor | None], dropout_p: float,
    activation: str, results: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """The launches of a gated MLP's forward for ``results``: Y, and G, U, gate's and up's S side by side and down's S, which are
    None if they are not requested. A missing branch comes as A [0, K] and B [N, 0].
    """
    weights, biases, lora_As, lora_Bs, scalings = (list[Any](each) for each in zip(*projections, strict=True))
    given: Any = (weights, biases, lora_As, lora_Bs, seeds, scalings, dropout_p, activation, *results)
    return lora_mlp.forward_launches(device, x, *given)


def mlp_backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, kept: Sequence[Any], projections: Sequence[Projection],
    seeds: Sequence[Tensor | None], dropout_p: float, activation: str,
    results: tuple[Tensor | None, Sequence[Any], Sequence[Any]],
) -> list[Any]:  # fmt: skip
    """The launches of a gated MLP's backward; ``kept`` are the forward's G, U, S and down's S, of which an S may be None."""
    weights, _, lora_As, lora_Bs, scalings = (list[Any](each) for each in zip(*projections, strict=True))
    g, u, *s = kept
    given: Any = (weights, lora_As, lora_Bs, *s, seeds, scalings, dropout_p, activation, *results)
    return lora_mlp.backward_launches(device, x, grad, g, u, *given)

"""The launches of a gated MLP without the call, as ``stablelora_kernels.ops.meta_calls`` has them
for a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardCall,
    MLPBackwardSettings,
    MLPForwardCall,
    MLPForwardSettings,
    each_mask,
)
from stablelora_kernels.ops.lora_mlp.triton import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.ops.meta_calls import DTypes, Ways, projection_of, seed_of
from stablelora_kernels.projection import layouts_of, operands_of, scales_of


class MLPCalls(NamedTuple):
    """The calls of a forward and of its backward, on tensors without values."""

    forward: MLPForwardCall
    backward: MLPBackwardCall


def mlp_calls(
    m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float, activation: str = "silu",
    where: str = "meta",
) -> MLPCalls:  # fmt: skip
    """The calls on [m, k] rows, without biases. ``sizes``: output, inner and input features.

    ``r``: the rank, or those of gate, up and down, 0 for one without a branch.
    """
    n, f, k = sizes
    ranks = (r,) * 3 if isinstance(r, int) else tuple(r)
    projections = []
    for size, rank in zip(((f, k), (f, k), (n, f)), ranks, strict=True):
        p = projection_of(*size, rank, dtypes, where)._replace(bias=None)
        projections.append(p if rank else p._replace(lora_A=None, lora_B=None))
    layouts = layouts_of(projections)
    scalings = tuple([p.scaling for p in projections])
    operands = operands_of(projections)
    scales = scales_of(projections, layouts)
    x = torch.zeros(m, k, dtype=dtypes[0], device=where)
    seeds = [seed_of(where, dropout_p if rank else 0.0) for rank in ranks]
    stores_gate, stores_up, stores_down = [seed is not None for seed in seeds]
    stores_mask = (stores_gate, stores_up, stores_down)
    settings = MLPForwardSettings(
        layouts,
        scalings,
        dropout_p,
        activation,
        output=True,
        save=True,
        stores_mask=stores_mask,
        shared_mask=False,
    )
    forward = MLPForwardCall(x, operands, scales, seeds, settings)
    results = lora_mlp_fwd.allocate(forward)
    every = (True, True, True)
    backward = MLPBackwardCall(
        grad=torch.zeros_like(results.y),
        x=x,
        g=results.g,
        u=results.u,
        s=results.s,
        s_down=results.s_down,
        operands=operands,
        scales=scales,
        masks=each_mask(results.masks, stores_mask),
        settings=MLPBackwardSettings(
            layouts,
            scalings,
            dropout_p,
            activation,
            need_x=True,
            need_a=every,
            need_b=every,
            shared_mask=False,
        ),
    )
    return MLPCalls(forward, backward)


def mlp_launches(
    device: Device, m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float,
    activation: str = "silu",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches of :func:`mlp_calls`."""
    calls = mlp_calls(m, sizes, r, dtypes, dropout_p, activation)
    forward = lora_mlp_fwd.plan(device, calls.forward)[1]
    return forward, lora_mlp_bwd.plan(device, calls.backward)[1]

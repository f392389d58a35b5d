"""The launches of a gated MLP without the call, as ``stablelora_kernels.explanation`` has them for
a single layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.explanation import DTypes, Ways, numbers_of, projection_of, seed_of
from stablelora_kernels.ops.lora_mlp import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.projection import flat, layouts_of, scales_of


def mlp_launches(
    device: Device, m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float,
    activation: str = "silu",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches on [m, k] rows, without biases. ``sizes``: output,
    inner and input features.

    ``r``: the rank, or those of gate, up and down, 0 for one without a branch.
    """
    n, f, k = sizes
    ranks = (r,) * 3 if isinstance(r, int) else tuple(r)
    projections = []
    for size, rank in zip(((f, k), (f, k), (n, f)), ranks, strict=True):
        p = projection_of(*size, rank, dtypes, "meta")._replace(bias=None)
        projections.append(p if rank else p._replace(lora_A=None, lora_B=None))
    x = torch.zeros(m, k, dtype=dtypes[0], device="meta")
    seeds = [seed_of("meta", dropout_p if rank else 0.0) for rank in ranks]
    operands, scales = flat(projections), scales_of(projections, layouts_of(projections))
    numbers = (*numbers_of(projections, dropout_p), activation)
    stored = [seed is not None for seed in seeds]
    results, forward = lora_mlp_fwd.plan(
        device, (x, operands, scales, seeds, *numbers, True, stored)
    )
    y, *kept, stored_masks = results
    left = iter(stored_masks)
    masks = [next(left) if is_stored else None for is_stored in stored]
    every = (True,) * 3
    arguments = (
        torch.zeros_like(y),
        x,
        *kept,
        operands,
        scales,
        masks,
        *numbers,
        True,
        every,
        every,
    )
    backward = lora_mlp_bwd.plan(device, arguments)[1]
    return forward, backward

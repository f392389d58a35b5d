"""The launches of a gated MLP without the call, as ``stablelora_kernels.explanation`` has them for a single layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.explanation import DTypes, Ways, lists_of, projection_of, seed_of
from stablelora_kernels.ops.lora_mlp import lora_mlp_bwd, lora_mlp_fwd


def mlp_launches(
    device: Device, m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float,
    activation: str = "silu",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches on [m, k] rows, without biases. ``sizes``: output, inner and input features.

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
    lists, numbers = lists_of(projections)
    stored = [seed is not None for seed in seeds]
    given: tuple[Any, ...] = (x, *lists, seeds, *numbers, dropout_p, activation, True, stored)
    (y, *kept, found), forward = lora_mlp_fwd.plan(device, given)
    left = iter(found)
    masks = [next(left) if each else None for each in stored]
    datas, scales, _, lora_As, lora_Bs = lists
    given = (torch.zeros_like(y), x, *kept, datas, scales, lora_As, lora_Bs, masks, *numbers, dropout_p, activation)
    _, backward = lora_mlp_bwd.plan(device, (*given, True, (True,) * 3, (True,) * 3))
    return forward, backward

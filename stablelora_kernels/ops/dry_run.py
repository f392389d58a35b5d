"""The launches of a call without the call: the ops' planners get tensors of the meta device, which have no memory, or of another.

``explain``, the compile report and the predictions ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.lora_linear import lora_linear_bwd, lora_linear_fwd
from stablelora_kernels.ops.lora_mlp import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.projection import Projection, flatten, layouts_of, scale_count, split
from stablelora_kernels.quantized import FP8Weight, NF4Weight

# Of x and the weights, and of A and B.
DTypes = tuple[torch.dtype, torch.dtype]
# The launches of forward and of backward.
Ways = tuple[list[Any], list[Any]]


def linear_launches(
    device: Device, m: int, n: int | Sequence[int], k: int, r: int, dtypes: DTypes, dropout_p: float,
    weight: str | NF4Weight | FP8Weight = "plain", choices: Sequence[Choice | None] = (None, None), where: str = "meta",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches on [m, k] rows with a [n, k] weight and a bias; several n are a projection group.

    ``weight``: "plain", "nf4", "fp8", a quantized weight, or "none" for a branch alone. ``choices``: kernels in place of the
    table's, forward and backward.
    """
    ns = (n,) if isinstance(n, int) else tuple(n)
    projections = [_projection(size, k, r, dtypes, where, weight) for size in ns]
    x, seeds = _zeros(where, m, k, of=dtypes[0]), [_seed(where, dropout_p) for _ in ns]
    base = _zeros(where, m, ns[0], of=dtypes[0]) if weight == "none" else None
    lists, numbers = _lists(projections)
    (ys, s), forward = lora_linear_fwd.plan(device, (x, base, *lists, seeds, *numbers, dropout_p, True), choices[0])
    datas, scales, _, lora_As, lora_Bs = lists
    given = (x, ys, datas if base is None else (), scales, lora_As, lora_Bs, [s], seeds)
    _, backward = lora_linear_bwd.plan(device, (*given, *numbers, dropout_p, True, True, True), choices[1])
    return forward, backward


def mlp_launches(
    device: Device, m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float,
    activation: str = "silu", where: str = "meta",
) -> Ways:  # fmt: skip
    """:func:`linear_launches` for a gated MLP without biases. ``sizes``: its output, inner and input features.

    ``r``: the rank, or those of gate, up and down, 0 for one without a branch.
    """
    n, f, k = sizes
    ranks = (r,) * 3 if isinstance(r, int) else tuple(r)
    projections = []
    for size, rank in zip(((f, k), (f, k), (n, f)), ranks, strict=True):
        p = _projection(*size, rank, dtypes, where)._replace(bias=None)
        projections.append(p if rank else p._replace(lora_A=None, lora_B=None))
    x, seeds = _zeros(where, m, k, of=dtypes[0]), [_seed(where, dropout_p if rank else 0.0) for rank in ranks]
    lists, numbers = _lists(projections)
    (y, *kept), forward = lora_mlp_fwd.plan(device, (x, *lists, seeds, *numbers, dropout_p, activation, True))
    datas, scales, _, lora_As, lora_Bs = lists
    given: Any = (
        torch.zeros_like(y),
        x,
        *kept,
        datas,
        scales,
        lora_As,
        lora_Bs,
        seeds,
        *numbers,
        dropout_p,
        activation,
    )
    _, backward = lora_mlp_bwd.plan(device, (*given, True, (True,) * 3, (True,) * 3))
    return forward, backward


def quantized_weight(kind: str, n: int, k: int, where: str = "meta") -> NF4Weight | FP8Weight:
    """A weight in "nf4", nested in bitsandbytes' usual blocks, or in "fp8"."""
    if kind == "fp8":
        return FP8Weight(_zeros(where, n, k, of=torch.float8_e4m3fn), _zeros(where, n))
    blocks = -(-n * k // 64)
    packed, absmax = (_zeros(where, size, of=torch.uint8) for size in (-(-n * k // 2), blocks))
    nested = (_zeros(where, -(-blocks // 256)), _zeros(where, 256), _zeros(where), 256)
    return NF4Weight(packed, absmax, _zeros(where, 16), (n, k), 64, *nested)


def _projection(n: int, k: int, r: int, dtypes: DTypes, where: str, weight: Any = "plain") -> Projection:
    dtype, lora_dtype = dtypes
    lora_A, lora_B = _zeros(where, r, k, of=lora_dtype), _zeros(where, n, r, of=lora_dtype)
    if weight == "none":
        return Projection(None, None, lora_A, lora_B, 1.0)
    if weight == "plain":
        weight = _zeros(where, n, k, of=dtype)
    else:
        weight = (quantized_weight(weight, n, k, where) if isinstance(weight, str) else weight).stored
    return Projection(weight, _zeros(where, n, of=dtype), lora_A, lora_B, 1.0)


def _lists(projections: Sequence[Projection]) -> tuple[list[list[Any]], Any]:
    """The lists of tensors that an op takes, then layouts and scalings."""
    n, layouts = len(projections), layouts_of(projections)
    lists = split(flatten(projections), (n, scale_count(layouts), n, n, n))
    return lists, (layouts, [p.scaling for p in projections])


def _seed(where: str, dropout_p: float) -> Tensor | None:
    return _zeros(where, 1, of=torch.int64) if dropout_p else None


def _zeros(where: str, *size: int, of: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=of, device=where)

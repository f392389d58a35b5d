"""The calls of the linear ops on tensors without values, and the launches that their planners make of
them.

Tensors are on the meta device, which has no memory, or on another. ``explain`` and the lab ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.autograd import read_by_backward
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardCall,
    LinearBackwardSettings,
    LinearForwardCall,
    LinearForwardSettings,
)
from stablelora_kernels.ops.lora_linear.triton import lora_linear_bwd, lora_linear_fwd
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsForwardCall,
    RowsSettings,
)
from stablelora_kernels.ops.lora_rows.triton import lora_rows_bwd, lora_rows_fwd
from stablelora_kernels.projection import Projection, layouts_of, operands_of, scales_of
from stablelora_kernels.quantized import WEIGHTS, QuantizedWeight

# Of x and the weights, and of A and B.
DTypes = tuple[torch.dtype, torch.dtype]
# The launches of forward and of backward.
Ways = tuple[list[Any], list[Any]]


class LinearCalls(NamedTuple):
    """The calls of a forward and of its backward, on tensors without values."""

    forward: LinearForwardCall
    backward: LinearBackwardCall


def linear_calls(
    m: int, n: int | Sequence[int], k: int, r: int, dtypes: DTypes, dropout_p: float,
    weight: str | QuantizedWeight = "plain", where: str = "meta",
) -> LinearCalls:  # fmt: skip
    """The calls on [m, k] rows with a [n, k] weight and a bias; several n are a projection group.

    ``weight``: "plain", one of WEIGHTS, a quantized weight, or "none" for a branch alone.
    """
    ns = (n,) if isinstance(n, int) else tuple(n)
    projections = [projection_of(size, k, r, dtypes, where, weight) for size in ns]
    layouts = layouts_of(projections)
    scalings = tuple([p.scaling for p in projections])
    x = _zeros(where, m, k, of=dtypes[0])
    operands = operands_of(projections)
    scales = scales_of(projections, layouts)
    forward = LinearForwardCall(
        x=x,
        base=_zeros(where, m, ns[0], of=dtypes[0]) if weight == "none" else None,
        operands=operands,
        scales=scales,
        seeds=[seed_of(where, dropout_p) for _ in ns],
        settings=LinearForwardSettings(
            layouts, scalings, dropout_p, save_s=True, save_mask=dropout_p > 0
        ),
    )
    results = lora_linear_fwd.allocate(forward)
    backward = LinearBackwardCall(
        x=x,
        grads=results.ys,
        operands=read_by_backward(operands, weights=True),
        scales=scales,
        s=results.s,
        masks=results.masks or [None] * len(ns),
        settings=LinearBackwardSettings(
            layouts, scalings, dropout_p, need_x=True, need_a=True, need_b=True
        ),
    )
    return LinearCalls(forward, backward)


def linear_launches(
    device: Device, m: int, n: int | Sequence[int], k: int, r: int, dtypes: DTypes, dropout_p: float,
    weight: str | QuantizedWeight = "plain", choices: Sequence[Choice | None] = (None, None), where: str = "meta",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches of :func:`linear_calls`. ``choices``: strategies in
    place of the table's, forward and backward.
    """
    calls = linear_calls(m, n, k, r, dtypes, dropout_p, weight, where)
    forward = lora_linear_fwd.plan(device, calls.forward, choices[0])[1]
    backward = lora_linear_bwd.plan(device, calls.backward, choices[1])[1]
    return forward, backward


def rows_launches(
    device: Device, ms: Sequence[int], n: int, k: int, ranks: Sequence[int], dtypes: DTypes, dropout_p: float,
    branch_only: bool = False, where: str = "meta",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches of a layer on the rows of several adapters, with
    the vendor's product unless ``branch_only``.
    """
    from stablelora_kernels.launch.base import VendorProduct

    dtype, lora_dtype = dtypes
    ends = tuple(accumulate(ms))
    x = _zeros(where, ends[-1], k, of=dtype)
    y = _zeros(where, ends[-1], n, of=dtype)
    weight = _zeros(where, n, k, of=dtype)
    settings = RowsSettings(
        starts=(0, *ends[:-1]),
        ends=ends,
        scalings=(1.0,) * len(ms),
        dropout_ps=(dropout_p,) * len(ms),
        need_x=True,
        need_ab=True,
    )
    lora_As = [_zeros(where, r, k, of=lora_dtype) for r in ranks]
    lora_Bs = [_zeros(where, n, r, of=lora_dtype) for r in ranks]
    seeds = [seed_of(where, dropout_p) for _ in ms]
    call = RowsForwardCall(x, y, lora_As, lora_Bs, seeds, settings)
    results, forward = lora_rows_fwd.plan(device, call)
    dx = torch.zeros_like(x)
    backward_call = RowsBackwardCall(y, x, dx, lora_As, lora_Bs, results.s, results.masks, settings)
    backward = lora_rows_bwd.plan(device, backward_call)[1]
    if not branch_only:
        forward.insert(0, VendorProduct(x, weight, None, y))
        backward.insert(0, VendorProduct(y, weight.t(), None, dx))
    return forward, backward


def projection_of(
    n: int,
    k: int,
    r: int,
    dtypes: DTypes,
    where: str,
    weight: str | QuantizedWeight = "plain",
) -> Projection:
    """A projection without values; ``weight`` as for :func:`linear_calls`."""
    dtype, lora_dtype = dtypes
    lora_A = _zeros(where, r, k, of=lora_dtype)
    lora_B = _zeros(where, n, r, of=lora_dtype)
    if weight == "none":
        return Projection(None, None, lora_A, lora_B, 1.0)
    bias = _zeros(where, n, of=dtype)
    if weight == "plain":
        return Projection(_zeros(where, n, k, of=dtype), bias, lora_A, lora_B, 1.0)
    if isinstance(weight, str):
        weight = WEIGHTS[weight](n, k, where)
    return Projection(weight.stored, bias, lora_A, lora_B, 1.0)


def seed_of(where: str, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    return _zeros(where, 1, of=torch.int64) if dropout_p else None


def _zeros(where: str, *size: int, of: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=of, device=where)

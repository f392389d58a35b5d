"""``lora_linear`` on PyTorch's operators: its two calls, by the formulas of one projection after
another.
"""

from __future__ import annotations

from torch import Tensor

from stablelora_kernels.ops.dropout import draw_to_keep
from stablelora_kernels.ops.formulas import gradients_of, lora_dtype_of, project, to_multiply
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardCall,
    LinearBackwardResults,
    LinearForwardCall,
    LinearForwardResults,
    branches_in,
    split_s,
)
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.projection import LORA_AS, projections_of
from stablelora_kernels.utils.tensors import cast


def linear_forward_torch(call: LinearForwardCall) -> LinearForwardResults:
    """The call of ``lora_linear_fwd``. Torch's generator draws the masks, and each projection has an
    S of its own.
    """
    settings = call.settings
    x = as_matrix(call.x)
    base = None if call.base is None else as_matrix(call.base)
    like = call.x if call.base is None else call.base
    ys: list[Tensor] = []
    every_s: list[Tensor] = []
    masks: list[Tensor | None] = []
    for p in projections_of(call.operands, call.scales, settings.layouts, settings.scalings):
        mask = draw_to_keep(x, settings.dropout_p).mask
        y, s = project(x, to_multiply(p, x.dtype), mask, base)
        ys.append(like_rows_of(y, like))
        every_s.append(s)
        masks.append(mask)
    return LinearForwardResults(ys, every_s, masks)


def linear_backward_torch(call: LinearBackwardCall) -> LinearBackwardResults:
    """The call of ``lora_linear_bwd``. A sum of several dX is rounded once."""
    settings = call.settings
    projections = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    nothing: list[Tensor | None] = [None] * len(projections)
    every_s = split_s(call.s, branches_in(call.operands, LORA_AS)) or nothing
    x = None if call.x is None else as_matrix(call.x)
    like = call.grads[0]
    wanted = settings.wanted
    dx: Tensor | None = None
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    for dy, p, s, mask in zip(call.grads, projections, every_s, call.masks, strict=True):
        grad = with_own_memory(as_matrix(dy))
        multiplied = to_multiply(p, dy.dtype)
        dx, da, db = gradients_of(x, grad, multiplied, s, mask, lora_dtype_of(p), wanted, dx)
        if da is not None:
            das.append(da)
        if db is not None:
            dbs.append(db)
    if dx is None:
        return LinearBackwardResults(like.new_empty(0), das, dbs)
    return LinearBackwardResults(like_rows_of(cast(dx, like.dtype), like), das, dbs)

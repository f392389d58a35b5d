"""``lora_rows`` on PyTorch's operators: its two calls, by the formulas of one branch after another."""

from __future__ import annotations

from torch import Tensor

from stablelora_kernels.ops.cpu_products import by_float32
from stablelora_kernels.ops.dropout import draw_to_keep
from stablelora_kernels.ops.formulas import (
    Wanted,
    add_branch_,
    gradients_of,
    lora_dtype_of,
    to_multiply,
)
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsBackwardResults,
    RowsForwardCall,
    RowsForwardResults,
    branches_of,
)


def rows_forward_torch(call: RowsForwardCall) -> RowsForwardResults:
    """The call of ``lora_rows_fwd``. Torch's generator draws the masks."""
    every_s: list[Tensor] = []
    masks: list[Tensor | None] = []
    settings = call.settings
    for p, rows, dropout_p in zip(
        branches_of(call), settings.rows, settings.dropout_ps, strict=True
    ):
        x = call.x[rows]
        mask = draw_to_keep(x, dropout_p).mask
        every_s.append(add_branch_(call.y[rows], x, to_multiply(p, x.dtype), mask))
        masks.append(mask)
    return RowsForwardResults(every_s, masks)


def rows_backward_torch(call: RowsBackwardCall) -> RowsBackwardResults:
    """The call of ``lora_rows_bwd``."""
    need_ab = call.settings.need_ab
    wanted = Wanted(call.dx is not None, need_ab, need_ab)
    # In float32 the branch's gradient is of another dtype than dx.
    in_place = not by_float32(call.grad)
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    for i, (p, rows) in enumerate(zip(branches_of(call), call.settings.rows, strict=True)):
        dx = None if call.dx is None else call.dx[rows]
        gradients = gradients_of(
            None if call.x is None else call.x[rows],
            call.grad[rows],
            to_multiply(p, call.grad.dtype),
            call.s[i],
            call.masks[i],
            lora_dtype_of(p),
            wanted,
            dx if in_place else None,
        )
        if dx is not None and gradients.dx is not None and not in_place:
            dx += gradients.dx
        if gradients.da is not None and gradients.db is not None:
            das.append(gradients.da)
            dbs.append(gradients.db)
    return RowsBackwardResults(das, dbs)

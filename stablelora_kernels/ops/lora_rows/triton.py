"""``lora_rows`` on Triton: the branches of several adapters, each on its own rows, added in place. A
forward and a backward as torch.library ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.dropout import new_mask
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsBackwardResults,
    RowsForwardCall,
    RowsForwardResults,
    RowsSettings,
    branches_of,
    mask_of,
)
from stablelora_kernels.ops.lora_rows.proof import BACKWARD, FORWARD
from stablelora_kernels.ops.plans import Launches, OpTypes, define_launches


def _allocate_forward(call: RowsForwardCall) -> RowsForwardResults:
    settings = call.settings
    s: list[Tensor] = []
    masks: list[Tensor | None] = []
    for rows, lora_A, dropout_p in zip(
        settings.rows, call.lora_As, settings.dropout_ps, strict=True
    ):
        x = call.x[rows]
        rows_kept = x.shape[0] if settings.need_ab else 0
        s.append(x.new_empty(rows_kept, lora_A.shape[0]))
        is_mask_kept = dropout_p > 0 and (settings.need_x or settings.need_ab)
        masks.append(new_mask(x if is_mask_kept else x[:0], x.shape[1]))
    return RowsForwardResults(s, masks)


@define_launches(
    "lora_rows_fwd",
    "(Tensor x, Tensor(a!) y, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] seeds, int[] starts, int[] ends, "
    "float[] scalings, float[] dropout_ps, bool need_x, bool need_ab) -> (Tensor[], Tensor[])",
    OpTypes(RowsForwardCall, RowsForwardCall.of, RowsSettings, RowsForwardResults),
    _allocate_forward,
    FORWARD,
)
def lora_rows_fwd(
    device: Device, call: RowsForwardCall, results: RowsForwardResults, choice: Choice | None
) -> Launches:
    """Add each branch to its rows of y, and save what backward needs. ``choice`` is of a product,
    which there is none of here.
    """
    from stablelora_kernels.launch.lora_linear import ForwardCall, forward_launches

    settings = call.settings
    launches: Launches = []
    for i, (p, rows) in enumerate(zip(branches_of(call), settings.rows, strict=True)):
        y = call.y[rows]
        branch = ForwardCall(
            x=call.x[rows],
            projections=[p],
            seeds=[call.seeds[i]],
            masks=[mask_of(results.masks, i)],
            s=results.s[i] if settings.need_ab else None,
            ys=[y],
            dropout_p=settings.dropout_ps[i],
            base=y,
        )
        launches += forward_launches(device, branch)
    return launches


def _allocate_backward(call: RowsBackwardCall) -> RowsBackwardResults:
    if not call.settings.need_ab:
        return RowsBackwardResults([], [])
    return RowsBackwardResults(
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in call.lora_As],
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in call.lora_Bs],
    )


@define_launches(
    "lora_rows_bwd",
    "(Tensor grad, Tensor? x, Tensor(a!)? dx, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] s, Tensor?[] masks, "
    "int[] starts, int[] ends, float[] scalings, float[] dropout_ps, bool need_x, bool need_ab) -> (Tensor[], Tensor[])",
    OpTypes(RowsBackwardCall, RowsBackwardCall.of, RowsSettings, RowsBackwardResults),
    _allocate_backward,
    BACKWARD,
)
def lora_rows_bwd(
    device: Device, call: RowsBackwardCall, results: RowsBackwardResults, choice: Choice | None
) -> Launches:
    """Add each branch's gradient to its rows of dx, and compute every dA and dB. ``choice`` as in
    :func:`lora_rows_fwd`.
    """
    from stablelora_kernels.launch.lora_linear import BackwardCall, Gradients, backward_launches

    settings = call.settings
    launches: Launches = []
    for i, (p, rows) in enumerate(zip(branches_of(call), settings.rows, strict=True)):
        gradients = Gradients(None if call.dx is None else call.dx[rows], [None], [None])
        if settings.need_ab:
            gradients = gradients._replace(das=[results.das[i]], dbs=[results.dbs[i]])
        branch = BackwardCall(
            x=None if call.x is None else call.x[rows],
            grads=[call.grad[rows]],
            projections=[p],
            s=[call.s[i] if settings.need_ab else None],
            masks=[mask_of(call.masks, i)],
            dropout_p=settings.dropout_ps[i],
            results=gradients,
            adds=True,
        )
        launches += backward_launches(device, branch)
    return launches

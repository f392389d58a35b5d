"""``lora_mlp`` on Triton: its forward and its backward as torch.library ops."""

from __future__ import annotations

import torch

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.dropout import new_mask
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardCall,
    MLPBackwardResults,
    MLPBackwardSettings,
    MLPForwardCall,
    MLPForwardResults,
    MLPForwardSettings,
    each_mask,
    needed_like,
    with_branches,
)
from stablelora_kernels.ops.lora_mlp.proof import BACKWARD, FORWARD
from stablelora_kernels.ops.matrices import as_matrix, row_count
from stablelora_kernels.ops.plans import Launches, OpTypes, define_launches
from stablelora_kernels.projection import (
    LORA_AS,
    LORA_BS,
    Projection,
    projections_of,
)


def _size_of(p: Projection) -> tuple[int, int]:
    """N and K of a projection that has its weight."""
    assert p.weight is not None
    n, k = p.weight.shape
    return n, k


def _allocate_forward(call: MLPForwardCall) -> MLPForwardResults:
    """Memory for the results of a forward."""
    x = call.x
    settings = call.settings
    gate, up, down = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    inner, k = _size_of(gate)
    n = _size_of(down)[0]
    leading = x.shape[:-1]
    saved_leading = leading if settings.save else (0,)
    saved_rows = row_count(x) if settings.save else 0
    widths = zip((k, k, inner), settings.stores_mask, strict=True)
    return MLPForwardResults(
        y=x.new_empty((*(leading if settings.output else (0,)), n)),
        g=x.new_empty((*saved_leading, inner)),
        u=x.new_empty((*saved_leading, inner)),
        s=[x.new_empty((saved_rows, gate.rank + up.rank))],
        s_down=x.new_empty((saved_rows, down.rank)),
        masks=[new_mask(x, width) for width, is_stored in widths if is_stored],
    )


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor?[] operands, Tensor[] scales, Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, "
    "str activation, bool output, bool save, bool[] stores_mask, bool shared_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor[])",
    OpTypes(MLPForwardCall, MLPForwardCall.of, MLPForwardSettings, MLPForwardResults),
    _allocate_forward,
    FORWARD,
)
def lora_mlp_fwd(
    device: Device, call: MLPForwardCall, results: MLPForwardResults, choice: Choice | None
) -> Launches:
    """With ``output`` Y for x [..., K], and with ``save`` what backward needs. The scalings are s'."""
    from stablelora_kernels.launch import lora_mlp

    settings = call.settings
    x = as_matrix(call.x)
    projections = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    is_saved = settings.save
    forward = lora_mlp.MLPForwardCall(
        x=x,
        projections=with_branches(projections, x),
        seeds=call.seeds,
        masks=each_mask(results.masks, settings.stores_mask),
        dropout_p=settings.dropout_p,
        activation=settings.activation,
        y=as_matrix(results.y) if settings.output else None,
        g=as_matrix(results.g) if is_saved else None,
        u=as_matrix(results.u) if is_saved else None,
        s=results.s[0] if is_saved else None,
        s_down=results.s_down if is_saved else None,
    )
    return lora_mlp.mlp_forward_launches(device, forward, choice)


def _allocate_backward(call: MLPBackwardCall) -> MLPBackwardResults:
    """Memory for the gradients; empty for those that are not needed."""
    grad = call.grad
    settings = call.settings
    gate = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)[0]
    dx = grad.new_empty(0)
    if settings.need_x:
        dx = grad.new_empty((*grad.shape[:-1], _size_of(gate)[1]))
    return MLPBackwardResults(
        dx=dx,
        das=needed_like(call.operands[LORA_AS], settings.need_a, torch.empty_like, grad),
        dbs=needed_like(call.operands[LORA_BS], settings.need_b, torch.empty_like, grad),
    )


@define_launches(
    "lora_mlp_bwd",
    "(Tensor grad, Tensor? x, Tensor g, Tensor u, Tensor? s_down, Tensor[] s, Tensor?[] operands, Tensor[] scales, "
    "Tensor?[] masks, int[] layouts, float[] scalings, float dropout_p, str activation, bool need_x, bool[] need_a, "
    "bool[] need_b, bool shared_mask) -> (Tensor, Tensor[], Tensor[])",
    OpTypes(MLPBackwardCall, MLPBackwardCall.of, MLPBackwardSettings, MLPBackwardResults),
    _allocate_backward,
    BACKWARD,
)
def lora_mlp_bwd(
    device: Device, call: MLPBackwardCall, results: MLPBackwardResults, choice: Choice | None
) -> Launches:
    """The needed ones of dX, the dA's and the dB's."""
    from stablelora_kernels.launch import lora_mlp
    from stablelora_kernels.launch.lora_linear import Gradients

    settings = call.settings
    grad = as_matrix(call.grad)
    projections = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    dx = as_matrix(results.dx) if settings.need_x else None
    das = [da if da.numel() else None for da in results.das]
    dbs = [db if db.numel() else None for db in results.dbs]
    backward = lora_mlp.MLPBackwardCall(
        x=None if call.x is None else as_matrix(call.x),
        grad=grad,
        g=as_matrix(call.g),
        u=as_matrix(call.u),
        s=call.s[0] if call.s else None,
        s_down=call.s_down,
        projections=with_branches(projections, grad),
        masks=call.every_mask,
        dropout_p=settings.dropout_p,
        activation=settings.activation,
        results=Gradients(dx, das, dbs),
    )
    return lora_mlp.mlp_backward_launches(device, backward, choice)

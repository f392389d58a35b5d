"""``lora_linear`` on Triton: its forward and its backward as torch.library ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.dropout import new_mask
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardCall,
    LinearBackwardResults,
    LinearBackwardSettings,
    LinearForwardCall,
    LinearForwardResults,
    LinearForwardSettings,
    branches_in,
    split_s,
)
from stablelora_kernels.ops.lora_linear.proof import BACKWARD, FORWARD
from stablelora_kernels.ops.matrices import as_matrix, row_count
from stablelora_kernels.ops.plans import Launches, OpTypes, define_launches
from stablelora_kernels.projection import LORA_AS, LORA_BS, projections_of


def _allocate_forward(call: LinearForwardCall) -> LinearForwardResults:
    """Memory for the results of a forward."""
    x = call.x
    like = x if call.base is None else call.base
    lora_As = branches_in(call.operands, LORA_AS)
    lora_Bs = branches_in(call.operands, LORA_BS)
    s_rows = row_count(x) if call.settings.save_s else 0
    return LinearForwardResults(
        ys=[like.new_empty((*x.shape[:-1], lora_B.shape[0])) for lora_B in lora_Bs],
        s=[x.new_empty(s_rows, sum(lora_A.shape[0] for lora_A in lora_As))],
        masks=[new_mask(x, x.shape[-1]) for _ in call.seeds if call.settings.save_mask],
    )


@define_launches(
    "lora_linear_fwd",
    "(Tensor x, Tensor? base, Tensor?[] operands, Tensor[] scales, Tensor?[] seeds, int[] layouts, float[] scalings, "
    "float dropout_p, bool save_s, bool save_mask) -> (Tensor[], Tensor[], Tensor[])",
    OpTypes(LinearForwardCall, LinearForwardCall.of, LinearForwardSettings, LinearForwardResults),
    _allocate_forward,
    FORWARD,
)
def lora_linear_fwd(
    device: Device,
    call: LinearForwardCall,
    results: LinearForwardResults,
    choice: Choice | None,
) -> Launches:
    """The Y's for x, and what ``settings`` says to save.

    The scalings are s'. With ``base`` [..., N] there is one projection, a lone branch, and Y has
    base's dtype.
    """
    from stablelora_kernels.launch.lora_linear import ForwardCall, forward_launches

    settings = call.settings
    forward = ForwardCall(
        x=as_matrix(call.x),
        projections=projections_of(call.operands, call.scales, settings.layouts, settings.scalings),
        seeds=call.seeds,
        masks=results.masks or [None] * len(results.ys),
        s=results.s[0] if settings.save_s else None,
        ys=[as_matrix(y) for y in results.ys],
        dropout_p=settings.dropout_p,
        base=None if call.base is None else as_matrix(call.base).contiguous(),
    )
    return forward_launches(device, forward, choice)


def _allocate_backward(call: LinearBackwardCall) -> LinearBackwardResults:
    """Memory for the gradients; empty for those that are not needed."""
    grad = call.grads[0]
    lora_As = branches_in(call.operands, LORA_AS)
    lora_Bs = branches_in(call.operands, LORA_BS)
    columns = lora_As[0].shape[1]
    dx_shape = (*grad.shape[:-1], columns) if call.settings.need_x else (0, columns)
    return LinearBackwardResults(
        dx=grad.new_empty(dx_shape),
        das=_contiguous_like(lora_As) if call.settings.need_a else [],
        dbs=_contiguous_like(lora_Bs) if call.settings.need_b else [],
    )


def _contiguous_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@define_launches(
    "lora_linear_bwd",
    "(Tensor? x, Tensor[] grads, Tensor?[] operands, Tensor[] scales, Tensor[] s, Tensor?[] masks, int[] layouts, "
    "float[] scalings, float dropout_p, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor[], Tensor[])",
    OpTypes(
        LinearBackwardCall, LinearBackwardCall.of, LinearBackwardSettings, LinearBackwardResults
    ),
    _allocate_backward,
    BACKWARD,
)
def lora_linear_bwd(
    device: Device,
    call: LinearBackwardCall,
    results: LinearBackwardResults,
    choice: Choice | None,
) -> Launches:
    """The needed ones of dX, the dA's and the dB's, for x [..., K] and each dY [..., N]."""
    from stablelora_kernels.launch.lora_linear import BackwardCall, Gradients, backward_launches

    settings = call.settings
    nothing: list[None] = [None] * len(call.grads)
    dx = as_matrix(results.dx) if settings.need_x else None
    backward = BackwardCall(
        as_matrix(call.x) if call.x is not None else None,
        [as_matrix(grad) for grad in call.grads],
        projections_of(call.operands, call.scales, settings.layouts, settings.scalings),
        split_s(call.s, branches_in(call.operands, LORA_AS)) or nothing,
        call.masks,
        settings.dropout_p,
        Gradients(dx, results.das or nothing, results.dbs or nothing),
    )
    return backward_launches(device, backward, choice)

"""``lora_linear`` on Triton: its forward and its backward as torch.library ops, and the records of
their arguments and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.dropout import new_mask
from stablelora_kernels.ops.matrices import as_matrix, row_count
from stablelora_kernels.ops.plans import Launches, OpTypes, define_launches
from stablelora_kernels.projection import (
    LORA_AS,
    LORA_BS,
    OPERANDS,
    projections_of,
    scale_count_of,
    split,
)


class LinearForwardSettings(NamedTuple):
    """The arguments of ``lora_linear_fwd`` that are no tensors."""

    layouts: tuple[int, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    dropout_p: float
    save_s: bool
    save_mask: bool


class LinearForwardCall(NamedTuple):
    """The arguments of ``lora_linear_fwd``."""

    x: Tensor
    # That of a lone branch.
    base: Tensor | None
    # ``projection.operands_of`` and ``scales_of`` of the projections.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: LinearForwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: LinearForwardSettings) -> LinearForwardCall:
        """The call of its tensors, one after another."""
        count = len(settings.scalings)
        x, base, *others = tensors
        lengths = (OPERANDS * count, scale_count_of(settings.layouts), count)
        operands, scales, seeds = split(others, lengths)
        return LinearForwardCall(x, base, operands, scales, seeds, settings)


class LinearForwardResults(NamedTuple):
    """The Y's [..., N], and what backward needs."""

    ys: Sequence[Tensor]
    # One matrix for all projections, side by side; it is empty if it is not saved.
    s: Sequence[Tensor]
    # Empty if they are not saved.
    masks: Sequence[Tensor | None]


class LinearBackwardSettings(NamedTuple):
    """The arguments of ``lora_linear_bwd`` that are no tensors."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    need_x: bool
    need_a: bool
    need_b: bool


class LinearBackwardCall(NamedTuple):
    """The arguments of ``lora_linear_bwd``."""

    # None if dA is not needed.
    x: Tensor | None
    grads: Sequence[Tensor]
    # Biases are None, and so is the data of a weight that dX does not read, or that a lone branch
    # does not have.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # Each projection's S, or one matrix that has all of them side by side.
    s: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    settings: LinearBackwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: LinearBackwardSettings) -> LinearBackwardCall:
        """The call of its tensors, one after another."""
        count = len(settings.scalings)
        x, *others = tensors
        known_count = (1 + OPERANDS + 1) * count + scale_count_of(settings.layouts)
        lengths = (
            count,
            OPERANDS * count,
            scale_count_of(settings.layouts),
            len(others) - known_count,
            count,
        )
        arguments: Any = (x, *split(others, lengths), settings)
        return LinearBackwardCall(*arguments)


class LinearBackwardResults(NamedTuple):
    """dX [..., K], the dA's and the dB's. What is not needed is empty."""

    dx: Tensor
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


def branches_in(operands: Sequence[Tensor | None], kind: slice) -> list[Tensor]:
    """The A's or the B's among ``operands``, where every projection has one."""
    return [t for t in operands[kind] if t is not None]


def split_s(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, of one matrix that has all of them, or if they are separate already."""
    if len(s) == 1 and len(lora_As) > 1:
        return list(s[0].split([lora_A.shape[0] for lora_A in lora_As], 1))
    return list(s)


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

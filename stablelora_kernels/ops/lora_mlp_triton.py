"""``lora_mlp`` on Triton: its forward and its backward as torch.library ops, and the records of
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
    Projection,
    projections_of,
    scale_count_of,
    split,
)

# For gate, up and down.
OfThree = tuple[bool, bool, bool]


class MLPForwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_fwd`` that are no tensors."""

    layouts: tuple[int, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    save: bool
    # Whether gate's, up's and down's mask is stored.
    stores_mask: OfThree


class MLPForwardCall(NamedTuple):
    """The arguments of ``lora_mlp_fwd``."""

    x: Tensor
    # ``projection.operands_of`` and ``scales_of`` of gate, up and down.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: MLPForwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPForwardSettings) -> MLPForwardCall:
        """The call of its tensors, one after another."""
        x, *others = tensors
        lengths = (3 * OPERANDS, scale_count_of(settings.layouts), 3)
        operands, scales, seeds = split(others, lengths)
        return MLPForwardCall(x, operands, scales, seeds, settings)


class MLPForwardResults(NamedTuple):
    """Y [..., N], and what backward needs of it, which is empty if nothing is saved."""

    y: Tensor
    # [..., F].
    g: Tensor
    u: Tensor
    # Gate's and up's side by side.
    s: Tensor
    s_down: Tensor
    # Those that are stored.
    masks: Sequence[Tensor]


class MLPBackwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_bwd`` that are no tensors."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    need_x: bool
    need_a: OfThree
    need_b: OfThree


class MLPBackwardCall(NamedTuple):
    """The arguments of ``lora_mlp_bwd``: dY [..., N] and what forward has saved. None is what no
    needed gradient reads.
    """

    grad: Tensor
    x: Tensor | None
    g: Tensor
    u: Tensor
    s: Tensor | None
    s_down: Tensor | None
    # Biases are None.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    settings: MLPBackwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPBackwardSettings) -> MLPBackwardCall:
        """The call of its tensors, one after another."""
        lengths = (6, 3 * OPERANDS, scale_count_of(settings.layouts), 3)
        singles, *lists = split(tensors, lengths)
        arguments: Any = (*singles, *lists, settings)
        return MLPBackwardCall(*arguments)


class MLPBackwardResults(NamedTuple):
    """dX [..., K], and the dA and dB of gate, up and down. What is not needed is empty."""

    dx: Tensor
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


def with_branches(projections: Sequence[Projection], like: Tensor) -> list[Projection]:
    """``projections`` with an A and a B of rank 0 where there is no branch, on the device of
    ``like``.
    """
    dtypes = [p.lora_A.dtype for p in projections if p.lora_A is not None]
    dtype = dtypes[0] if dtypes else like.dtype
    return [p if p.lora_A is not None else _of_rank_0(p, like, dtype) for p in projections]


def _of_rank_0(p: Projection, like: Tensor, dtype: torch.dtype) -> Projection:
    # These sizes are never read where the weight is not read.
    n, k = (0, 0) if p.weight is None else p.weight.shape
    return p._replace(
        lora_A=torch.empty((0, k), dtype=dtype, device=like.device),
        lora_B=torch.empty((n, 0), dtype=dtype, device=like.device),
    )


def each_mask(masks: Sequence[Tensor], is_stored: Sequence[bool]) -> list[Tensor | None]:
    """Gate's, up's and down's mask, of those that are stored."""
    stored = iter(masks)
    return [next(stored) if is_there else None for is_there in is_stored]


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
        y=x.new_empty((*leading, n)),
        g=x.new_empty((*saved_leading, inner)),
        u=x.new_empty((*saved_leading, inner)),
        s=x.new_empty((saved_rows, gate.rank + up.rank)),
        s_down=x.new_empty((saved_rows, down.rank)),
        masks=[new_mask(x, width) for width, is_stored in widths if is_stored],
    )


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor?[] operands, Tensor[] scales, Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, "
    "str activation, bool save, bool[] stores_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    OpTypes(MLPForwardCall, MLPForwardCall.of, MLPForwardSettings, MLPForwardResults),
    _allocate_forward,
)
def lora_mlp_fwd(
    device: Device, call: MLPForwardCall, results: MLPForwardResults, choice: Choice | None
) -> Launches:
    """Y for x [..., K], and with ``save`` what backward needs. The scalings are s'."""
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
        y=as_matrix(results.y),
        g=as_matrix(results.g) if is_saved else None,
        u=as_matrix(results.u) if is_saved else None,
        s=results.s if is_saved else None,
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
        das=_needed_like(call.operands[LORA_AS], settings.need_a, grad),
        dbs=_needed_like(call.operands[LORA_BS], settings.need_b, grad),
    )


def _needed_like(tensors: Sequence[Tensor | None], needed: OfThree, grad: Tensor) -> list[Tensor]:
    """Memory for the gradients of those ``tensors`` that are needed, and an empty tensor for each
    other.
    """
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if is_needed and t is not None
        else grad.new_empty(0)
        for t, is_needed in zip(tensors, needed, strict=True)
    ]


@define_launches(
    "lora_mlp_bwd",
    "(Tensor grad, Tensor? x, Tensor g, Tensor u, Tensor? s, Tensor? s_down, Tensor?[] operands, Tensor[] scales, "
    "Tensor?[] masks, int[] layouts, float[] scalings, float dropout_p, str activation, bool need_x, bool[] need_a, "
    "bool[] need_b) -> (Tensor, Tensor[], Tensor[])",
    OpTypes(MLPBackwardCall, MLPBackwardCall.of, MLPBackwardSettings, MLPBackwardResults),
    _allocate_backward,
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
        s=call.s,
        s_down=call.s_down,
        projections=with_branches(projections, grad),
        masks=call.masks,
        dropout_p=settings.dropout_p,
        activation=settings.activation,
        results=Gradients(dx, das, dbs),
    )
    return lora_mlp.mlp_backward_launches(device, backward, choice)

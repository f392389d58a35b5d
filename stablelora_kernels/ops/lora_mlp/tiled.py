"""``lora_mlp`` in tiles of rows, of which autograd keeps x and dropout's seeds alone.

    forward    tile by tile, Y; nothing else is kept
    backward   tile by tile, G and U again without Y, and then the gradients; dA and dB are summed
               over the tiles in float32

What has F columns exists for one tile at a time, in forward and in backward. A tile is a call of
``lora_mlp_fwd`` or ``lora_mlp_bwd`` on either backend.

A node in front of the one that computes saves what backward reads (:func:`~.ops.autograd.keep`). So a
checkpointed MLP multiplies all rows by a weight eight times, and nine times where G and U are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, distinct, first_derivative, keep
from stablelora_kernels.ops.lora_mlp.backends import BACKENDS
from stablelora_kernels.ops.lora_mlp.call import (
    DOWN,
    GATE,
    UP,
    MLPBackwardCall,
    MLPBackwardSettings,
    MLPFacts,
    MLPForwardCall,
    MLPForwardSettings,
    if_needed,
    needed_like,
    stores_mask,
)
from stablelora_kernels.ops.matrices import RowTile, as_matrix, row_count, row_tile_count, row_tiles
from stablelora_kernels.ops.plans import define_op, tensors_of
from stablelora_kernels.projection import LORA_AS, LORA_BS, OPERANDS, projections_of

_OPERAND_COUNT = 3 * OPERANDS


def first_tile(x: Tensor, tile_rows: int) -> Tensor:
    """The first tile of x [M, K]; x itself if it has no rows."""
    return next((x[tile.rows] for tile in row_tiles(x.shape[0], tile_rows)), x)


def _seeds_of(
    seeds: Tensor | None, tile: RowTile, operands: Sequence[Tensor | None], shared_mask: bool
) -> list[Tensor | None]:
    """Gate's, up's and down's seed of a tile, None without a branch. ``seeds``: [tiles, 3, 2]."""
    if seeds is None:
        return [None, None, None]
    of_tile = [*seeds[tile.number].unbind()]
    if shared_mask:
        of_tile[UP] = of_tile[GATE]
    lora_As = operands[LORA_AS]
    return [None if a is None else seed for a, seed in zip(lora_As, of_tile, strict=True)]


def _settings(values: Sequence[Any]) -> list[Any]:
    """An op's settings, of which it gets lists for tuples."""
    return [tuple(value) if type(value) is list else value for value in values]


def _empty_output(
    x: Tensor,
    operands: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    seeds: Tensor | None,
    layouts: Sequence[int],
    scalings: Sequence[float],
    *others: Any,
) -> Tensor:
    """Memory for Y [..., N]."""
    down = projections_of(operands, scales, layouts, scalings)[DOWN].weight
    assert down is not None
    return x.new_empty((*x.shape[:-1], down.shape[0]))


# Ops, so that a compiled graph holds one node of a call, and so that a checkpoint's policy can name
# what it keeps.


@define_op(
    "lora_mlp_tiled_fwd",
    "(Tensor x, Tensor?[] operands, Tensor[] scales, Tensor? seeds, int[] layouts, float[] scalings, float dropout_p, "
    "str activation, bool output, bool save, bool[] stores_mask, bool shared_mask, str backend, int tile_rows) -> Tensor",
    _empty_output,
)
def _tiled_forward(
    x: Tensor,
    operands: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    seeds: Tensor | None,
    layouts: Sequence[int],
    scalings: Sequence[float],
    *others: Any,
) -> Tensor:
    """Y [..., N] for x [..., K]; behind ``seeds`` come MLPForwardSettings, the backend and a tile's
    rows.
    """
    *values, backend, tile_rows = _settings([layouts, scalings, *others])
    settings = MLPForwardSettings(*values)
    y = _empty_output(x, operands, scales, seeds, layouts, scalings)
    rows = as_matrix(x)
    outputs = y.view(rows.shape[0], y.shape[-1])
    for tile in row_tiles(rows.shape[0], tile_rows):
        of_tile = _seeds_of(seeds, tile, operands, settings.shared_mask)
        tensors = [rows[tile.rows], *operands, *scales, *of_tile]
        outputs[tile.rows] = BACKENDS[backend].forward(None, tensors, settings).y
    return y


def _empty_gradients(
    grad: Tensor,
    x: Tensor,
    operands: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    seeds: Tensor | None,
    *others: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Memory for the gradients, zeros for dA and dB; empty for those that are not needed."""
    needs = MLPBackwardSettings(*_settings(others)[:-2])
    lora_As = operands[LORA_AS]
    lora_Bs = operands[LORA_BS]
    # Not empty_like(x), whose strides may overlap.
    dx = x.new_empty(x.shape if needs.need_x else (0,))
    das = needed_like(lora_As, needs.need_a, torch.zeros_like, x)
    dbs = needed_like(lora_Bs, needs.need_b, torch.zeros_like, x)
    return dx, das, dbs


@define_op(
    "lora_mlp_tiled_bwd",
    "(Tensor grad, Tensor x, Tensor?[] operands, Tensor[] scales, Tensor? seeds, int[] layouts, float[] scalings, "
    "float dropout_p, str activation, bool need_x, bool[] need_a, bool[] need_b, bool shared_mask, str backend, "
    "int tile_rows) -> (Tensor, Tensor[], Tensor[])",
    _empty_gradients,
)
def _tiled_backward(
    grad: Tensor,
    x: Tensor,
    operands: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    seeds: Tensor | None,
    *others: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The needed ones of dX, the dA's and the dB's for dY [..., N]; ``others`` are
    MLPBackwardSettings, the backend and a tile's rows.
    """
    *values, backend, tile_rows = _settings(others)
    needs = MLPBackwardSettings(*values)
    forward = MLPForwardSettings(
        needs.layouts,
        needs.scalings,
        needs.dropout_p,
        needs.activation,
        output=False,
        save=True,
        stores_mask=stores_mask(needs, operands[LORA_AS]),
        shared_mask=needs.shared_mask,
    )
    dx, das, dbs = _empty_gradients(grad, x, operands, scales, seeds, *others)
    # A tile's dA and dB are float32, and so are their sums, which are rounded once.
    wide = _with_wide_branches(operands)
    sums = [_widened(t) for t in (*das, *dbs)]
    rows = as_matrix(x)
    grads = as_matrix(grad)
    for tile in row_tiles(rows.shape[0], tile_rows):
        of_tile = _seeds_of(seeds, tile, operands, needs.shared_mask)
        call = MLPForwardCall(rows[tile.rows], operands, scales, of_tile, forward)
        kept = BACKENDS[backend].forward(None, tensors_of(call), forward)
        saved = MLPBackwardCall.tensors_behind_grad(call._replace(operands=wide), kept, needs)
        del kept
        gradients = BACKENDS[backend].backward(None, [grads[tile.rows], *saved], needs)
        del saved
        if needs.need_x:
            dx.view_as(rows)[tile.rows] = gradients.dx
        for total, part in zip(sums, [*gradients.das, *gradients.dbs], strict=True):
            if total.numel():
                total += part
    for result, total in zip([*das, *dbs], sums, strict=True):
        if result is not total:
            result.copy_(total)
    return dx, das, dbs


def _widened(t: Tensor) -> Tensor:
    """``t`` in float32, unless it is float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _with_wide_branches(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``operands`` with A and B in float32, unless they are float64."""
    wide = [*operands]
    for places in (LORA_AS, LORA_BS):
        wide[places] = [None if t is None else _widened(t) for t in operands[places]]
    return wide


class _TiledContext(Context, Protocol):
    facts: MLPFacts
    # The node that has saved the tensors; None if this one has.
    keeper: Any


class _Tiled(torch.autograd.Function):
    """``tensors``: the operands of gate, up and down, then all scales."""

    @staticmethod
    def forward(
        ctx: _TiledContext,
        facts: MLPFacts,
        keeper: Any,
        seeds: Tensor | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        if keeper is None:
            ctx.save_for_backward(x, seeds, *tensors)
        ctx.facts = facts
        ctx.keeper = keeper
        return _forward(facts, seeds, x, tensors)

    @staticmethod
    @first_derivative
    def backward(ctx: _TiledContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.backward
        saved: Sequence[Any] = (ctx.keeper or ctx).saved_tensors
        x, seeds, *tensors = saved
        operands = tensors[:_OPERAND_COUNT]
        scales = tensors[_OPERAND_COUNT:]
        how = (*needs, facts.options.backend, facts.tile_rows)
        dx, das, dbs = _tiled_backward(grad, x, operands, scales, seeds, *how)
        of_operands: list[Tensor | None] = [None] * _OPERAND_COUNT
        of_operands[LORA_AS] = if_needed(das, needs.need_a)
        of_operands[LORA_BS] = if_needed(dbs, needs.need_b)
        of_x = dx if needs.need_x else None
        return (None, None, None, of_x, *of_operands, *[None] * facts.scale_count)


def _forward(facts: MLPFacts, seeds: Tensor | None, x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """Y for x [..., K]."""
    settings = facts.forward._replace(save=False, stores_mask=(False, False, False))
    operands = tensors[:_OPERAND_COUNT]
    how = (*settings, facts.options.backend, facts.tile_rows)
    y: Tensor = _tiled_forward(x, operands, tensors[_OPERAND_COUNT:], seeds, *how)
    return y


def lora_mlp_tiled(facts: MLPFacts, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """Y for x [..., K], with or without gradients. ``tensors``: as :class:`_Tiled` takes them."""
    seeds = None
    if facts.options.dropout_p:
        # PyTorch's generators take a seed from the host.
        device = x.device if facts.options.backend == "triton" else "cpu"
        count = row_tile_count(row_count(x), facts.tile_rows)
        seeds = torch.randint(2**63 - 1, (count, 3, 2), device=device)
    if facts.strategy == "without gradients":
        return _forward(facts, seeds, x, tensors)
    kept = keep(x, [seeds, *tensors])
    if torch.compiler.is_compiling():
        tensors = distinct(tensors)
    y: Tensor = _Tiled.apply(facts, kept.node, seeds, kept.x, *tensors)  # type: ignore[no-untyped-call]
    return y

"""S, and dB, in the launch of the product that needs S: their tiles, and by how many programs.
Needs no Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.tiles import (
    DOWN_TILES,
    Plan,
    Tile,
    bytes_of,
    co_scheduled_grad_plan,
    fit,
    linear_stage,
    pick_tile,
    plan_split_k,
    rank_block,
    without_empty_parts,
)

# Clocks of Hopper, whose products leave the least time: until loads come from memory; of a step of
# S or dB, at least, and of one that draws a mask; and of a product's step, for each column.
MEMORY_CLOCKS = 1400
STEP_CLOCKS = 200
DRAWN_CLOCKS = 1250
COLUMN_CLOCKS = 4


class ChainedPlans(NamedTuple):
    """For S, and for dB if it is wanted, in the launch of a product that needs S."""

    s: Plan
    db: Plan | None
    # Of both. They take part after part.
    programs: int


def chained_plans(
    device: Device, call: Call, product: Tile, db: bool, spare: int = 0
) -> ChainedPlans:
    """For S, and with ``db`` for dB, in the launch of ``product``.

    ``spare`` processors have a tile of the product less than the others. S and dB are theirs alone
    if that takes no longer.
    """
    s_plan = _down_plan(device, call, product)
    db_plan = _grad_plan(device, call, product) if db else None
    if spare:
        drawn = call.dropout and not call.masked
        s_few = _by_few(s_plan, call.k, spare, DRAWN_CLOCKS if drawn else STEP_CLOCKS)
        db_few = _by_few(db_plan, call.m, spare, STEP_CLOCKS) if db_plan else _NO_PROGRAMS
        clocks = s_few.clocks + db_few.clocks
        # A little longer still costs less than a phase of all processors.
        if clocks <= 1.1 * cdiv(call.k, 64) * COLUMN_CLOCKS * product.BLOCK_N:
            programs = s_few.plan.programs + db_few.plan.programs
            few_db_plan = db_few.plan if db_plan else None
            return ChainedPlans(s_few.plan, few_db_plan, min(spare, programs))
    programs = s_plan.programs + (db_plan.programs if db_plan else 0)
    return ChainedPlans(s_plan, db_plan, programs)


class _Few(NamedTuple):
    """A plan for few programs, and the clocks that they take."""

    plan: Plan
    clocks: float


_NO_PROGRAMS = _Few(Plan(Tile(0, 0, 0, 0, 0), "", block_r=0, tiles=0), clocks=0)


def _by_few(plan: Plan, size: int, programs: int, step_clocks: float) -> _Few:
    """``plan``, whose sums run over ``size``, for so few programs."""
    splits = min(plan.splits, max(1, programs // plan.tiles))
    few = plan._replace(splits=without_empty_parts(cdiv(size, plan.tile.BLOCK_K), splits))
    step = max(step_clocks, MEMORY_CLOCKS / (plan.tile.num_stages - 1))
    turns = cdiv(few.programs, programs) * cdiv(size, 64 * few.splits)
    return _Few(few, turns * step)


def _down_plan(device: Device, call: Call, product: Tile) -> Plan:
    """For S, all of its ranks by programs with the warps of ``product``."""
    tile, reason = pick_tile(DOWN_TILES, device, call)
    # A wider block of ranks for few warps would spill registers where they hold the sums' operands.
    block_r = rank_block(call.r, min(tile.BLOCK_N, 128 if device.tma else 16 * product.num_warps))
    # A matrix instruction has 64 rows for each four warps.
    rows = max(tile.BLOCK_M, 16 * product.num_warps)
    drawn = call.dropout and not call.masked
    depth = tile.BLOCK_K
    if call.dtype != torch.float32:
        depth = max(64, tile.BLOCK_K * tile.BLOCK_M // rows)
    elif drawn:
        # A wider part of a mask would spill registers beside float32's products of 64 rows.
        depth = 16
    tile = Tile(rows, tile.BLOCK_N, depth, product.num_warps, tile.num_stages)
    tiles = cdiv(call.m, rows) * cdiv(call.r, block_r)
    # The product's shared memory leaves room for one program a processor.
    splits = plan_split_k(device, tiles, cdiv(call.k, depth), programs=1)
    # What a mask leaves of X passes through shared memory.
    masked_x = bytes_of(call, rows * depth) if drawn else 0
    tile = _deeper(tile, device, depth * bytes_of(call, rows, block_r), call, product, masked_x)
    return Plan(tile, reason, block_r, tiles, splits)


def _grad_plan(device: Device, call: Call, product: Tile) -> Plan:
    """For dB, by programs with the warps of ``product``."""
    plan = co_scheduled_grad_plan(device, call, True, product.num_warps)
    stage = plan.tile.BLOCK_K * bytes_of(call, plan.tile.BLOCK_M + plan.block_r)
    return plan._replace(tile=_deeper(plan.tile, device, stage, call, product))


def _deeper(
    tile: Tile, device: Device, bytes_a_stage: int, call: Call, product: Tile, other_bytes: int = 0
) -> Tile:
    """Like ``fit``, but with up to 7 stages in the memory of ``product``: few programs must keep
    many bytes in flight.
    """
    buffers = product.num_stages if device.tma else product.num_stages - 1
    product_bytes = buffers * linear_stage(call, product)
    # The product's memory serves S and dB first.
    unusable = max(device.shared_limit - product_bytes, other_bytes)
    deep = fit(tile._replace(num_stages=7), device, bytes_a_stage, unusable)
    usual = fit(tile, device, bytes_a_stage)
    return max(usual, deep, key=lambda fitted: fitted.num_stages)

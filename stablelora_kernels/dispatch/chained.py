"""S, and dB, in the launch of the product that needs S: their tiles, and by how many programs.
Needs no Triton.
"""

from __future__ import annotations

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
MEMORY_CLOCKS, STEP_CLOCKS, DRAWN_CLOCKS, COLUMN_CLOCKS = 1400, 200, 1250, 4


def chained_plans(
    device: Device, call: Call, product: Tile, db: bool, spare: int = 0
) -> tuple[Plan, Plan | None, int]:
    """For S, and with ``db`` for dB, in the launch of ``product``; and the number of their
    programs, which take part after part.

    ``spare`` processors have a tile of the product less than the others. S and dB are theirs alone
    if that takes no longer.
    """
    s, b = _down_plan(device, call, product), _grad_plan(device, call, product) if db else None
    if spare:
        drawn = call.dropout and not call.masked
        few, clocks = _by_few(s, call.k, spare, DRAWN_CLOCKS if drawn else STEP_CLOCKS)
        few_b, more = _by_few(b, call.m, spare, STEP_CLOCKS) if b else (None, 0)
        # A little longer still costs less than a phase of all processors.
        if clocks + more <= 1.1 * cdiv(call.k, 64) * COLUMN_CLOCKS * product.BLOCK_N:
            return few, few_b, min(spare, few.programs + (few_b.programs if few_b else 0))
    return s, b, s.programs + (b.programs if b else 0)


def _by_few(plan: Plan, size: int, programs: int, step_clocks: float) -> tuple[Plan, float]:
    """``plan``, whose sums run over ``size``, for so few programs; and the clocks that they take."""
    splits = min(plan.splits, max(1, programs // plan.tiles))
    few = plan._replace(splits=without_empty_parts(cdiv(size, plan.tile.BLOCK_K), splits))
    step = max(step_clocks, MEMORY_CLOCKS / (plan.tile.num_stages - 1))
    return few, cdiv(few.programs, programs) * cdiv(size, 64 * few.splits) * step


def _down_plan(device: Device, call: Call, product: Tile) -> Plan:
    tile, reason = pick_tile(DOWN_TILES, device, call)
    # A wider block of ranks for few warps would spill registers where they hold the sums' operands.
    block_r = rank_block(call.r, min(tile.BLOCK_N, 128 if device.tma else 16 * product.num_warps))
    # A matrix instruction has 64 rows for each four warps.
    rows = max(tile.BLOCK_M, 16 * product.num_warps)
    depth = (
        max(64, tile.BLOCK_K * tile.BLOCK_M // rows)
        if call.dtype != torch.float32
        else tile.BLOCK_K
    )
    tile = Tile(rows, tile.BLOCK_N, depth, product.num_warps, tile.num_stages)
    tiles = cdiv(call.m, rows) * cdiv(call.r, block_r)
    # The product's shared memory leaves room for one program a processor.
    splits = plan_split_k(device, tiles, cdiv(call.k, depth), programs=1)
    # What a mask leaves of X passes through shared memory.
    kept = bytes_of(call, rows * depth) if call.dropout and not call.masked else 0
    tile = _deeper(tile, device, depth * bytes_of(call, rows, block_r), call, product, kept)
    return Plan(tile, reason, block_r, tiles, splits)


def _grad_plan(device: Device, call: Call, product: Tile) -> Plan:
    plan = co_scheduled_grad_plan(device, call, True, product.num_warps)
    stage = plan.tile.BLOCK_K * bytes_of(call, plan.tile.BLOCK_M + plan.block_r)
    return plan._replace(tile=_deeper(plan.tile, device, stage, call, product))


def _deeper(
    tile: Tile, device: Device, bytes_a_stage: int, call: Call, product: Tile, other_bytes: int = 0
) -> Tile:
    """Like ``fit``, but with up to 7 stages in the memory of ``product``: few programs must keep
    many bytes in flight.
    """
    own = (product.num_stages - (not device.tma)) * linear_stage(call, product, 0, True)
    deep = fit(
        tile._replace(num_stages=7),
        device,
        bytes_a_stage,
        max(device.shared_limit - own, other_bytes),
    )
    return max(fit(tile, device, bytes_a_stage), deep, key=lambda each: each.num_stages)

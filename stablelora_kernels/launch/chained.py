"""S's programs, and dB's, in the launch of the product that needs S: what its kernels take for them."""

from __future__ import annotations

from typing import Any, NamedTuple

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.launch.counters import counters
from stablelora_kernels.launch.lora_common import Gradients, Product, co_scheduled_grad, split_k_buffers


class ChainedS(NamedTuple):
    """The programs, and the kernel's arguments for them, in its order."""

    programs: int
    pointers: tuple[Any, ...]
    # S_PROGRAMS, S_SPLITS, DB_PROGRAMS, DB_SPLITS, FLAG_M
    counts: tuple[int, ...]
    # Of T, which is dB's S.
    stride: int
    constants: dict[str, Any]


_NONE = ChainedS(
    0, (None,) * 7, (0, 1, 0, 1, 1), 0,
    {"CHAINED": False, "S_DROPOUT": False, "S_EVEN_K": False, "S_BLOCK_M": 1, "S_BLOCK_K": 1, "S_BLOCK_R": 1, "S_STAGES": 1,
     "S_PRECISION": "ieee", "HAS_DB": False, "DB_UNIT": 1.0, "DB_M": 1, "DB_C": 1, "DB_R": 1, "DB_STAGES": 1,
     "DB_PRECISION": "ieee"},
)  # fmt: skip


def chained_s(device: Device, p: Product, g: Gradients | None, tile: Tile, chained: bool) -> ChainedS:
    """The programs for ``p.s``, and with ``g`` for its dB, in the launch of ``p``, whose tile is ``tile``; or none."""
    if not chained:
        return _NONE
    c = p.call
    plan = tiles.chained_shrink_plan(device, c, tile)
    rows = tiles.flag_rows(c.m, tile, plan.tile)
    parts, count = split_k_buffers(plan, plan.tile.BLOCK_M * plan.block_r, p.x)
    grad = co_scheduled_grad(device, g, None if g is None else g.db, tile.num_warps, lane=2)
    t = g.s if g is not None and grad.programs else None
    chain = counters(tiles.CHAIN_HEAD + -(-c.m // rows), p.x.device, lane=4)
    programs = plan.tiles * plan.splits + grad.programs
    return ChainedS(
        programs,
        (chain, parts, count, t, *grad.pointers),
        (programs, plan.splits, grad.programs, grad.splits, rows),
        0 if t is None else t.stride(0),
        {"CHAINED": True, "S_DROPOUT": c.dropout and not c.masked, "S_EVEN_K": c.k % plan.tile.BLOCK_K == 0,
         "S_BLOCK_M": plan.tile.BLOCK_M, "S_BLOCK_K": plan.tile.BLOCK_K, "S_BLOCK_R": plan.block_r,
         "S_STAGES": plan.tile.num_stages,
         "S_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward"),
         "HAS_DB": grad.programs > 0, "DB_UNIT": 1.0 if g is None else g.unit, "DB_M": grad.constants["GRAD_M"],
         "DB_C": grad.constants["GRAD_C"], "DB_R": grad.constants["GRAD_R"], "DB_STAGES": grad.constants["GRAD_STAGES"],
         "DB_PRECISION": grad.constants["GRAD_PRECISION"]},
    )  # fmt: skip

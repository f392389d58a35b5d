"""How gate and up of a gated MLP are computed with their activation: the form, the tile and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import Choice, is_idle
from stablelora_kernels.dispatch.settings import get_kernel
from stablelora_kernels.dispatch.tiles import Plan, Tile, TileRule, fit, pick_tile, rank_block


class MLPRule(NamedTuple):
    # Of gate's and up's call; the last argument says whether tensor descriptors can hold all matrices.
    applies: Callable[[Device, Call, bool], bool]
    form: str
    reason: str


# Gate and up with the activation: in one kernel, or each in a kernel of its own and the activation in a third one.
MLP_RULES = (
    MLPRule(
        lambda d, c, described: c.dtype == torch.float32,
        "separate",
        "float32: two accumulators do not fit in registers, or the vendor's library computes the product",
    ),
    MLPRule(
        lambda d, c, described: c.m <= problem.SMALL_M,
        "separate",
        f"up to {problem.SMALL_M} rows: loading W is the bottleneck, so programs split each tile's K",
    ),
    MLPRule(
        lambda d, c, described: is_idle(d, c),
        "separate",
        "128 x 128 tiles would leave two fifths of the GPU idle; separate products split each tile's K",
    ),
    MLPRule(
        lambda d, c, described: d.generation >= 100 and d.tma and c.m >= 1024,
        "separate",
        "data-center Blackwell: the vendor's library computes gate and up, as it does a single projection",
    ),
    MLPRule(
        lambda d, c, described: described and d.tma,
        "tma",
        "one kernel for gate and up: x is read once, and the activation needs no launch of its own",
    ),
    MLPRule(
        lambda d, c, described: True,
        "pointers",
        "one kernel for gate and up, in narrower tiles: x is read once, and the activation needs no launch of its own",
    ),
)


def choose_gate_up(device: Device, call: Call, described: bool) -> Choice:
    """``"tma"``, ``"pointers"`` or ``"separate"`` for gate's and up's ``call``; "split" forces one of the first two."""
    forced = get_kernel()
    if forced not in ("auto", "split"):
        return Choice("separate", f"kernel {forced!r} is forced and computes one projection")
    rows = MLP_RULES if forced == "auto" else [rule for rule in MLP_RULES if rule.form != "separate"]
    return next(Choice(rule.form, rule.reason) for rule in rows if rule.applies(device, call, described))


# Gate and up of an MLP (lora_gate_up): two accumulators of this size.
GATE_UP_TMA_TILES = (
    TileRule(
        lambda d, c: True, Tile(128, 128, 64, 8, 4), "two accumulators fill the registers; x is read once for both"
    ),
)
GATE_UP_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 32, 32, 4, 3), "float32: products are in registers"),
    TileRule(lambda d, c: True, Tile(128, 64, 64, 8, 3), "two accumulators take the registers of the default tile"),
)


def gate_up_plan(device: Device, call: Call, tma: bool, activation: str) -> tuple[Plan, int]:
    """For gate and up in one kernel, and the parts of a tile's columns that it finishes one after another.

    ``call`` has the larger rank. The TMA kernel's programs stay and take tile after tile.
    """
    tile, reason = pick_tile(GATE_UP_TMA_TILES if tma else GATE_UP_TILES, device, call)
    item = call.dtype.itemsize
    # A wider block of ranks, or wider parts, would spill registers beside two accumulators. GELU's erf takes most of them.
    erf = activation == "gelu"
    block_r = rank_block(call.r, (16 if erf else 32) if tma else problem.MAX_FUSED_R)
    parts = (8 if erf else 4) if tma else 1
    # After the main loop, its memory serves the branches. A part of a result is stored from memory of its own.
    stored = tile.BLOCK_M * tile.BLOCK_N // parts * item if tma else 0
    tile = fit(tile, device, tile.BLOCK_K * (tile.BLOCK_M + 2 * tile.BLOCK_N) * item, stored)
    return Plan(tile, reason, block_r, cdiv(call.m, tile.BLOCK_M) * cdiv(call.n, tile.BLOCK_N)), parts

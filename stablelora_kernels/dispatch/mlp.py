"""How gate and up of a gated MLP are computed with their activation: the form, the tile and its parts."""

from __future__ import annotations

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import Call, Device, Rule, cdiv, first
from stablelora_kernels.dispatch.rules import Choice, is_idle
from stablelora_kernels.dispatch.settings import get_kernel
from stablelora_kernels.dispatch.tiles import Plan, Tile, fit, pick_tile, rank_block

# Gate and up with the activation: in one kernel, or each in a kernel of its own and the activation in a third one. The rows
# take gate's and up's call, and whether tensor descriptors can hold all matrices.
MLP_RULES = (
    Rule(lambda d, c, described: c.dtype == torch.float32,
         "separate", "float32: gate and up together do not fit in registers, or the vendor's library computes the product"),
    Rule(lambda d, c, described: c.m <= problem.SMALL_M,
         "separate", f"up to {problem.SMALL_M} rows: reading W takes the time, so programs split each tile's K"),
    Rule(lambda d, c, described: is_idle(d, c),
         "separate", "128 x 128 tiles would leave two fifths of the GPU idle; separate products split each tile's K"),
    Rule(lambda d, c, described: d.generation >= 100 and d.tma and c.m >= 1024,
         "separate", "data-center Blackwell: the vendor's library computes gate and up, as it does a single projection"),
    Rule(lambda d, c, described: described and d.tma,
         "tma", "one kernel for gate and up: x is read once, and the activation needs no launch of its own"),
    Rule(lambda d, c, described: True,
         "pointers", "one kernel for gate and up, in narrower tiles: x is read once, and the activation needs no launch"),
)  # fmt: skip


def choose_gate_up(device: Device, call: Call, described: bool) -> Choice:
    """``"tma"``, ``"pointers"`` or ``"separate"`` for gate's and up's ``call``; "split" forces one of the first two."""
    forced = get_kernel()
    if forced not in ("auto", "split"):
        return Choice("separate", f"kernel {forced!r} is forced and computes one projection")
    rows = [rule for rule in MLP_RULES if forced == "auto" or rule.choice != "separate"]
    return Choice(*first(rows, device, call, described))


# Gate and up of an MLP (lora_gate_up): two accumulators of this size.
GATE_UP_TMA_TILES = (Rule(lambda d, c: True, Tile(128, 128, 64, 8, 4), "gate and up share each read of x"),)
GATE_UP_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32, Tile(64, 32, 32, 4, 3), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: True, Tile(128, 64, 64, 8, 3), "no larger tile of gate and up fits in registers"),
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

"""Which tile a kernel takes: one table a kernel, each row with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.problem import SMALL_M, Call, Device, cdiv


class Tile(NamedTuple):
    """Rows, columns and depth of a program's step; for dA and dB, their columns and the rows that are summed over."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class TileRule(NamedTuple):
    applies: Callable[[Device, Call], bool]
    tile: Tile
    reason: str


def rank_block(r: int, limit: int) -> int:
    """The rank padded to what a matrix instruction takes, a power of two of at least 16; ``limit`` where it is looped over."""
    return min(max(16, 1 << (r - 1).bit_length()), limit)


# Y's tiles read through descriptors (lora_linear_tma).
TMA_TILES = (
    TileRule(
        lambda d, c: c.n < 1024 or c.m < 1024,
        Tile(128, 128, 64, 8, 4),
        "a small result needs more tiles to fill the GPU",
    ),
    TileRule(
        lambda d, c: c.masked and (c.r > 32 or c.add),
        Tile(128, 128, 64, 8, 4),
        "a rank block of 64, or Y's earlier values, beside the mask's random numbers spill registers in a wider tile",
    ),
    TileRule(
        lambda d, c: d.generation >= 100,
        Tile(128, 128, 64, 8, 4),
        "Blackwell: a wider tile and its branch outgrow tensor memory, which the compiler answers with an empty kernel",
    ),
    TileRule(
        lambda d, c: True,
        Tile(128, 256, 64, 8, 3),
        "the widest matrix instruction, whose operands are read 1.5 times less often than 128 by 128",
    ),
)


# Y's tiles read through pointers (lora_linear).
LINEAR_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 4, 3), "float32: products are in registers"),
    TileRule(
        lambda d, c: d.shared_limit < 200_000 and c.r > 32,
        Tile(64, 128, 64, 4, 3),
        "a wide rank block beside 128 by 128 spills where accumulators are in registers, or outgrows shared memory",
    ),
    TileRule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "the usual tile"),
)


# Y for few rows (lora_linear_split_k): BLOCK_M is 16 or 64, whichever M fits.
SPLIT_K_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 64, 4, 3), "float32: twice the bytes an element"),
    TileRule(lambda d, c: d.shared_limit < 100_000, Tile(16, 64, 64, 4, 3), "little shared memory"),
    TileRule(lambda d, c: True, Tile(16, 64, 128, 4, 4), "many bytes of W on their way at once, in narrow tiles"),
)


# Y with a quantized W (lora_linear_quantized): BLOCK_M is 16 or 64 where M fits.
QUANTIZED_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 32, 8, 2), "float32: products are in registers"),
    TileRule(lambda d, c: not d.nvidia, Tile(64, 64, 64, 4, 2), "wider tiles of W, dequantized in registers, spill"),
    TileRule(lambda d, c: c.m <= 16, Tile(16, 64, 128, 4, 3), "many bytes of W on their way at once, in narrow tiles"),
    TileRule(lambda d, c: d.shared_limit < 150_000, Tile(64, 64, 64, 4, 3), "little shared memory"),
    TileRule(lambda d, c: c.m <= SMALL_M, Tile(64, 128, 64, 4, 3), "rows of one wide matrix instruction"),
    TileRule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "each element of W is dequantized for as many rows as fit"),
)


# S (lora_shrink): rows, ranks and K; BLOCK_N is the rank's block.
SHRINK_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 128, 32, 4, 3), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 64 and d.shared_limit < 100_000, Tile(64, 128, 64, 8, 3), "little shared memory"),
    TileRule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so that X is read once"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 64, 4, 4), "random numbers for 64 by 128 would take most registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 128, 4, 3), "rows of one wide matrix instruction, X read in long runs"),
)


# S of several projections (lora_shrink_group), likewise; r is the largest rank's block.
SHRINK_GROUP_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 8, 3), "float32: products are in registers"),
    TileRule(
        lambda d, c: c.r > 32 and c.dropout and d.nvidia and not d.tma,
        Tile(32, 64, 32, 8, 3),
        "three sums, random numbers and X in registers: more rows spill",
    ),
    TileRule(lambda d, c: c.r > 32 and c.dropout, Tile(64, 64, 32, 8, 3), "three sums and random numbers in registers"),
    TileRule(lambda d, c: c.r > 32, Tile(64, 64, 64, 8, 3), "three sums in registers"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 32, 4, 4), "random numbers for each projection in registers"),
    TileRule(
        lambda d, c: True, Tile(128, 64, 64, 8, 3), "the A's, more bytes than a step of X, are read once for 128 rows"
    ),
)


# The branch onto a finished product (lora_expand).
EXPAND_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 3), "rows of one wide matrix instruction"),
)


# dA and dB (lora_weight_grads): BLOCK_M columns of the result, BLOCK_N ranks, BLOCK_K rows that are summed over.
WEIGHT_GRADS_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(32, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so that X and dY are read once"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "rows of one wide matrix instruction"),
)


# dA of several projections (lora_weight_grads_group), likewise.
WEIGHT_GRADS_GROUP_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(32, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 32, Tile(64, 64, 32, 8, 3), "three sums in registers"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 32, 4, 4), "random numbers for each projection in registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "rows of one wide matrix instruction"),
)


def pick_tile(
    rules: tuple[TileRule, ...], device: Device, call: Call, measured: Tile | None = None
) -> tuple[Tile, str]:
    """The tile of the first rule that applies, or the one that was measured to be faster, and the reason for it.

    It is still to be fitted into shared memory.
    """
    if measured is not None:
        return measured, "measured to be the fastest"
    return next((rule.tile, rule.reason) for rule in rules if rule.applies(device, call))


def fit(tile: Tile, device: Device, bytes_a_stage: int, bytes_beside: int = 0) -> Tile:
    """``tile`` with the deepest pipeline of at most its own, and at least 2, whose buffers fit into shared memory."""
    # Matrix units that read shared memory while it is being filled need a buffer more.
    spare = 0 if device.tma else 1
    stages = tile.num_stages
    while stages > 2 and (stages - spare) * bytes_a_stage + bytes_beside > device.shared_limit:
        stages -= 1
    return tile._replace(num_stages=stages)


def splits(device: Device, tiles: int, steps: int, programs: int = 2, least_steps: int = 4, most: int = 16) -> int:
    """How many programs share a tile's sum: enough for ``programs`` on every processor, each with ``least_steps`` steps."""
    return max(1, min(programs * device.processors // max(tiles, 1), steps // least_steps, most))


def chunks(rows: int, block_r: int, steps: int) -> int:
    """Into how many chunks of rows dB's sum is cut beside dS, so that what one of the two has read is in L2 for the other.

    A chunk's part of dB, stored and read again in float32, is an eighth of the chunk of dY that it sums up. Of ``steps`` of the
    sum, a chunk has at least 4.
    """
    return max(1, min(cdiv(rows, 32 * block_r), steps // 4))

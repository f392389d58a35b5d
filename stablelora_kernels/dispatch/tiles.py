"""Which tile a kernel takes, and how many programs share its sum.

One table a kernel, each row with its reason; then one plan a kernel, which fits the tile to the
device and the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import Call, Device, Rule, cdiv, first


class Tile(NamedTuple):
    """Rows, columns and depth of a program's step; for dA and dB, their columns and the rows of the
    sum.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def rounds(device: Device, call: Call, rows: int, columns: int) -> int:
    """Tiles of Y that the busiest processor computes, one after another."""
    return cdiv(cdiv(call.m, rows) * cdiv(call.n, columns), device.processors)


def filled(device: Device, programs: int) -> float:
    """The share of the processors that ``programs`` keep busy, until the last of them ends."""
    return programs / (max(1, cdiv(programs, device.processors)) * device.processors)


# Y's tiles read through descriptors (lora_linear_tma).
TMA_TILES = (
    # A tile of 128 x 256 takes twice as long as one of 128 x 128 by operations, 1.5 times by what
    # it reads.
    Rule(lambda d, c: 8 * rounds(d, c, 128, 256) > 5 * rounds(d, c, 128, 128), Tile(128, 128, 64, 8, 4),
         "wider tiles would leave more of the GPU idle in the last round than they save in reads"),
    Rule(lambda d, c: True, Tile(128, 256, 64, 8, 3), "the widest tile: it reads a third less than 128 x 128 tiles"),
)  # fmt: skip

# A branch alone (lora_linear), which reads its base once in any tile.
BRANCH_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 4, 3), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: d.shared_limit < 200_000 and c.r > 32, Tile(64, 128, 64, 4, 3),
         "rank above 32: a 128 x 128 tile would not fit in registers or shared memory"),
    Rule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "the default tile"),
)  # fmt: skip


def _widest_pays(device: Device, call: Call) -> bool:
    """Whether 128 x 256 tiles read through pointers spill no registers and take no more time by
    operations.
    """
    # A mask, a gated MLP's gradients and loads of single elements would spill beside this
    # accumulator.
    lean = (
        call.dtype != torch.float32
        and not (call.masked or call.gated)
        and (call.n | call.k) % 16 == 0
    )
    # In a chained launch, S of high ranks would outgrow a small shared memory.
    known = (
        device.generation >= 80
        and not device.tma
        and (call.r <= 32 or device.shared_limit > 150_000)
    )
    # One takes twice as long as a tile of 128 x 128; a last round that is less full may add a
    # thirty-second.
    return (
        lean
        and known
        and 64 * rounds(device, call, 128, 256) <= 33 * rounds(device, call, 128, 128)
    )


# Y's tiles read through pointers (lora_linear).
LINEAR_TILES = (
    Rule(_widest_pays, Tile(128, 256, 32, 8, 4),
         "the widest tile: it reads a quarter less than 128 x 128 tiles, in half as many rounds"),
    *BRANCH_TILES,
)  # fmt: skip

# Y for few rows or columns (lora_linear_split_k); up to 64 rows linear_split_k_plan sets BLOCK_M.
SPLIT_K_TILES = (
    Rule(lambda d, c: c.m > 128, Tile(128, 128, 64, 8, 4),
         "many rows, few tiles: each row of x serves 128 columns, and each column 128 rows"),
    Rule(lambda d, c: c.m > problem.SMALL_M, Tile(128, 64, 64, 4, 4),
         "one tile holds all rows, so W is read once; narrow tiles let twice as many programs read it"),
    Rule(lambda d, c: c.dtype == torch.float32 and c.m > 16, Tile(64, 64, 32, 4, 4),
         "float32: no larger tile fits in registers"),
    Rule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 64, 4, 3), "float32: twice the bytes an element"),
    Rule(lambda d, c: d.shared_limit < 100_000, Tile(16, 64, 64, 4, 3), "little shared memory"),
    Rule(lambda d, c: True, Tile(16, 64, 128, 4, 4), "narrow tiles keep many bytes of W in flight"),
)  # fmt: skip

# Y with a quantized W (lora_linear_quantized); linear_quantized_plan lowers BLOCK_M for few rows.
QUANTIZED_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 32, 8, 2), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: not d.nvidia, Tile(64, 64, 64, 4, 2), "no larger tile of dequantized W fits in registers"),
    Rule(lambda d, c: c.m <= 16, Tile(16, 64, 128, 4, 3), "narrow tiles keep many bytes of W in flight"),
    Rule(lambda d, c: d.shared_limit < 150_000, Tile(64, 64, 64, 4, 3), "little shared memory"),
    Rule(lambda d, c: c.m <= problem.SMALL_M and c.masked and not d.tma, Tile(64, 64, 64, 4, 3),
         "a mask of few rows: no wider tile fits in registers"),
    Rule(lambda d, c: c.m <= problem.SMALL_M, Tile(64, 128, 64, 4, 3), "64 rows fill one matrix instruction"),
    Rule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "as many rows as fit share each dequantized element of W"),
)  # fmt: skip

# W in full from 4 or 8 bits (dequantize): BLOCK_N rows and BLOCK_K columns.
DEQUANTIZE_TILES = (Rule(lambda d, c: True, Tile(1, 16, 256, 4, 1), "16 bytes of W a thread"),)

# The losses of a head's logits (cross_entropy): BLOCK_N columns of one row at a time.
CROSS_ENTROPY_TILES = (
    Rule(lambda d, c: True, Tile(1, 4096, 1, 8, 2), "32 bytes of logits a thread, and its sums in registers"),
)  # fmt: skip

# S (lora_down): rows, ranks and K; BLOCK_N is the rank's block.
DOWN_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32, Tile(64, 128, 32, 4, 3), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 64 and d.shared_limit < 100_000, Tile(64, 128, 64, 8, 3), "little shared memory"),
    Rule(lambda d, c: c.r > 128 and c.dropout, Tile(64, 256, 32, 8, 3),
         "rank above 128, dropout: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so x is read once"),
    Rule(lambda d, c: c.dropout, Tile(64, 64, 64, 4, 4), "dropout: no larger tile fits in registers"),
    Rule(lambda d, c: True, Tile(64, 64, 128, 4, 3), "64 rows fill one matrix instruction; x is read in long runs"),
)  # fmt: skip

# S of several projections, likewise; r is the largest rank.
DOWN_GROUP_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 8, 3), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 32 and c.dropout and d.nvidia and not d.tma, Tile(32, 64, 32, 8, 3),
         "rank above 32, dropout: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 32 and c.dropout, Tile(64, 64, 32, 8, 3),
         "rank above 32, dropout: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 32, Tile(64, 64, 64, 8, 3), "rank above 32: no larger tile fits in registers"),
    Rule(lambda d, c: c.dropout, Tile(64, 64, 32, 4, 4), "dropout: no larger tile fits in registers"),
    Rule(lambda d, c: True, Tile(128, 64, 64, 8, 3), "128 rows share one read of the A matrices"),
)  # fmt: skip

# dA and dB (lora_weight_grads): BLOCK_M columns of the result, BLOCK_N ranks, BLOCK_K rows of the
# sum.
WEIGHT_GRADS_TILES = (
    Rule(lambda d, c: c.dtype == torch.float32 and c.gated and c.masked, Tile(32, 64, 16, 4, 2),
         "float32, a mask and a gated MLP: no larger tile fits in registers"),
    Rule(lambda d, c: c.dtype == torch.float32, Tile(32, 64, 32, 4, 2), "float32: no larger tile fits in registers"),
    Rule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so x and dy are read once"),
    Rule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "64 columns fill one matrix instruction"),
)  # fmt: skip

# dA of several projections, likewise.
WEIGHT_GRADS_GROUP_TILES = (
    Rule(
        lambda d, c: c.dtype == torch.float32,
        Tile(32, 64, 32, 4, 2),
        "float32: no larger tile fits in registers",
    ),
    Rule(
        lambda d, c: c.r > 32,
        Tile(64, 64, 32, 8, 3),
        "rank above 32: no larger tile fits in registers",
    ),
    Rule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "64 columns fill one matrix instruction"),
)


class Plan(NamedTuple):
    """A kernel's tile, whose pipeline fits into shared memory, and the programs that compute with
    it.
    """

    tile: Tile
    reason: str
    # Ranks in a block, padded.
    block_r: int
    # Tiles of the result.
    tiles: int
    # Programs that share a tile: the split-K factor.
    splits: int = 1
    # Parts of a tile's columns that a program finishes one after another.
    column_parts: int = 1

    @property
    def programs(self) -> int:
        return self.tiles * self.splits


# Most sums that programs may share in one launch: a sum has a counter. More tiles than this fill
# any GPU without sharing.
MAX_SHARED_SUMS = 2048


def pick_tile(
    rules: tuple[Rule, ...], device: Device, call: Call, measured: Tile | None = None
) -> tuple[Tile, str]:
    """The tile of the first rule that applies, or the ``measured`` one, and its reason. :func:`fit`
    comes next.
    """
    if measured is not None:
        return measured, "measured: the fastest"
    return first(rules, device, call)


def fit(tile: Tile, device: Device, bytes_a_stage: int, other_bytes: int = 0) -> Tile:
    """``tile`` with as many stages, at least 2 and at most its own, as fit into shared memory with
    ``other_bytes``.
    """
    # Matrix units that read shared memory while loads fill it need one buffer more.
    spare = 0 if device.tma else 1
    stages = tile.num_stages
    while stages > 2 and (stages - spare) * bytes_a_stage + other_bytes > device.shared_limit:
        stages -= 1
    return tile._replace(num_stages=stages)


def rank_block(r: int, limit: int) -> int:
    """The rank padded to a power of two of at least 16, for matrix instructions; ``limit`` where
    the kernel loops over it.
    """
    return min(max(16, 1 << (r - 1).bit_length()), limit)


def plan_split_k(device: Device, tiles: int, steps: int, programs: int = 2) -> int:
    """Programs that share a tile's sums: enough for ``programs`` on every processor, each with at
    least 4 steps.
    """
    splits = min(programs * device.processors // max(tiles, 1), steps // 4, 16)
    return without_empty_parts(steps, max(1, splits))


def fill_split_k(device: Device, tiles: int, steps: int) -> int:
    """The fewest programs for a tile that keep seven tenths of the processors busy, or those that
    keep most of them busy.

    Partial sums of many rows cost more than the few processors that stay idle.
    """
    if tiles > MAX_SHARED_SUMS:
        return 1
    most = max(1, min(steps // 4, 16))
    candidates = [without_empty_parts(steps, splits) for splits in range(1, most + 1)]
    for splits in candidates:
        if filled(device, tiles * splits) >= 0.7:
            return splits
    return max(candidates, key=lambda splits: filled(device, tiles * splits))


def without_empty_parts(steps: int, splits: int) -> int:
    """``splits`` less those whose part, of ceil(steps / splits) steps, would be empty; the others'
    parts stay as they are.
    """
    return cdiv(steps, cdiv(steps, splits))


def bytes_of(call: Call, elements: int, of_lora: int = 0) -> int:
    """Bytes of ``elements`` of x, W or Y, and of ``of_lora`` elements of A or B."""
    return elements * call.dtype.itemsize + of_lora * call.lora_dtype.itemsize


def linear_stage(call: Call, tile: Tile, block_r: int = 0) -> int:
    """Bytes of shared memory for a step of Y's main loop, and of S with ``block_r`` ranks if it
    computes that too.
    """
    return tile.BLOCK_K * bytes_of(call, tile.BLOCK_M + tile.BLOCK_N, block_r)


def down_plan(device: Device, call: Call, projections: int = 1) -> Plan:
    """For S of several ``projections``, ``call`` has the largest rank."""
    tile, reason = pick_tile(DOWN_GROUP_TILES if projections > 1 else DOWN_TILES, device, call)
    block_r = rank_block(call.r, tile.BLOCK_N)
    tiles = cdiv(call.m, tile.BLOCK_M) * cdiv(call.r, block_r)
    splits = plan_split_k(device, tiles, cdiv(call.k, tile.BLOCK_K))
    tile = fit(tile, device, tile.BLOCK_K * bytes_of(call, tile.BLOCK_M, projections * block_r))
    return Plan(tile, reason, block_r, tiles, splits)


# Integers ahead of a chain's flags, see kernels/lora/chain.py.
CHAIN_HEAD = 4
# Most rows of a chained launch: each 64 have a flag, or more.
MAX_CHAINED_M = 64 * (MAX_SHARED_SUMS - CHAIN_HEAD)


def linear_plan(
    device: Device, call: Call, measured: Tile | None = None, has_w: bool = True
) -> Plan:
    """For Y through pointers. Without ``has_w`` the branch is alone."""
    table = LINEAR_TILES if has_w else BRANCH_TILES
    tile, reason = pick_tile(table, device, call, measured)
    # A wider block of ranks would spill registers beside the widest accumulator, or beside a mask
    # without Hopper's units.
    widest = tile.BLOCK_M * tile.BLOCK_N > 128 * 128
    narrow = widest or (call.masked and not device.tma)
    block_r = rank_block(call.r, 32 if narrow else problem.MAX_BLOCK_R)
    # The branch's operands need shared memory too.
    branch = block_r * bytes_of(call, tile.BLOCK_M, tile.BLOCK_N)
    tile = fit(tile, device, linear_stage(call, tile), branch)
    return Plan(tile, reason, block_r, tiles_of(call, tile))


def tiles_of(call: Call, tile: Tile) -> int:
    """Tiles of Y."""
    return cdiv(call.m, tile.BLOCK_M) * cdiv(call.n, tile.BLOCK_N)


def linear_split_k_plan(
    device: Device, call: Call, measured: Tile | None = None, computes_s: bool = False
) -> Plan:
    """For Y of few rows or columns, whose tiles programs share. ``computes_s``: and which compute
    the S that they need.
    """
    tile, reason = pick_tile(SPLIT_K_TILES, device, call, measured)
    few = call.m <= problem.SMALL_M
    if few:
        # All rows are in one tile.
        tile = tile._replace(BLOCK_M=16 if call.m <= 16 else 64)
    # A wider block of ranks beside a mask would spill registers.
    narrow = call.masked and not (few or device.tma)
    block_r = rank_block(call.r, 32 if narrow else problem.MAX_BLOCK_R)
    tiles = tiles_of(call, tile)
    steps = cdiv(call.k, tile.BLOCK_K)
    if few:
        # Partial sums of 64 rows are as large as what a program reads of W in a few steps: one
        # program a processor is enough.
        programs = 2 if tile.BLOCK_M == 16 else 1
        splits = plan_split_k(device, tiles, steps, programs=programs)
    else:
        splits = fill_split_k(device, tiles, steps)
    tile = fit(tile, device, linear_stage(call, tile, block_r if computes_s else 0))
    return Plan(tile, reason, block_r, tiles, splits)


def linear_tma_plan(device: Device, call: Call, measured: Tile | None = None) -> Plan:
    """For Y through descriptors, by programs that take tile after tile."""
    tile, reason = pick_tile(TMA_TILES, device, call, measured)
    # A wider block of ranks would spill registers beside the widest accumulator and float32's casts
    # or a mask.
    narrow = tile.BLOCK_N > 128 and (call.lora_dtype != call.dtype or call.masked)
    block_r = rank_block(call.r, 32 if narrow else problem.MAX_BLOCK_R)
    # A mask is read by words of 32 columns. Beside it, a gated MLP's gradients or 32 ranks would
    # spill in wider parts.
    parts = 2
    if call.gated or (call.masked and block_r > 16):
        parts = 8 if call.gated and call.masked else 4
    parts = min(parts, tile.BLOCK_N // 32)
    columns = tile.BLOCK_N // parts
    # The stored part of Y, or the parts of G, U, dG and dU, and the branch's operands need shared
    # memory too.
    stored = 4 if call.gated else 1
    finish = bytes_of(call, stored * tile.BLOCK_M * columns + block_r * (tile.BLOCK_M + columns))
    tile = fit(tile, device, linear_stage(call, tile), finish)
    return Plan(tile, reason, block_r, tiles_of(call, tile), column_parts=parts)


def linear_quantized_plan(device: Device, call: Call, bits: int) -> Plan:
    """For Y from a W of ``bits`` bits an element, which the product's loop dequantizes."""
    tile, reason = pick_tile(QUANTIZED_TILES, device, call)
    rows = 128
    if call.m <= problem.SMALL_M:
        rows = 16 if call.m <= 16 else 64
    tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, rows))
    block_r = rank_block(call.r, problem.MAX_BLOCK_R)
    # In shared memory: every stage's X and stored W; W once in float32 and once in X's dtype; the
    # branch's operands.
    stage = tile.BLOCK_K * (bytes_of(call, tile.BLOCK_M) + tile.BLOCK_N * bits // 8)
    weight = tile.BLOCK_K * tile.BLOCK_N * (4 + call.dtype.itemsize)
    tile = fit(tile, device, stage, weight + block_r * bytes_of(call, tile.BLOCK_M, tile.BLOCK_N))
    tiles = tiles_of(call, tile)
    splits = plan_split_k(device, tiles, cdiv(call.k, tile.BLOCK_K))
    return Plan(tile, reason, block_r, tiles, splits)


class WeightGradsPlan(NamedTuple):
    """The plan for a launch of dA and dB, and for the tiles of each."""

    both: Plan
    da: Plan
    db: Plan


def weight_grads_plan(
    device: Device, call: Call, need_a: bool, need_b: bool, projections: int = 1
) -> WeightGradsPlan:
    """For dA and dB in a launch of their own.

    For dA of several ``projections``, ``call`` has the largest rank.
    """
    table = WEIGHT_GRADS_GROUP_TILES if projections > 1 else WEIGHT_GRADS_TILES
    tile, reason = pick_tile(table, device, call)
    block_r = rank_block(call.r, tile.BLOCK_N)
    # The backward's n is K, and its k is N.
    tiles_a = _grad_tiles(call.n, tile.BLOCK_M, call.r, block_r) if need_a else 0
    tiles_b = _grad_tiles(call.k, tile.BLOCK_M, call.r, block_r) if need_b else 0
    steps = cdiv(call.m, tile.BLOCK_K)
    splits = plan_split_k(device, tiles_a + tiles_b, steps)
    # A gated MLP's G and U are two operands in place of one.
    operands = 2 if call.gated else 1
    elements = operands * tile.BLOCK_M + projections * block_r
    tile = fit(tile, device, tile.BLOCK_K * bytes_of(call, elements))
    both = Plan(tile, reason, block_r, tiles_a + tiles_b, splits)
    return WeightGradsPlan(both, both._replace(tiles=tiles_a), both._replace(tiles=tiles_b))


def _grad_tiles(columns: int, block_c: int, r: int, block_r: int) -> int:
    """Tiles of a gradient [columns, r]."""
    return cdiv(columns, block_c) * cdiv(r, block_r)


def co_scheduled_grad_plan(device: Device, call: Call, of_b: bool, warps: int) -> Plan:
    """For dA, or dB if ``of_b``, by programs of another launch, which has ``warps`` warps a
    program.
    """
    tile, reason = pick_tile(WEIGHT_GRADS_TILES, device, call)
    # A wider block of ranks beside the other kernel's accumulators would spill registers.
    block_r = rank_block(call.r, min(tile.BLOCK_N, 128))
    gated = call.gated and not of_b
    # A matrix instruction has 64 rows for each four warps.
    columns = max(tile.BLOCK_M, 16 * warps)
    depth = 32 if gated and not device.tma else 64
    tile = tile._replace(BLOCK_M=columns, BLOCK_K=min(depth, tile.BLOCK_K))
    tiles = _grad_tiles(call.k if of_b else call.n, columns, call.r, block_r)
    steps = cdiv(call.m, tile.BLOCK_K)
    splits = plan_split_k(device, tiles, steps, programs=1)
    if of_b and tiles <= MAX_SHARED_SUMS:
        # Chunks of rows, so that what dS's programs or dB's have read is still in L2 for the
        # others. A chunk's part of dB, stored and read again in float32, is an eighth of the chunk
        # of dY that it sums up.
        chunks = min(cdiv(call.m, 32 * block_r), steps // 4)
        splits = without_empty_parts(steps, max(splits, chunks))
    operands = 2 if gated else 1
    tile = fit(tile, device, tile.BLOCK_K * bytes_of(call, operands * columns + block_r))
    return Plan(tile, reason, block_r, tiles, splits)


# Gate and up of an MLP (lora_gate_up): two accumulators of this size.
GATE_UP_TMA_TILES = (
    Rule(lambda d, c: True, Tile(128, 128, 64, 8, 4), "gate and up share each read of x"),
)
GATE_UP_TILES = (
    Rule(
        lambda d, c: c.dtype == torch.float32,
        Tile(64, 32, 32, 4, 3),
        "float32: no larger tile fits in registers",
    ),
    Rule(
        lambda d, c: True,
        Tile(128, 64, 64, 8, 3),
        "no larger tile of gate and up fits in registers",
    ),
)


def gate_up_plan(device: Device, call: Call, tma: bool, activation: str) -> Plan:
    """For gate and up in one kernel; ``call`` has the larger rank. The TMA kernel's programs stay
    and take tile after tile.
    """
    tile, reason = pick_tile(GATE_UP_TMA_TILES if tma else GATE_UP_TILES, device, call)
    item = call.dtype.itemsize
    # A wider block of ranks, or wider parts, would spill registers beside two accumulators. GELU's
    # erf takes most of them.
    erf = activation == "gelu"
    block_limit = problem.MAX_BLOCK_R
    parts = 1
    stored = 0
    if tma:
        block_limit = 16 if erf else 32
        parts = 8 if erf else 4
        # After the main loop, its memory serves the branches. A part of a result is stored from
        # memory of its own.
        stored = tile.BLOCK_M * tile.BLOCK_N // parts * item
    block_r = rank_block(call.r, block_limit)
    tile = fit(tile, device, tile.BLOCK_K * (tile.BLOCK_M + 2 * tile.BLOCK_N) * item, stored)
    return Plan(tile, reason, block_r, tiles_of(call, tile), column_parts=parts)


def tiles_to_try(device: Device, call: Call) -> list[Tile]:
    """Tiles of the product worth trying besides the table's."""
    size = call.dtype.itemsize
    if call.m <= problem.SMALL_M:
        # 8 to 32 KiB of W a stage: less leaves the memory idle, more leaves no room for stages. The
        # plan sets BLOCK_M.
        sizes = [
            (n, k) for n in (32, 64, 128) for k in (64, 128, 256) if 8 <= n * k * size / 1024 <= 32
        ]
        return [Tile(16, n, k, 4, 4) for n, k in sizes]
    if size == 4:
        return [Tile(32, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3)]
    tiles = [
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
    ]
    if 100 <= device.generation < 120:
        # The table has the wider one for descriptors. Through pointers none is proven: where tensor
        # memory is too small, the compiler returns an empty kernel.
        return tiles
    tiles.append(Tile(64, 256, 64, 8, 3))
    if device.nvidia:
        # Without descriptors, the registers and a small shared memory have room for shallow steps
        # only.
        tiles.append(Tile(128, 256, 64, 8, 3) if device.tma else Tile(128, 256, 32, 8, 4))
    return tiles

"""Y on Hopper and data-center Blackwell, through tensor descriptors.

Formulas and arguments are in this directory's ``__init__``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, column_parts, dot, tile_of
from stablelora_kernels.kernels.lora.chain import leave
from stablelora_kernels.kernels.lora.gated import gated_grads, prefetch
from stablelora_kernels.kernels.lora.product import (
    NOT_SPECIALIZED,
    add_branch,
    product_program,
    wait_for_s,
)
from stablelora_kernels.kernels.lora.tickets import request_tile, requested_tile


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_linear_tma_kernel(
    x,
    x_desc,
    w_desc,
    y_desc,
    g_desc,
    u_desc,
    du_desc,
    bias,
    branch,
    gate,
    s_job,
    db,
    z,
    da,
    chain,
    tickets,
    M,
    N,
    PRODUCTS,
    S_PROGRAMS,
    S_SPLITS,
    DB_SPLITS,
    DA_SPLITS,
    threshold,
    TILE: tl.constexpr,
    BRANCH: tl.constexpr,
    S: tl.constexpr,
    DB: tl.constexpr,
    DA: tl.constexpr,
):
    """Y = X W^T + bias + (S UP^T) ∘ keep.

    X [M, K], W [N, K], Y [M, N].

    As ``_lora_linear_kernel``, but persistent: each program takes tile after tile, see ``tickets``,
    and finishes it in PARTS parts of its columns. The programs of dA run as those of the product
    free a processor.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    program = product_program(
        x,
        s_job,
        db,
        z,
        da,
        chain,
        M,
        PRODUCTS,
        S_PROGRAMS,
        S_SPLITS,
        DB_SPLITS,
        DA_SPLITS,
        threshold,
        S,
        DB,
        DA,
        LOOPS=True,
    )
    if program < 0:
        return
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    tile = program
    while tile < tiles:
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, TILE.GROUP_M)
        row0, col0 = pid_m * BLOCK_M, pid_n * BLOCK_N

        if TILE.GATE != "":
            prefetch(gate, row0, col0, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, x.width, BLOCK_K):
            x_tile = x_desc.load([row0, k0])
            if TILE.TRANS_W:  # noqa: SIM108 - the arms of a ternary must have one shape
                w_tile = w_desc.load([k0, col0])
            else:
                w_tile = tl.trans(w_desc.load([col0, k0]))
            acc = dot(x_tile, w_tile, acc, TILE.PRECISION)

        rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
        wait_for_s(chain, row0, branch, M, S)
        if branch.mask is None:
            # Onto the whole accumulator: products onto parts of it make ptxas serialize the main
            # loop's WGMMAs.
            cols = col0.to(tl.int64) + tl.arange(0, BLOCK_N)
            acc = add_branch(acc, branch, rows, cols, col0, M, N, BLOCK_N, BRANCH)
        # One part at a time: the masked branch takes fewer registers, and the store of Y less
        # shared memory.
        PART: tl.constexpr = BLOCK_N // TILE.PARTS
        parts = column_parts(acc, TILE.PARTS)
        for i in tl.static_range(TILE.PARTS):
            if i == TILE.PARTS // 2:
                # Its answer comes while the other parts are finished. Earlier, it would take
                # registers beside the whole accumulator.
                request = request_tile(tickets, tiles, PRODUCTS)
            y, col = parts[i], col0 + i * PART
            cols = col.to(tl.int64) + tl.arange(0, PART)
            if branch.mask is not None:
                y = add_branch(y, branch, rows, cols, col, M, N, PART, BRANCH)
            if bias is not None:
                y += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            if TILE.ADD:
                y += y_desc.load([row0, col]).to(tl.float32)
            if TILE.GATE != "":
                y, du = gated_grads(
                    y, g_desc.load([row0, col]), u_desc.load([row0, col]), TILE.GATE
                )
                du_desc.store([row0, col], cast(du, du_desc.dtype))
            y_desc.store([row0, col], cast(y, y_desc.dtype))
        tile = requested_tile(request, tickets, tiles, PRODUCTS)
    if S is not None:
        leave(chain, M, S)

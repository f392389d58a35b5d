"""Y, and dX by the same formula, from tiles read through pointers: any GPU, any strides.

Formulas and arguments are in this directory's ``__init__``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, tile_of
from stablelora_kernels.kernels.lora.chain import leave
from stablelora_kernels.kernels.lora.gated import prefetch, store_gated_grads
from stablelora_kernels.kernels.lora.product import (
    NOT_SPECIALIZED,
    add_branch,
    product_program,
    wait_for_s,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_linear_kernel(
    x,
    w,
    bias,
    y,
    base,
    branch,
    gate,
    s_job,
    db,
    z,
    da,
    chain,
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
    """Y = X W^T + bias + BASE + (S UP^T) ∘ keep.

    X [M, K], W [N, K], BASE and Y [M, N]. Programs of the launch, or a launch before it, compute S.

    Without a W, there is no product: Y is BASE and the branch alone.
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
        LOOPS=w.ptr is not None,
    )
    if program < 0:
        return
    pid_m, pid_n = tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TILE.GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    if TILE.GATE != "":
        prefetch(gate, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if w.ptr is not None:
        for k0 in range(0, x.width, BLOCK_K):
            x_mask, w_mask = row_mask[:, None], col_mask[None, :]
            if not TILE.EVEN_K:
                x_mask &= k0 + ks[None, :] < x.width
                w_mask &= k0 + ks[:, None] < x.width
            x_tile = tl.load(
                x.ptr + rows[:, None] * x.row + (k0 + ks[None, :]) * x.col, mask=x_mask, other=0.0
            )
            w_tile = tl.load(
                w.ptr + cols[None, :] * w.row + (k0 + ks[:, None]) * w.col, mask=w_mask, other=0.0
            )
            acc = dot(x_tile, w_tile, acc, TILE.PRECISION)

    if bias is not None:
        acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    wait_for_s(chain, pid_m * BLOCK_M, branch, M, S)
    acc = add_branch(acc, branch, rows, cols, pid_n * BLOCK_N, M, N, BLOCK_N, BRANCH)
    y_ptrs = y.ptr + rows[:, None] * y.row + cols[None, :]
    y_mask = row_mask[:, None] & col_mask[None, :]
    if base is not None:
        acc += tl.load(base + rows[:, None] * y.row + cols[None, :], mask=y_mask, other=0.0).to(
            tl.float32
        )
    if TILE.GATE != "":
        store_gated_grads(acc, gate, y.ptr, rows, pid_n * BLOCK_N, y.row, M, N, TILE.GATE, PARTS=2)
    else:
        tl.store(y_ptrs, cast(acc, y.ptr.dtype.element_ty), mask=y_mask)
    if S is not None:
        leave(chain, M, S)

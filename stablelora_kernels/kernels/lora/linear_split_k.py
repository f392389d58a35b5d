"""Y for few rows or columns, whose tiles alone would leave processors idle.

Formulas and arguments are in this directory's ``__init__``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import arrives_last, cast, dot, finished
from stablelora_kernels.kernels.lora.chain import leave
from stablelora_kernels.kernels.lora.gated import store_gated_grads
from stablelora_kernels.kernels.lora.product import (
    NOT_SPECIALIZED,
    add_branch,
    add_ranks,
    product_program,
    wait_for_s,
)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "SPLITS"])
def _lora_linear_split_k_kernel(
    x,
    w,
    down,
    bias,
    y,
    base,
    branch,
    gate,
    parts,
    counter,
    s_job,
    db,
    z,
    da,
    chain,
    M,
    N,
    SPLITS,
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

    X [M, K], W [N, K], BASE and Y [M, N].

    As ``_lora_linear_kernel``, with two differences that keep all of the GPU reading W. A program
    computes W X^T, so that W's rows are the long side of the matrix instruction and the few rows of
    X the short one. And SPLITS programs share a tile's K; the last one to finish adds up all parts
    in order.

    With DOWN [R, K], R <= BLOCK_R, each program computes the S = s' X DOWN^T that it needs. Then
    all rows are in one tile, and no mask drops any.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_R: tl.constexpr = BRANCH.BLOCK_R
    COMPUTES_S: tl.constexpr = down.ptr is not None
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
        LOOPS=False,
    )
    if program < 0:
        return
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    tile, split = program % tiles, program // tiles
    pid_m, pid_n = tile // tiles_n, tile % tiles_n
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    share = tl.cdiv(tl.cdiv(x.width, BLOCK_K), SPLITS) * BLOCK_K
    start, stop = split * share, tl.minimum(split * share + share, x.width)
    # No part is empty. Zeros of an empty loop would make ptxas serialize the WGMMAs.
    tl.assume(start < stop)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        k = k0 + ks[None, :]
        x_mask, w_mask, down_mask = row_mask[:, None], col_mask[:, None], rs[None, :] < branch.R
        if not TILE.EVEN_K:
            x_mask &= k < x.width
            w_mask &= k < x.width
            down_mask &= k0 + ks[:, None] < x.width
        x_tile = tl.load(x.ptr + rows[:, None] * x.row + k * x.col, mask=x_mask, other=0.0)
        w_tile = tl.load(w.ptr + cols[:, None] * w.row + k * w.col, mask=w_mask, other=0.0)
        acc = dot(w_tile, tl.trans(x_tile), acc, TILE.PRECISION)
        if COMPUTES_S:
            down_tile = tl.load(
                down.ptr + rs[None, :] * down.row + (k0 + ks[:, None]) * down.col,
                mask=down_mask,
                other=0.0,
            )
            s = dot(x_tile, cast(down_tile, x_tile.dtype), s, TILE.PRECISION)
            if BLOCK_M < 64:
                # Hopper's asynchronous products have at least 64 rows, so S's is none, and reads X
                # in another way.
                acc = finished(acc)

    acc, s, last = _sum_of_splits(acc, s, parts, counter, tile, split, SPLITS, row_mask, COMPUTES_S)
    if last:
        y_tile = tl.trans(acc)
        if bias is not None:
            y_tile += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        wait_for_s(chain, pid_m * BLOCK_M, branch, M, S)
        col0 = pid_n * BLOCK_N
        if COMPUTES_S:
            s_low = cast(branch.scaling * s, x.ptr.dtype.element_ty)
            y_tile = _add_branch_of(s_low, y_tile, branch, rows, cols, pid_n == 0, M, N, BRANCH)
        else:
            y_tile = add_branch(y_tile, branch, rows, cols, col0, M, N, BLOCK_N, BRANCH)
        y_ptrs = y.ptr + rows[:, None] * y.row + cols[None, :]
        y_mask = row_mask[:, None] & col_mask[None, :]
        if base is not None:
            y_tile += tl.load(
                base + rows[:, None] * y.row + cols[None, :], mask=y_mask, other=0.0
            ).to(tl.float32)
        if TILE.GATE != "":
            store_gated_grads(y_tile, gate, y.ptr, rows, col0, y.row, M, N, TILE.GATE, PARTS=1)
        else:
            tl.store(y_ptrs, cast(y_tile, y.ptr.dtype.element_ty), mask=y_mask)
    if S is not None:
        leave(chain, M, S)


@triton.jit
def _add_branch_of(s, acc, branch, rows, cols, stores, M, N, BRANCH: tl.constexpr):
    """acc + S UP^T for the S that this program has computed. If it is wanted, a program that
    ``stores`` it does.
    """
    rs = tl.arange(0, BRANCH.BLOCK_R).to(tl.int64)
    s_mask = (rows[:, None] < M) & (rs[None, :] < branch.R)
    # Only one of the two conditions is a constant for the compiler.
    if branch.s is not None:  # noqa: SIM102
        if stores:
            tl.store(branch.s + rows[:, None] * branch.stride_s + rs[None, :], s, mask=s_mask)
    if BRANCH.UNIT != 1.0:
        acc *= 1.0 / BRANCH.UNIT
    acc = add_ranks(acc, s, 0, branch, cols, N, BRANCH)
    if BRANCH.UNIT != 1.0:
        acc *= BRANCH.UNIT
    return acc


@triton.jit
def _sum_of_splits(acc, s, parts, counter, tile, split, SPLITS, row_mask, SUMS_S: tl.constexpr):
    """The sums of all SPLITS programs' parts, and whether this program has them: the last to arrive
    adds up, in order.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    BLOCK_R: tl.constexpr = s.shape[1]
    PART: tl.constexpr = BLOCK_N * BLOCK_M + BLOCK_M * BLOCK_R
    # Row by row of Y and S, so that rows beyond M cost nothing.
    acc_offsets = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    s_offsets = (
        BLOCK_N * BLOCK_M
        + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R
        + tl.arange(0, BLOCK_R)[None, :]
    )
    acc_mask, s_mask = row_mask[None, :], row_mask[:, None]
    parts += tile.to(tl.int64) * SPLITS * PART
    last = SPLITS == 1
    if SPLITS > 1:
        tl.store(parts + split * PART + acc_offsets, acc, mask=acc_mask)
        if SUMS_S:
            tl.store(parts + split * PART + s_offsets, s, mask=s_mask)
        last = arrives_last(counter + tile, SPLITS)
        if last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for i in range(SPLITS):
                acc += tl.load(
                    parts + i * PART + acc_offsets, mask=acc_mask, other=0.0, cache_modifier=".cg"
                )
                if SUMS_S:
                    s += tl.load(
                        parts + i * PART + s_offsets, mask=s_mask, other=0.0, cache_modifier=".cg"
                    )
    return acc, s, last

"""Y for few rows, where a product is bound by reading W; the formulas are in ``lora_linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import arrives_last, cast, dot
from stablelora_kernels.kernels.lora.linear import add_branch, grad_beside


@triton.jit(do_not_specialize=["M", "SPLITS", "PRODUCTS", "GRAD_SPLITS", "threshold"])
def _lora_linear_split_k_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, partial_ptr, counter_ptr,
    z_ptr, grad_ptr, grad_partial_ptr, grad_counter_ptr,
    M, N, K, R, SPLITS, PRODUCTS, GRAD_SPLITS,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    stride_zm, stride_zn,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, MASK_BRANCH: tl.constexpr,
    ADD: tl.constexpr, EVEN_K: tl.constexpr, WAIT: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K] with M <= BLOCK_M, W [N, K], A [R, K], B [N, R], Y [M, N].

    As ``_lora_linear_kernel``, with two differences that keep all of the GPU reading W. A program's product is W X^T, so
    that W's rows are the matrix instruction's long side and the few rows of X its short one. And SPLITS programs share a
    tile's K; the last of them to finish adds up all parts in order.
    """
    program = tl.program_id(0)
    if HAS_GRAD:  # noqa: SIM102, since only one of the two is known to the compiler
        if program >= PRODUCTS:
            grad_beside(
                program - PRODUCTS, z_ptr, s_ptr, grad_ptr, seed_ptr, grad_partial_ptr, grad_counter_ptr, M, N, R, GRAD_SPLITS,
                stride_zm, stride_zn, stride_sm, threshold, MASK_BRANCH, WAIT, GRAD_M, GRAD_C, GRAD_R, GRAD_STAGES,
                GRAD_PRECISION,
            )  # fmt: skip
            return
    tiles = tl.cdiv(N, BLOCK_N)
    tile, split = program % tiles, program // tiles
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    cols = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        k = k0 + ks[None, :]
        x_mask, w_mask, a_mask = row_mask[:, None], col_mask[:, None], rs[None, :] < R
        if not EVEN_K:
            x_mask &= k < K
            w_mask &= k < K
            a_mask &= k0 + ks[:, None] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + k * stride_xk, mask=x_mask, other=0.0)
        w = tl.load(w_ptr + cols[:, None] * stride_wn + k * stride_wk, mask=w_mask, other=0.0)
        acc = dot(w, tl.trans(x), acc, INPUT_PRECISION)
        if not LOAD_S:
            a = tl.load(a_ptr + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak, mask=a_mask, other=0.0)
            s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)

    PART: tl.constexpr = BLOCK_N * BLOCK_M + BLOCK_M * BLOCK_R
    # Row after row of Y and S, so that those beyond M cost nothing.
    acc_at = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    s_at = BLOCK_N * BLOCK_M + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    acc_mask, s_mask = row_mask[None, :], row_mask[:, None]
    parts = partial_ptr + tile.to(tl.int64) * SPLITS * PART
    last = SPLITS == 1
    if SPLITS > 1:
        tl.store(parts + split * PART + acc_at, acc, mask=acc_mask)
        if not LOAD_S:
            tl.store(parts + split * PART + s_at, s, mask=s_mask)
        last = arrives_last(counter_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for i in range(SPLITS):
                acc += tl.load(parts + i * PART + acc_at, mask=acc_mask, other=0.0, cache_modifier=".cg")
                if not LOAD_S:
                    s += tl.load(parts + i * PART + s_at, mask=s_mask, other=0.0, cache_modifier=".cg")
        y = tl.trans(acc)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        y = add_branch(
            y, s, s_ptr, b_ptr, seed_ptr, rows, cols, tile * BLOCK_N, STORE_S & (tile == 0), M, N, R, stride_sm, stride_bn,
            stride_br, scaling, threshold, LOAD_S, MASK_BRANCH, WAIT, BLOCK_N, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
        if ADD:
            y += tl.load(y_ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)
        tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])

"""The LoRA branch onto a finished product; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask
from stablelora_kernels.kernels.lora.gated import store_gated_grads


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_expand_kernel(
    x_ptr, a_ptr, b_ptr, s_ptr, base_ptr, y_ptr, seed_ptr, g_ptr, u_ptr, du_ptr,
    M, N, K, R, COLUMNS,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    scaling, threshold,
    IN_PLACE: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, S_UNIT: tl.constexpr,
    MASK_X: tl.constexpr, MASK_BRANCH: tl.constexpr, GATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = BASE + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], A [R, K], B [N, R], S [M, R], BASE and Y [M, N].

    BASE is Y itself (IN_PLACE), or a tensor with Y's strides. A program computes S for its rows, or
    reads it with LOAD_S, and goes through COLUMNS columns of Y.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask = rows < M
    if MASK_X or MASK_BRANCH:
        seed = tl.load(seed_ptr)

    s_low = tl.zeros((BLOCK_M, BLOCK_R), dtype=x_ptr.dtype.element_ty)
    if not LOAD_S:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_mask, a_mask = row_mask[:, None], rs[None, :] < R
            if not EVEN_K:
                x_mask &= k0 + ks[None, :] < K
                a_mask &= k0 + ks[:, None] < K
            x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
            a = tl.load(a_ptr + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak, mask=a_mask, other=0.0)
            if MASK_X:
                x = tl.where(keep_mask(seed, rows, k0, K, threshold, BLOCK_K), x, 0.0)
            s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)
        s_low = cast(scaling * s, x_ptr.dtype.element_ty)
        if STORE_S & (tl.program_id(1) == 0):
            s_ptrs = s_ptr + rows[:, None] * stride_sm + rs[None, :]
            tl.store(s_ptrs, s_low, mask=row_mask[:, None] & (rs[None, :] < R))

    first = tl.program_id(1) * COLUMNS
    for n0 in range(first, tl.minimum(first + COLUMNS, N), BLOCK_N):
        cols = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
        y_mask = row_mask[:, None] & (cols[None, :] < N)
        branch = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r0 in tl.range(0, R if LOAD_S else BLOCK_R, BLOCK_R, num_stages=1):
            if LOAD_S:
                s_mask = row_mask[:, None] & (r0 + rs[None, :] < R)
                s_low = tl.load(s_ptr + rows[:, None] * stride_sm + (r0 + rs[None, :]), mask=s_mask, other=0.0)
            b_mask = (r0 + rs[:, None] < R) & (cols[None, :] < N)
            b = tl.load(b_ptr + cols[None, :] * stride_bn + (r0 + rs[:, None]) * stride_br, mask=b_mask, other=0.0)
            branch = dot(s_low, cast(b, s_low.dtype), branch, INPUT_PRECISION)
        if S_UNIT != 1.0:
            branch *= S_UNIT
        if MASK_BRANCH:
            branch = tl.where(keep_mask(seed, rows, n0, N, threshold, BLOCK_N), branch, 0.0)
        if IN_PLACE:
            branch = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32) + branch
        else:
            base_ptrs = base_ptr + rows[:, None] * stride_ym + cols[None, :]
            branch = tl.load(base_ptrs, mask=y_mask, other=0.0).to(tl.float32) + branch
        if GATE != "":
            store_gated_grads(branch, g_ptr, u_ptr, y_ptr, du_ptr, rows, n0, stride_ym, M, N, GATE, PARTS=4)
        else:
            tl.store(y_ptrs, cast(branch, y_ptr.dtype.element_ty), mask=y_mask)

"""The kernels of ``lora_linear``. With s' = scaling / (1 - p) and a keep-mask of zeros and ones:

    forward   S  = s' (X ∘ keep) A^T             Y  = X W^T + bias + S B^T
    backward  dS = s' dY B                       dX = dY W + (dS A) ∘ keep
              dA = dS^T (X ∘ keep)               dB = dY^T S

S and dS are scaled in float32 and rounded once. dX is the forward's formula with W, A and B read through swapped strides, so
one kernel serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels._common import cast, dot, keep_mask


@triton.jit
def _branch_inner(
    x_ptr, a_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, rows, r0, seed, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """(X ∘ keep)[rows] A[r0 : r0 + BLOCK_R]^T, float32 [BLOCK_M, BLOCK_R], without the scaling."""
    rs = r0 + tl.arange(0, BLOCK_R).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask = (rows[:, None] < M) & (k0 + ks[None, :] < K)
        if DROPOUT:
            x_mask &= keep_mask(seed, rows, k0, K, threshold, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        a_mask = (k0 + ks[:, None] < K) & (rs[None, :] < R)
        a = tl.load(a_ptr + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak, mask=a_mask, other=0.0)
        s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)
    return s


@triton.jit
def _lora_shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    scaling, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """S = s (X ∘ keep) A^T;  X [M, K], A [R, K], S [M, R]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r0 = tl.program_id(1) * BLOCK_R
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    s = _branch_inner(
        x_ptr, a_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, rows, r0, seed, threshold,
        DROPOUT, BLOCK_M, BLOCK_K, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    rs = r0 + tl.arange(0, BLOCK_R)
    s_mask = (rows[:, None] < M) & (rs[None, :] < R)
    tl.store(s_ptr + rows[:, None] * stride_sm + rs[None, :], cast(scaling * s, s_ptr.dtype.element_ty), mask=s_mask)


@triton.jit
def _linear_tile(
    pid,
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, MASK_BRANCH: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_RANK_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile ``pid`` of Y = X W^T + bias + (S B^T) ∘ keep; see ``_lora_linear_kernel``."""
    # Neighbouring programs share rows of X and W in L2: groups of GROUP_M row tiles, column tile after column tile.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_m
    pid_n = (pid % (GROUP_M * tiles_n)) // group_m

    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    a_ptrs = a_ptr + rs[None, :] * stride_ar + ks[:, None] * stride_ak
    step_x, step_w, step_a = BLOCK_K * stride_xk, BLOCK_K * stride_wk, BLOCK_K * stride_ak

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask, w_mask, a_mask = row_mask[:, None], col_mask[None, :], rs[None, :] < R
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
            w_mask &= k0 + ks[:, None] < K
            a_mask &= k0 + ks[:, None] < K
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc = dot(x, w, acc, INPUT_PRECISION)
        if not LOAD_S:
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)
            a_ptrs += step_a
        x_ptrs += step_x
        w_ptrs += step_w

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if MASK_BRANCH:
        keep = keep_mask(tl.load(seed_ptr), rows, pid_n * BLOCK_N, N, threshold, BLOCK_N)
    for r0 in range(0, BLOCK_R if ONE_RANK_BLOCK else R, BLOCK_R):
        s_mask = row_mask[:, None] & (r0 + rs[None, :] < R)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + (r0 + rs[None, :])
        if LOAD_S:
            s_low = tl.load(s_ptrs, mask=s_mask, other=0.0)
        else:
            if r0 > 0:
                s = _branch_inner(
                    x_ptr, a_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, rows, r0, 0, 0,
                    False, BLOCK_M, BLOCK_K, BLOCK_R, INPUT_PRECISION,
                )  # fmt: skip
            s_low = cast(scaling * s, x_ptr.dtype.element_ty)
            if STORE_S and pid_n == 0:
                tl.store(s_ptrs, s_low, mask=s_mask)
        b_mask = (r0 + rs[:, None] < R) & col_mask[None, :]
        b = tl.load(b_ptr + cols[None, :] * stride_bn + (r0 + rs[:, None]) * stride_br, mask=b_mask, other=0.0)
        b = cast(b, s_low.dtype)
        if MASK_BRANCH:
            branch = dot(s_low, b, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), INPUT_PRECISION)
            acc += tl.where(keep, branch, 0.0)
        else:
            # Onto the base product's own accumulator: a second one of its size would not fit the registers.
            acc = dot(s_low, b, acc, INPUT_PRECISION)

    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def _lora_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, MASK_BRANCH: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_RANK_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s X A^T;  X [M, K], W [N, K], A [R, K], B [N, R], S [M, R], Y [M, N].

    S is accumulated beside the base product, or read where LOAD_S; keep (of Y's shape) is all ones unless MASK_BRANCH.
    Ranks above BLOCK_R read X again for each further block of BLOCK_R, unless S is read.
    """
    _linear_tile(
        tl.program_id(0), x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, M, N, K, R,
        stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
        scaling, threshold, HAS_BIAS, LOAD_S, STORE_S, MASK_BRANCH, EVEN_K, ONE_RANK_BLOCK,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit
def _weight_grad_tile(
    z_ptr, t_ptr, out_ptr, M, C, R, stride_zm, stride_zc, stride_tm, stride_oc, stride_or, c0, r0, seed, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """out[c, r] = sum_m (Z ∘ keep)[m, c] T[m, r];  Z [M, C], T [M, R]; one tile, rows summed in order."""
    cs = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    rs = r0 + tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m0 in range(0, M, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        z_mask = (rows[:, None] < M) & (cs[None, :] < C)
        if DROPOUT:
            z_mask &= keep_mask(seed, rows, c0, C, threshold, BLOCK_C)
        z = tl.load(z_ptr + rows[:, None] * stride_zm + cs[None, :] * stride_zc, mask=z_mask, other=0.0)
        t_mask = (rows[:, None] < M) & (rs[None, :] < R)
        t = tl.load(t_ptr + rows[:, None] * stride_tm + rs[None, :], mask=t_mask, other=0.0)
        acc = dot(tl.trans(z), t, acc, INPUT_PRECISION)
    out = cast(acc, out_ptr.dtype.element_ty)
    out_mask = (cs[:, None] < C) & (rs[None, :] < R)
    tl.store(out_ptr + cs[:, None] * stride_oc + rs[None, :] * stride_or, out, mask=out_mask)


@triton.jit
def _lora_linear_grads_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, s_ptr, ds_ptr, dy_ptr, dx_ptr, da_ptr, db_ptr, seed_ptr,
    M, N, K, R, TILES_X, TILES_A, TILES_B,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_sm, stride_dsm, stride_ym, stride_yn, stride_dxm,
    threshold,
    WITH_DX: tl.constexpr, DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    DX_BLOCK_M: tl.constexpr, DX_BLOCK_K: tl.constexpr, DX_BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = dS^T (X ∘ keep), dB = dY^T S, and dX = dY W + (dS A) ∘ keep where WITH_DX, from dS that was computed before.

    X [M, K], W [N, K], A [R, K], S and dS [M, R], dY [M, N]; dX [M, K], dA [R, K], dB [N, R]. The first TILES_X programs
    each own a tile of dX, then come TILES_A of dA and TILES_B of dB for each block of ranks: no atomics, one order of sums.
    """
    pid = tl.program_id(0)
    if pid < TILES_X:
        if WITH_DX:
            # The forward's tile with every matrix transposed; b_ptr only stands where its B is not read.
            _linear_tile(
                pid, dy_ptr, w_ptr, None, b_ptr, a_ptr, ds_ptr, dx_ptr, seed_ptr, M, K, N, R,
                stride_ym, stride_yn, stride_wk, stride_wn, 0, 0, stride_ak, stride_ar, stride_dsm, stride_dxm,
                1.0, threshold, False, True, False, DROPOUT, EVEN_N, False,
                DX_BLOCK_M, DX_BLOCK_K, DX_BLOCK_N, BLOCK_R, GROUP_M, INPUT_PRECISION,
            )  # fmt: skip
    else:
        tile = (pid - TILES_X) % (TILES_A + TILES_B)
        r0 = (pid - TILES_X) // (TILES_A + TILES_B) * BLOCK_R
        if tile < TILES_A:
            seed = 0
            if DROPOUT:
                seed = tl.load(seed_ptr)
            _weight_grad_tile(
                x_ptr, ds_ptr, da_ptr, M, K, R, stride_xm, stride_xk, stride_dsm, 1, K, tile * BLOCK_C, r0, seed,
                threshold, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
        else:
            _weight_grad_tile(
                dy_ptr, s_ptr, db_ptr, M, N, R, stride_ym, stride_yn, stride_sm, R, 1, (tile - TILES_A) * BLOCK_C, r0, 0,
                0, False, BLOCK_M, BLOCK_C, BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip

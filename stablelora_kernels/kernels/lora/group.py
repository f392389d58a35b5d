"""S and dA of up to three projections of one X, each from one read of it; the formulas are in ``lora_linear``.

The projections' S lie side by side in one matrix, and so do their dS. Each has its own mask, which is why their A's are not
simply one A of more ranks: X is loaded once, and masked and multiplied for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, shared_sum


@triton.jit(do_not_specialize=["M", "SPLITS", "threshold"])
def _lora_shrink_group_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, s_ptr, seed0_ptr, seed1_ptr, seed2_ptr, partial_ptr, counter_ptr,
    M, K, R0, R1, R2, COLUMN1, COLUMN2, SPLITS,
    stride_xm, stride_xk, stride_sm,
    scaling0, scaling1, scaling2, threshold,
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, LEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """S_g = s'_g (X ∘ keep_g) A_g^T for MEMBERS g;  X [M, K], A_g [R_g, K] contiguous, S_g [M, R_g] from S's COLUMN_g on.

    SPLITS programs share a tile of rows, each with a part of K; the last of them to finish adds up all parts in order.
    """
    if LEAD:
        # The wide product that follows needs S at its end only: it may take what room is left on the GPU from here on.
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    tile, split = program // SPLITS, program % SPLITS
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < M
    seed0, seed1, seed2 = _seeds(seed0_ptr, seed1_ptr, seed2_ptr, MEMBERS, DROPOUT)

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    s0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    s1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        x_mask = row_mask[:, None]
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        s0 = _thin(x, a0_ptr, seed0, s0, rows, k0, K, R0, threshold, DROPOUT, EVEN_K, BLOCK_K, BLOCK_R, INPUT_PRECISION)
        s1 = _thin(x, a1_ptr, seed1, s1, rows, k0, K, R1, threshold, DROPOUT, EVEN_K, BLOCK_K, BLOCK_R, INPUT_PRECISION)
        if MEMBERS > 2:
            s2 = _thin(
                x, a2_ptr, seed2, s2, rows, k0, K, R2, threshold, DROPOUT, EVEN_K, BLOCK_K, BLOCK_R, INPUT_PRECISION
            )

    # A projection's parts and counter follow those of the one before it.
    PART: tl.constexpr = BLOCK_M * BLOCK_R
    parts_ptr = partial_ptr + tile.to(tl.int64) * MEMBERS * SPLITS * PART
    counter_ptr += tile * MEMBERS
    _store(s0, s_ptr, parts_ptr, counter_ptr, split, SPLITS, rows, M, R0, stride_sm, scaling0, BLOCK_R)
    _store(
        s1,
        s_ptr + COLUMN1,
        parts_ptr + SPLITS * PART,
        counter_ptr + 1,
        split,
        SPLITS,
        rows,
        M,
        R1,
        stride_sm,
        scaling1,
        BLOCK_R,
    )
    if MEMBERS > 2:
        _store(
            s2, s_ptr + COLUMN2, parts_ptr + 2 * SPLITS * PART, counter_ptr + 2, split, SPLITS, rows, M, R2, stride_sm, scaling2,
            BLOCK_R,
        )  # fmt: skip


@triton.jit
def _seeds(seed0_ptr, seed1_ptr, seed2_ptr, MEMBERS: tl.constexpr, DROPOUT: tl.constexpr):
    """The projections' seeds."""
    seed0 = 0
    seed1 = 0
    seed2 = 0
    if DROPOUT:
        seed0 = tl.load(seed0_ptr)
        seed1 = tl.load(seed1_ptr)
        seed2 = seed1
        if MEMBERS > 2:
            seed2 = tl.load(seed2_ptr)
    return seed0, seed1, seed2


@triton.jit
def _thin(
    x, a_ptr, seed, s, rows, k0, K, R, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """s + (X ∘ keep) A^T for a step of K."""
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    a_mask = rs[None, :] < R
    if not EVEN_K:
        a_mask &= k0 + ks[:, None] < K
    a = tl.load(a_ptr + rs[None, :] * K + (k0 + ks[:, None]), mask=a_mask, other=0.0)
    if DROPOUT:
        x = tl.where(keep_mask(seed, rows, k0, K, threshold, BLOCK_K), x, 0.0)
    return dot(x, cast(a, x.dtype), s, INPUT_PRECISION)


@triton.jit
def _store(s, s_ptr, parts_ptr, counter_ptr, split, SPLITS, rows, M, R, stride_sm, scaling, BLOCK_R: tl.constexpr):
    """The sum of all programs' ``s``, scaled, rounded and stored by the last of them."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    s, last = shared_sum(s, parts_ptr, counter_ptr, split, SPLITS)
    if last:
        s_ptrs = s_ptr + rows[:, None] * stride_sm + rs[None, :]
        tl.store(s_ptrs, cast(scaling * s, s_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (rs[None, :] < R))


@triton.jit(do_not_specialize=["M", "SPLITS", "threshold"])
def _lora_weight_grads_group_kernel(
    x_ptr, ds_ptr, da0_ptr, da1_ptr, da2_ptr, seed0_ptr, seed1_ptr, seed2_ptr, partial_ptr, counter_ptr,
    M, K, R0, R1, R2, COLUMN1, COLUMN2, SPLITS,
    stride_xm, stride_xk, stride_dsm,
    threshold,
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_g = dS_g^T (X ∘ keep_g) for MEMBERS g;  X [M, K], dS_g [M, R_g] from dS's COLUMN_g on, dA_g [R_g, K] contiguous.

    Programs: SPLITS parts of M one after another, in each the tiles of columns, as in ``weight_grad``.
    """
    tiles = tl.cdiv(K, BLOCK_C)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    c0 = tile * BLOCK_C
    cs = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    seed0, seed1, seed2 = _seeds(seed0_ptr, seed1_ptr, seed2_ptr, MEMBERS, DROPOUT)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    acc0 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m0 in tl.range(split * share, tl.minimum(split * share + share, M), BLOCK_M, num_stages=STAGES):
        rows = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        x_mask = (rows[:, None] < M) & (cs[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cs[None, :] * stride_xk, mask=x_mask, other=0.0)
        acc0 = _outer(
            x,
            ds_ptr,
            seed0,
            acc0,
            rows,
            c0,
            M,
            K,
            R0,
            stride_dsm,
            threshold,
            DROPOUT,
            BLOCK_C,
            BLOCK_R,
            INPUT_PRECISION,
        )
        acc1 = _outer(
            x, ds_ptr + COLUMN1, seed1, acc1, rows, c0, M, K, R1, stride_dsm, threshold, DROPOUT, BLOCK_C, BLOCK_R,
            INPUT_PRECISION,
        )  # fmt: skip
        if MEMBERS > 2:
            acc2 = _outer(
                x, ds_ptr + COLUMN2, seed2, acc2, rows, c0, M, K, R2, stride_dsm, threshold, DROPOUT, BLOCK_C, BLOCK_R,
                INPUT_PRECISION,
            )  # fmt: skip

    PART: tl.constexpr = BLOCK_C * BLOCK_R
    parts_ptr = partial_ptr + tile.to(tl.int64) * MEMBERS * SPLITS * PART
    counter_ptr += tile * MEMBERS
    _store_grad(acc0, da0_ptr, parts_ptr, counter_ptr, split, SPLITS, cs, K, R0, BLOCK_R)
    _store_grad(acc1, da1_ptr, parts_ptr + SPLITS * PART, counter_ptr + 1, split, SPLITS, cs, K, R1, BLOCK_R)
    if MEMBERS > 2:
        _store_grad(acc2, da2_ptr, parts_ptr + 2 * SPLITS * PART, counter_ptr + 2, split, SPLITS, cs, K, R2, BLOCK_R)


@triton.jit
def _outer(
    x, ds_ptr, seed, acc, rows, c0, M, K, R, stride_dsm, threshold,
    DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (X ∘ keep)^T dS for a step of M."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    ds = tl.load(
        ds_ptr + rows[:, None] * stride_dsm + rs[None, :], mask=(rows[:, None] < M) & (rs[None, :] < R), other=0.0
    )
    if DROPOUT:
        x = tl.where(keep_mask(seed, rows, c0, K, threshold, BLOCK_C), x, 0.0)
    return dot(tl.trans(x), ds, acc, INPUT_PRECISION)


@triton.jit
def _store_grad(acc, da_ptr, parts_ptr, counter_ptr, split, SPLITS, cs, K, R, BLOCK_R: tl.constexpr):
    """The sum of all programs' ``acc``, rounded and stored by the last of them."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    acc, last = shared_sum(acc, parts_ptr, counter_ptr, split, SPLITS)
    if last:
        da_ptrs = da_ptr + cs[:, None] + rs[None, :] * K
        tl.store(da_ptrs, cast(acc, da_ptr.dtype.element_ty), mask=(cs[:, None] < K) & (rs[None, :] < R))

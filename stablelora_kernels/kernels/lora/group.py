"""S and dA of up to three projections of one X, with one read of X; formulas and arguments are in ``linear``.

The projections' S lie side by side in one matrix, and so do their dS. Each projection has its own mask, so their A can't be
one A of a higher rank: the kernels load X once, then mask and multiply it for each projection.
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
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, TRIGGERS_DEPENDENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """S_g = s'_g (X ∘ keep_g) A_g^T for MEMBERS g;  X [M, K], A_g [R_g, K] contiguous, S_g [M, R_g] from S's COLUMN_g on.

    SPLITS programs share a tile of rows, each with a part of K; the last one to finish adds up all parts in order.
    """
    if TRIGGERS_DEPENDENTS:
        # The wide product that follows needs S only at its end. It may fill idle processors from here on.
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    tile, split = program // SPLITS, program % SPLITS
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < M
    seed0, seed1, seed2 = _seeds(seed0_ptr, seed1_ptr, seed2_ptr, MEMBERS, DROPOUT)

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start, stop = split * share, tl.minimum(split * share + share, K)
    # No part is empty, see ``weight_grad``.
    tl.assume(start < stop)
    s0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    s1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        x_mask = row_mask[:, None]
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        s0 = _thin(
            x=x, a_ptr=a0_ptr, seed=seed0, s=s0, rows=rows, k0=k0, K=K, R=R0, threshold=threshold, DROPOUT=DROPOUT,
            EVEN_K=EVEN_K, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        s1 = _thin(
            x=x, a_ptr=a1_ptr, seed=seed1, s=s1, rows=rows, k0=k0, K=K, R=R1, threshold=threshold, DROPOUT=DROPOUT,
            EVEN_K=EVEN_K, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        if MEMBERS > 2:
            s2 = _thin(
                x=x, a_ptr=a2_ptr, seed=seed2, s=s2, rows=rows, k0=k0, K=K, R=R2, threshold=threshold, DROPOUT=DROPOUT,
                EVEN_K=EVEN_K, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
            )  # fmt: skip

    # Each projection has its parts and its counter, one behind the other.
    PART: tl.constexpr = BLOCK_M * BLOCK_R
    parts_ptr = partial_ptr + tile.to(tl.int64) * MEMBERS * SPLITS * PART
    counter_ptr += tile * MEMBERS
    _store(
        s=s0, s_ptr=s_ptr, parts_ptr=parts_ptr, counter_ptr=counter_ptr, split=split, SPLITS=SPLITS, rows=rows, M=M, R=R0,
        stride_sm=stride_sm, scaling=scaling0, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    _store(
        s=s1, s_ptr=s_ptr + COLUMN1, parts_ptr=parts_ptr + SPLITS * PART, counter_ptr=counter_ptr + 1, split=split,
        SPLITS=SPLITS, rows=rows, M=M, R=R1, stride_sm=stride_sm, scaling=scaling1, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    if MEMBERS > 2:
        _store(
            s=s2, s_ptr=s_ptr + COLUMN2, parts_ptr=parts_ptr + 2 * SPLITS * PART, counter_ptr=counter_ptr + 2, split=split,
            SPLITS=SPLITS, rows=rows, M=M, R=R2, stride_sm=stride_sm, scaling=scaling2, BLOCK_R=BLOCK_R,
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
    """s + (X ∘ keep) A^T for one step of K."""
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
    """Add up all programs' ``s``; the last program scales, rounds and stores the sum."""
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
    start, stop = split * share, tl.minimum(split * share + share, M)
    # No part is empty, see ``weight_grad``.
    tl.assume(start < stop)
    acc0 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m0 in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        rows = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        x_mask = (rows[:, None] < M) & (cs[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cs[None, :] * stride_xk, mask=x_mask, other=0.0)
        acc0 = _outer(
            x=x, ds_ptr=ds_ptr, seed=seed0, acc=acc0, rows=rows, c0=c0, M=M, K=K, R=R0, stride_dsm=stride_dsm,
            threshold=threshold, DROPOUT=DROPOUT, BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        acc1 = _outer(
            x=x, ds_ptr=ds_ptr + COLUMN1, seed=seed1, acc=acc1, rows=rows, c0=c0, M=M, K=K, R=R1, stride_dsm=stride_dsm,
            threshold=threshold, DROPOUT=DROPOUT, BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        if MEMBERS > 2:
            acc2 = _outer(
                x=x, ds_ptr=ds_ptr + COLUMN2, seed=seed2, acc=acc2, rows=rows, c0=c0, M=M, K=K, R=R2, stride_dsm=stride_dsm,
                threshold=threshold, DROPOUT=DROPOUT, BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
            )  # fmt: skip

    PART: tl.constexpr = BLOCK_C * BLOCK_R
    parts_ptr = partial_ptr + tile.to(tl.int64) * MEMBERS * SPLITS * PART
    counter_ptr += tile * MEMBERS
    _store_grad(
        acc=acc0, da_ptr=da0_ptr, parts_ptr=parts_ptr, counter_ptr=counter_ptr, split=split, SPLITS=SPLITS, cs=cs, K=K, R=R0,
        BLOCK_R=BLOCK_R,
    )  # fmt: skip
    _store_grad(
        acc=acc1, da_ptr=da1_ptr, parts_ptr=parts_ptr + SPLITS * PART, counter_ptr=counter_ptr + 1, split=split,
        SPLITS=SPLITS, cs=cs, K=K, R=R1, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    if MEMBERS > 2:
        _store_grad(
            acc=acc2, da_ptr=da2_ptr, parts_ptr=parts_ptr + 2 * SPLITS * PART, counter_ptr=counter_ptr + 2, split=split,
            SPLITS=SPLITS, cs=cs, K=K, R=R2, BLOCK_R=BLOCK_R,
        )  # fmt: skip


@triton.jit
def _outer(
    x, ds_ptr, seed, acc, rows, c0, M, K, R, stride_dsm, threshold,
    DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (X ∘ keep)^T dS for one step of M."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    ds = tl.load(
        ds_ptr + rows[:, None] * stride_dsm + rs[None, :], mask=(rows[:, None] < M) & (rs[None, :] < R), other=0.0
    )
    if DROPOUT:
        x = tl.where(keep_mask(seed, rows, c0, K, threshold, BLOCK_C), x, 0.0)
    return dot(tl.trans(x), ds, acc, INPUT_PRECISION)


@triton.jit
def _store_grad(acc, da_ptr, parts_ptr, counter_ptr, split, SPLITS, cs, K, R, BLOCK_R: tl.constexpr):
    """Add up all programs' ``acc``; the last program rounds and stores the sum."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    acc, last = shared_sum(acc, parts_ptr, counter_ptr, split, SPLITS)
    if last:
        da_ptrs = da_ptr + cs[:, None] + rs[None, :] * K
        tl.store(da_ptrs, cast(acc, da_ptr.dtype.element_ty), mask=(cs[:, None] < K) & (rs[None, :] < R))

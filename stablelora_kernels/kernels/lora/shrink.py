"""S, or dS with dB; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, shared_sum
from stablelora_kernels.kernels.lora.chain import raise_flag
from stablelora_kernels.kernels.lora.weight_grads import weight_grad


@triton.jit(do_not_specialize=["M", "SPLITS", "GRAD_PROGRAMS", "GRAD_SPLITS", "threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, t_ptr, grad_ptr, grad_partial_ptr, grad_counter_ptr,
    M, K, R, SPLITS, GRAD_PROGRAMS, GRAD_SPLITS,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm, stride_tm,
    scaling, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, TRIGGERS_DEPENDENTS: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
    GRAD_UNIT: tl.constexpr, GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """S = s' (X ∘ keep) A^T, and with HAS_GRAD grad = X^T T;  X [M, K], A [R, K], S and T [M, R], grad [K, R].

    T is in units of GRAD_UNIT.

    Programs of S: tiles of rows, in each blocks of ranks, in each SPLITS parts of K. The last part to finish adds up all parts
    in order. The GRAD_PROGRAMS programs of grad are spread evenly among those of S: both walk down the rows of X at one pace,
    so the second to read a row finds it in L2.
    """
    if TRIGGERS_DEPENDENTS:
        # The wide product that follows needs S only at its end. It may fill idle processors from here on.
        tl.extra.cuda.gdc_launch_dependents()
    s_program(
        program=tl.program_id(0), programs=tl.num_programs(0), x_ptr=x_ptr, a_ptr=a_ptr, s_ptr=s_ptr, seed_ptr=seed_ptr,
        partial_ptr=partial_ptr, counter_ptr=counter_ptr, t_ptr=t_ptr, grad_ptr=grad_ptr, grad_partial_ptr=grad_partial_ptr,
        grad_counter_ptr=grad_counter_ptr, chain_ptr=None, M=M, K=K, R=R, SPLITS=SPLITS, GRAD_PROGRAMS=GRAD_PROGRAMS,
        GRAD_SPLITS=GRAD_SPLITS, FLAG_M=1, stride_xm=stride_xm, stride_xk=stride_xk, stride_ar=stride_ar, stride_ak=stride_ak,
        stride_sm=stride_sm, stride_tm=stride_tm, scaling=scaling, threshold=threshold, DROPOUT=DROPOUT, EVEN_K=EVEN_K,
        RAISES_FLAGS=False, HAS_GRAD=HAS_GRAD, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, STAGES=STAGES,
        GRAD_UNIT=GRAD_UNIT, GRAD_M=GRAD_M, GRAD_C=GRAD_C, GRAD_R=GRAD_R, GRAD_STAGES=GRAD_STAGES,
        INPUT_PRECISION=INPUT_PRECISION, GRAD_PRECISION=GRAD_PRECISION,
    )  # fmt: skip


@triton.jit
def s_program(
    program, programs, x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, t_ptr, grad_ptr, grad_partial_ptr,
    grad_counter_ptr, chain_ptr, M, K, R, SPLITS, GRAD_PROGRAMS, GRAD_SPLITS, FLAG_M, stride_xm, stride_xk, stride_ar,
    stride_ak, stride_sm, stride_tm, scaling, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, RAISES_FLAGS: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
    GRAD_UNIT: tl.constexpr, GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """The ``program``-th of ``programs`` for S and grad, as ``_lora_shrink_kernel`` says."""
    # Programs of grad before this one.
    grads, is_grad = 0, False
    if HAS_GRAD:
        grads = (program.to(tl.int64) * GRAD_PROGRAMS // programs).to(tl.int32)
        is_grad = ((program + 1).to(tl.int64) * GRAD_PROGRAMS // programs).to(tl.int32) > grads
        if is_grad:
            weight_grad(
                program=grads, z_ptr=x_ptr, u_ptr=x_ptr, t_ptr=t_ptr, out_ptr=grad_ptr, seed_ptr=seed_ptr,
                partial_ptr=grad_partial_ptr, counter_ptr=grad_counter_ptr, M=M, C=K, R=R, SPLITS=GRAD_SPLITS,
                stride_zm=stride_xm, stride_zc=stride_xk, stride_tm=stride_tm, stride_oc=R, stride_or=1, threshold=threshold,
                T_UNIT=GRAD_UNIT, HAS_ROWS=True, DROPOUT=False, GATE="", BLOCK_M=GRAD_M, BLOCK_C=GRAD_C, BLOCK_R=GRAD_R,
                STAGES=GRAD_STAGES, INPUT_PRECISION=GRAD_PRECISION,
            )  # fmt: skip
    if not is_grad:
        _shrink(
            program=program - grads, x_ptr=x_ptr, a_ptr=a_ptr, s_ptr=s_ptr, seed_ptr=seed_ptr, partial_ptr=partial_ptr,
            counter_ptr=counter_ptr, chain_ptr=chain_ptr, M=M, K=K, R=R, SPLITS=SPLITS, FLAG_M=FLAG_M, stride_xm=stride_xm,
            stride_xk=stride_xk, stride_ar=stride_ar, stride_ak=stride_ak, stride_sm=stride_sm, scaling=scaling,
            threshold=threshold, DROPOUT=DROPOUT, EVEN_K=EVEN_K, RAISES_FLAGS=RAISES_FLAGS, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
            BLOCK_R=BLOCK_R, STAGES=STAGES, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip


@triton.jit
def _shrink(
    program, x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, chain_ptr, M, K, R, SPLITS, FLAG_M, stride_xm, stride_xk,
    stride_ar, stride_ak, stride_sm, scaling, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, RAISES_FLAGS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The ``program``-th program of S."""
    tiles_r = tl.cdiv(R, BLOCK_R)
    tile, split = program // SPLITS, program % SPLITS
    row0 = tile // tiles_r * BLOCK_M
    rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, r_mask = rows < M, rs < R
    if DROPOUT:
        seed = tl.load(seed_ptr)

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in tl.range(split * share, tl.minimum(split * share + share, K), BLOCK_K, num_stages=STAGES):
        x_mask, a_mask = row_mask[:, None], r_mask[None, :]
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
            a_mask &= k0 + ks[:, None] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        a = tl.load(a_ptr + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak, mask=a_mask, other=0.0)
        if DROPOUT:
            # After the load, so that the load itself stays asynchronous.
            x = tl.where(keep_mask(seed, rows, k0, K, threshold, BLOCK_K), x, 0.0)
        s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)

    parts_ptr = partial_ptr + tile.to(tl.int64) * SPLITS * (BLOCK_M * BLOCK_R)
    s, last = shared_sum(s, parts_ptr, counter_ptr + tile, split, SPLITS)
    if last:
        s_ptrs = s_ptr + rows[:, None] * stride_sm + rs[None, :]
        tl.store(s_ptrs, cast(scaling * s, s_ptr.dtype.element_ty), mask=row_mask[:, None] & r_mask[None, :])
        if RAISES_FLAGS:
            raise_flag(chain_ptr, row0 // FLAG_M)

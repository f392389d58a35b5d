"""Y for few rows or columns, whose tiles alone would leave processors idle; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import arrives_last, cast, dot, finished
from stablelora_kernels.kernels.lora.chain import draw_ticket, leave
from stablelora_kernels.kernels.lora.gated import store_gated_grads
from stablelora_kernels.kernels.lora.linear import NOT_SPECIALIZED, add_branch, co_scheduled_grad, wait_for_s
from stablelora_kernels.kernels.lora.shrink import s_program


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "SPLITS"])
def _lora_linear_split_k_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, partial_ptr, counter_ptr,
    z_ptr, u_ptr, du_ptr, grad_ptr, grad_partial_ptr, grad_counter_ptr,
    chain_ptr, s_partial_ptr, s_counter_ptr, t_ptr, db_ptr, db_partial_ptr, db_counter_ptr,
    M, N, K, R, SPLITS, PRODUCTS, GRAD_SPLITS, S_PROGRAMS, S_SPLITS, DB_PROGRAMS, DB_SPLITS, FLAG_M,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    stride_zm, stride_zn, stride_tm,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, S_UNIT: tl.constexpr, MASK_BRANCH: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, EVEN_K: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
    CHAINED: tl.constexpr, S_DROPOUT: tl.constexpr, S_EVEN_K: tl.constexpr, HAS_DB: tl.constexpr, DB_UNIT: tl.constexpr,
    S_BLOCK_M: tl.constexpr, S_BLOCK_K: tl.constexpr, S_BLOCK_R: tl.constexpr, S_STAGES: tl.constexpr,
    DB_M: tl.constexpr, DB_C: tl.constexpr, DB_R: tl.constexpr, DB_STAGES: tl.constexpr,
    S_PRECISION: tl.constexpr, DB_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], W [N, K], A [R, K], B [N, R], Y [M, N].

    As ``_lora_linear_kernel``, with two differences that keep all of the GPU reading W. A program computes W X^T, so that
    W's rows are the long side of the matrix instruction and the few rows of X the short one. And SPLITS programs share a
    tile's K; the last one to finish adds up all parts in order.
    """
    program = tl.program_id(0)
    if CHAINED:
        program = draw_ticket(chain_ptr)
        if program < S_PROGRAMS:
            s_program(
                program=program, programs=S_PROGRAMS, x_ptr=x_ptr, a_ptr=a_ptr, s_ptr=s_ptr, seed_ptr=seed_ptr,
                partial_ptr=s_partial_ptr, counter_ptr=s_counter_ptr, t_ptr=t_ptr, grad_ptr=db_ptr,
                grad_partial_ptr=db_partial_ptr, grad_counter_ptr=db_counter_ptr, chain_ptr=chain_ptr, M=M, K=K, R=R,
                SPLITS=S_SPLITS, GRAD_PROGRAMS=DB_PROGRAMS, GRAD_SPLITS=DB_SPLITS, FLAG_M=FLAG_M, stride_xm=stride_xm,
                stride_xk=stride_xk, stride_ar=stride_ar, stride_ak=stride_ak, stride_sm=stride_sm, stride_tm=stride_tm,
                scaling=scaling, threshold=threshold, DROPOUT=S_DROPOUT, EVEN_K=S_EVEN_K, RAISES_FLAGS=True, HAS_GRAD=HAS_DB,
                BLOCK_M=S_BLOCK_M, BLOCK_K=S_BLOCK_K, BLOCK_R=S_BLOCK_R, STAGES=S_STAGES, GRAD_UNIT=DB_UNIT, GRAD_M=DB_M,
                GRAD_C=DB_C, GRAD_R=DB_R, GRAD_STAGES=DB_STAGES, INPUT_PRECISION=S_PRECISION, GRAD_PRECISION=DB_PRECISION,
            )  # fmt: skip
            leave(chain_ptr, M, FLAG_M)
            return
        program -= S_PROGRAMS
    if HAS_GRAD:  # noqa: SIM102 - only one of the two is a constant for the compiler
        if program >= PRODUCTS:
            co_scheduled_grad(
                program=program - PRODUCTS, z_ptr=z_ptr, u_ptr=u_ptr, s_ptr=s_ptr, grad_ptr=grad_ptr, seed_ptr=seed_ptr,
                chain_ptr=chain_ptr, FLAG_M=FLAG_M, partial_ptr=grad_partial_ptr, counter_ptr=grad_counter_ptr, M=M, N=N, R=R,
                SPLITS=GRAD_SPLITS, stride_zm=stride_zm, stride_zn=stride_zn, stride_sm=stride_sm, threshold=threshold,
                DROPOUT=MASK_BRANCH, GATE=GATE, WAITS_FOR_PRIMARY=WAITS_FOR_PRIMARY, CHAINED=CHAINED, S_BLOCK_M=S_BLOCK_M,
                S_BLOCK_R=S_BLOCK_R, BLOCK_M=GRAD_M, BLOCK_C=GRAD_C, BLOCK_R=GRAD_R, STAGES=GRAD_STAGES,
                INPUT_PRECISION=GRAD_PRECISION,
            )  # fmt: skip
            if CHAINED:
                leave(chain_ptr, M, FLAG_M)
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

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start, stop = split * share, tl.minimum(split * share + share, K)
    # No part is empty. Zeros of an empty loop would make ptxas serialize the WGMMAs.
    tl.assume(start < stop)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(start, stop, BLOCK_K):
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
            if BLOCK_M < 64:
                # Hopper's asynchronous products have at least 64 rows, so S's is none, and reads X in another way.
                acc = finished(acc)

    PART: tl.constexpr = BLOCK_N * BLOCK_M + BLOCK_M * BLOCK_R
    # Row by row of Y and S, so that rows beyond M cost nothing.
    acc_offsets = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    s_offsets = BLOCK_N * BLOCK_M + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    acc_mask, s_mask = row_mask[None, :], row_mask[:, None]
    parts = partial_ptr + tile.to(tl.int64) * SPLITS * PART
    last = SPLITS == 1
    if SPLITS > 1:
        tl.store(parts + split * PART + acc_offsets, acc, mask=acc_mask)
        if not LOAD_S:
            tl.store(parts + split * PART + s_offsets, s, mask=s_mask)
        last = arrives_last(counter_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for i in range(SPLITS):
                acc += tl.load(parts + i * PART + acc_offsets, mask=acc_mask, other=0.0, cache_modifier=".cg")
                if not LOAD_S:
                    s += tl.load(parts + i * PART + s_offsets, mask=s_mask, other=0.0, cache_modifier=".cg")
        y = tl.trans(acc)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        wait_for_s(chain_ptr, pid_m * BLOCK_M, M, R, FLAG_M, WAITS_FOR_PRIMARY, CHAINED, S_BLOCK_M, S_BLOCK_R)
        y = add_branch(
            acc=y, s=s, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=seed_ptr, rows=rows, cols=cols, col0=pid_n * BLOCK_N,
            store_s=STORE_S & (pid_n == 0), M=M, N=N, R=R, stride_sm=stride_sm, stride_bn=stride_bn, stride_br=stride_br,
            scaling=scaling, threshold=threshold, LOAD_S=LOAD_S, S_UNIT=S_UNIT, MASK_BRANCH=MASK_BRANCH,
            BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        y_ptrs, y_mask = y_ptr + rows[:, None] * stride_ym + cols[None, :], row_mask[:, None] & col_mask[None, :]
        if ADD:
            y += tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
        if GATE != "":
            store_gated_grads(y, z_ptr, u_ptr, y_ptr, du_ptr, rows, pid_n * BLOCK_N, stride_ym, M, N, GATE, PARTS=1)
        else:
            tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=y_mask)
    if CHAINED:
        leave(chain_ptr, M, FLAG_M)

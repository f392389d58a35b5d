"""Y on Hopper and data-center Blackwell, through tensor descriptors; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, column_parts, dot, tile_of
from stablelora_kernels.kernels.lora.chain import draw_ticket, leave
from stablelora_kernels.kernels.lora.gated import gated_grads, prefetch
from stablelora_kernels.kernels.lora.linear import NOT_SPECIALIZED, add_branch, co_scheduled_grad, wait_for_s
from stablelora_kernels.kernels.lora.shrink import s_program


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_linear_tma_kernel(
    x_desc, w_desc, bias_ptr, a_ptr_or_desc, b_ptr, s_ptr, y_desc, seed_ptr, g_desc, u_desc, du_desc, z_ptr, u_ptr, grad_ptr,
    grad_partial_ptr, grad_counter_ptr, x_ptr, chain_ptr, s_partial_ptr, s_counter_ptr, t_ptr, db_ptr, db_partial_ptr,
    db_counter_ptr, M, N, K, R, PRODUCTS, GRAD_SPLITS, S_PROGRAMS, S_SPLITS, DB_PROGRAMS, DB_SPLITS, FLAG_M,
    stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_zm, stride_zn, stride_xm, stride_xk, stride_tm,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, S_UNIT: tl.constexpr, MASK_BRANCH: tl.constexpr,
    PARTS: tl.constexpr, TRANS_W: tl.constexpr, DESCRIBED_A: tl.constexpr, TRANS_A: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
    CHAINED: tl.constexpr, S_DROPOUT: tl.constexpr, S_EVEN_K: tl.constexpr, HAS_DB: tl.constexpr, DB_UNIT: tl.constexpr,
    S_BLOCK_M: tl.constexpr, S_BLOCK_K: tl.constexpr, S_BLOCK_R: tl.constexpr, S_STAGES: tl.constexpr,
    DB_M: tl.constexpr, DB_C: tl.constexpr, DB_R: tl.constexpr, DB_STAGES: tl.constexpr,
    S_PRECISION: tl.constexpr, DB_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], W [N, K], A [R, K], B [N, R], S [M, R], Y [M, N].

    As ``_lora_linear_kernel``, but persistent: each program takes tile after tile and finishes it in PARTS parts of its
    columns. Descriptors hold X, Y, W (W^T [K, N] with TRANS_W) and, with DESCRIBED_A, A (A^T [K, R] with TRANS_A). The
    programs of grad run as those of the product free a processor.
    """
    program = tl.program_id(0)
    if CHAINED:
        program = draw_ticket(chain_ptr)
        if program < S_PROGRAMS:
            s_program(
                program=program, programs=S_PROGRAMS, x_ptr=x_ptr, a_ptr=a_ptr_or_desc, s_ptr=s_ptr, seed_ptr=seed_ptr,
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
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Flattening this loop into the inner one crashes the compiler for sm_100 if a dot follows the inner loop.
    for tile in tl.range(program, tiles_m * tiles_n, PRODUCTS, flatten=False):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        rs = tl.arange(0, BLOCK_R).to(tl.int64)

        if GATE != "":
            prefetch(z_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
            prefetch(u_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k0])
            if TRANS_W:  # noqa: SIM108 - the arms of a ternary must have one shape
                w = w_desc.load([k0, pid_n * BLOCK_N])
            else:
                w = tl.trans(w_desc.load([pid_n * BLOCK_N, k0]))
            acc = dot(x, w, acc, INPUT_PRECISION)
            if not LOAD_S:
                if not DESCRIBED_A:
                    a_ptrs = a_ptr_or_desc + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak
                    a = tl.load(a_ptrs, mask=(k0 + ks[:, None] < K) & (rs[None, :] < R), other=0.0)
                elif TRANS_A:
                    a = a_ptr_or_desc.load([k0, 0])
                else:
                    a = tl.trans(a_ptr_or_desc.load([0, k0]))
                s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)

        rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        wait_for_s(chain_ptr, pid_m * BLOCK_M, M, R, FLAG_M, WAITS_FOR_PRIMARY, CHAINED, S_BLOCK_M, S_BLOCK_R)
        if not MASK_BRANCH:
            # Onto the whole accumulator: products onto parts of it make ptxas serialize the main loop's WGMMAs.
            acc = add_branch(
                acc=acc, s=s, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=seed_ptr, rows=rows,
                cols=pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), col0=pid_n * BLOCK_N,
                store_s=STORE_S & (pid_n == 0), M=M, N=N, R=R, stride_sm=stride_sm, stride_bn=stride_bn, stride_br=stride_br,
                scaling=scaling, threshold=threshold, LOAD_S=LOAD_S, S_UNIT=S_UNIT, MASK_BRANCH=False,
                BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
            )  # fmt: skip
        # One part at a time: the masked branch takes fewer registers, and the store of Y less shared memory.
        PART: tl.constexpr = BLOCK_N // PARTS
        parts = column_parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            y = parts[i]
            col0 = pid_n * BLOCK_N + i * PART
            cols = col0.to(tl.int64) + tl.arange(0, PART)
            if MASK_BRANCH:
                y = add_branch(
                    acc=y, s=s, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=seed_ptr, rows=rows, cols=cols, col0=col0,
                    store_s=STORE_S & (col0 == 0), M=M, N=N, R=R, stride_sm=stride_sm, stride_bn=stride_bn,
                    stride_br=stride_br, scaling=scaling, threshold=threshold, LOAD_S=LOAD_S, S_UNIT=S_UNIT, MASK_BRANCH=True,
                    BLOCK_N=PART, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
                )  # fmt: skip
            if HAS_BIAS:
                y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            if ADD:
                y += y_desc.load([pid_m * BLOCK_M, col0]).to(tl.float32)
            if GATE != "":
                g, u = g_desc.load([pid_m * BLOCK_M, col0]), u_desc.load([pid_m * BLOCK_M, col0])
                y, du = gated_grads(y, g, u, GATE)
                du_desc.store([pid_m * BLOCK_M, col0], cast(du, du_desc.dtype))
            y_desc.store([pid_m * BLOCK_M, col0], cast(y, y_desc.dtype))
    if CHAINED:
        leave(chain_ptr, M, FLAG_M)

"""Y, and dX by the same formula, from tiles read through pointers: any GPU, any strides.

All kernels of this directory, with s' = scaling / (1 - p) and a keep-mask of zeros and ones:

    forward   S  = s' (X ∘ keep) A^T             Y  = X W^T + bias + S B^T
    backward  dS = s' dY B                       dX = dY W + (dS A) ∘ keep
              dA = dS^T (X ∘ keep)               dB = dY^T S

S and dS are scaled in float32 and rounded once. In float16, s' > 1 could make S overflow where Y does not, so S is stored in
units of a power of two, S_UNIT; what is computed from S is multiplied by it, exactly, in float32. dX is the forward's formula
with W, A and B read through swapped strides, so one kernel serves both. ``shrink`` has S; ``linear``, ``linear_split_k``,
``linear_tma`` and ``linear_quantized`` have Y for any GPU, few rows, Hopper and a quantized W; ``expand`` adds the branch onto
a finished product; ``weight_grads`` has dA and dB; ``group`` has S and dA of projections that share X. Mostly, dA and dB take
no launch of their own: programs for dB run with those for dS, since both read dY, and programs for dA run with those for dX.

Arguments that several kernels take:

    M, N, K, R            rows of X, columns of Y, columns of X, rank
    seed_ptr, threshold   dropout: Philox's seed, and the number below which 31 random bits drop an element
    SPLITS                programs that share a tile's sum, through partial_ptr (float32 scratch) and counter_ptr (int32 zeros)
    PRODUCTS              programs of the product; those of the co-scheduled gradient follow
    HAS_GRAD, GRAD_*      the co-scheduled dA or dB: its programs, and the arguments of its ``weight_grad``
    LOAD_S, STORE_S       read S; store the S that this kernel computes
    S_UNIT                what a stored 1 of S means; s' comes divided by it
    MASK_X, MASK_BRANCH   dropout masks X (forward); dropout masks the branch's result (backward)
    HAS_W                 else there is no product: Y is the branch alone
    ADD                   add to Y's earlier values
    GATE                  Y is dH of a gated MLP, see ``gated``: Z and u_ptr have G and U; Y's memory and du_ptr take dG and dU
    EVEN_K                BLOCK_K divides K, so that loads along K need no mask
    GROUP_M               row tiles of a group, see ``tile_of``
    TRIGGERS_DEPENDENTS   let the next launch begin before this one ends (programmatic dependent launch)
    WAITS_FOR_PRIMARY     wait for the launch before, which computes S, before reading S
    CHAINED               this launch has S's programs too, S_PROGRAMS, then PRODUCTS, then those of grad: see ``chain``
    S_*, DB_*             those programs, and dB's among them, with the arguments of ``s_program``
    INPUT_PRECISION       of float32 products, see ``dispatch.rules.input_precision``

``do_not_specialize``: otherwise Triton recompiles for M = 1, for multiples of 16 and for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, tile_of
from stablelora_kernels.kernels.lora.chain import draw_ticket, leave, wait_for_flag
from stablelora_kernels.kernels.lora.gated import prefetch, store_gated_grads
from stablelora_kernels.kernels.lora.shrink import s_program
from stablelora_kernels.kernels.lora.weight_grads import part_of_rows, weight_grad

# Of the three kernels of the product.
NOT_SPECIALIZED = [
    "M",
    "PRODUCTS",
    "GRAD_SPLITS",
    "S_PROGRAMS",
    "S_SPLITS",
    "DB_PROGRAMS",
    "DB_SPLITS",
    "FLAG_M",
    "threshold",
]


@triton.jit
def wait_for_s(
    chain_ptr, row0, M, R, FLAG_M,
    WAITS_FOR_PRIMARY: tl.constexpr, CHAINED: tl.constexpr, S_BLOCK_M: tl.constexpr, S_BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Wait until S is stored from row ``row0`` on, as far as the rows of its flag go."""
    if WAITS_FOR_PRIMARY:
        # This launch may begin before the one that computes S ends.
        tl.extra.cuda.gdc_wait()
    if CHAINED:
        wait_for_flag(chain_ptr, row0 // FLAG_M, M, R, FLAG_M, S_BLOCK_M, S_BLOCK_R)


@triton.jit
def add_branch(
    acc, s, s_ptr, b_ptr, seed_ptr, rows, cols, col0, store_s, M, N, R, stride_sm, stride_bn, stride_br, scaling, threshold,
    LOAD_S: tl.constexpr, S_UNIT: tl.constexpr, MASK_BRANCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (S B^T) ∘ keep for a tile, where S is read (LOAD_S) or ``s``, scaled, rounded and, if ``store_s``, stored."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    if MASK_BRANCH:
        # One load for all parts of a tile would keep the keys made of the seed in registers, and 64 bytes more would spill.
        keep = keep_mask(tl.load(seed_ptr), rows, col0, N, threshold, BLOCK_N)
    if S_UNIT != 1.0:
        acc *= 1.0 / S_UNIT
    # One stage, because a pipeline would take the main loop's shared memory.
    for r0 in tl.range(0, R if LOAD_S else BLOCK_R, BLOCK_R, num_stages=1):
        s_mask = (rows[:, None] < M) & (r0 + rs[None, :] < R)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + (r0 + rs[None, :])
        if LOAD_S:
            s_low = tl.load(s_ptrs, mask=s_mask, other=0.0)
        else:
            s_low = cast(scaling * s, s_ptr.dtype.element_ty)
            if store_s:
                tl.store(s_ptrs, s_low, mask=s_mask)
        b_mask = (r0 + rs[:, None] < R) & (cols[None, :] < N)
        b = tl.load(b_ptr + cols[None, :] * stride_bn + (r0 + rs[:, None]) * stride_br, mask=b_mask, other=0.0)
        b = cast(b, s_low.dtype)
        if MASK_BRANCH:
            branch = dot(s_low, b, tl.zeros(acc.shape, dtype=tl.float32), INPUT_PRECISION)
            acc += tl.where(keep, branch, 0.0)
        else:
            # Into the product's own accumulator: registers have no room for a second one.
            acc = dot(s_low, b, acc, INPUT_PRECISION)
    if S_UNIT != 1.0:
        acc *= S_UNIT
    return acc


@triton.jit
def co_scheduled_grad(
    program, z_ptr, u_ptr, s_ptr, grad_ptr, seed_ptr, chain_ptr, partial_ptr, counter_ptr, M, N, R, SPLITS, FLAG_M, stride_zm,
    stride_zn, stride_sm, threshold,
    DROPOUT: tl.constexpr, GATE: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr, CHAINED: tl.constexpr,
    S_BLOCK_M: tl.constexpr, S_BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad = S^T (Z ∘ keep), [R, N], by programs of a product's launch; earlier programs store S, or the launch before does."""
    if WAITS_FOR_PRIMARY:
        tl.extra.cuda.gdc_wait()
    if CHAINED:
        start, stop = part_of_rows(program, M, N, R, SPLITS, BLOCK_M, BLOCK_C, BLOCK_R)
        for flag in range(start // FLAG_M, tl.cdiv(stop, FLAG_M)):
            wait_for_flag(chain_ptr, flag, M, R, FLAG_M, S_BLOCK_M, S_BLOCK_R)
    weight_grad(
        program=program, z_ptr=z_ptr, u_ptr=u_ptr, t_ptr=s_ptr, out_ptr=grad_ptr, seed_ptr=seed_ptr, partial_ptr=partial_ptr,
        counter_ptr=counter_ptr, M=M, C=N, R=R, SPLITS=SPLITS, stride_zm=stride_zm, stride_zc=stride_zn, stride_tm=stride_sm,
        stride_oc=1, stride_or=N, threshold=threshold, T_UNIT=1.0, HAS_ROWS=True, DROPOUT=DROPOUT, GATE=GATE, BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, STAGES=STAGES, INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, z_ptr, u_ptr, du_ptr, grad_ptr, grad_partial_ptr,
    grad_counter_ptr, chain_ptr, s_partial_ptr, s_counter_ptr, t_ptr, db_ptr, db_partial_ptr, db_counter_ptr,
    M, N, K, R, PRODUCTS, GRAD_SPLITS, S_PROGRAMS, S_SPLITS, DB_PROGRAMS, DB_SPLITS, FLAG_M,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    stride_zm, stride_zn, stride_tm,
    scaling, threshold,
    HAS_W: tl.constexpr, HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, S_UNIT: tl.constexpr,
    MASK_BRANCH: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, EVEN_K: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr,
    HAS_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
    CHAINED: tl.constexpr, S_DROPOUT: tl.constexpr, S_EVEN_K: tl.constexpr, HAS_DB: tl.constexpr, DB_UNIT: tl.constexpr,
    S_BLOCK_M: tl.constexpr, S_BLOCK_K: tl.constexpr, S_BLOCK_R: tl.constexpr, S_STAGES: tl.constexpr,
    DB_M: tl.constexpr, DB_C: tl.constexpr, DB_R: tl.constexpr, DB_STAGES: tl.constexpr,
    S_PRECISION: tl.constexpr, DB_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], W [N, K], A [R, K], B [N, R], S [M, R], Y [M, N].

    The main loop computes S with the product, for R <= BLOCK_R, unless LOAD_S, which a call without W has. keep, of Y's shape,
    is all ones unless MASK_BRANCH. With HAS_GRAD, the programs from PRODUCTS on compute grad = S^T (Z ∘ keep), Z [M, N],
    grad [R, N].
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
    pid_m, pid_n = tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    if GATE != "":
        prefetch(z_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
        prefetch(u_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if HAS_W:
        for k0 in range(0, K, BLOCK_K):
            x_mask, w_mask, a_mask = row_mask[:, None], col_mask[None, :], rs[None, :] < R
            if not EVEN_K:
                x_mask &= k0 + ks[None, :] < K
                w_mask &= k0 + ks[:, None] < K
                a_mask &= k0 + ks[:, None] < K
            x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
            w = tl.load(w_ptr + cols[None, :] * stride_wn + (k0 + ks[:, None]) * stride_wk, mask=w_mask, other=0.0)
            acc = dot(x, w, acc, INPUT_PRECISION)
            if not LOAD_S:
                a = tl.load(a_ptr + rs[None, :] * stride_ar + (k0 + ks[:, None]) * stride_ak, mask=a_mask, other=0.0)
                s = dot(x, cast(a, x.dtype), s, INPUT_PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    wait_for_s(chain_ptr, pid_m * BLOCK_M, M, R, FLAG_M, WAITS_FOR_PRIMARY, CHAINED, S_BLOCK_M, S_BLOCK_R)
    acc = add_branch(
        acc=acc, s=s, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=seed_ptr, rows=rows, cols=cols, col0=pid_n * BLOCK_N,
        store_s=STORE_S & (pid_n == 0), M=M, N=N, R=R, stride_sm=stride_sm, stride_bn=stride_bn, stride_br=stride_br,
        scaling=scaling, threshold=threshold, LOAD_S=LOAD_S, S_UNIT=S_UNIT, MASK_BRANCH=MASK_BRANCH,
        BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip
    y_ptrs, y_mask = y_ptr + rows[:, None] * stride_ym + cols[None, :], row_mask[:, None] & col_mask[None, :]
    if ADD:
        acc += tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    if GATE != "":
        store_gated_grads(acc, z_ptr, u_ptr, y_ptr, du_ptr, rows, pid_n * BLOCK_N, stride_ym, M, N, GATE, PARTS=2)
    else:
        tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=y_mask)
    if CHAINED:
        leave(chain_ptr, M, FLAG_M)

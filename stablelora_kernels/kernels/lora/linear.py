"""The kernels of ``lora_linear``. With s' = scaling / (1 - p) and a keep-mask of zeros and ones:

    forward   S  = s' (X ∘ keep) A^T             Y  = X W^T + bias + S B^T
    backward  dS = s' dY B                       dX = dY W + (dS A) ∘ keep
              dA = dS^T (X ∘ keep)               dB = dY^T S

S and dS are scaled in float32 and rounded once. dX is the forward's formula with W, A and B read through swapped strides, so
one kernel serves both. Here are S (``_lora_shrink_kernel``) and Y from tiles read through pointers, on any GPU and at any
strides; ``lora_linear_split_k`` has Y for few rows, ``lora_linear_tma`` Y through Hopper's tensor descriptors,
``lora_expand`` the branch onto a finished product, ``lora_weight_grads`` dA and dB. Those mostly take no launch of their
own: programs for dB go with those for dS, both reading dY, and programs for dA with those for dX.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, shared_sum, tile_of
from stablelora_kernels.kernels.lora.weight_grads import weight_grad


# Without do_not_specialize every batch size would be compiled anew: for 1, for multiples of 16 and for the rest.
@triton.jit(do_not_specialize=["M", "SPLITS", "GRAD_PROGRAMS", "GRAD_SPLITS", "threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, t_ptr, grad_ptr, grad_partial_ptr, grad_counter_ptr,
    M, K, R, SPLITS, GRAD_PROGRAMS, GRAD_SPLITS,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm, stride_tm,
    scaling, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, LEAD: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """S = s' (X ∘ keep) A^T, and grad = X^T T where HAS_GRAD;  X [M, K], A [R, K], S and T [M, R], grad [K, R].

    Programs of S: tiles of rows, in each blocks of ranks, in each SPLITS parts of K, the last of which to finish adds up all of
    them in order. Programs of grad are strewn among them evenly: both go through the rows of X at one pace, so that the second
    to read a row finds it in L2.
    """
    if LEAD:
        # The wide product that follows needs S at its end only: it may take what room is left on the GPU from here on.
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if HAS_GRAD:
        # How many of the programs before this one, and before the next, are grad's.
        grads = (program.to(tl.int64) * GRAD_PROGRAMS // tl.num_programs(0)).to(tl.int32)
        grads_next = ((program + 1).to(tl.int64) * GRAD_PROGRAMS // tl.num_programs(0)).to(tl.int32)
        if grads_next > grads:
            weight_grad(
                grads, x_ptr, t_ptr, grad_ptr, seed_ptr, grad_partial_ptr, grad_counter_ptr, M, K, R, GRAD_SPLITS, stride_xm,
                stride_xk, stride_tm, R, 1, threshold, False, GRAD_M, GRAD_C, GRAD_R, GRAD_STAGES, GRAD_PRECISION,
            )  # fmt: skip
        else:
            _shrink(
                program - grads, x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, M, K, R, SPLITS, stride_xm, stride_xk,
                stride_ar, stride_ak, stride_sm, scaling, threshold, DROPOUT, EVEN_K, BLOCK_M, BLOCK_K, BLOCK_R,
                INPUT_PRECISION,
            )  # fmt: skip
    else:
        _shrink(
            program, x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, M, K, R, SPLITS, stride_xm, stride_xk, stride_ar,
            stride_ak, stride_sm, scaling, threshold, DROPOUT, EVEN_K, BLOCK_M, BLOCK_K, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip


@triton.jit
def _shrink(
    program, x_ptr, a_ptr, s_ptr, seed_ptr, partial_ptr, counter_ptr, M, K, R, SPLITS, stride_xm, stride_xk, stride_ar,
    stride_ak, stride_sm, scaling, threshold,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """What the ``program``-th of S's programs does."""
    tiles_r = tl.cdiv(R, BLOCK_R)
    tile, split = program // SPLITS, program % SPLITS
    rows = (tile // tiles_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, r_mask = rows < M, rs < R
    if DROPOUT:
        seed = tl.load(seed_ptr)

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
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


@triton.jit
def add_branch(
    acc, s, s_ptr, b_ptr, seed_ptr, rows, cols, col0, store_s, M, N, R, stride_sm, stride_bn, stride_br, scaling, threshold,
    LOAD_S: tl.constexpr, MASK_BRANCH: tl.constexpr, WAIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (S B^T) ∘ keep for a tile, with S read where LOAD_S, and else ``s`` scaled and rounded, and stored if ``store_s``."""
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    if WAIT:
        # This launch may have begun before the one that computes S has ended.
        tl.extra.cuda.gdc_wait()
    if MASK_BRANCH:
        keep = keep_mask(tl.load(seed_ptr), rows, col0, N, threshold, BLOCK_N)
    # Not pipelined: that would take the main loop's shared memory.
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
            # Onto the base product's own accumulator: a second one of its size would not fit the registers.
            acc = dot(s_low, b, acc, INPUT_PRECISION)
    return acc


@triton.jit
def grad_beside(
    program, z_ptr, s_ptr, grad_ptr, seed_ptr, partial_ptr, counter_ptr, M, N, R, SPLITS, stride_zm, stride_zn, stride_sm,
    threshold,
    DROPOUT: tl.constexpr, WAIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad = S^T (Z ∘ keep), [R, N], by programs of a product's launch; S is the launch before's."""
    if WAIT:
        tl.extra.cuda.gdc_wait()
    weight_grad(
        program, z_ptr, s_ptr, grad_ptr, seed_ptr, partial_ptr, counter_ptr, M, N, R, SPLITS, stride_zm, stride_zn, stride_sm,
        1, N, threshold, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R, STAGES, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "PRODUCTS", "GRAD_SPLITS", "threshold"])
def _lora_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, z_ptr, grad_ptr, grad_partial_ptr, grad_counter_ptr,
    M, N, K, R, PRODUCTS, GRAD_SPLITS,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sm, stride_ym,
    stride_zm, stride_zn,
    scaling, threshold,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, STORE_S: tl.constexpr, MASK_BRANCH: tl.constexpr,
    ADD: tl.constexpr, EVEN_K: tl.constexpr, WAIT: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    GRAD_M: tl.constexpr, GRAD_C: tl.constexpr, GRAD_R: tl.constexpr, GRAD_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], W [N, K], A [R, K], B [N, R], S [M, R], Y [M, N].

    S is accumulated beside the base product, and R is at most BLOCK_R then, or read where LOAD_S. keep, of Y's shape, is all
    ones unless MASK_BRANCH. Where ADD, all this is added to what Y holds. Where HAS_GRAD, the programs from PRODUCTS on compute
    grad = S^T (Z ∘ keep), Z [M, N], grad [R, N].
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
    pid_m, pid_n = tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + cols[None, :] * stride_wn + ks[:, None] * stride_wk
    a_ptrs = a_ptr + rs[None, :] * stride_ar + ks[:, None] * stride_ak

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
            a_ptrs += BLOCK_K * stride_ak
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = add_branch(
        acc, s, s_ptr, b_ptr, seed_ptr, rows, cols, pid_n * BLOCK_N, STORE_S & (pid_n == 0), M, N, R, stride_sm, stride_bn,
        stride_br, scaling, threshold, LOAD_S, MASK_BRANCH, WAIT, BLOCK_N, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    if ADD:
        acc += tl.load(y_ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])

"""Y and dX from a quantized W, which the main loop dequantizes; formulas and arguments are in ``linear``.

``reference.nf4_ref`` and ``reference.fp8_ref`` define what a stored W means. The loop rounds a dequantized element to X's
dtype before it multiplies, so results equal those of a W that was dequantized first.

Arguments: q_ptr the stored bytes, rows of stride_q bytes; scale_ptr the absmax (NF4) or scales (FP8); code_ptr, nested_scale_ptr,
nested_code_ptr and offset_ptr as in ``quantized.NF4Weight``. BLOCKSIZE elements share a scale, and NESTED scales a nested
one, 0 if scales are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, shared_sum, tile_of
from stablelora_kernels.kernels.lora.linear import add_branch


@triton.jit
def _nf4_scale(block, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED: tl.constexpr):
    """The absmax of a block of W in float32; with NESTED > 0, it is stored as an 8-bit code."""
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED > 0:
        outer = tl.load(nested_absmax_ptr + block // NESTED, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    return scale


@triton.jit
def _nf4_tile(
    q_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, rows, col0, N, K, stride_q,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """W[rows, col0 : col0 + COLS] in float32 from two elements a byte, the first in the upper half.

    ALIGNED: no byte and no block lies across two rows, and blocks divide COLS or COLS divides them. Otherwise each element
    loads its own byte and scale, for which a pipelined loop has no room.
    """
    row_mask = rows[:, None] < N
    if ALIGNED:
        HALF: tl.constexpr = COLS // 2
        SCALES: tl.constexpr = max(COLS // BLOCKSIZE, 1)
        bytes_ = col0 // 2 + tl.arange(0, HALF).to(tl.int64)
        mask = row_mask & (bytes_[None, :] < stride_q)
        pair = tl.load(q_ptr + rows[:, None] * stride_q + bytes_[None, :], mask=mask, other=0).to(tl.int32)
        index = tl.interleave(pair >> 4, pair & 15)
        value = tl.zeros(index.shape, dtype=tl.float32)
        # Always true, which the compiler can't know. Without the condition it would pipeline each look-up through shared
        # memory like the main loop's other loads. The 16 values lie side by side and hit the L1 cache.
        if stride_q > 0:
            value = tl.load(code_ptr + index)
        block = col0 // BLOCKSIZE + tl.arange(0, SCALES)
        scale_mask = row_mask & (block[None, :] * BLOCKSIZE < K)
        scale = _nf4_scale(
            rows[:, None] * (K // BLOCKSIZE) + block[None, :], scale_mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr,
            offset_ptr, NESTED,
        )  # fmt: skip
        if SCALES > 1:
            ROWS: tl.constexpr = value.shape[0]
            value = tl.reshape(value, (ROWS, SCALES, COLS // SCALES)) * scale[:, :, None]
            value = tl.reshape(value, (ROWS, COLS))
        else:
            value *= scale
    else:
        cols = col0 + tl.arange(0, COLS).to(tl.int64)
        mask = row_mask & (cols[None, :] < K)
        flat = rows[:, None] * K + cols[None, :]
        pair = tl.load(q_ptr + flat // 2, mask=mask, other=0).to(tl.int32)
        value = tl.load(code_ptr + tl.where(flat % 2 == 0, pair >> 4, pair & 15))
        value *= _nf4_scale(flat // BLOCKSIZE, mask, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED)
    return value


@triton.jit
def _fp8_tile(q_ptr, scale_ptr, rows, col0, N, K, stride_q, COLS: tl.constexpr):
    """W[rows, col0 : col0 + COLS] in float32 from bytes of e4m3 (1 sign, 4 exponent, 3 fraction bits, no infinities)."""
    cols = col0 + tl.arange(0, COLS).to(tl.int64)
    row_mask = rows < N
    mask = row_mask[:, None] & (cols[None, :] < K)
    bits = tl.load(q_ptr + rows[:, None] * stride_q + cols[None, :], mask=mask, other=0).to(tl.int16)
    # Read as float16, which has one exponent bit more, they are 2^8 too small, subnormal ones included.
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return value * tl.load(scale_ptr + rows, mask=row_mask, other=0.0)[:, None]


@triton.jit
def _weight_tile(
    q_ptr, scale_ptr, code_ptr, nested_scale_ptr, nested_code_ptr, offset_ptr, rows, col0, N, K, stride_q,
    NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """W[rows, col0 : col0 + COLS] in float32; W is [N, K]. Elements beyond its edges are undefined."""
    if NF4:
        return _nf4_tile(
            q_ptr=q_ptr, absmax_ptr=scale_ptr, code_ptr=code_ptr, nested_absmax_ptr=nested_scale_ptr,
            nested_code_ptr=nested_code_ptr, offset_ptr=offset_ptr, rows=rows, col0=col0, N=N, K=K, stride_q=stride_q,
            BLOCKSIZE=BLOCKSIZE, NESTED=NESTED, ALIGNED=ALIGNED, COLS=COLS,
        )  # fmt: skip
    else:
        return _fp8_tile(q_ptr, scale_ptr, rows, col0, N, K, stride_q, COLS)


@triton.jit(do_not_specialize=["M", "SPLITS", "threshold"])
def _lora_linear_quantized_kernel(
    x_ptr, q_ptr, scale_ptr, code_ptr, nested_scale_ptr, nested_code_ptr, offset_ptr, bias_ptr, b_ptr, s_ptr, y_ptr, seed_ptr,
    partial_ptr, counter_ptr,
    M, N, K, R, SPLITS,
    stride_xm, stride_xk, stride_q, stride_bn, stride_br, stride_sm, stride_ym,
    threshold,
    NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TRANS_W: tl.constexpr, HAS_BIAS: tl.constexpr,
    S_UNIT: tl.constexpr, MASK_BRANCH: tl.constexpr, EVEN_K: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + (S B^T) ∘ keep;  X [M, K], W [N, K] (stored as [K, N] with TRANS_W), B [N, R], S [M, R], Y [M, N].

    No block of W lies across two stored rows. SPLITS programs share a tile's K; the last one to finish adds up all parts in
    order.
    """
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    pid_m, pid_n = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        x_mask = row_mask[:, None]
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        # W is stored as [N, K] for Y and [K, N] for dX, with contiguous rows in both.
        if TRANS_W:
            w = _weight_tile(
                q_ptr=q_ptr, scale_ptr=scale_ptr, code_ptr=code_ptr, nested_scale_ptr=nested_scale_ptr,
                nested_code_ptr=nested_code_ptr, offset_ptr=offset_ptr, rows=k0 + ks, col0=pid_n * BLOCK_N, N=K, K=N,
                stride_q=stride_q, NF4=NF4, BLOCKSIZE=BLOCKSIZE, NESTED=NESTED, ALIGNED=True, COLS=BLOCK_N,
            )  # fmt: skip
            acc = dot(x, cast(w, x.dtype), acc, INPUT_PRECISION)
        else:
            w = _weight_tile(
                q_ptr=q_ptr, scale_ptr=scale_ptr, code_ptr=code_ptr, nested_scale_ptr=nested_scale_ptr,
                nested_code_ptr=nested_code_ptr, offset_ptr=offset_ptr, rows=cols, col0=k0, N=N, K=K, stride_q=stride_q,
                NF4=NF4, BLOCKSIZE=BLOCKSIZE, NESTED=NESTED, ALIGNED=True, COLS=BLOCK_K,
            )  # fmt: skip
            acc = dot(x, tl.trans(cast(w, x.dtype)), acc, INPUT_PRECISION)

    parts_ptr = partial_ptr + tile.to(tl.int64) * SPLITS * (BLOCK_M * BLOCK_N)
    acc, last = shared_sum(acc, parts_ptr, counter_ptr + tile, split, SPLITS)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if WAITS_FOR_PRIMARY:
            # This launch may begin before the one that computes S ends.
            tl.extra.cuda.gdc_wait()
        acc = add_branch(
            acc=acc, s=acc, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=seed_ptr, rows=rows, cols=cols, col0=pid_n * BLOCK_N,
            store_s=False, M=M, N=N, R=R, stride_sm=stride_sm, stride_bn=stride_bn, stride_br=stride_br, scaling=1.0,
            threshold=threshold, LOAD_S=True, S_UNIT=S_UNIT, MASK_BRANCH=MASK_BRANCH, BLOCK_N=BLOCK_N,
            BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
        tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def _dequantize_kernel(
    q_ptr, scale_ptr, code_ptr, nested_scale_ptr, nested_code_ptr, offset_ptr, w_ptr, N, K, stride_q,
    NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [N, K] from the stored bytes, rounded once."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col0 = tl.program_id(0) % tiles_k * BLOCK_K
    w = _weight_tile(
        q_ptr=q_ptr, scale_ptr=scale_ptr, code_ptr=code_ptr, nested_scale_ptr=nested_scale_ptr,
        nested_code_ptr=nested_code_ptr, offset_ptr=offset_ptr, rows=rows, col0=col0, N=N, K=K, stride_q=stride_q, NF4=NF4,
        BLOCKSIZE=BLOCKSIZE, NESTED=NESTED, ALIGNED=ALIGNED, COLS=BLOCK_K,
    )  # fmt: skip
    cols = col0 + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < N) & (cols[None, :] < K)
    tl.store(w_ptr + rows[:, None] * K + cols[None, :], cast(w, w_ptr.dtype.element_ty), mask=mask)

"""Y and dX from a quantized W, which the main loop dequantizes.

Formulas and arguments are in this directory's ``__init__``.

``reference.nf4_ref``, ``fp8_ref`` and ``fp4_ref`` define what a stored W means. The loop rounds a
dequantized element to X's dtype before it multiplies, so results equal those of a W that was
dequantized first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, shared_sum, tile_of
from stablelora_kernels.kernels.lora.product import add_branch


@triton.jit
def _nf4_scale(block, mask, w, NESTED: tl.constexpr):
    """The absmax of a block of W in float32; with NESTED > 0, it is stored as an 8-bit code."""
    scale = tl.load(w.scale + block, mask=mask, other=0)
    if NESTED > 0:
        outer = tl.load(w.nested_scale + block // NESTED, mask=mask, other=0.0)
        scale = tl.load(w.nested_code + scale.to(tl.int32)) * outer + tl.load(w.offset)
    return scale


@triton.jit
def _nf4_tile(w, rows, col0, N, K, PACKED: tl.constexpr, COLS: tl.constexpr):
    """W[rows, col0 : col0 + COLS] in float32 from two elements a byte, the first in the upper half.

    Without ALIGNED each element loads its own byte and scale, for which a pipelined loop has no
    room.
    """
    BLOCKSIZE: tl.constexpr = PACKED.BLOCKSIZE
    row_mask = rows[:, None] < N
    if PACKED.ALIGNED:
        HALF: tl.constexpr = COLS // 2
        SCALES: tl.constexpr = max(COLS // BLOCKSIZE, 1)
        bytes_ = col0 // 2 + tl.arange(0, HALF).to(tl.int64)
        mask = row_mask & (bytes_[None, :] < w.stride)
        pair = tl.load(w.data + rows[:, None] * w.stride + bytes_[None, :], mask=mask, other=0).to(
            tl.int32
        )
        index = tl.interleave(pair >> 4, pair & 15)
        value = tl.zeros(index.shape, dtype=tl.float32)
        # Always true, which the compiler can't know. Without the condition it would pipeline each
        # look-up through shared memory like the main loop's other loads. The 16 values lie side by
        # side and hit the L1 cache.
        if w.stride > 0:
            value = tl.load(w.code + index)
        block = col0 // BLOCKSIZE + tl.arange(0, SCALES)
        scale_mask = row_mask & (block[None, :] * BLOCKSIZE < K)
        scale = _nf4_scale(
            rows[:, None] * (K // BLOCKSIZE) + block[None, :], scale_mask, w, PACKED.NESTED
        )
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
        pair = tl.load(w.data + flat // 2, mask=mask, other=0).to(tl.int32)
        value = tl.load(w.code + tl.where(flat % 2 == 0, pair >> 4, pair & 15))
        value *= _nf4_scale(flat // BLOCKSIZE, mask, w, PACKED.NESTED)
    return value


@triton.jit
def _e4m3(bits):
    """Floats of 8 bits (1 sign, 4 exponent, 3 fraction bits, no infinities) in float32."""
    bits = bits.to(tl.int16)
    # Read as float16, which has one exponent bit more, they are 2^8 too small, subnormal ones
    # included.
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _e8m0(bits):
    """Powers of two, stored as exponents over 127, in float32."""
    bits = bits.to(tl.int32)
    # The least is subnormal in float32.
    power = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 255, float("nan"), power)


@triton.jit
def _fp8_tile(w, rows, col0, N, K, COLS: tl.constexpr):
    """W[rows, col0 : col0 + COLS] in float32 from bytes of e4m3."""
    cols = col0 + tl.arange(0, COLS).to(tl.int64)
    row_mask = rows < N
    mask = row_mask[:, None] & (cols[None, :] < K)
    bits = tl.load(w.data + rows[:, None] * w.stride + cols[None, :], mask=mask, other=0)
    return _e4m3(bits) * tl.load(w.scale + rows, mask=row_mask, other=0.0)[:, None]


@triton.jit
def _fp4_tile(w, rows, col0, N, K, PACKED: tl.constexpr, COLS: tl.constexpr):
    """W[rows, col0 : col0 + COLS] in float32 from two floats of 4 bits a byte (1 sign, 2 exponent, 1
    fraction bits), the first in the lower half. No block lies across two rows.
    """
    BLOCKSIZE: tl.constexpr = PACKED.BLOCKSIZE
    HALF: tl.constexpr = COLS // 2
    SCALES: tl.constexpr = max(COLS // BLOCKSIZE, 1)
    row_mask = rows[:, None] < N
    bytes_ = col0 // 2 + tl.arange(0, HALF).to(tl.int64)
    mask = row_mask & (bytes_[None, :] < w.stride)
    pair = tl.load(w.data + rows[:, None] * w.stride + bytes_[None, :], mask=mask, other=0)
    pair = pair.to(tl.int16)
    bits = tl.interleave(pair & 15, pair >> 4)
    # Read as float16, which has three exponent bits more, they are 2^14 too small, subnormal ones
    # included.
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) * 16384.0
    block = col0 // BLOCKSIZE + tl.arange(0, SCALES)[None, :]
    blocks = K // BLOCKSIZE
    if PACKED.SWIZZLED:
        tile_of_scale = rows[:, None] // 128 * tl.cdiv(blocks, 4) + block // 4
        row = rows[:, None] % 32 * 16 + rows[:, None] % 128 // 32 * 4
        place = tile_of_scale * 512 + row + block % 4
    else:
        place = rows[:, None] * blocks + block
    scale_bits = tl.load(w.scale + place, mask=row_mask & (block < blocks), other=0)
    if PACKED.FORMAT == "nvfp4":
        scale = _e4m3(scale_bits)
        if w.nested_scale is not None:
            scale *= tl.load(w.nested_scale)
    else:
        scale = _e8m0(scale_bits)
    ROWS: tl.constexpr = value.shape[0]
    value = tl.reshape(value, (ROWS, SCALES, COLS // SCALES)) * scale[:, :, None]
    return tl.reshape(value, (ROWS, COLS))


@triton.jit
def _weight_tile(w, rows, col0, N, K, PACKED: tl.constexpr, COLS: tl.constexpr):
    """W[rows, col0 : col0 + COLS] in float32; W is [N, K]. Elements beyond are undefined."""
    if PACKED.FORMAT == "nf4":
        return _nf4_tile(w, rows, col0, N, K, PACKED, COLS)
    elif PACKED.FORMAT == "fp8":
        return _fp8_tile(w, rows, col0, N, K, COLS)
    elif PACKED.FORMAT == "nvfp4" or PACKED.FORMAT == "mxfp4":
        return _fp4_tile(w, rows, col0, N, K, PACKED, COLS)
    else:
        tl.static_assert(False, "the kernel does not read this format")


@triton.jit(do_not_specialize=["M", "SPLITS"])
def _lora_linear_quantized_kernel(
    x,
    w,
    bias,
    y,
    branch,
    parts,
    counter,
    M,
    N,
    K,
    SPLITS,
    TILE: tl.constexpr,
    BRANCH: tl.constexpr,
    PACKED: tl.constexpr,
    TRANS_W: tl.constexpr,
):
    """Y = X W^T + bias + (S UP^T) ∘ keep;  X [M, K], W [N, K], Y [M, N].

    With TRANS_W, W is stored as [K, N]. No block of W lies across two stored rows. SPLITS
    programs share a tile's K; the last one to finish adds up all parts in order.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    pid_m, pid_n = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TILE.GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        x_mask = row_mask[:, None]
        if not TILE.EVEN_K:
            x_mask &= k0 + ks[None, :] < K
        x_tile = tl.load(
            x.ptr + rows[:, None] * x.row + (k0 + ks[None, :]) * x.col, mask=x_mask, other=0.0
        )
        # W is stored as [N, K] for Y and [K, N] for dX, with contiguous rows in both.
        if TRANS_W:
            w_tile = cast(
                _weight_tile(w, k0 + ks, pid_n * BLOCK_N, K, N, PACKED, BLOCK_N), x_tile.dtype
            )
        else:
            w_tile = tl.trans(cast(_weight_tile(w, cols, k0, N, K, PACKED, BLOCK_K), x_tile.dtype))
        acc = dot(x_tile, w_tile, acc, TILE.PRECISION)

    acc, last = shared_sum(acc, parts, counter, tile, split, SPLITS)
    if last:
        if bias is not None:
            acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        acc = add_branch(acc, branch, rows, cols, pid_n * BLOCK_N, M, N, BLOCK_N, BRANCH)
        y_ptrs = y.ptr + rows[:, None] * y.row + cols[None, :]
        tl.store(
            y_ptrs, cast(acc, y.ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :]
        )


@triton.jit
def _dequantize_kernel(
    w, out_ptr, N, K, PACKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """W [N, K] from the stored bytes, rounded once."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col0 = tl.program_id(0) % tiles_k * BLOCK_K
    tile = _weight_tile(w, rows, col0, N, K, PACKED, BLOCK_K)
    cols = col0 + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < N) & (cols[None, :] < K)
    tl.store(
        out_ptr + rows[:, None] * K + cols[None, :], cast(tile, out_ptr.dtype.element_ty), mask=mask
    )

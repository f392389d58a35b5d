"""Device functions of the optimizer's kernels: addresses from a table, random rounding, sums in a
fixed order, 8-bit moments.

A moment in 8 bits is a small floating-point code an element and one float32 scale a block of 256
elements, in the format of ``reference.optimizer.moment8_ref``. SIGNED is true for the first moment,
false for the second.
"""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.stable_adamw.tables import N_VARIANTS

# Elements per scale. Must equal optim.rounding.BLOCK.
BLOCK = tl.constexpr(256)


@triton.jit
def mix(x):
    """``reference.optimizer.mix32`` of uint32 words."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_round(x, noise, KIND: tl.constexpr):
    """Round float32 ``x`` by uint32 ``noise`` to values of bfloat16 (KIND 1) or float16 (KIND 2);
    the result is float32.

    The same bits as ``reference.optimizer.stochastic_round_ref``.
    """
    bits = x.to(tl.uint32, bitcast=True)
    if KIND == 1:
        rounded = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        # Below 2^-14 float16 is subnormal: every step is 2^-24.
        rounded = ((bits + (noise & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        scaled = tl.abs(x) * 16777216.0
        whole = tl.floor(scaled)
        rest = (16777216 - (noise & 0xFFFFFF).to(tl.int32)).to(tl.float32) * 5.9604644775390625e-8
        small = (whole + tl.where(scaled - whole >= rest, 1.0, 0.0)) * 5.9604644775390625e-8
        # Copy the sign bit, since zero has a sign too.
        signed = (small.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(
            tl.float32, bitcast=True
        )
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, signed, rounded)
    # Adding noise to a NaN's bits could carry into its sign.
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def element_pointers(address, start, offsets, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements ``start + offsets`` of the tensor at ``address``; KIND is the dtype's
    index in ``tables.KINDS``.
    """
    if KIND == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    # Without this hint the compiler assumes alignment to one element and loads 4 bytes at a time.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + offsets


@triton.jit
def element_mask(start, numel, offsets, ALIGNED: tl.constexpr):
    """Whether elements ``start + offsets`` lie below ``numel``."""
    remaining = numel - start
    # A mask that could change inside a vector would split the vector.
    if ALIGNED:
        remaining = tl.multiple_of(remaining, 16)
    return offsets < remaining


@triton.jit
def square_sum(address, start, numel, variant, offsets, VARIANTS: tl.constexpr):
    """The sum of squares of elements ``start + offsets`` below ``numel`` of the tensor at ``address``.

    ``variant``: the tensor's code, one of those whose bits VARIANTS has.
    """
    total = tl.full((), 0.0, tl.float32)
    for code in tl.static_range(N_VARIANTS):
        if (VARIANTS >> code) & 1:
            if variant == code:
                mask = element_mask(start, numel, offsets, code % 2 == 1)
                pointers = element_pointers(address, start, offsets, code // 2, code % 2 == 1)
                x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                total = tl.sum(x * x, 0)
    return total


@triton.jit
def one_minus_exp(z):
    """1 - e^z for z <= 0, to float32's accuracy also where e^z is close to 1."""
    series = 1 + z / 2 * (
        1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7 * (1 + z / 8)))))
    )
    return tl.where(z > -0.5, -z * series, 1 - tl.exp(z))


@triton.jit
def span_sum(values_ptr, count, BLOCK: tl.constexpr):
    """Sum ``count`` values, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        total += tl.load(values_ptr + start + offsets, mask=offsets < count - start, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def pair_sums(values_ptr, a_first, a_count, b_first, b_count, BLOCK: tl.constexpr):
    """:func:`span_sum` of two spans, whose loads do not wait for each other."""
    a, b = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, tl.maximum(a_count, b_count), BLOCK):
        places = start + offsets
        a += tl.load(values_ptr + a_first + places, mask=places < a_count, other=0.0)
        b += tl.load(values_ptr + b_first + places, mask=places < b_count, other=0.0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def decode8(codes, SIGNED: tl.constexpr):
    """Decode int32 codes to float32 values of magnitude at most 1.875."""
    magnitude = codes & 127 if SIGNED else codes
    normal = ((magnitude + (896 if SIGNED else 768)) << 20).to(tl.float32, bitcast=True)
    # 2^-17 and 2^-33
    small = magnitude.to(tl.float32) * (7.62939453125e-06 if SIGNED else 1.1641532182693481e-10)
    x = tl.where(magnitude >= 8, normal, small)
    return tl.where(codes >= 128, -x, x) if SIGNED else x


@triton.jit
def encode8(y, noise, SIGNED: tl.constexpr):
    """Encode float32 values of magnitude at most 1.875 as int32 codes, rounded at random by uint32
    ``noise``.
    """
    size = tl.abs(y)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + (noise & 0xFFFFF)) >> 20).to(tl.int32) - (896 if SIGNED else 768)
    # 2^17 and 2^33
    scaled = size * (131072.0 if SIGNED else 8589934592.0)
    whole = tl.floor(scaled)
    up = scaled - whole > (noise >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
    small = (whole + tl.where(up, 1.0, 0.0)).to(tl.int32)
    # 2^-14 and 2^-30
    codes = tl.where(size < (6.103515625e-05 if SIGNED else 9.313225746154785e-10), small, normal)
    if SIGNED:
        codes = codes | tl.where(y < 0, 128, 0)
    return codes & 255


@triton.jit
def _pointers(codes, scales, start, offsets, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to a chunk's codes and to its blocks' scales."""
    code_ptrs = codes.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        code_ptrs = tl.multiple_of(code_ptrs, 16)
    scale_ptrs = (
        scales.to(tl.pointer_type(tl.float32)) + start // BLOCK + tl.arange(0, CHUNK // BLOCK)
    )
    return code_ptrs + start + offsets, scale_ptrs


@triton.jit
def load8(
    codes,
    scales,
    start,
    remaining,
    offsets,
    mask,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Load the chunk of a moment that begins at element ``start``, as float32.

    ``codes`` and ``scales`` are addresses; ``remaining``: how many elements begin at ``start``.
    """
    code_ptrs, scale_ptrs = _pointers(codes, scales, start, offsets, ALIGNED, CHUNK)
    values = tl.load(code_ptrs, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptrs, mask=tl.arange(0, CHUNK // BLOCK) * BLOCK < remaining, other=0.0)
    return decode8(values, SIGNED) * tl.reshape(
        tl.broadcast_to(scale[:, None], (CHUNK // BLOCK, BLOCK)), (CHUNK,)
    )


@triton.jit
def store8(
    x,
    noise,
    codes,
    scales,
    start,
    remaining,
    offsets,
    mask,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Round float32 ``x`` by uint32 ``noise`` and store it as a chunk; the other arguments are
    those of :func:`load8`.
    """
    code_ptrs, scale_ptrs = _pointers(codes, scales, start, offsets, ALIGNED, CHUNK)
    rows = tl.reshape(tl.where(mask, x, 0.0), (CHUNK // BLOCK, BLOCK))
    # rows * 0 sums to 0, or to NaN where a value is not finite: the whole block then becomes NaN.
    scale = (tl.max(tl.abs(rows), 1) + tl.sum(rows * 0.0, 1)) / 1.875
    y = rows / tl.where(scale > 0, scale, 1.0)[:, None]
    y = tl.minimum(tl.maximum(y, -1.875), 1.875)
    values = encode8(tl.reshape(y, (CHUNK,)), noise, SIGNED)
    tl.store(code_ptrs, values.to(tl.uint8), mask=mask)
    tl.store(scale_ptrs, scale, mask=tl.arange(0, CHUNK // BLOCK) * BLOCK < remaining)

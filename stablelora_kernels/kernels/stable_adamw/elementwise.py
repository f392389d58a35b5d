"""Device functions of the optimizer's kernels: addresses from a table, random rounding, sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Round float32 ``x`` by uint32 ``noise`` to values of bfloat16 (KIND 1) or float16 (KIND 2); the result is float32.

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
        signed = (small.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, signed, rounded)
    # Adding noise to a NaN's bits could carry into its sign.
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def element_pointers(address, start, offsets, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements ``start + offsets`` of the tensor at ``address``; KIND is the dtype's index in ``tables.KINDS``."""
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
    left = numel - start
    # A mask that could change inside a vector would split the vector.
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return offsets < left


@triton.jit
def one_minus_exp(z):
    """1 - e^z for z <= 0, to float32's accuracy also where e^z is close to 1."""
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7 * (1 + z / 8))))))
    return tl.where(z > -0.5, -z * series, 1 - tl.exp(z))


@triton.jit
def span_sum(values_ptr, first, count, BLOCK: tl.constexpr):
    """Sum ``count`` values from index ``first`` on, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        total += tl.load(values_ptr + first + start + offsets, mask=offsets < count - start, other=0.0)
    return tl.sum(total, 0)

"""Pieces of the optimizer's kernels: addresses out of a table, rounding at random, sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """``reference_optim.mix32`` of uint32 words."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_round(x, noise, KIND: tl.constexpr):
    """float32 values that bfloat16 (KIND 1) or float16 (KIND 2) holds: ``reference_optim.stochastic_round_ref``."""
    bits = x.to(tl.uint32, bitcast=True)
    if KIND == 1:
        rounded = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        # Below 2^-14 float16's steps are 2^-24, whatever the exponent.
        rounded = ((bits + (noise & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        scaled = tl.abs(x) * 16777216.0
        whole = tl.floor(scaled)
        rest = (16777216 - (noise & 0xFFFFFF).to(tl.int32)).to(tl.float32) * 5.9604644775390625e-8
        small = (whole + tl.where(scaled - whole >= rest, 1.0, 0.0)) * 5.9604644775390625e-8
        # The sign by its bit: zero has one too.
        signed = (small.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, signed, rounded)
    # The sum could carry a NaN's bits into its sign.
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def element_pointers(address, start, offsets, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    if KIND == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    # Unless told, the compiler takes an address out of a table to be aligned to one element, and loads 4 bytes at a time.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + offsets


@triton.jit
def element_mask(start, numel, offsets, ALIGNED: tl.constexpr):
    left = numel - start
    # A mask that could change inside a vector would split it.
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
    """The sum of ``count`` values from ``first``, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        total += tl.load(values_ptr + first + at + offsets, mask=offsets < count - at, other=0.0)
    return tl.sum(total, 0)

"""Arithmetic of PTX on arrays, where NumPy's own differs or has none."""

from __future__ import annotations

from typing import Any

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I16, I32, I64 = np.int16, np.int32, np.int64
INTEGERS = {
    "s8": np.int8,
    "s16": I16,
    "s32": I32,
    "s64": I64,
    "u8": U8,
    "u16": U16,
    "u32": U32,
    "u64": U64,
}
Array = Any

# Infinity, NaN and wrapped integers are part of the arithmetic.
np.seterr(all="ignore")


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: Array, rounding: str = "rn") -> Array:
    """Bits of bfloat16."""
    bits = x.view(U32)
    rounded = bits if rounding == "rz" else bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    return np.where(np.isnan(x), U32(0x7FFF), rounded >> U32(16)).astype(U16)


def f16_to_f32(bits: Array) -> Array:
    return bits.view(F16).astype(F32)


def f32_to_f16(x: Array, rounding: str = "rn") -> Array:
    """Bits of float16."""
    result = x.astype(F16)
    if rounding == "rz":
        result = np.where(
            np.abs(result.astype(F64)) > np.abs(x), np.nextafter(result, F16(0)), result
        )
    return np.where(np.isnan(x), U16(0x7FFF), result.view(U16)).astype(U16)


def _e4m3() -> Array:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, (codes & 7) / 8
    value = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    value = np.where(codes & 127 == 127, np.nan, value)
    return np.where(codes >= 128, -value, value).astype(F32)


# float8's values by their bits.
E4M3 = _e4m3()


def tf32(bits: Array, rounding: str = "rz") -> Array:
    """Bits of float32 with ten bits of fraction, to nearest with ties away from zero for "rna"."""
    return (bits + U32(0x1000) if rounding == "rna" else bits) & U32(0xFFFFE000)


def ftz(x: Array) -> Array:
    """Subnormals become zeros of their sign."""
    return np.where(np.abs(x) < F32(1.17549435e-38), np.copysign(F32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """One rounding, but for ties that float64's own rounding makes or breaks."""
    return (a.astype(F64) * b + c).astype(F32)


def divide(a: Array, b: Array) -> Array:
    """Integers, toward zero. By zero, all bits are ones, as the hardware gives."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    quotient = a // b
    quotient = quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(zero, ~a.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def mulhi(a: Array, b: Array) -> Array:
    """The upper half of a product of 32-bit integers."""
    wide = I64 if a.dtype == I32 else U64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def shift(a: Array, n: Array, left: bool) -> Array:
    """``n``: uint32. Amounts beyond the width give zeros, or signs."""
    bits = a.dtype.itemsize * 8
    small = np.minimum(n, U32(bits - 1)).astype(a.dtype)
    if not left and a.dtype.kind == "i":
        return a >> small
    return np.where(n < bits, (a << small) if left else (a >> small), a.dtype.type(0))


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """``length`` bits from bit ``start`` on, extended by their sign if ``a`` is signed."""
    bits = a.dtype.itemsize * 8
    start, length = (start & U32(255)).astype(I64), (length & U32(255)).astype(I64)
    end = np.minimum(start + length, bits)
    width = np.clip(end - start, 0, bits)
    up = np.clip(bits - end, 0, bits - 1).astype(a.dtype)
    down = np.clip(bits - width, 0, bits - 1).astype(a.dtype)
    beyond = np.where((a < 0) & (length > 0), ~a.dtype.type(0), a.dtype.type(0))
    return np.where(width > 0, (a << up) >> down, beyond)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: each nibble of the selector picks a byte of (b, a), or that byte's sign."""
    both, result = a.astype(U64) | (b.astype(U64) << U64(32)), np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = (both >> ((nibble & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(255)
        byte = np.where(nibble & U32(8), (byte >> U32(7)) * U32(255), byte)
        result = result | (byte << U32(8 * i))
    return result


def to_integer(x: Array, kind: str, rounding: str) -> Array:
    """Floats to integers, clamped to their range; NaN gives 0."""
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(F64))
    info = np.iinfo(INTEGERS[kind])
    low, high = x <= info.min, x >= info.max
    # The largest int64 is no float64.
    inside = np.where(np.isnan(x) | low | high, 0.0, x).astype(info.dtype)
    return np.where(
        low, info.dtype.type(info.min), np.where(high, info.dtype.type(info.max), inside)
    )


# Of products: the parts of a 32-bit register as float32, by type.
PARTS = {
    "bf16": lambda bits: [bf16_to_f32((bits >> U32(16 * i)).astype(U16)) for i in (0, 1)],
    "f16": lambda bits: [f16_to_f32((bits >> U32(16 * i)).astype(U16)) for i in (0, 1)],
    "tf32": lambda bits: [tf32(bits).view(F32)],
    "e4m3": lambda bits: [E4M3[(bits >> U32(8 * i)) & U32(255)] for i in range(4)],
}
# The same for elements in memory, by type: bytes of one, and its value.
ELEMENTS = {
    "bf16": (2, bf16_to_f32),
    "f16": (2, f16_to_f32),
    "tf32": (4, lambda bits: tf32(bits).view(F32)),
    "e4m3": (1, lambda bits: E4M3[bits]),
}


# How a product's operands lie in the registers of threads, of which each warp has 16 rows.


def operand_at(thread: Array, i: int, part: int, per: int) -> tuple[Array, Array]:
    """Row and column of one of the ``per`` parts of each thread's i-th register of A."""
    return 16 * (thread >> 5) + (thread % 32 >> 2) + 8 * (i & 1), per * (
        thread & 3
    ) + part + 4 * per * (i >> 1)


def accumulator_at(thread: Array, i: int) -> tuple[Array, Array]:
    """Row and column of each thread's i-th accumulator."""
    return 16 * (thread >> 5) + (thread % 32 >> 2) + 8 * ((i >> 1) & 1), 8 * (i >> 2) + 2 * (
        thread & 3
    ) + (i & 1)

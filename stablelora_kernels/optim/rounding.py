"""How a float32 value becomes one of fewer bits: rounding at random to bfloat16 and float16, the
random words that it goes by, and 8-bit moments by blocks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Added to the word that rounds a parameter's element to get the word that rounds its moments.
MOMENT_WORD = 0x9E3779B9
# Elements, in memory order, that share a scale in 8-bit moments.
BLOCK = 256
# The noise with which encode8 rounds to nearest.
NEAREST = 0x80080000 - 2**32


def flat(t: Tensor) -> Tensor:
    """A 1-d view of a dense tensor's elements in memory order."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


# Random words


def mix_(x: Tensor) -> Tensor:
    """Mix every int32 word of ``x`` in place: a bijection in which each bit flips about half the
    bits of the result.

    Multiply-xorshift with the constants of Chris Wellons' "lowbias32" (public domain,
    https://nullprogram.com/blog/2018/07/31/). ``reference.optimizer.mix32`` is an independent copy,
    as an oracle should be.
    """
    # Shifts of int32 are arithmetic: the mask makes them logical.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


# StableShrink asks at every step.
@functools.lru_cache(maxsize=64)
def seed_word(seed: int) -> int:
    """The seed's 64 bits as the word of the rounding key, an int32."""
    halves = torch.tensor([seed, seed >> 32], dtype=torch.int64, device="cpu").to(torch.int32)
    low, high = halves.split(1)
    return int(mix_(mix_(low) ^ high))


# bfloat16 and float16


class Rounding:
    """Rounds float32 values up or down at random, in place. It allocates all of its memory as it is
    made.
    """

    def __init__(self, noise: Tensor, dtype: torch.dtype) -> None:
        """``noise``: int32 words, one a value. ``dtype``: torch.bfloat16 or torch.float16."""
        # Random bits added below the cut carry into the kept bits with the probability of the
        # fraction cut off.
        self.cut = 0xFFFF if dtype is torch.bfloat16 else 0x1FFF
        self.noise = noise & self.cut
        self.is_nan = torch.empty_like(noise, dtype=torch.bool)
        self.has_subnormals = dtype is torch.float16
        if self.has_subnormals:
            self.thresholds = (2**24 - (noise & 0xFFFFFF)).float().mul_(2.0**-24)
            self.whole = torch.empty_like(self.thresholds)
            self.fraction = torch.empty_like(self.thresholds)
            self.is_small = torch.empty_like(self.is_nan)

    def round_(self, x: Tensor) -> Tensor:
        """Round ``x``, float32 of the noise's shape, to values of the dtype."""
        torch.ne(x, x, out=self.is_nan)
        if self.has_subnormals:
            # Below 2^-14 float16 is subnormal: every step is 2^-24.
            torch.abs(x, out=self.fraction)
            torch.lt(self.fraction, 2.0**-14, out=self.is_small)
            torch.floor(self.fraction.mul_(2.0**24), out=self.whole)
            up = self.fraction.sub_(self.whole).ge_(self.thresholds)
            torch.copysign(self.whole.add_(up).mul_(2.0**-24), x, out=self.whole)
        x.view(torch.int32).add_(self.noise).bitwise_and_(~self.cut)
        if self.has_subnormals:
            torch.where(self.is_small, self.whole, x, out=x)
        # Noise added to a NaN's bits could carry into its sign.
        return x.masked_fill_(self.is_nan, torch.nan)


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 ``x`` up or down at random to ``dtype``, bfloat16 or float16; ``noise`` holds
    int32 words of its shape.

    The same bits as :func:`~stablelora_kernels.reference.optimizer.stochastic_round_ref`
    elementwise.
    """
    return Rounding(noise, dtype).round_(x.clone()).to(dtype)


# 8 bits by blocks


class Format8(NamedTuple):
    """A format of 8-bit codes. Adding ``shift`` to a code gives float32's exponent and leading
    bits; subnormal values are multiples of ``step``.
    """

    shift: int
    step: float


SIGNED = Format8(896, 2.0**-17)
UNSIGNED = Format8(768, 2.0**-33)


class Encoded(NamedTuple):
    """float32 values in 8 bits: uint8 codes [n] and float32 scales [ceil(n / BLOCK)]."""

    codes: Tensor
    scales: Tensor


def scales_shape(p: Tensor) -> torch.Size:
    """The shape of the scales of an 8-bit moment of ``p``."""
    return torch.Size([-(-p.numel() // BLOCK)])


def decode8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 values of uint8 ``codes``, in their shape and strides; ``scales`` is float32, one a
    block.

    Source of the format: :func:`~stablelora_kernels.reference.optimizer.moment8_ref`.
    """
    shift, step = SIGNED if signed else UNSIGNED
    whole = flat(codes).int()
    magnitude = whole & 127 if signed else whole
    normal = ((magnitude + shift) << 20).view(torch.float32)
    x = torch.where(magnitude >= 8, normal, magnitude.float() * step)
    if signed:
        x = torch.where(whole >= 128, -x, x)
    value = x * scales.repeat_interleave(BLOCK)[: x.numel()]
    return value.as_strided(codes.shape, codes.stride())


def encode8(x: Tensor, noise: Tensor, signed: bool) -> Encoded:
    """float32 ``x`` [n] in 8 bits, rounded at random by int32 ``noise`` [n]."""
    shift, step = SIGNED if signed else UNSIGNED
    rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    # rows * 0 sums to 0, or to NaN where a value is not finite: the whole block then becomes NaN.
    scales = (rows.abs().amax(1) + (rows * 0.0).sum(1)) / 1.875
    scaled_rows = rows / torch.where(scales > 0, scales, 1.0)[:, None]
    y = scaled_rows.clamp_(-1.875, 1.875).flatten()[: x.numel()]
    size = y.abs()
    normal = ((size.view(torch.int32) + (noise & 0xFFFFF)) >> 20) - shift
    steps = size / step
    whole = steps.floor()
    up = steps - whole > ((noise >> 8) & 0xFFFFFF).float() * 2.0**-24
    codes = torch.where(size < 8 * step, (whole + up).int(), normal)
    if signed:
        codes |= torch.where(y < 0, 128, 0).int()
    return Encoded((codes & 255).to(torch.uint8), scales)

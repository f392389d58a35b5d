"""Rounding to bfloat16 and float16 at random, by noise that seed, step and element decide, on PyTorch's operators."""

from __future__ import annotations

import torch

from ..reference_optim import mix32

LOW_PRECISION = (torch.bfloat16, torch.float16)


def mix_(x: torch.Tensor) -> torch.Tensor:
    """:func:`~stablelora_kernels.reference_optim.mix32` of every int32 word of ``x``, in place."""
    # Shifts of int32 are arithmetic: the mask makes them logical.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def as_int32(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def seed_word(seed: int) -> int:
    """The part of the rounding key that the seed alone decides, as an int32."""
    return as_int32(mix32(mix32(seed) ^ (seed >> 32)))


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """float32 ``x`` rounded at random to ``dtype``, bfloat16 or float16; ``noise`` holds int32 words of random bits.

    Elementwise :func:`~stablelora_kernels.reference_optim.stochastic_round_ref`, to the bit.
    """
    # Adding random bits below the cut carries into the kept ones as often as the part cut off is large.
    cut = 0xFFFF if dtype is torch.bfloat16 else 0x1FFF
    rounded = (x.view(torch.int32) + (noise & cut)).bitwise_and_(~cut).view(torch.float32)
    if dtype is torch.float16:
        # Below 2^-14 float16's steps are 2^-24, whatever the exponent.
        scaled = x.abs() * 2.0**24
        whole = scaled.floor()
        up = (scaled - whole) >= (2**24 - (noise & 0xFFFFFF)).float() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign((whole + up) * 2.0**-24, x), rounded)
    # The sum could carry a NaN's bits into its sign.
    return torch.where(x.isfinite(), rounded, x).to(dtype)

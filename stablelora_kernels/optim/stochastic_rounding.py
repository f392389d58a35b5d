"""Rounding to bfloat16 and float16 at random, by noise that seed, step and element decide, on PyTorch's operators."""

from __future__ import annotations

from typing import Any

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


def mix32(x: int) -> int:
    """A bijection of 32-bit words: every bit of the argument flips about half the bits of the result.

    Multiply-xorshift with the constants of Chris Wellons' "lowbias32" (public domain,
    https://nullprogram.com/blog/2018/07/31/). ``reference.optimizer.mix32`` is the same function, kept apart as an oracle.
    """
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def mix_(x: torch.Tensor) -> torch.Tensor:
    """:func:`mix32` of every int32 word of ``x``, in place."""
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

    Elementwise :func:`~stablelora_kernels.reference.optimizer.stochastic_round_ref`, to the bit.
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


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``; from fresh pinned memory to a GPU, so that the host does not wait for it."""
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Scratch:
    """The float32 work copies of all parameters of one low-precision dtype, in one buffer."""

    def __init__(
        self, dtype: torch.dtype, params: list[torch.Tensor], indices: list[torch.Tensor], places: list[int]
    ) -> None:
        """``indices``: the numbers of each parameter's elements among all; ``places``: their own among the members."""
        self.dtype, self.params, self.places = dtype, params, places
        self.sizes = [p.numel() for p in params]
        device = params[0].device
        self.flat = torch.empty(sum(self.sizes), dtype=torch.float32, device=device)
        self.repeats = upload(self.sizes, torch.int64, device)
        self.at = upload(places, torch.int64, device)
        # Indices are taken modulo 2^32.
        self.index = torch.cat(indices).to(torch.int32)
        self.views = [
            flat.as_strided(p.shape, p.stride(), flat.storage_offset())
            for flat, p in zip(self.flat.split(self.sizes), self.params, strict=True)
        ]

    def load(self) -> None:
        torch._foreach_copy_(self.views, self.params)

    def store(self, steps: torch.Tensor, seeds: torch.Tensor, present: list[bool]) -> None:
        """Round every present parameter's copy back; ``steps`` and ``seeds`` are int32, one for each member."""
        keys = mix_(steps[self.at] + seeds[self.at])
        noise = mix_(torch.repeat_interleave(keys, self.repeats, output_size=self.flat.numel()) ^ self.index)
        rounded = stochastic_round(self.flat, self.dtype, noise).split(self.sizes)
        sources = [
            flat.as_strided(p.shape, p.stride(), flat.storage_offset())
            for flat, p in zip(rounded, self.params, strict=True)
        ]
        kept = [k for k, i in enumerate(self.places) if present[i]]
        if kept:
            torch._foreach_copy_([self.params[k] for k in kept], [sources[k] for k in kept])

"""Stochastic rounding to bfloat16 and float16 with PyTorch's operators; seed, step and element index decide the noise."""

from __future__ import annotations

import torch

from stablelora_kernels.optim.graph_capture import upload

LOW_PRECISION = (torch.bfloat16, torch.float16)


def mix32(x: int) -> int:
    """A bijection of 32-bit words: each bit of the argument flips about half the bits of the result.

    Multiply-xorshift with the constants of Chris Wellons' "lowbias32" (public domain,
    https://nullprogram.com/blog/2018/07/31/). ``reference.optimizer.mix32`` is an independent copy, as an oracle should be.
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
    """The int32 that has the bits of the 32-bit ``word``."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def seed_word(seed: int) -> int:
    """The seed's part of the rounding key, as an int32."""
    return as_int32(mix32(mix32(seed) ^ (seed >> 32)))


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 ``x`` up or down at random to ``dtype``, bfloat16 or float16; ``noise`` holds int32 words of its shape.

    The same bits as :func:`~stablelora_kernels.reference.optimizer.stochastic_round_ref` elementwise.
    """
    # Random bits added below the cut carry into the kept bits with the probability of the fraction cut off.
    cut = 0xFFFF if dtype is torch.bfloat16 else 0x1FFF
    rounded = (x.view(torch.int32) + (noise & cut)).bitwise_and_(~cut).view(torch.float32)
    if dtype is torch.float16:
        # Below 2^-14 float16 is subnormal: every step is 2^-24.
        scaled = x.abs() * 2.0**24
        whole = scaled.floor()
        up = (scaled - whole) >= (2**24 - (noise & 0xFFFFFF)).float() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign((whole + up) * 2.0**-24, x), rounded)
    # Adding noise to a NaN's bits could carry into its sign.
    return torch.where(x.isfinite(), rounded, x).to(dtype)


class Scratch:
    """float32 working copies of all parameters of one low-precision dtype, in one buffer."""

    def __init__(
        self,
        dtype: torch.dtype,
        params: list[torch.Tensor],
        element_indices: list[torch.Tensor],
        member_indices: list[int],
    ) -> None:
        """Make the buffer, uninitialized.

        Args:
            dtype: torch.bfloat16 or torch.float16.
            params: dense parameters of that dtype on one device.
            element_indices: for each parameter, int64 [numel], the indices of its elements among those of all members.
            member_indices: the parameters' indices in the engine's list of members.
        """
        self.dtype, self.params, self.member_indices = dtype, params, member_indices
        self.sizes = [p.numel() for p in params]
        device = params[0].device
        self.flat = torch.empty(sum(self.sizes), dtype=torch.float32, device=device)
        self.repeats = upload(self.sizes, torch.int64, device)
        self.member_indices_on_device = upload(member_indices, torch.int64, device)
        # Indices are modulo 2^32.
        self.element_indices = torch.cat(element_indices).to(torch.int32)
        self.views = self._split(self.flat)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of ``flat`` in the parameters' shapes and strides."""
        return [
            part.as_strided(p.shape, p.stride(), part.storage_offset())
            for part, p in zip(flat.split(self.sizes), self.params, strict=True)
        ]

    def load(self) -> None:
        """Copy the parameters into the buffer."""
        torch._foreach_copy_(self.views, self.params)

    def store(self, steps: torch.Tensor, seeds: torch.Tensor, present: list[bool]) -> None:
        """Round the copies of present members back; ``steps`` and ``seeds`` are int32, ``present`` bools, one a member."""
        members = self.member_indices_on_device
        keys = mix_(steps[members] + seeds[members])
        noise = mix_(torch.repeat_interleave(keys, self.repeats, output_size=self.flat.numel()) ^ self.element_indices)
        rounded = self._split(stochastic_round(self.flat, self.dtype, noise))
        kept = [k for k, i in enumerate(self.member_indices) if present[i]]
        if kept:
            torch._foreach_copy_([self.params[k] for k in kept], [rounded[k] for k in kept])

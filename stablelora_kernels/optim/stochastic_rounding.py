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


def seed_word(seed: int) -> int:
    """The seed's part of the rounding key, as an int32."""
    word = mix32(mix32(seed) ^ (seed >> 32))
    return word - 2**32 if word >= 2**31 else word


class Rounding:
    """Rounds float32 values up or down at random, in place. It allocates all of its memory as it is made."""

    def __init__(self, noise: torch.Tensor, dtype: torch.dtype) -> None:
        """``noise``: int32 words, one a value. ``dtype``: torch.bfloat16 or torch.float16."""
        # Random bits added below the cut carry into the kept bits with the probability of the fraction cut off.
        self.cut = 0xFFFF if dtype is torch.bfloat16 else 0x1FFF
        self.noise = noise & self.cut
        self.is_nan = torch.empty_like(noise, dtype=torch.bool)
        self.has_subnormals = dtype is torch.float16
        if self.has_subnormals:
            self.thresholds = (2**24 - (noise & 0xFFFFFF)).float().mul_(2.0**-24)
            self.whole, self.fraction = torch.empty_like(self.thresholds), torch.empty_like(self.thresholds)
            self.is_small = torch.empty_like(self.is_nan)

    def round_(self, x: torch.Tensor) -> torch.Tensor:
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


def stochastic_round(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 ``x`` up or down at random to ``dtype``, bfloat16 or float16; ``noise`` holds int32 words of its shape.

    The same bits as :func:`~stablelora_kernels.reference.optimizer.stochastic_round_ref` elementwise.
    """
    return Rounding(noise, dtype).round_(x.clone()).to(dtype)


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

    def prepare(self, steps: torch.Tensor, seeds: torch.Tensor) -> None:
        """Allocate what :meth:`store` needs; ``steps`` and ``seeds`` are int32, one a member."""
        members = self.member_indices_on_device
        keys = mix_(steps[members] + seeds[members])
        noise = mix_(torch.repeat_interleave(keys, self.repeats, output_size=self.flat.numel()) ^ self.element_indices)
        self.rounding: Rounding | None = Rounding(noise, self.dtype)

    def store(self, present: list[bool]) -> None:
        """Round the copies of present members back; ``present`` holds one bool a member."""
        assert self.rounding is not None
        self.rounding.round_(self.flat)
        self.rounding = None
        kept = [k for k, i in enumerate(self.member_indices) if present[i]]
        if kept:
            torch._foreach_copy_([self.params[k] for k in kept], [self.views[k] for k in kept])

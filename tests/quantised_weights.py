"""Random weights in 4 and 8 bits, and the oracle's word on what they stand for."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from stablelora_kernels.quantised import FP8Weight, NF4Weight
from stablelora_kernels.reference import fp8_ref, nf4_ref

NF4_FIELDS = tuple(field.name for field in fields(NF4Weight))


def nf4_weight(n: int, k: int, blocksize: int, nested: bool) -> NF4Weight:
    """Any bits are a weight. Elements are of the size that makes a product with it of order one."""
    generator = torch.Generator().manual_seed(n * k)

    def integers(size: int) -> Tensor:
        return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)

    def positive(size: int) -> Tensor:
        return (torch.rand(size, generator=generator) + 0.5) * k**-0.5

    blocks = -(-n * k // blocksize)
    code = torch.linspace(-1.7, 1.7, 16) ** 3
    packed = integers(-(-n * k // 2))
    if not nested:
        return NF4Weight(packed, positive(blocks), code, (n, k), blocksize)
    offset, nested_code = torch.tensor(k**-0.5), torch.linspace(-0.9, 1, 256)
    return NF4Weight(
        packed, integers(blocks), code, (n, k), blocksize, positive(-(-blocks // 256)), nested_code, offset, 256
    )


def fp8_weight(n: int, k: int) -> FP8Weight:
    generator = torch.Generator().manual_seed(n * k)
    # Small ones are subnormal numbers in eight bits.
    values = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, k)
    return FP8Weight(values.to(torch.float8_e4m3fn), (torch.rand(n, generator=generator) + 0.5) * k**-0.5)


def reference(weight: NF4Weight | FP8Weight) -> Tensor:
    """W in float64."""
    if isinstance(weight, FP8Weight):
        return fp8_ref(weight.data, weight.scale)
    return nf4_ref(**{name: getattr(weight, name) for name in NF4_FIELDS})

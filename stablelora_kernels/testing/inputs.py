"""Inputs of layers and of the optimizer: random operands, quantized weights, pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stablelora_kernels.formats import FORMATS
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.quantized import FP4Weight, FP8Weight, NF4Weight, QuantizedWeight
from stablelora_kernels.reference import fp4_ref, fp8_ref, nf4_ref

#: The dtypes of a layer by their short names.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_inputs(
    shape: tuple[int, ...],
    out_features: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random arguments of :func:`stablelora_kernels.functional.lora_linear` by name, and an
    incoming gradient ``grad``.

    ``shape`` is x's; its last size is in_features. The values are scaled so that the base product
    and the LoRA branch are both of order one. B is not zero: with a zero B, every gradient of A
    would vanish.
    """
    generator = torch.Generator().manual_seed(seed)
    k, n = shape[-1], out_features

    def normal(*size: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(
            device=device, dtype=to
        )

    lora = lora_dtype or dtype
    return {
        "x": normal(*shape),
        "weight": normal(n, k, std=k**-0.5),
        "bias": normal(n) if bias else None,
        "lora_A": normal(r, k, std=k**-0.5, to=lora),
        "lora_B": normal(n, r, std=r**-0.5, to=lora),
        "grad": normal(*shape[:-1], n),
    }


def nf4_weight(n: int, k: int, blocksize: int, nested: bool) -> NF4Weight:
    """A random 4-bit weight on the CPU, scaled so that its products are of order one."""
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
        packed,
        integers(blocks),
        code,
        (n, k),
        blocksize,
        positive(-(-blocks // 256)),
        nested_code,
        offset,
        256,
    )


def fp8_weight(n: int, k: int) -> FP8Weight:
    """A random float8 weight with one scale a row, on the CPU."""
    generator = torch.Generator().manual_seed(n * k)
    # The small values are subnormal in float8.
    values = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, k)
    return FP8Weight(
        values.to(torch.float8_e4m3fn), (torch.rand(n, generator=generator) + 0.5) * k**-0.5
    )


def fp4_weight(n: int, k: int, format: str, swizzled: bool = False) -> FP4Weight:
    """A random weight in NVFP4 or MXFP4, on the CPU."""
    generator = torch.Generator().manual_seed(n * k)
    blocks = k // ROW_UNITS[format]
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator)
    shape = (32 * -(-n // 128), 16 * -(-blocks // 4)) if swizzled else (n, blocks)
    if format == "mxfp4":
        exponents = torch.randint(121, 127, shape, dtype=torch.uint8, generator=generator)
        return FP4Weight(packed, exponents, None, swizzled)
    scale = torch.rand(shape, generator=generator) * 400
    return FP4Weight(packed, scale.to(torch.float8_e4m3fn), torch.tensor(k**-0.5 / 600), swizzled)


#: By formats, what a row's elements are a multiple of.
ROW_UNITS = {"nf4": 1, "fp8": 1, "nvfp4": 16, "mxfp4": 32}


def can_hold(kind: str | None, k: int) -> bool:
    """Whether rows of k elements can be of ``kind``, a name of QUANTIZED or None."""
    return kind is None or k % ROW_UNITS[kind.split()[0]] == 0


#: Random weights [n, k] by names that begin with that of their format; of a format with several, the
#: usual one comes last.
QUANTIZED: dict[str, Callable[[int, int], QuantizedWeight]] = {
    "nf4": lambda n, k: nf4_weight(n, k, 64, nested=False),
    "nf4 128 nested": lambda n, k: nf4_weight(n, k, 128, nested=True),
    "nf4 nested": lambda n, k: nf4_weight(n, k, 64, nested=True),
    "fp8": fp8_weight,
    "nvfp4": lambda n, k: fp4_weight(n, k, "nvfp4"),
    "nvfp4 swizzled": lambda n, k: fp4_weight(n, k, "nvfp4", swizzled=True),
    "mxfp4 swizzled": lambda n, k: fp4_weight(n, k, "mxfp4", swizzled=True),
    "mxfp4": lambda n, k: fp4_weight(n, k, "mxfp4"),
}
#: The oracle of each format.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "nf4": nf4_ref, "fp8": fp8_ref, "nvfp4": fp4_ref, "mxfp4": fp4_ref,
}  # fmt: skip


def dequantized_ref(weight: QuantizedWeight) -> torch.Tensor:
    """A quantized weight in float64, by the oracle."""
    parts = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return REFERENCES[FORMATS[weight.format].name](**parts)


def make_pairs(
    count: int, r: int, n: int, device: torch.device | str, latched: bool, m: int | None = None
) -> list[LoRAPair]:
    """Pairs of A [r, n] and B [m, r] with gradients; m is n unless given.

    With ``latched``, B is so large that every pair latches at the first step. Otherwise B is zero,
    so A keeps shrinking.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(count):
        a = torch.randn(r, n, generator=generator) / n**0.5
        b = torch.full((m or n, r), 1.0 if latched else 0.0)
        pair = LoRAPair(f"layer{i}", *(nn.Parameter(x.to(device)) for x in (a, b)))
        for p in (pair.A, pair.B):
            p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device)
        pairs.append(pair)
    return pairs

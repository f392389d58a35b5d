"""How frozen weights are stored in 4 and 8 bits: the table of formats, what their bytes mean, and
their values by PyTorch's operators.

``reference.nf4_ref``, ``fp8_ref`` and ``fp4_ref`` are their formulas in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# PyTorch dequantizes so many elements at a time, to bound the memory for float32 values and
# indices.
_ELEMENTS = 1 << 22
# In place of a number of scales: a weight has one nested scale.
ALL_SCALES = 1 << 30
# A dtype whose elements are as large as two of so many bytes.
_TWICE = {2: torch.int32, 4: torch.int64, 8: torch.complex128}
# OCP Microscaling Formats, version 1.0: the magnitudes of a float of 4 bits, and the bias of a
# scale's exponent.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127


class Layout(NamedTuple):
    """The memory layout of a weight [n, k], for which kernels are compiled, or of a stack of them.
    Ints, because ops take ints.
    """

    # Of FORMATS.
    format: int
    n: int
    k: int
    # Elements that share a scale, and scales that share a nested one (0 if scales are not nested,
    # ALL_SCALES if all of them share it).
    blocksize: int
    nested_blocksize: int = 0
    # Of a stack: rows that share a scale, and how many weights there are.
    block_rows: int = 1
    experts: int = 1
    # Whether scales lie in the tiles that Blackwell's tensor cores read: see _in_rows.
    swizzled: int = 0

    @property
    def name(self) -> str:
        """What the format is called."""
        return FORMATS[self.format].name

    @property
    def bits(self) -> int:
        """Those of an element."""
        return FORMATS[self.format].bits

    @property
    def elements(self) -> int:
        """The elements of a weight."""
        return self.n * self.k

    @property
    def aligned(self) -> bool:
        """Whether rows begin at multiples of 16 bytes, and no block lies across two rows."""
        return self.k % self.blocksize == 0 and self.k * self.bits % 128 == 0

    @property
    def scale_count(self) -> int:
        """The number of tensors that scale the data."""
        return len(self.scale_names)

    @property
    def scale_names(self) -> tuple[str, ...]:
        """What kernels call the tensors that scale the data, in their order."""
        stored = FORMATS[self.format]
        return stored.scales + (stored.nested if self.nested_blocksize else ())


class Format(NamedTuple):
    """How weights are stored: the one place that knows what their bytes mean.

    Kernels read the formats of ``quantized.WEIGHTS`` by their names.
    """

    name: str
    # Of an element.
    bits: int
    # The tensors that scale the data, by their names in kernels.jobs.Packed, and those beside them
    # where scales are nested.
    scales: tuple[str, ...]
    nested: tuple[str, ...]
    # Whether blocks end with their row. Otherwise elements count row after row.
    by_rows: bool
    # The values of some bytes before they are scaled, flat, of the data and the scales.
    values: Callable[[Tensor, Sequence[Tensor], torch.dtype], Tensor]
    # The scale of each block, [rows, blocks of a row] or [blocks, 1].
    block_scales: Callable[[Sequence[Tensor], Layout, torch.dtype], Tensor]


def _values_of_code(data: Tensor, scales: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``code[index]``, the first of two elements in the upper half of a byte."""
    byte = torch.arange(256, device=data.device)
    return _look_up_pairs(data, scales[1].to(dtype)[torch.stack((byte >> 4, byte & 15), 1)])


def _values_of_e2m1(data: Tensor, scales: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Floats of 4 bits, the first of two elements in the lower half of a byte."""
    magnitudes = torch.tensor(_E2M1, dtype=dtype, device=data.device)
    byte = torch.arange(256, device=data.device)
    both_signs = torch.cat((magnitudes, -magnitudes))
    return _look_up_pairs(data, both_signs[torch.stack((byte & 15, byte >> 4), 1)])


def _look_up_pairs(data: Tensor, pairs: Tensor) -> Tensor:
    """The elements of bytes, of which ``pairs`` [256, 2] has both."""
    # One look-up of both, as one element of twice the size.
    doubled = pairs.view(_TWICE[pairs.itemsize]).view(-1)
    return doubled.index_select(0, data.reshape(-1).int()).view(pairs.dtype)


def _values_of_float8(data: Tensor, scales: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if data.is_cuda:
        return data.reshape(-1).view(torch.float8_e4m3fn).to(dtype)
    # On a CPU PyTorch's conversion takes four times as long.
    every_byte = torch.arange(256, dtype=torch.uint8, device=data.device)
    of_byte = every_byte.view(torch.float8_e4m3fn).to(dtype)
    return of_byte.index_select(0, data.reshape(-1).int())


def _absmax(scales: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    absmax = scales[0].reshape(-1)
    if layout.nested_blocksize:
        nested_absmax, nested_code, offset = (t.to(dtype) for t in scales[2:])
        outer = nested_absmax.repeat_interleave(layout.nested_blocksize)[: absmax.numel()]
        absmax = nested_code.index_select(0, absmax.int()) * outer + offset
    return absmax.to(dtype).unsqueeze(1)


def _scales_by_row(scales: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    blocks = -(-layout.k // layout.blocksize)
    by_block = scales[0].to(dtype).view(layout.experts, -1, blocks)
    if layout.block_rows > 1:
        by_block = by_block.repeat_interleave(layout.block_rows, 1)[:, : layout.n]
    return by_block.reshape(-1, blocks)


def _float8_scales(scales: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    by_block = scales[0].view(torch.float8_e4m3fn).to(dtype).reshape(-1, 1)
    return by_block.mul_(scales[1].to(dtype)) if layout.nested_blocksize else by_block


def _powers_of_two(scales: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    exponents = scales[0].reshape(-1, 1).int().sub_(_E8M0_BIAS)
    # Each power is computed once and not, as ldexp would, for each element.
    ones = torch.ones_like(exponents, dtype=torch.float32)
    powers = torch.ldexp(ones, exponents).to(dtype)
    return powers.masked_fill_(exponents > _E8M0_BIAS, float("nan"))


# The formats of a layout. 0 is a weight that is not quantized. FP4 is bitsandbytes' own format;
# quantized.FP4Weight is a weight in one of the last two.
NF4, FP4, FP8, MXFP4, NVFP4 = range(1, 6)
_NESTED = ("nested_scale", "nested_code", "offset")
FORMATS = {
    # bitsandbytes' 4 bits: absmax and code. FP4 differs in its code alone.
    NF4: Format("nf4", 4, ("scale", "code"), _NESTED, False, _values_of_code, _absmax),
    FP4: Format("fp4", 4, ("scale", "code"), _NESTED, False, _values_of_code, _absmax),
    FP8: Format("fp8", 8, ("scale",), (), True, _values_of_float8, _scales_by_row),
    MXFP4: Format("mxfp4", 4, ("scale",), (), False, _values_of_e2m1, _powers_of_two),
    NVFP4: Format(
        "nvfp4", 4, ("scale",), ("nested_scale",), False, _values_of_e2m1, _float8_scales
    ),
}


def dequantize(
    data: Tensor, scales: Sequence[Tensor], layout: Layout, dtype: torch.dtype
) -> Tensor:
    """W [n, k], or all of a stack [experts n, k], by PyTorch's operators, computed in float32 and
    rounded once; float64 is not rounded.
    """
    stored = FORMATS[layout.format]
    work = torch.promote_types(dtype, torch.float32)
    if layout.swizzled:
        scales = (_in_rows(scales[0], layout), *scales[1:])
    block_scales = stored.block_scales(scales, layout, work)
    # The elements that a row of block_scales scales.
    line = layout.k if stored.by_rows else layout.blocksize
    lines = max(1, _ELEMENTS // line)
    rows = layout.experts * layout.n
    data = data.view(-1)
    out = torch.empty(data.numel() * 8 // stored.bits, dtype=dtype, device=data.device)
    for part, packed, scale in zip(
        out.split(lines * line),
        data.split(lines * line * stored.bits // 8),
        block_scales.split(lines),
        strict=True,
    ):
        values = stored.values(packed, scales, work)
        whole = values.numel() // line
        rest = whole * line
        # In place, block by block: the scales of all elements would be as large as the values.
        blocks = values[:rest].view(whole, line).split(layout.blocksize, 1)
        for place, block in enumerate(blocks):
            block.mul_(scale[:whole, place, None])
        # Blocks across rows need not end with the last one.
        values[rest:].mul_(scale[-1:, 0])
        part.copy_(values)
    return out[: rows * layout.k].view(rows, layout.k)


def _in_rows(swizzled: Tensor, layout: Layout) -> Tensor:
    """Scales [n, blocks of a row] of swizzled ones: tiles of 128 rows and 4 blocks, row-major, each
    [32, 4, 4] of row modulo 32, row div 32 and block.
    """
    blocks = layout.k // layout.blocksize
    tiles = swizzled.view(-1, -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tiles.shape[0] * 128, -1)[: layout.n, :blocks].contiguous()


class Stored(NamedTuple):
    """A quantized weight in the parts that the ops take: its bytes in uint8, its scales and its
    layout.

    Scales of NF4: absmax, code and, if nested, nested_absmax, nested_code, offset. Of float8: scale.
    Of floats of 4 bits: scale and, if there is one, tensor_scale.
    """

    data: Tensor
    scales: tuple[Tensor, ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.n, self.layout.k

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """As :func:`dequantize`."""
        return dequantize(self.data, self.scales, self.layout, dtype)

"""Frozen weights in 4 and 8 bits: their storage, their sources and their values.

The classes describe the formats; ``reference.nf4_ref``, ``fp8_ref`` and ``fp4_ref`` are their
formulas in float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.utils.validation import check_int

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

    Kernels read the formats of WEIGHTS by their names.
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


# The formats of a layout. 0 is a weight that is not quantized.
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


def as_plain(weight: Tensor | Stored | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """``weight``, or the W that it stores, in ``dtype``."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A frozen weight [N, K] in 4 bits an element: ``code[index] · absmax``, as bitsandbytes stores
    it.

    Blocks of ``blocksize`` elements run row by row and need not end with a row. An index has 4
    bits; a byte holds two, the first in the upper half. Nested ("double quantization", QLoRA, arXiv
    2305.14314), an absmax is ``nested_code[absmax] · nested_absmax + offset``, in blocks of
    ``nested_blocksize``.

    Args:
        packed: uint8 [ceil(N K / 2)].
        absmax: float32, or uint8 if nested, [ceil(N K / blocksize)].
        code: float32 [16], the values of an index.
        shape: (N, K).
        blocksize: elements that share an absmax, a power of two.
        nested_absmax: float32 [ceil(absmax's / nested_blocksize)]. Give this and the next three all
            or not at all.
        nested_code: float32 [256], the values of an 8-bit absmax.
        offset: one float32, added to every absmax.
        nested_blocksize: number of absmax that share a nested_absmax, a power of two.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it and both values.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = 0

    format: ClassVar[int] = NF4

    def __post_init__(self) -> None:
        n, k = self.shape
        check_int("shape[0]", n, minimum=1)
        check_int("shape[1]", k, minimum=1)
        check_power("blocksize", self.blocksize)
        blocks = -(-n * k // self.blocksize)
        nested = [self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize or None]
        if any(part is None for part in nested) and any(part is not None for part in nested):
            raise ValueError(
                "nested_absmax, nested_code, offset and nested_blocksize must be given all or not at all, got "
                f"{[part is not None for part in nested]}"
            )
        expected: dict[str, tuple[Any, ...]] = {"packed": (torch.uint8, -(-n * k // 2))}
        expected |= {"absmax": (torch.float32, blocks), "code": (torch.float32, 16)}
        if self.nested_blocksize:
            check_power("nested_blocksize", self.nested_blocksize)
            outer = -(-blocks // self.nested_blocksize)
            expected |= {"absmax": (torch.uint8, blocks), "nested_absmax": (torch.float32, outer)}
            expected |= {"nested_code": (torch.float32, 256), "offset": (torch.float32,)}
        for name, (dtype, *shape) in expected.items():
            check_tensor(name, getattr(self, name), dtype, shape, self.packed)

    @classmethod
    def zeros(cls, n: int, k: int, device: torch.device | str) -> NF4Weight:
        """A weight nested in bitsandbytes' usual blocks."""
        blocks = -(-n * k // 64)
        with torch.device(device):
            return cls(
                packed=torch.zeros(-(-n * k // 2), dtype=torch.uint8),
                absmax=torch.zeros(blocks, dtype=torch.uint8),
                code=torch.zeros(16),
                shape=(n, k),
                blocksize=64,
                nested_absmax=torch.zeros(-(-blocks // 256)),
                nested_code=torch.zeros(256),
                offset=torch.zeros(()),
                nested_blocksize=256,
            )

    @classmethod
    def from_bitsandbytes(cls, weight: Any) -> NF4Weight:
        """The weight of a ``bitsandbytes.nn.Params4bit``, NF4 or FP4 in any storage dtype, without
        a copy.

        Raises:
            TypeError: ``weight`` is no quantized Params4bit (moving one to a device quantizes it).
            ValueError: ``weight`` has bitsandbytes' packing for inference on a CPU.
        """
        state = getattr(weight, "quant_state", None)
        if state is None or len(getattr(state, "shape", ())) != 2:
            raise TypeError(
                f"weight must be a quantized Params4bit of two dimensions, got {type(weight).__name__} of "
                f"shape {list(weight.shape)}, quant_state {state!r}"
            )
        if is_packed_for_cpu(weight):
            raise ValueError(
                "weight must be in bitsandbytes' usual packing, got the one that it makes on a CPU in eval mode; make the "
                "weight's layer compute in train mode, or move it to a GPU, before its first call"
            )
        # Leave the parameter's class, which would run Python code at every operator.
        with torch._C.DisableTorchFunctionSubclass():
            packed = weight.detach().view(torch.uint8).reshape(-1)
        inner = state.state2
        nested = (
            (inner.absmax, inner.code, state.offset, inner.blocksize)
            if state.nested
            else (None, None, None, 0)
        )
        values = (packed, state.absmax, state.code, tuple(state.shape), state.blocksize, *nested)
        tensors = (*values[1:3], *values[5:8])
        sizes = (packed.numel(), packed.device, *values[3:5], values[8])
        if _has_passed(state, tensors, sizes):
            self = object.__new__(cls)
            self.__dict__.update(zip(_NF4_FIELDS, values, strict=True))
            return self
        self = cls(*values)
        if not torch.compiler.is_compiling():
            key = id(state)
            refs = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
            _passed[key] = weakref.ref(state, lambda _: _passed.pop(key, None)), refs, sizes
        return self

    @property
    def stored(self) -> Stored:
        nested = (
            (self.nested_absmax, self.nested_code, self.offset) if self.nested_blocksize else ()
        )
        layout = Layout(NF4, *self.shape, self.blocksize, self.nested_blocksize)
        return Stored(self.packed, (self.absmax, self.code, *nested), layout)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)


@dataclass(frozen=True, eq=False)
class FP8Weight:
    """A frozen weight [N, K] in float8 with a scale a row: ``data[n, k] · scale[n]``.

    Args:
        data: float8_e4m3fn [N, K], contiguous.
        scale: float32 [N].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it and both values.
    """

    data: Tensor
    scale: Tensor

    format: ClassVar[int] = FP8

    def __post_init__(self) -> None:
        if self.data.dim() != 2 or 0 in self.data.shape:
            raise ValueError(
                f"data must be [N, K], N and K at least 1, got {list(self.data.shape)}"
            )
        check_tensor("data", self.data, torch.float8_e4m3fn, list(self.data.shape), self.data)
        check_tensor("scale", self.scale, torch.float32, [self.data.shape[0]], self.data)

    @classmethod
    def zeros(cls, n: int, k: int, device: torch.device | str) -> FP8Weight:
        with torch.device(device):
            return cls(torch.zeros(n, k, dtype=torch.float8_e4m3fn), torch.zeros(n))

    @classmethod
    def from_torchao(cls, weight: Any) -> FP8Weight:
        """The weight of torchao's ``Float8Tensor`` from ``Float8WeightOnlyConfig``, without a copy.

        Raises:
            TypeError: ``weight`` is something else.
            ValueError: ``weight`` has no scale per row, or quantizes activations too.
        """
        data, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
        if not isinstance(data, Tensor) or not isinstance(scale, Tensor):
            raise TypeError(f"weight must be torchao's Float8Tensor, got {type(weight).__name__}")
        if data.dim() != 2 or scale.shape != (data.shape[0], 1):
            raise ValueError(
                f"weight must have a scale a row, {[data.shape[0], 1]} for {list(data.shape)}, got {list(scale.shape)}"
            )
        if getattr(weight, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"weight must leave activations as they are, got act_quant_kwargs {weight.act_quant_kwargs}"
            )
        return cls(data, scale[:, 0])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.data.shape
        return n, k

    @property
    def stored(self) -> Stored:
        layout = Layout(FP8, *self.shape, self.shape[1])
        return Stored(self.data.view(torch.uint8), (self.scale,), layout)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)


@dataclass(frozen=True, eq=False)
class FP4Weight:
    """A frozen weight [N, K] in floats of 4 bits (e2m1) with a scale for each block of a row: NVFP4
    or MXFP4.

    A byte holds two elements, the first in the lower half. NVFP4 has blocks of 16 with a scale in
    float8, ``e2m1 · scale · tensor_scale``. MXFP4 (OCP Microscaling Formats, version 1.0) has blocks
    of 32 with a power of two. Both take no more than 0.5625 bytes an element, if K is a multiple of
    64 and, swizzled, N one of 128.

    Args:
        packed: uint8 [N, K / 2], contiguous.
        scale: [N, K / block], contiguous: float8_e4m3fn for NVFP4, or uint8 for MXFP4, the exponent
            plus 127.
        tensor_scale: one float32 that multiplies every scale of NVFP4, or None.
        swizzled: ``scale`` is [32 ceil(N / 128), 16 ceil(K / block / 4)] in the order that
            Blackwell's tensor cores read, as torchao stores it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it and both values.
    """

    packed: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None
    swizzled: bool = False

    def __post_init__(self) -> None:
        if self.packed.dim() != 2 or 0 in self.packed.shape:
            raise ValueError(
                f"packed must be [N, K / 2], N and K at least 1, got {list(self.packed.shape)}"
            )
        check_tensor("packed", self.packed, torch.uint8, list(self.packed.shape), self.packed)
        if self.scale.dtype not in _FP4_BLOCKS:
            raise TypeError(
                f"scale must be torch.float8_e4m3fn or torch.uint8, got {self.scale.dtype}"
            )
        n, k = self.shape
        if k % self.blocksize:
            raise ValueError(
                f"packed must have whole blocks of {self.blocksize} elements in a row, got {k} elements"
            )
        blocks = k // self.blocksize
        shape = [32 * -(-n // 128), 16 * -(-blocks // 4)] if self.swizzled else [n, blocks]
        check_tensor("scale", self.scale, self.scale.dtype, shape, self.packed)
        if self.tensor_scale is None:
            return
        if self.format == MXFP4:
            raise ValueError(
                f"tensor_scale must be None for scales of {self.scale.dtype}, got a tensor"
            )
        of_one = [1] if self.tensor_scale.dim() else []
        check_tensor("tensor_scale", self.tensor_scale, torch.float32, of_one, self.packed)

    @classmethod
    def zeros(
        cls, n: int, k: int, device: torch.device | str, dtype: torch.dtype = torch.float8_e4m3fn
    ) -> FP4Weight:
        """NVFP4 with a tensor_scale; MXFP4 with uint8, the scale's ``dtype``."""
        with torch.device(device):
            scale = torch.zeros(n, k // _FP4_BLOCKS[dtype], dtype=torch.uint8).view(dtype)
            packed = torch.zeros(n, k // 2, dtype=torch.uint8)
            return cls(packed, scale, torch.ones(()) if dtype != torch.uint8 else None)

    @classmethod
    def from_torchao(cls, weight: Any) -> FP4Weight:
        """The weight of torchao's ``NVFP4Tensor``, as ``NVFP4WeightOnlyConfig`` makes it, or of its
        ``MXTensor`` in floats of 4 bits, without a copy.

        Raises:
            TypeError: ``weight`` is something else.
            ValueError: ``weight`` quantizes activations too.
        """
        data, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
        elements = getattr(weight, "elem_dtype", None)
        is_fp4 = type(weight).__name__ == "NVFP4Tensor" or str(elements) == "torch.float4_e2m1fn_x2"
        if not is_fp4 or not isinstance(data, Tensor) or not isinstance(scale, Tensor):
            kind = type(weight).__name__ + ("" if elements is None else f" of {elements}")
            raise TypeError(
                f"weight must be torchao's NVFP4Tensor, or its MXTensor of torch.float4_e2m1fn_x2, got {kind}"
            )
        if getattr(weight, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"weight must leave activations as they are, got act_quant_kwargs {weight.act_quant_kwargs}"
            )
        if scale.dtype != torch.float8_e4m3fn:
            scale = scale.view(torch.uint8)
        tensor_scale = getattr(weight, "per_tensor_scale", None)
        return cls(data.view(torch.uint8), scale, tensor_scale, weight.is_swizzled_scales)

    @property
    def format(self) -> int:
        return MXFP4 if self.scale.dtype == torch.uint8 else NVFP4

    @property
    def blocksize(self) -> int:
        """Elements of a row that share a scale."""
        return _FP4_BLOCKS[self.scale.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, half = self.packed.shape
        return n, 2 * half

    @property
    def stored(self) -> Stored:
        scales = [self.scale.view(torch.uint8)]
        if self.tensor_scale is not None:
            scales.append(self.tensor_scale)
        nested = ALL_SCALES if len(scales) > 1 else 0
        layout = Layout(
            self.format, *self.shape, self.blocksize, nested, swizzled=int(self.swizzled)
        )
        return Stored(self.packed, tuple(scales), layout)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)


# The elements of a block by the dtype of its scale.
_FP4_BLOCKS = {torch.float8_e4m3fn: 16, torch.uint8: 32}

# A frozen weight as ``lora_linear`` takes it. What makes one [n, k] of zeros on a device, by the
# names of the formats.
QuantizedWeight = NF4Weight | FP8Weight | FP4Weight
WEIGHTS: dict[str, Callable[[int, int, torch.device | str], QuantizedWeight]] = {
    "nf4": NF4Weight.zeros,
    "fp8": FP8Weight.zeros,
    "nvfp4": FP4Weight.zeros,
    "mxfp4": partial(FP4Weight.zeros, dtype=torch.uint8),
}
# What reads a parameter of a library, by the name of the parameter's type.
_READERS: dict[str, Callable[[Any], QuantizedWeight]] = {
    "Params4bit": NF4Weight.from_bitsandbytes,
    "Float8Tensor": FP8Weight.from_torchao,
    "NVFP4Tensor": FP4Weight.from_torchao,
    "MXTensor": FP4Weight.from_torchao,
}
_NF4_FIELDS = tuple(field.name for field in fields(NF4Weight))

# Every call reads its layer's weight, and checking took half of that time. So remember the parts of
# a quant_state that passed, by identity and weakly. A read still returns the state's present parts,
# also after a move.
_passed: dict[int, tuple[Any, list[Any], tuple[Any, ...]]] = {}


def _has_passed(state: Any, tensors: tuple[Any, ...], sizes: tuple[Any, ...]) -> bool:
    found = None if torch.compiler.is_compiling() else _passed.get(id(state))
    if found is None or found[0]() is not state or found[2] != sizes:
        return False
    return all(
        tensor is (None if ref is None else ref())
        for tensor, ref in zip(tensors, found[1], strict=True)
    )


def is_quantized(weight: Any) -> bool:
    """Whether ``weight`` is a parameter of bitsandbytes in 4 bits or of torchao in floats of 8 or 4
    bits, by the name of its type.
    """
    return type(weight).__name__ in _READERS


def is_packed_for_cpu(weight: Any) -> bool:
    """Whether bitsandbytes has packed ``weight`` for inference on a CPU, which only its own layer
    reads.
    """
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def read(weight: Any) -> QuantizedWeight:
    """The weight of a parameter for which :func:`is_quantized` holds, without a copy.

    Raises:
        TypeError, ValueError: as :meth:`NF4Weight.from_bitsandbytes`, :meth:`FP8Weight.from_torchao`
            and :meth:`FP4Weight.from_torchao`.
    """
    return _READERS[type(weight).__name__](weight)


def reason_unreadable(weight: Any) -> str | None:
    """Why :func:`read` raises for a parameter for which :func:`is_quantized` holds, or None."""
    try:
        read(weight)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def check_power(name: str, value: int) -> None:
    check_int(name, value, minimum=2)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int], other: Tensor
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of the others, {other.device}, got {tensor.device}"
        )

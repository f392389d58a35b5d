"""Frozen weights in 4 and 8 bits as their libraries hold them: bitsandbytes' and torchao's. What their
bytes mean is in ``formats.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from stablelora_kernels.formats import (
    ALL_SCALES,
    FP8,
    MXFP4,
    NF4,
    NVFP4,
    Layout,
    Stored,
)
from stablelora_kernels.utils.validation import check_int


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
        # torchao 0.15 has another name for it.
        swizzled: Any = getattr(weight, "is_swizzled_scales", None)
        is_fp4 = type(weight).__name__ == "NVFP4Tensor" or str(elements) == "torch.float4_e2m1fn_x2"
        is_fp4 = is_fp4 and swizzled is not None
        if not is_fp4 or not isinstance(data, Tensor) or not isinstance(scale, Tensor):
            kind = type(weight).__name__ + ("" if elements is None else f" of {elements}")
            raise TypeError(
                f"weight must be the NVFP4Tensor of torchao 0.16 or newer, or its MXTensor of torch.float4_e2m1fn_x2, got {kind}"
            )
        if getattr(weight, "act_quant_kwargs", None) is not None:
            raise ValueError(
                f"weight must leave activations as they are, got act_quant_kwargs {weight.act_quant_kwargs}"
            )
        if scale.dtype != torch.float8_e4m3fn:
            scale = scale.view(torch.uint8)
        tensor_scale = getattr(weight, "per_tensor_scale", None)
        return cls(data.view(torch.uint8), scale, tensor_scale, swizzled)

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

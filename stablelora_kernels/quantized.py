"""Frozen weights in 4 and 8 bits: their storage, their sources and their values.

The classes describe the formats; ``reference.nf4_ref`` and ``reference.fp8_ref`` are both formulas
in float64.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.utils.validation import check_int

# PyTorch dequantizes so many elements at a time, to bound the memory for float32 values and
# indices.
_ELEMENTS = 1 << 22


class Layout(NamedTuple):
    """The memory layout of a weight [n, k], for which kernels are compiled. Ints, because ops take
    ints.
    """

    # 4: NF4, 8: FP8.
    bits: int
    n: int
    k: int
    # Elements that share a scale, and scales that share a nested one (0 if scales are float32).
    blocksize: int
    nested_blocksize: int

    @property
    def aligned(self) -> bool:
        """Whether rows begin at multiples of 16 bytes, and no block lies across two rows."""
        return self.k % self.blocksize == 0 and self.k * self.bits % 128 == 0

    @property
    def scale_count(self) -> int:
        """The number of tensors in ``Stored.scales``."""
        return 1 if self.bits == 8 else 5 if self.nested_blocksize else 2


class Stored(NamedTuple):
    """A quantized weight in the parts that the ops take: its bytes in uint8, its scales and its
    layout.

    Scales for 4 bits: absmax, code and, if nested, nested_absmax, nested_code, offset. For 8 bits:
    scale.
    """

    data: Tensor
    scales: tuple[Tensor, ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.n, self.layout.k

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [n, k] by PyTorch's operators, computed in float32 and rounded once; float64 is not
        rounded.
        """
        n, k = self.layout.n, self.layout.k
        work = torch.promote_types(dtype, torch.float32)
        if self.layout.bits == 8:
            out = torch.empty(n, k, dtype=dtype, device=self.data.device)
            rows = max(1, _ELEMENTS // k)
            values = self.data.view(torch.float8_e4m3fn).split(rows)
            for part, stored, scale in zip(
                out.split(rows), values, self.scales[0].split(rows), strict=True
            ):
                part.copy_(stored.to(work) * scale.to(work)[:, None])
            return out
        absmax, code = self.scales[:2]
        if self.layout.nested_blocksize:
            nested_absmax, nested_code, offset = (t.to(work) for t in self.scales[2:])
            outer = nested_absmax.repeat_interleave(self.layout.nested_blocksize)[: absmax.numel()]
            absmax = nested_code.index_select(0, absmax.int()) * outer + offset
        # One look-up gives both elements of a byte.
        index = torch.arange(256, device=code.device)
        pairs = code.to(work)[torch.stack((index >> 4, index & 15), 1)]
        out = torch.empty(2 * self.data.numel(), dtype=dtype, device=self.data.device)
        # A multiple of blocks and of bytes.
        step = max(_ELEMENTS, self.layout.blocksize)
        scales = absmax.to(work).split(step // self.layout.blocksize)
        for part, packed, scale in zip(
            out.split(step), self.data.split(step // 2), scales, strict=True
        ):
            values = pairs.index_select(0, packed.int()).view(-1)
            whole = values.numel() // self.layout.blocksize
            rest = whole * self.layout.blocksize
            values[:rest].view(whole, self.layout.blocksize).mul_(scale[:whole, None])
            values[rest:].mul_(scale[-1:])
            part.copy_(values)
        return out[: n * k].view(n, k)


def as_plain(weight: Tensor | Stored | NF4Weight | FP8Weight, dtype: torch.dtype) -> Tensor:
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
        layout = Layout(4, *self.shape, self.blocksize, self.nested_blocksize)
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

    def __post_init__(self) -> None:
        if self.data.dim() != 2 or 0 in self.data.shape:
            raise ValueError(
                f"data must be [N, K], N and K at least 1, got {list(self.data.shape)}"
            )
        check_tensor("data", self.data, torch.float8_e4m3fn, list(self.data.shape), self.data)
        check_tensor("scale", self.scale, torch.float32, [self.data.shape[0]], self.data)

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
        return Stored(
            self.data.view(torch.uint8), (self.scale,), Layout(8, *self.shape, self.shape[1], 0)
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)


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
    """Whether ``weight`` is a parameter of bitsandbytes in 4 bits or of torchao in float8, by the
    name of its type.
    """
    return type(weight).__name__ in ("Params4bit", "Float8Tensor")


def is_packed_for_cpu(weight: Any) -> bool:
    """Whether bitsandbytes has packed ``weight`` for inference on a CPU, which only its own layer
    reads.
    """
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def read(weight: Any) -> NF4Weight | FP8Weight:
    """The weight of a parameter for which :func:`is_quantized` holds, without a copy.

    Raises:
        TypeError, ValueError: as :meth:`NF4Weight.from_bitsandbytes` and
            :meth:`FP8Weight.from_torchao`.
    """
    return (
        NF4Weight.from_bitsandbytes
        if type(weight).__name__ == "Params4bit"
        else FP8Weight.from_torchao
    )(weight)


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

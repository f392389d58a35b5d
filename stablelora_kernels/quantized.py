"""Frozen weights in 4 and 8 bits: how they are stored, where they come from, and what they stand for.

NF4 (QLoRA, arXiv 2305.14314, with bitsandbytes' layout): the elements of W [N, K], row after row, in blocks of ``blocksize``
that need not end with a row. An element is ``code[index] · absmax``, the index being 4 bits, two of them in a byte, the first in
the upper half; ``absmax`` is its block's. Nested ("double quantization"): the absmax are 8 bits themselves,
``nested_code[absmax] · nested_absmax + offset`` in blocks of ``nested_blocksize``.

FP8 (torchao's float8 weights): an element is float8_e4m3fn times its row's float32 scale.

``reference.nf4_ref`` and ``reference.fp8_ref`` have both formulas in float64.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.utils.validation import check_int

# So many elements at a time are dequantized in PyTorch, which bounds the float32 values and indices beside the result.
_ELEMENTS = 1 << 22


class Layout(NamedTuple):
    """How the numbers of a weight [n, k] lie in memory: what kernels are compiled for. All are ints, as an op wants them."""

    # 4: NF4, 8: FP8.
    bits: int
    n: int
    k: int
    # Elements that share a scale, and scales that share a nested one; 0 where these are float32.
    blocksize: int
    nested_blocksize: int

    @property
    def aligned(self) -> bool:
        """Whether rows begin at multiples of 16 bytes, and no block lies across two of them."""
        return self.k % self.blocksize == 0 and self.k * self.bits % 128 == 0


class Stored(NamedTuple):
    """A quantized weight in pieces, as the ops take it: its bytes in uint8, and scales.

    Scales of 4 bits: absmax, code and, where nested, nested_absmax, nested_code, offset. Of 8 bits: scale.
    """

    data: Tensor
    scales: tuple[Tensor, ...]
    layout: Layout

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [n, k] by PyTorch's operators: computed in float32 and rounded once (float64: not rounded)."""
        n, k = self.layout.n, self.layout.k
        work = torch.promote_types(dtype, torch.float32)
        if self.layout.bits == 8:
            out, rows = torch.empty(n, k, dtype=dtype, device=self.data.device), max(1, _ELEMENTS // k)
            values = self.data.view(torch.float8_e4m3fn).split(rows)
            for part, stored, scale in zip(out.split(rows), values, self.scales[0].split(rows), strict=True):
                part.copy_(stored.to(work) * scale.to(work)[:, None])
            return out
        absmax, code = self.scales[:2]
        if self.layout.nested_blocksize:
            nested_absmax, nested_code, offset = (t.to(work) for t in self.scales[2:])
            outer = nested_absmax.repeat_interleave(self.layout.nested_blocksize)[: absmax.numel()]
            absmax = nested_code.index_select(0, absmax.int()) * outer + offset
        # Both elements of a byte by one look-up.
        index = torch.arange(256, device=code.device)
        pairs = code.to(work)[torch.stack((index >> 4, index & 15), 1)]
        out = torch.empty(2 * self.data.numel(), dtype=dtype, device=self.data.device)
        # A whole number of blocks, and of bytes.
        step = max(_ELEMENTS, self.layout.blocksize)
        scales = absmax.to(work).split(step // self.layout.blocksize)
        for part, packed, scale in zip(out.split(step), self.data.split(step // 2), scales, strict=True):
            values = pairs.index_select(0, packed.int()).view(-1)
            whole = values.numel() // self.layout.blocksize
            rest = whole * self.layout.blocksize
            values[:rest].view(whole, self.layout.blocksize).mul_(scale[:whole, None])
            values[rest:].mul_(scale[-1:])
            part.copy_(values)
        return out[: n * k].view(n, k)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A frozen weight [N, K] in 4 bits an element: ``code[index] · absmax``, as bitsandbytes stores it.

    Elements are counted row after row, in blocks of ``blocksize`` that need not end with a row. An index is 4 bits, two of
    them in a byte, the first in the upper half. Nested ("double quantization", QLoRA, arXiv 2305.14314), the absmax is
    ``nested_code[absmax] · nested_absmax + offset``, in blocks of ``nested_blocksize``.

    Args:
        packed: uint8 [ceil(N K / 2)].
        absmax: float32, or uint8 where nested, [ceil(N K / blocksize)].
        code: float32 [16], the values that the 4 bits stand for.
        shape: (N, K).
        blocksize: elements that share an absmax, a power of two.
        nested_absmax: float32 [ceil(absmax's / nested_blocksize)]. This and the next three are given all or not at all.
        nested_code: float32 [256], the values that the 8 bits of an absmax stand for.
        offset: float32, one number, added to every absmax.
        nested_blocksize: absmax that share a nested_absmax, a power of two.

    Raises:
        ValueError, TypeError: what does not fit, naming it and both values.
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
        _check_power("blocksize", self.blocksize)
        blocks = -(-n * k // self.blocksize)
        nested = [self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize or None]
        if any(part is None for part in nested) and any(part is not None for part in nested):
            raise ValueError(
                "nested_absmax, nested_code, offset and nested_blocksize must be given all or not at all, got "
                f"{[part is not None for part in nested]}"
            )
        _check_tensor("packed", self.packed, torch.uint8, (-(-n * k // 2),), self.packed)
        _check_tensor(
            "absmax", self.absmax, torch.uint8 if self.nested_blocksize else torch.float32, (blocks,), self.packed
        )
        _check_tensor("code", self.code, torch.float32, (16,), self.packed)
        if self.nested_blocksize:
            _check_power("nested_blocksize", self.nested_blocksize)
            outer = -(-blocks // self.nested_blocksize)
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, (outer,), self.packed)
            _check_tensor("nested_code", self.nested_code, torch.float32, (256,), self.packed)
            _check_tensor("offset", self.offset, torch.float32, (), self.packed)

    @classmethod
    def from_bitsandbytes(cls, weight: Any) -> NF4Weight:
        """What a ``bitsandbytes.nn.Params4bit`` holds, of any storage dtype, quantized as NF4 or FP4; nothing is copied.

        Raises:
            TypeError: it is no quantized Params4bit (one is quantized as it is moved to a device).
            ValueError: its packing is the one that bitsandbytes makes on a CPU for inference.
        """
        state = getattr(weight, "quant_state", None)
        if state is None or len(getattr(state, "shape", ())) != 2:
            raise TypeError(
                f"weight must be a quantized Params4bit of two dimensions, got {type(weight).__name__} of "
                f"shape {list(weight.shape)}, quant_state {state!r}"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "weight must be in bitsandbytes' usual packing, got the one that it makes on a CPU in eval mode; make the "
                "weight's layer compute in train mode, or move it to a GPU, before its first call"
            )
        # Out of the parameter's class, which would see every operator in Python.
        with torch._C.DisableTorchFunctionSubclass():
            packed = weight.detach().view(torch.uint8).reshape(-1)
        inner = state.state2 if state.nested else _NOT_NESTED
        offset = state.offset if state.nested else None
        values = (
            packed, state.absmax, state.code, tuple(state.shape), state.blocksize,
            inner.absmax, inner.code, offset, inner.blocksize,
        )  # fmt: skip
        tensors, sizes = (*values[1:3], *values[5:8]), (packed.numel(), packed.device, *values[3:5], values[8])
        if _was_checked(state, tensors, sizes):
            self = object.__new__(cls)
            self.__dict__.update(zip(_NF4_FIELDS, values, strict=True))
        else:
            self = cls(*values)
            _remember_check(state, tensors, sizes)
        return self

    @property
    def stored(self) -> Stored:
        nested = (self.nested_absmax, self.nested_code, self.offset) if self.nested_blocksize else ()
        layout = Layout(4, *self.shape, self.blocksize, self.nested_blocksize)
        return Stored(self.packed, (self.absmax, self.code, *nested), layout)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)

    # The British spelling, by which it was known first.
    dequantise = dequantize


@dataclass(frozen=True, eq=False)
class FP8Weight:
    """A frozen weight [N, K] in float8 with a scale a row: ``data[n, k] · scale[n]``.

    Args:
        data: float8_e4m3fn [N, K], contiguous.
        scale: float32 [N].

    Raises:
        ValueError, TypeError: what does not fit, naming it and both values.
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.data.dim() != 2 or 0 in self.data.shape:
            raise ValueError(f"data must be [N, K], N and K at least 1, got {list(self.data.shape)}")
        _check_tensor("data", self.data, torch.float8_e4m3fn, tuple(self.data.shape), self.data)
        _check_tensor("scale", self.scale, torch.float32, (self.data.shape[0],), self.data)

    @classmethod
    def from_torchao(cls, weight: Any) -> FP8Weight:
        """What torchao's ``Float8Tensor`` holds, as ``Float8WeightOnlyConfig`` makes it; nothing is copied.

        Raises:
            TypeError: it is something else.
            ValueError: its scales are not one a row, or its activations are to be quantized too.
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
        return Stored(self.data.view(torch.uint8), (self.scale,), Layout(8, *self.shape, self.shape[1], 0))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float32 and rounded once to ``dtype``."""
        return self.stored.dequantize(dtype)

    # The British spelling, by which it was known first.
    dequantise = dequantize


class _NotNested(NamedTuple):
    absmax: None = None
    code: None = None
    blocksize: int = 0


_NOT_NESTED = _NotNested()
_NF4_FIELDS = tuple(field.name for field in fields(NF4Weight))

# A layer's weight is read at each call, half of which was checking it. So a quant_state's parts that were found right are
# remembered, by identity and weakly: what is read is always what the state holds now, also after a move.
_checked: dict[int, tuple[Any, list[Any], tuple[Any, ...]]] = {}


def _was_checked(state: Any, tensors: tuple[Any, ...], sizes: tuple[Any, ...]) -> bool:
    found = None if torch.compiler.is_compiling() else _checked.get(id(state))
    if found is None or found[0]() is not state or found[2] != sizes:
        return False
    return all(tensor is (None if ref is None else ref()) for tensor, ref in zip(tensors, found[1], strict=True))


def _remember_check(state: Any, tensors: tuple[Any, ...], sizes: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        key = id(state)
        gone = weakref.ref(state, lambda _: _checked.pop(key, None))
        _checked[key] = gone, [None if tensor is None else weakref.ref(tensor) for tensor in tensors], sizes


def is_quantized(weight: Any) -> bool:
    """Whether ``weight`` is a parameter of bitsandbytes in 4 bits or of torchao in float8, by the name of its type."""
    return type(weight).__name__ in ("Params4bit", "Float8Tensor")


def read(weight: Any) -> NF4Weight | FP8Weight:
    """What a parameter for which :func:`is_quantized` holds stands for; nothing is copied.

    Raises:
        TypeError, ValueError: as :meth:`NF4Weight.from_bitsandbytes` and :meth:`FP8Weight.from_torchao`.
    """
    return (NF4Weight.from_bitsandbytes if type(weight).__name__ == "Params4bit" else FP8Weight.from_torchao)(weight)


def _check_power(name: str, value: int) -> None:
    check_int(name, value, minimum=2)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")


def _check_tensor(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor) -> None:
    assert tensor is not None
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if tensor.device != beside.device:
        raise ValueError(f"{name} must be on the device of the others, {beside.device}, got {tensor.device}")

"""Frozen stacks of experts in 4 and 8 bits: their storage, their sources and their values.

``lora_experts`` takes a :class:`PackedExperts` in place of a stack's tensor and dequantizes a few
experts at a time. The subclasses know one format each. They read it where its library keeps it, and
the op knows nothing of these libraries.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stablelora_kernels.formats import FP4, FP8, MXFP4, NF4, Layout, dequantize
from stablelora_kernels.quantized import check_power, check_tensor

# bitsandbytes' names of its formats.
_BITSANDBYTES = {"nf4": NF4, "fp4": FP4}
# bitsandbytes' own parametrization of a parameter in 4 bits, by the name of its type.
_PARAMETRIZATION = "Bnb4bitParametrization"
# In MXFP4 so many elements share a power of two.
_MX_BLOCK = 32


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """A frozen stack of experts [E, N, K] as it is stored; a subclass for each format makes it.

    Attributes:
        data: the bytes.
        scales: the tensors that scale them.
        layout: the format and the sizes.

    Raises:
        ValueError, TypeError: a part does not fit; the message names it and both values.
    """

    data: Tensor
    scales: tuple[Tensor, ...]
    layout: Layout

    #: What messages and reports call the format, and the formats of its layouts.
    format: ClassVar[str] = "unknown"
    formats: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.layout.format not in self.formats:
            raise ValueError(
                f"layout.format of {type(self).__name__} must be one of {list(self.formats)}, got {self.layout.format}"
            )
        if len(self.scales) != self.layout.scale_count:
            raise ValueError(
                f"scales must be {self.layout.scale_count} tensors, got {len(self.scales)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K); (E, K, N) for a stack that is stored transposed."""
        return self.layout.experts, self.layout.n, self.layout.k

    @property
    def device(self) -> torch.device:
        return self.data.device

    def expert(self, place: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix [N, K], computed in float32 and rounded once to ``dtype``; float64 is
        not rounded.
        """
        return self.experts(place, place + 1, dtype)[0]

    def experts(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """As :meth:`expert` for the experts from ``start`` to before ``end``: [end - start, N, K]."""
        layout = self.layout._replace(experts=end - start)
        scales = [scale[start:end] for scale in self.scales]
        values = dequantize(self.data[start:end], scales, layout, dtype)
        return values.view(end - start, layout.n, layout.k)


class NF4Experts(PackedExperts):
    """A stack in bitsandbytes' 4 bits, NF4 or FP4; bitsandbytes itself dequantizes it.

    ``scales`` are absmax and code and, if nested, nested_absmax, nested_code and offset, as in
    :class:`~stablelora_kernels.quantized.NF4Weight`. An expert must be whole blocks.
    """

    format = "bitsandbytes' 4 bits"
    formats = (NF4, FP4)

    def __post_init__(self) -> None:
        super().__post_init__()
        layout = self.layout
        check_power("blocksize", layout.blocksize)
        if layout.elements % layout.blocksize:
            raise ValueError(
                f"an expert must be whole blocks of {layout.blocksize} elements, got "
                f"{layout.n} x {layout.k} = {layout.elements} elements"
            )
        blocks = layout.experts * layout.elements // layout.blocksize
        tensors = {"absmax": (torch.float32, [blocks]), "code": (torch.float32, [16])}
        if layout.nested_blocksize:
            check_power("nested_blocksize", layout.nested_blocksize)
            nested_blocks = -(-blocks // layout.nested_blocksize)
            tensors["absmax"] = (torch.uint8, [blocks])
            tensors["nested_absmax"] = (torch.float32, [nested_blocks])
            tensors["nested_code"] = (torch.float32, [256])
            tensors["offset"] = (torch.float32, [])
        data_size = layout.experts * layout.elements // 2
        check_tensor("data", self.data, torch.uint8, [data_size], self.data)
        for tensor, (name, (dtype, shape)) in zip(self.scales, tensors.items(), strict=True):
            check_tensor(name, tensor, dtype, shape, self.data)

    @classmethod
    def from_parametrization(cls, module: nn.Module, name: str) -> NF4Experts:
        """The parameter ``name`` of ``module``, which
        ``bitsandbytes.nn.parametrize.replace_parameter_4bit`` has quantized, without a copy.

        Raises:
            TypeError: something else, or something more, computes the parameter.
            ValueError: an expert is not whole blocks, or the parameter does not stack matrices.
        """
        computed: Any = getattr(module, "parametrizations", {})
        steps = list(computed[name]) if name in computed else []
        kinds = [type(step).__name__ for step in steps]
        if kinds != [_PARAMETRIZATION]:
            raise TypeError(
                f"{name} must be computed by {_PARAMETRIZATION} alone, got {' and '.join(kinds) or 'no parametrization'}"
            )
        return cls.from_quant_state(computed[name].original, steps[0].quant_state)

    @classmethod
    def from_quant_state(cls, data: Tensor, state: Any) -> NF4Experts:
        """The stack that ``bitsandbytes.functional.quantize_4bit`` has returned, without a copy.

        Raises:
            ValueError: the state is of another format, an expert is not whole blocks, or the shape
                is not [E, N, K].
        """
        if state.quant_type not in _BITSANDBYTES:
            raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {state.quant_type!r}")
        if len(state.shape) != 3:
            raise ValueError(f"the shape must be [E, N, K], got {list(state.shape)}")
        count, rows, columns = state.shape
        scales = [state.absmax, state.code]
        nested_blocksize = 0
        if state.nested:
            scales += [state.state2.absmax, state.state2.code, state.offset]
            nested_blocksize = state.state2.blocksize
        format = _BITSANDBYTES[state.quant_type]
        layout = Layout(format, rows, columns, state.blocksize, nested_blocksize, experts=count)
        return cls(data.detach().view(torch.uint8).reshape(-1), tuple(scales), layout)

    def experts(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        layout = self.layout._replace(nested_blocksize=0, experts=end - start)
        blocks_of_one = layout.elements // layout.blocksize
        blocks = slice(start * blocks_of_one, end * blocks_of_one)
        data = self.data[start * layout.elements // 2 : end * layout.elements // 2]
        scales = (self._absmax(blocks), self.scales[1])
        if dtype == torch.float64:
            values = dequantize(data, scales, layout, dtype)
        else:
            # Whoever has a stack in 4 bits has bitsandbytes, which no extra installs. Its kernels
            # are one launch, and on a CPU several times as fast as PyTorch's operators.
            functional = importlib.import_module("bitsandbytes.functional")
            absmax, code = scales
            state = functional.QuantState(
                absmax=absmax,
                # One row a block: on a CPU bitsandbytes is wrong about blocks across rows.
                shape=torch.Size((absmax.numel(), layout.blocksize)),
                dtype=dtype,
                blocksize=layout.blocksize,
                quant_type=layout.name,
                code=code,
            )
            values = functional.dequantize_4bit(data.unsqueeze(1), state)
        return values.view(end - start, layout.n, layout.k)

    def _absmax(self, blocks: slice) -> Tensor:
        """The float32 absmax of these blocks, to the bit as bitsandbytes computes it."""
        absmax = self.scales[0][blocks]
        if not self.layout.nested_blocksize:
            return absmax
        nested_absmax, nested_code, offset = self.scales[2:]
        size = self.layout.nested_blocksize
        # The nested blocks that these begin and end in.
        first = blocks.start // size
        nested = nested_absmax[first : -(-blocks.stop // size)].repeat_interleave(size)
        skipped = blocks.start - first * size
        nested = nested[skipped : skipped + absmax.numel()]
        return nested_code.index_select(0, absmax.int()).mul_(nested).add_(offset)


class FP8Experts(PackedExperts):
    """A stack in float8 with a multiplier a block, as transformers' module ``FP8Experts`` stores
    it.

    ``data`` is float8_e4m3fn [E, N, K], viewed as uint8. ``scales`` holds one tensor, float32 [E, ceil(N /
    block_rows), ceil(K / block_columns)].
    """

    format = "float8"
    formats = (FP8,)

    def __post_init__(self) -> None:
        super().__post_init__()
        layout = self.layout
        if layout.block_rows < 1 or layout.blocksize < 1:
            raise ValueError(
                f"block_size must be at least 1 x 1, got {layout.block_rows} x {layout.blocksize}"
            )
        row_blocks = -(-layout.n // layout.block_rows)
        column_blocks = -(-layout.k // layout.blocksize)
        check_tensor("data", self.data, torch.uint8, [*self.shape], self.data)
        shape = [layout.experts, row_blocks, column_blocks]
        check_tensor("scale_inv", self.scales[0], torch.float32, shape, self.data)

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> FP8Experts:
        """The parameter ``name`` of a transformers module ``FP8Experts``, without a copy.

        Raises:
            TypeError, ValueError: the parameter is not float8 in blocks; the message says what it
                is.
        """
        data: Tensor = getattr(module, name)
        scale_inv: Tensor = getattr(module, f"{name}_scale_inv")
        return cls.from_blocks(data, scale_inv, module.block_size)  # type: ignore[arg-type]

    @classmethod
    def from_blocks(
        cls, data: Tensor, scale_inv: Tensor, block_size: Sequence[int] | None
    ) -> FP8Experts:
        """The stack whose blocks of ``block_size`` (rows, columns) are multiplied by ``scale_inv``.

        Raises:
            TypeError, ValueError: a part does not fit; the message names it and both values.
        """
        if data.dim() != 3:
            raise ValueError(f"data must be [E, N, K], got {list(data.shape)}")
        if block_size is None or len(block_size) != 2:
            raise ValueError(f"block_size must be (rows, columns), got {block_size}")
        check_tensor("data", data, torch.float8_e4m3fn, [*data.shape], data)
        count, rows, columns = data.shape
        block_rows, block_columns = block_size
        layout = Layout(FP8, rows, columns, block_columns, block_rows=block_rows, experts=count)
        return cls(data.detach().view(torch.uint8), (scale_inv.detach(),), layout)


class MXFP4Experts(PackedExperts):
    """A stack in MXFP4, as gpt-oss's checkpoints store it: 4-bit floats, 32 of which share a power
    of two.

    ``data`` is uint8 [E, N, K / 32, 16], the first element of a byte in its lower half. ``scales``
    holds one tensor, uint8 [E, N, K / 32]: exponents over 127.
    """

    format = "MXFP4"
    formats = (MXFP4,)

    def __post_init__(self) -> None:
        super().__post_init__()
        layout = self.layout
        groups = [layout.experts, layout.n, layout.k // _MX_BLOCK]
        check_tensor("blocks", self.data, torch.uint8, [*groups, _MX_BLOCK // 2], self.data)
        check_tensor("scales", self.scales[0], torch.uint8, groups, self.data)

    @classmethod
    def from_blocks(cls, blocks: Tensor, scales: Tensor) -> MXFP4Experts:
        """The stack of a checkpoint's ``blocks`` and ``scales``, without a copy.

        Raises:
            TypeError, ValueError: a part does not fit; the message names it and both values.
        """
        if blocks.dim() != 4:
            raise ValueError(f"blocks must be [E, N, K / 32, 16], got {list(blocks.shape)}")
        count, rows, groups = blocks.shape[:3]
        layout = Layout(MXFP4, rows, groups * _MX_BLOCK, _MX_BLOCK, experts=count)
        return cls(blocks, (scales,), layout)


_STACKS: dict[int, type[PackedExperts]] = {
    format: stack for stack in (NF4Experts, FP8Experts, MXFP4Experts) for format in stack.formats
}


def packed_experts(data: Tensor, scales: Sequence[Tensor], layout: Sequence[int]) -> PackedExperts:
    """The stack of the parts that an op takes."""
    named = Layout(*layout)
    return _STACKS[named.format](data, tuple(scales), named)


def is_in_4_bits(module: nn.Module, name: str) -> bool:
    """Whether bitsandbytes' parametrization computes the parameter ``name`` of ``module``."""
    computed: Any = module._modules.get("parametrizations")
    if computed is None or name not in computed:
        return False
    return any(type(step).__name__ == _PARAMETRIZATION for step in computed[name])


def chunks(packed: PackedExperts, dtype: torch.dtype, limit: int) -> list[tuple[int, int]]:
    """Ranges of experts that take at most ``limit`` bytes in ``dtype``, or one expert each."""
    size = max(1, limit // max(1, packed.layout.elements * dtype.itemsize))
    count = packed.layout.experts
    return [(start, min(start + size, count)) for start in range(0, count, size)]

"""Stacks of experts in 4 and 8 bits, as their libraries make them, and what these say they stand
for.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FP8Experts, MXFP4Experts, NF4Experts, PackedExperts
from stablelora_kernels.nn.stacks import set_mxfp4

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="runs where bitsandbytes is installed: pip install .[test]"
)
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
mxfp4 = pytest.importorskip(
    "transformers.integrations.mxfp4", reason="runs where transformers is installed"
)
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
moe = pytest.importorskip("transformers.integrations.moe")

FP8_BLOCK = (128, 128)


class Stack(NamedTuple):
    """A packed stack, and its values in a dtype by its own library."""

    packed: PackedExperts
    values: Any


def nf4(
    count: int, rows: int, columns: int, quant_type: str = "nf4", nested: bool = False
) -> Stack:
    weight = torch.randn(count, rows, columns)
    data, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=quant_type
    )

    def values(dtype: torch.dtype) -> Tensor:
        of_dtype = copy.copy(state)
        of_dtype.dtype = dtype
        return functional.dequantize_4bit(data, of_dtype)

    return Stack(NF4Experts.from_quant_state(data, state), values)


def fp8_blocks(count: int, rows: int, columns: int) -> Stack:
    data = torch.randn(count, rows, columns).mul_(100).to(torch.float8_e4m3fn)
    blocks = (-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
    scale_inv = torch.rand(count, *blocks).add_(0.5).mul_(0.01)

    def values(dtype: torch.dtype) -> Tensor:
        # In low precision transformers rounds the scale first, its kernels do not.
        work = torch.promote_types(dtype, torch.float32)
        return fp8._dequantize_fp8_weight(data, scale_inv, FP8_BLOCK, work).to(dtype)

    return Stack(FP8Experts.from_blocks(data, scale_inv, FP8_BLOCK), values)


def mxfp4_blocks(count: int, rows: int, columns: int) -> Stack:
    groups = (count, rows, columns // 32)
    blocks = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
    scales = torch.randint(122, 128, groups, dtype=torch.uint8)

    def values(dtype: torch.dtype) -> Tensor:
        return mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)

    return Stack(MXFP4Experts.from_blocks(blocks, scales), values)


FORMATS: dict[str, Any] = {
    "nf4": lambda *sizes: nf4(*sizes),
    "nf4 nested": lambda *sizes: nf4(*sizes, nested=True),
    "fp4": lambda *sizes: nf4(*sizes, quant_type="fp4"),
    "fp4 nested": lambda *sizes: nf4(*sizes, quant_type="fp4", nested=True),
    "fp8": fp8_blocks,
    "mxfp4": mxfp4_blocks,
}


def make_stack(name: str, count: int, rows: int, columns: int) -> Stack:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FORMATS[name](count, rows, columns)


def in_4_bits(model: Any, **options: Any) -> tuple[Any, Any]:
    """``model`` with its experts in bitsandbytes' 4 bits; and a copy with what these stand for."""
    plain = copy.deepcopy(model)
    for module, other in zip([*model.modules()], [*plain.modules()], strict=True):
        if not _has_stacks(module):
            continue
        for name in stacked_names(module):
            parametrize.replace_parameter_4bit(module, name, **options)
            getattr(other, name).data.copy_(getattr(module, name))
    return model, plain


def _has_stacks(module: nn.Module) -> bool:
    return "down_proj" in module._parameters and module._parameters["down_proj"].dim() == 3


def stacked_names(module: nn.Module) -> list[str]:
    return [name for name, p in [*module._parameters.items()] if p is not None and p.dim() == 3]


class FP8Module(fp8.FP8Experts):
    """transformers makes a module of every model's kind of it."""


def in_float8(model: Any) -> tuple[Any, Any]:
    """``model`` with its experts in transformers' ``FP8Experts``; and a copy with what these stand
    for.
    """
    kind = moe.use_experts_implementation(
        experts_class=type("FP8Experts", (FP8Module,), {}),
        experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    plain = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if not _has_stacks(module):
            continue
        packed = kind(module.config, block_size=FP8_BLOCK)
        for stack in ("gate_up_proj", "down_proj"):
            values = getattr(module, stack).data
            data, scale_inv = quantize_fp8(values)
            getattr(packed, stack).data.copy_(data)
            getattr(packed, f"{stack}_scale_inv").data.copy_(scale_inv)
            exact = fp8._dequantize_fp8_weight(data, scale_inv, FP8_BLOCK, values.dtype)
            getattr(plain.get_submodule(name), stack).data.copy_(exact)
        model.set_submodule(name, packed)
    return model, plain


def quantize_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """A stack of whole blocks in float8, and the blocks' multipliers."""
    count, rows, columns = values.shape
    by_block = values.float().view(count, rows // 128, 128, columns // 128, 128)
    scale_inv = by_block.abs().amax((2, 4)) / 448
    scaled = by_block / scale_inv[:, :, None, :, None]
    return scaled.view(values.shape).to(torch.float8_e4m3fn), scale_inv


def in_mxfp4(model: Any) -> tuple[Any, Any]:
    """``model``, whose experts are stored transposed as gpt-oss's, with random ones in MXFP4; and a
    copy with what these stand for.
    """
    plain = copy.deepcopy(model)
    for module, other in zip([*model.modules()], [*plain.modules()], strict=True):
        if not _has_stacks(module):
            continue
        for name in stacked_names(module):
            count, columns, rows = getattr(module, name).shape
            made = make_stack("mxfp4", count, rows, columns)
            (scales,) = made.packed.scales
            set_mxfp4(module, name, made.packed.data, scales, transposed=True)
            getattr(other, name).data.copy_(made.values(torch.float32).transpose(1, 2))
    return model, plain

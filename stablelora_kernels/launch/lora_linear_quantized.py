"""From a call of ``lora_linear_quantized`` to its launches, as ``launch/lora_linear.py`` does for a plain weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.kernels.lora.linear_quantized import _dequantize_kernel, _lora_linear_quantized_kernel
from stablelora_kernels.launch import lora_linear as plain
from stablelora_kernels.launch.base import Launch, tile_blocks, tile_options
from stablelora_kernels.launch.lora_common import (
    Product,
    backward_product,
    dropout_threshold,
    few_rows_word,
    forward_product,
    gradient_launches,
    shrink,
    split_k_buffers,
    with_s,
)
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.quantized import Stored


def forward_launches(
    device: Device, x: Tensor, weight: Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    y: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a forward on ``device``, by ``choice`` or else by the table's."""
    p = forward_product(x, None, bias, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    if p.call.m == 0:
        return []
    if _dequantizes(device, p, weight, choice):
        launch, w = dequantize(_memory(p, weight), weight)
        return [launch, *plain.product_launches(device, p._replace(w=w), rules.choose(device, p.call))]
    p = with_s(p)
    return [shrink(device, p, triggers_dependents=rules.overlaps(device)), _linear(device, p, weight)]


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, weight: Stored, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, dx: Tensor, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
    choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a backward on ``device``, for dX and for those of dA and dB that are not None."""
    ds = scratch(grad, grad.shape[0], lora_A.shape[0]) if da is not None else None
    p, g = backward_product(x, grad, None, lora_A, lora_B, s, ds, seed, dx, da, db, scaling, dropout_p)
    if p.call.m == 0:
        return [*gradient_launches(device, g)]
    if _dequantizes(device, p, weight, choice):
        launch, w = dequantize(_memory(p, weight), weight)
        p = p._replace(w=w.t())
        return [launch, *plain.product_backward_launches(device, p, g, rules.choose(device, p.call))]
    p = with_s(p)
    first = shrink(device, p, g, triggers_dependents=rules.overlaps(device))
    return [first, _linear(device, p, weight), *gradient_launches(device, g._replace(db=None))]


def _dequantizes(device: Device, p: Product, weight: Stored, choice: Choice | None) -> bool:
    layout = weight.layout
    return (choice or rules.choose_quantized(device, p.call, layout.bits, layout.aligned)).kernel == "dequantize"


def _arguments(weight: Stored) -> tuple[tuple[Any, ...], int, dict[str, Any]]:
    """A kernel's arguments for ``weight``: its pointers, the bytes of a row, and compile-time constants."""
    layout = weight.layout
    pointers = (weight.data, *weight.scales, *[None] * (5 - len(weight.scales)))
    constants = {
        "NF4": layout.bits == 4,
        "BLOCKSIZE": layout.blocksize if layout.bits == 4 else 1,
        "NESTED": layout.nested_blocksize,
    }
    return pointers, layout.k * layout.bits // 8, constants


def _words(weight: Stored) -> str:
    layout = weight.layout
    name = "nf4" if layout.bits == 4 else "fp8"
    return f"{name}{' nested' if layout.nested_blocksize else ''}{'' if layout.aligned else ' unaligned'}"


def _linear(device: Device, p: Product, weight: Stored) -> Launch:
    """The product with W dequantized in the main loop, and the branch, for which S is read."""
    c = p.call
    assert p.s is not None
    plan = tiles.linear_quantized_plan(device, c, weight.layout.bits)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * tile.BLOCK_N, p.x, lane=1)
    pointers, row_bytes, constants = _arguments(weight)
    trans = c.direction == "backward"
    words = (
        f"{few_rows_word(c)}{'dx' if trans else 'y'} r{plan.block_r} {_words(weight)}{' masked' if c.masked else ''}"
    )
    waits = rules.overlaps(device)
    return Launch(
        _lora_linear_quantized_kernel,
        f"{words} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (p.x, *pointers, p.bias, p.b, p.s, p.y, p.seed if c.masked else None, parts, count, c.m, c.n, c.k, c.r, plan.splits,
         *p.x.stride(), row_bytes, *p.b.stride(), p.s.stride(0), p.y.stride(0), dropout_threshold(p.dropout_p)),
        constants | tile_blocks(tile) | {
         "TRANS_W": trans, "HAS_BIAS": p.bias is not None, "S_UNIT": p.unit, "MASK_BRANCH": c.masked,
         "EVEN_K": c.k % tile.BLOCK_K == 0, "WAITS_FOR_PRIMARY": waits, "BLOCK_R": plan.block_r, "GROUP_M": 8,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=trans)},
        tile_options(tile) | ({"launch_pdl": True} if waits else {}),
    )  # fmt: skip


def _memory(p: Product, weight: Stored) -> Tensor:
    return scratch(p.x, weight.layout.n, weight.layout.k)


def dequantize(w: Tensor, weight: Stored) -> tuple[Launch, Tensor]:
    """The launch that fills ``w`` [N, K] with ``weight``, and ``w``."""
    n, k = w.shape
    pointers, row_bytes, constants = _arguments(weight)
    ((_, tile, reason),) = tiles.DEQUANTIZE_TILES
    launch = Launch(
        _dequantize_kernel,
        f"{_words(weight)} {tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (cdiv(n, tile.BLOCK_N) * cdiv(k, tile.BLOCK_K),),
        (*pointers, w, n, k, row_bytes),
        constants | {"ALIGNED": weight.layout.aligned, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K},
        tile_options(tile),
    )
    return launch, w

"""From a call of ``lora_linear_quantised`` to the launches that do it, as ``lora_linear_launch`` does for a plain weight."""

from __future__ import annotations

from typing import Any

import torch

from stablelora_kernels import dispatch
from stablelora_kernels.dispatch import Choice, Device, cdiv, fit, pick_tile, rank_block
from stablelora_kernels.kernels import lora_linear_launch as plain
from stablelora_kernels.kernels._common import Launch, input_precision
from stablelora_kernels.kernels.lora_linear_launch import Gradients, Product, VendorProduct
from stablelora_kernels.kernels.lora_linear_quantised import _dequantise_kernel, _lora_linear_quantised_kernel
from stablelora_kernels.quantised import Stored


def product_launches(device: Device, p: Product, weight: Stored, choice: Choice) -> list[Launch | VendorProduct]:
    """The launches for Y, ``p.y``; of ``p`` w is not read."""
    if p.call.m == 0:
        return []
    if choice.kernel == "dequantise":
        launch, w = _dequantise(p, weight)
        return [launch, *plain.product_launches(device, p._replace(w=w), dispatch.choose(device, p.call))]
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    return [plain.shrink(device, p, lead=plain.overlap(device)), _linear(device, p, weight)]


def backward_launches(
    device: Device, p: Product, g: Gradients, weight: Stored, choice: Choice
) -> list[Launch | VendorProduct]:
    """The launches for dX, ``p.y``, and for dA and dB; of ``p`` w is not read."""
    if p.call.m == 0:
        return [*plain.gradient_launches(device, g)]
    if choice.kernel == "dequantise":
        launch, w = _dequantise(p, weight)
        product = p._replace(w=w.t())
        return [launch, *plain.backward_launches(device, product, g, dispatch.choose(device, p.call))]
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    shrink = plain.shrink(device, p, g, lead=plain.overlap(device))
    return [shrink, _linear(device, p, weight), *plain.gradient_launches(device, g._replace(db=None))]


def _pieces(weight: Stored) -> tuple[tuple[Any, ...], int, dict[str, Any]]:
    """A kernel's arguments for ``weight``: its pointers, the bytes of a row, and what is known when it is compiled."""
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
    """The product with W dequantised in the main loop, and the branch, S being read."""
    c = p.call
    assert p.s is not None
    tile, reason = pick_tile(dispatch.QUANTISED_TILES, device, c)
    tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, 16 if c.m <= 16 else 64 if c.m <= dispatch.SMALL_M else 128))
    # In shared memory: X and W as they are stored, of every stage; W once in float32 and once as it is multiplied; and the
    # branch's operands.
    block_r = rank_block(c.r, dispatch.MAX_FUSED_R)
    stage = tile.BLOCK_K * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * weight.layout.bits // 8)
    product = tile.BLOCK_K * tile.BLOCK_N * (4 + c.dtype.itemsize)
    branch = block_r * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * c.lora_dtype.itemsize)
    tile = fit(tile, device, stage, product + branch)
    wait = plain.overlap(device)
    tiles = cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N)
    n, parts, count = plain.share(device, tiles, cdiv(c.k, tile.BLOCK_K), tile.BLOCK_M * tile.BLOCK_N, p.x, lane=1)
    pointers, row_bytes, constants = _pieces(weight)
    trans = c.direction == "backward"
    words, masked = "dx" if trans else "y", " masked" if c.masked else ""
    return Launch(
        _lora_linear_quantised_kernel,
        f"{plain.small(c)}{words} r{block_r} {_words(weight)}{masked} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles * n,),
        (p.x, *pointers, p.bias, p.b, p.s, p.y, p.seed if c.masked else None, parts, count, c.m, c.n, c.k, c.r, n,
         *p.x.stride(), row_bytes, *p.b.stride(), p.s.stride(0), p.y.stride(0), plain.threshold(p.dropout_p)),
        constants | {
         "TRANS_W": trans, "HAS_BIAS": p.bias is not None, "MASK_BRANCH": c.masked, "EVEN_K": c.k % tile.BLOCK_K == 0,
         "WAIT": wait, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "BLOCK_R": block_r,
         "GROUP_M": 8, "INPUT_PRECISION": input_precision(device, c.dtype, transposed=trans)},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({"launch_pdl": True} if wait else {}),
    )  # fmt: skip


def _dequantise(p: Product, weight: Stored) -> tuple[Launch, torch.Tensor]:
    """W in X's dtype, and the launch that fills it."""
    n, k = weight.layout.n, weight.layout.k
    w = p.x.new_empty(n, k)
    pointers, row_bytes, constants = _pieces(weight)
    rows, columns = 16, 256
    launch = Launch(
        _dequantise_kernel,
        f"{_words(weight)} {rows}x{columns}",
        "16 bytes of W for each thread",
        (cdiv(n, rows) * cdiv(k, columns),),
        (*pointers, w, n, k, row_bytes),
        constants | {"ALIGNED": weight.layout.aligned, "BLOCK_N": rows, "BLOCK_K": columns},
        {"num_warps": 4, "num_stages": 1},
    )
    return launch, w

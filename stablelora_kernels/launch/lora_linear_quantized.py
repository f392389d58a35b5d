"""From a call of ``lora_linear_quantized`` to the launches that do it, as ``lora_linear_launch`` does for a plain weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem, rules
from stablelora_kernels.dispatch import tiles as tiles_
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import fit, pick_tile, rank_block
from stablelora_kernels.kernels.lora.linear_quantized import _dequantize_kernel, _lora_linear_quantized_kernel
from stablelora_kernels.launch import lora_common
from stablelora_kernels.launch import lora_linear as plain
from stablelora_kernels.launch.base import Launch, input_precision
from stablelora_kernels.launch.lora_common import Gradients, Product, VendorProduct
from stablelora_kernels.quantized import Stored


def forward_launches(
    device: Device, x: Tensor, weight: Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    y: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a forward launches on ``device``: by ``choice``, or by dispatch's."""
    m, (n, k), r = x.shape[0], weight.layout[1:3], lora_A.shape[0]
    call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
    product = Product(call, x, x, bias, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    choice = choice or rules.choose_quantized(device, call, weight.layout.bits, weight.layout.aligned)
    return product_launches(device, product, weight, choice)


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, weight: Stored, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, dx: Tensor, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
    choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a backward launches on ``device`` for dX, and for those of dA and dB that are not None."""
    (m, n), (r, k) = grad.shape, lora_A.shape
    # The forward's formula with every matrix transposed gives dX, and dS on the way.
    call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
    ds = grad.new_empty(m, r) if da is not None else None
    gradients = Gradients(call, x, s, ds, grad, da, db, seed, dropout_p)
    product = Product(call, grad, grad, None, lora_B.t(), lora_A.t(), ds, dx, seed, scaling, dropout_p)
    choice = choice or rules.choose_quantized(device, call, weight.layout.bits, weight.layout.aligned)
    return product_backward_launches(device, product, gradients, weight, choice)


def product_launches(device: Device, p: Product, weight: Stored, choice: Choice) -> list[Launch | VendorProduct]:
    """The launches for Y, ``p.y``; of ``p`` w is not read."""
    if p.call.m == 0:
        return []
    if choice.kernel == "dequantize":
        launch, w = _dequantize(p, weight)
        return [launch, *plain.product_launches(device, p._replace(w=w), rules.choose(device, p.call))]
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    return [lora_common.shrink(device, p, lead=lora_common.overlap(device)), _linear(device, p, weight)]


def product_backward_launches(
    device: Device, p: Product, g: Gradients, weight: Stored, choice: Choice
) -> list[Launch | VendorProduct]:
    """The launches for dX, ``p.y``, and for dA and dB; of ``p`` w is not read."""
    if p.call.m == 0:
        return [*lora_common.gradient_launches(device, g)]
    if choice.kernel == "dequantize":
        launch, w = _dequantize(p, weight)
        product = p._replace(w=w.t())
        return [launch, *plain.product_backward_launches(device, product, g, rules.choose(device, p.call))]
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    shrink = lora_common.shrink(device, p, g, lead=lora_common.overlap(device))
    return [shrink, _linear(device, p, weight), *lora_common.gradient_launches(device, g._replace(db=None))]


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
    """The product with W dequantized in the main loop, and the branch, S being read."""
    c = p.call
    assert p.s is not None
    tile, reason = pick_tile(tiles_.QUANTIZED_TILES, device, c)
    tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, 16 if c.m <= 16 else 64 if c.m <= problem.SMALL_M else 128))
    # In shared memory: X and W as they are stored, of every stage; W once in float32 and once as it is multiplied; and the
    # branch's operands.
    block_r = rank_block(c.r, problem.MAX_FUSED_R)
    stage = tile.BLOCK_K * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * weight.layout.bits // 8)
    product = tile.BLOCK_K * tile.BLOCK_N * (4 + c.dtype.itemsize)
    branch = block_r * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * c.lora_dtype.itemsize)
    tile = fit(tile, device, stage, product + branch)
    wait = lora_common.overlap(device)
    tiles = cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N)
    n, parts, count = lora_common.share(
        device, tiles, cdiv(c.k, tile.BLOCK_K), tile.BLOCK_M * tile.BLOCK_N, p.x, lane=1
    )
    pointers, row_bytes, constants = _pieces(weight)
    trans = c.direction == "backward"
    words, masked = "dx" if trans else "y", " masked" if c.masked else ""
    return Launch(
        _lora_linear_quantized_kernel,
        f"{lora_common.small(c)}{words} r{block_r} {_words(weight)}{masked} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles * n,),
        (p.x, *pointers, p.bias, p.b, p.s, p.y, p.seed if c.masked else None, parts, count, c.m, c.n, c.k, c.r, n,
         *p.x.stride(), row_bytes, *p.b.stride(), p.s.stride(0), p.y.stride(0), lora_common.threshold(p.dropout_p)),
        constants | {
         "TRANS_W": trans, "HAS_BIAS": p.bias is not None, "MASK_BRANCH": c.masked, "EVEN_K": c.k % tile.BLOCK_K == 0,
         "WAIT": wait, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "BLOCK_R": block_r,
         "GROUP_M": 8, "INPUT_PRECISION": input_precision(device, c.dtype, transposed=trans)},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({"launch_pdl": True} if wait else {}),
    )  # fmt: skip


def _dequantize(p: Product, weight: Stored) -> tuple[Launch, torch.Tensor]:
    """W in X's dtype, and the launch that fills it."""
    n, k = weight.layout.n, weight.layout.k
    w = p.x.new_empty(n, k)
    pointers, row_bytes, constants = _pieces(weight)
    rows, columns = 16, 256
    launch = Launch(
        _dequantize_kernel,
        f"{_words(weight)} {rows}x{columns}",
        "16 bytes of W for each thread",
        (cdiv(n, rows) * cdiv(k, columns),),
        (*pointers, w, n, k, row_bytes),
        constants | {"ALIGNED": weight.layout.aligned, "BLOCK_N": rows, "BLOCK_K": columns},
        {"num_warps": 4, "num_stages": 1},
    )
    return launch, w

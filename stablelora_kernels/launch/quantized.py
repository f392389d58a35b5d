"""Launches that read a quantized weight: the product that dequantizes it in its loop, and the
dequantization before a product.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.formats import FORMATS, Stored
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.linear_quantized import (
    _dequantize_kernel,
    _lora_linear_quantized_kernel,
)
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import Arguments, Launch, flag_words, planned, tile_words
from stablelora_kernels.launch.fill_jobs import (
    Product,
    branch_job,
    matrix,
    product_tile,
    product_words,
    shared_sums,
)


class _PackedWeight(NamedTuple):
    """What kernels take for a quantized weight, and its kind in words."""

    weight: jobs.Packed
    tile: jobs.PackedTile
    words: str


def _packed(weight: Stored) -> _PackedWeight:
    """A stored weight as kernels take it."""
    layout = weight.layout
    nested, swizzled = layout.nested_blocksize, layout.swizzled > 0
    scales = dict(zip(layout.scale_names, weight.scales, strict=True))
    packed = jobs.Packed(weight.data, layout.k * layout.bits // 8, **scales)
    tile = jobs.PackedTile(
        FORMAT=layout.name,
        # A scale a row is no reason to compile a kernel for each width.
        BLOCKSIZE=1 if FORMATS[layout.format].by_rows else layout.blocksize,
        NESTED=nested,
        ALIGNED=layout.aligned,
        SWIZZLED=swizzled,
    )
    flags = flag_words(nested=nested > 0, unaligned=not layout.aligned, swizzled=swizzled)
    return _PackedWeight(packed, tile, layout.name + flags)


def quantized(device: Device, p: Product, weight: Stored) -> Launch:
    """The product with ``weight`` dequantized in the main loop, and the branch, for which S is
    read.
    """
    call = p.call
    plan = tiles.linear_quantized_plan(device, call, weight.layout.bits)
    tile = plan.tile
    backward = call.direction == "backward"
    precision = input_precision(device, call.dtype, transposed=backward)
    sums = shared_sums(plan, tile.BLOCK_M * tile.BLOCK_N, p.x, workspace.Y_LANE)
    packed = _packed(weight)
    branch = branch_job(p, plan.block_r, precision)
    arguments: Arguments = {
        "x": matrix(p.x),
        "w": packed.weight,
        "bias": p.bias,
        "y": matrix(p.y),
        "branch": branch.branch,
        "parts": sums.parts,
        "counter": sums.counter,
        "M": call.m,
        "N": call.n,
        "K": call.k,
        "SPLITS": plan.splits,
    }
    constants: Arguments = {
        "TILE": product_tile(p, tile, precision),
        "BRANCH": branch.tile,
        "PACKED": packed.tile,
        "TRANS_W": backward,
    }
    flags = flag_words(masked=call.masked)
    words = f"{product_words(p, plan)} {packed.words}{flags} {tile_words(tile)}"
    kernel = _lora_linear_quantized_kernel
    return planned(kernel, words, plan, plan.programs, arguments, constants)


def dequantize(w: Tensor, weight: Stored) -> Launch:
    """The launch that fills ``w`` [N, K] with ``weight``."""
    n, k = w.shape
    packed = _packed(weight)
    rule = tiles.DEQUANTIZE_TILES[0]
    tile: Tile = rule.choice
    programs = cdiv(n, tile.BLOCK_N) * cdiv(k, tile.BLOCK_K)
    plan = Plan(tile, rule.reason, block_r=0, tiles=programs)
    arguments: Arguments = {"w": packed.weight, "out_ptr": w, "N": n, "K": k}
    constants: Arguments = {
        "PACKED": packed.tile,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
    }
    words = f"{packed.words} {tile.BLOCK_N}x{tile.BLOCK_K}"
    return planned(_dequantize_kernel, words, plan, programs, arguments, constants)

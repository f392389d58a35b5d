"""The launches that products are made of: S, the product in one of its forms, dA and dB, a dequantized weight.

Tensors are 2-D and of any strides unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.linear import _lora_linear_kernel
from stablelora_kernels.kernels.lora.linear_quantized import _dequantize_kernel, _lora_linear_quantized_kernel
from stablelora_kernels.kernels.lora.linear_split_k import _lora_linear_split_k_kernel
from stablelora_kernels.kernels.lora.linear_tma import _lora_linear_tma_kernel
from stablelora_kernels.kernels.lora.thin_products import _lora_shrink_kernel, _lora_weight_grads_kernel
from stablelora_kernels.launch.base import Launch, flag_words, tile_options
from stablelora_kernels.launch.jobs import (
    Chain,
    Gradient,
    Product,
    branch_job,
    buffers,
    chain_ahead,
    co_scheduled,
    da_job,
    db_job,
    matrix,
    rows,
    s_job,
    threshold,
    z_rows,
)
from stablelora_kernels.quantized import Stored

GROUP_M = 8


def shrink(device: Device, members: Sequence[Product]) -> Launch:
    """S of ``members``, which share X; of a single one with dB, if wanted."""
    (p, *others), ranks = members, [q.call.r for q in members]
    c = p.call
    plan = tiles.shrink_group_plan(device, c, ranks) if others else tiles.shrink_plan(device, c)
    job, constants = s_job(device, members, plan)
    db = Gradient() if others else co_scheduled(device, p, True, plan.tile.num_warps)
    many = f"{len(members)} of " if others else ""
    words = flag_words(dropout=c.dropout and not c.masked, dB=db.programs > 0)
    return Launch(
        _lora_shrink_kernel,
        f"{many}r{plan.block_r} {plan.tile.BLOCK_M}x{plan.tile.BLOCK_K}{words}",
        plan.reason,
        (plan.tiles * plan.splits + db.programs,),
        (rows(p.x, c.k), job, db.job, c.m, plan.splits, db.programs, db.splits, threshold(p)),
        {"S": constants, "DB": db.tile},
        tile_options(plan.tile),
    )


def weight_grads(device: Device, members: Sequence[Product]) -> Launch:
    """dA of ``members``, which share Z; or dA and dB of a single one, those that are wanted."""
    (p, *others), ranks = members, [q.call.r for q in members]
    c = p.call
    if others:
        plan, tiles_a = tiles.weight_grads_group_plan(device, c, ranks), -1
    else:
        plan, tiles_a = tiles.weight_grads_plan(device, c, p.da is not None, p.db is not None)
    of_a = plan if others else plan._replace(tiles=tiles_a)
    da = da_job(device, members, of_a) if p.da is not None else Gradient()
    db = db_job(device, p, plan._replace(tiles=plan.tiles - tiles_a)) if p.db is not None and not others else Gradient()
    many = f"{len(members)} of " if others else ""
    words = flag_words(dropout=c.dropout and p.da is not None, **activation_flag(p))
    return Launch(
        _lora_weight_grads_kernel,
        f"{many}r{plan.block_r} {plan.tile.BLOCK_M}x{plan.tile.BLOCK_K}{words}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (z_rows(p), da.job, rows(p.x, c.k), db.job, c.m, da.programs, plan.splits, threshold(p)),
        {"DA": da.tile, "DB": db.tile},
        tile_options(plan.tile),
    )


def activation_flag(p: Product) -> dict[str, bool]:
    """The activation's name, as a flag of a variant."""
    return {p.activation: True} if p.activation else {}


def linear(device: Device, p: Product, tile: Tile | None, *, load_s: bool, chained: bool = False) -> Launch:
    """The product, if it has a W, and the branch, with dA if wanted.

    S is read, or else computed and, if wanted, stored. ``chained``: earlier programs of the launch compute the S that is read,
    and dB if wanted.
    """
    c = p.call
    assert not isinstance(p.w, Stored)
    form = "pointers"
    if p.w is not None:
        operands = [p.x, rows_contiguous(p.w)[0], p.y, *([] if p.gate is None else p.gate)]
        form = rules.choose_form(device, c, described=all(described(t) for t in operands))
    build = _by_descriptors if form == "tma" else partial(_by_pointers, split_k=form == "split_k")
    return build(device, p, tile, load_s, chained)


def _launch(
    device: Device, p: Product, kernel: Any, plan: Plan, operands: tuple[Any, ...], sizes: Any, load_s: bool, chained: bool,
    parts: tuple[Any, ...] = (), persistent: int = 0,
) -> Launch:  # fmt: skip
    """A launch of one of the three kernels. ``operands``, which follow X, and ``sizes`` are its own; then come its jobs'.

    ``parts``: memory for shared sums. ``persistent``: programs that take tile after tile; by default, a program takes a part of
    one.
    """
    c, tile, x, z = p.call, plan.tile, rows(p.x, p.call.k), z_rows(p)
    branch, branch_tile = branch_job(p, plan.block_r, load_s, sizes.PRECISION)
    ahead = chain_ahead(device, p, tile) if chained else Chain()
    da = co_scheduled(device, p, False, tile.num_warps)
    products = p.wanted * (persistent or plan.tiles * plan.splits)
    counts = (products, ahead.programs, ahead.splits, ahead.db.programs, ahead.db.splits, da.splits, threshold(p))
    flags = flag_words(
        fused=not load_s, chained=chained, alone=p.w is None, masked=c.masked, add=p.base is p.y, **activation_flag(p),
        dA=da.programs > 0, dB=ahead.db.programs > 0,
    )  # fmt: skip
    return Launch(
        kernel,
        f"{_product_words(p)} r{plan.block_r}{flags} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (ahead.programs + products + da.programs,),
        (x, *operands, branch, p.gate, *parts, ahead.job, ahead.db.job, z, da.job, ahead.chain, c.m, c.n,
         *([plan.splits] if parts else []), *counts),
        {"TILE": sizes, "BRANCH": branch_tile, "S": ahead.tile, "DB": ahead.db.tile, "DA": da.tile},
        tile_options(tile),
    )  # fmt: skip


def _product_words(p: Product) -> str:
    return f"{'small ' if p.call.m <= problem.SMALL_M else ''}{'dx' if p.call.direction == 'backward' else 'y'}"


def product_tile(p: Product, tile: Tile, precision: str, activation: str = "") -> jobs.Tile:
    """The constants of a product that is read through pointers."""
    even = p.w is None or p.call.k % tile.BLOCK_K == 0
    return jobs.Tile(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, GROUP_M, even, activation, precision)


def _by_pointers(device: Device, p: Product, tile: Tile | None, load_s: bool, chained: bool, split_k: bool) -> Launch:
    plan = (tiles.linear_split_k_plan if split_k else tiles.linear_plan)(device, p.call, load_s, tile)
    transposed = split_k and p.call.direction == "backward"
    sizes = product_tile(p, plan.tile, input_precision(device, p.call.dtype, transposed), p.activation)
    operands = (matrix(p.w), matrix(None if load_s else p.a), p.bias, matrix(p.y), p.base)
    if not split_k:
        return _launch(device, p, _lora_linear_kernel, plan, operands, sizes, load_s, chained)
    parts = buffers(plan, plan.tile.BLOCK_M * (plan.tile.BLOCK_N + plan.block_r), p.x, lane=1)
    return _launch(device, p, _lora_linear_split_k_kernel, plan, operands, sizes, load_s, chained, parts)


def _by_descriptors(device: Device, p: Product, tile: Tile | None, load_s: bool, chained: bool) -> Launch:
    c = p.call
    assert isinstance(p.w, Tensor)
    plan, parts, programs = tiles.linear_tma_plan(device, c, load_s, tile)
    tile = plan.tile
    (w, trans_w), (a, trans_a) = rows_contiguous(p.w), rows_contiguous(p.a)
    # A float32 A passes through registers to be rounded, with a descriptor or without.
    described_a = not load_s and c.lora_dtype == c.dtype and described(a)
    part = tile.BLOCK_N // parts
    operands = (
        descriptor(p.x, tile.BLOCK_M, tile.BLOCK_K),
        descriptor(w, tile.BLOCK_N, tile.BLOCK_K, trans_w),
        descriptor(a, plan.block_r, tile.BLOCK_K, trans_a) if described_a else None,
        descriptor(p.y, tile.BLOCK_M, part),
        *([None] * 3 if p.gate is None else [descriptor(t, tile.BLOCK_M, part) for t in p.gate]),
        matrix(None if load_s or described_a else p.a),
        p.bias,
    )
    added, precision = p.base is not None, input_precision(device, c.dtype)
    sizes = jobs.DescribedTile(
        tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, GROUP_M, parts, trans_w, trans_a, added, p.activation, precision
    )
    return _launch(device, p, _lora_linear_tma_kernel, plan, operands, sizes, load_s, chained, persistent=programs)


def described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride that begin at multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0


def rows_contiguous(t: Tensor) -> tuple[Tensor, bool]:
    """``t`` or its transpose, whichever may have rows of unit stride, and whether it is the transpose."""
    return (t.t(), True) if t.stride(0) == 1 else (t, False)


def descriptor(t: Tensor, rows: int, cols: int, trans: bool = False) -> TensorDescriptor:
    """Of blocks of ``rows`` by ``cols``; the other way round with ``trans``."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [cols, rows] if trans else [rows, cols])


def _packed(weight: Stored) -> tuple[jobs.Packed, jobs.PackedTile, str]:
    """What kernels take for ``weight``, and its kind in words."""
    layout = weight.layout
    scale, *others = weight.scales
    pointers = (*others, *[None] * (4 - len(others)))
    nf4 = layout.bits == 4
    tile = jobs.PackedTile(nf4, layout.blocksize if nf4 else 1, layout.nested_blocksize, layout.aligned)
    words = flag_words(nested=layout.nested_blocksize > 0, unaligned=not layout.aligned)
    return (
        jobs.Packed(weight.data, layout.k * layout.bits // 8, scale, *pointers),
        tile,
        ("nf4" if nf4 else "fp8") + words,
    )


def quantized(device: Device, p: Product) -> Launch:
    """The product with W dequantized in the main loop, and the branch, for which S is read."""
    c = p.call
    assert isinstance(p.w, Stored)
    plan = tiles.linear_quantized_plan(device, c, p.w.layout.bits)
    tile, trans = plan.tile, c.direction == "backward"
    precision = input_precision(device, c.dtype, transposed=trans)
    parts = buffers(plan, tile.BLOCK_M * tile.BLOCK_N, p.x, lane=1)
    w, packed, kind = _packed(p.w)
    branch, branch_tile = branch_job(p, plan.block_r, True, precision)
    words = f"{_product_words(p)} r{plan.block_r} {kind}{flag_words(masked=c.masked)}"
    return Launch(
        _lora_linear_quantized_kernel,
        f"{words} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (matrix(p.x), w, p.bias, matrix(p.y), branch, *parts, c.m, c.n, c.k, plan.splits, threshold(p)),
        {"TILE": product_tile(p, tile, precision), "BRANCH": branch_tile, "PACKED": packed, "TRANS_W": trans},
        tile_options(tile),
    )


def dequantize(w: Tensor, weight: Stored) -> Launch:
    """The launch that fills ``w`` [N, K] with ``weight``."""
    n, k = w.shape
    packed, constants, kind = _packed(weight)
    ((_, tile, reason),) = tiles.DEQUANTIZE_TILES
    return Launch(
        _dequantize_kernel,
        f"{kind} {tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (cdiv(n, tile.BLOCK_N) * cdiv(k, tile.BLOCK_K),),
        (packed, w, n, k),
        {"PACKED": constants, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K},
        tile_options(tile),
    )

"""From a call of ``lora_linear`` to the launches that do it. Tensors are 2-D and of any strides unless it says otherwise.

Nothing here launches: a list of :class:`Launch` is made, which the op runs, ``explain`` prints and the compile report
compiles. Tensors may be on the meta device for the latter two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch import problem, rules
from stablelora_kernels.dispatch import tiles as tiles_
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import Tile, fit, pick_tile, rank_block
from stablelora_kernels.kernels.lora.linear import _lora_linear_kernel
from stablelora_kernels.kernels.lora.linear_split_k import _lora_linear_split_k_kernel
from stablelora_kernels.kernels.lora.linear_tma import _lora_linear_tma_kernel
from stablelora_kernels.launch.base import Launch, input_precision
from stablelora_kernels.launch.lora_common import (
    Gradients,
    Product,
    VendorProduct,
    _Beside,
    _beside,
    branch,
    gradient_launches,
    overlap,
    share,
    shrink,
    small,
    threshold,
    words_of,
)

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


def forward_launches(
    device: Device, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    y: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a forward launches on ``device``, by the kernel that dispatch chooses unless it is given."""
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
    product = Product(call, x, weight, bias, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    return product_launches(device, product, choice or rules.choose(device, call))


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    s: Tensor | None, seed: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, *, scaling: float,
    dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a backward launches on ``device`` for those of dX, dA and dB that are not None."""
    (m, n), (r, k) = grad.shape, lora_A.shape
    # The forward's formula with every matrix transposed gives dX, and dS on the way.
    call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
    ds = grad.new_empty(m, r) if da is not None else None
    gradients = Gradients(call, x, s, ds, grad, da, db, seed, dropout_p)
    if dx is None or weight is None:
        product = Product(call, grad, grad, None, lora_B.t(), lora_A.t(), ds, grad, seed, scaling, dropout_p)
        return product_backward_launches(device, product, gradients, None)
    product = Product(call, grad, weight.t(), None, lora_B.t(), lora_A.t(), ds, dx, seed, scaling, dropout_p)
    return product_backward_launches(device, product, gradients, choice or rules.choose(device, call))


def product_launches(
    device: Device, p: Product, choice: Choice, s_is_there: bool = False
) -> list[Launch | VendorProduct]:
    """The launches for ``p`` by the kernel chosen, which must be one that :func:`dispatch.choose` allows.

    ``s_is_there``: a launch before has filled ``p.s``, which "fused" would compute anew.
    """
    rules.check_possible(p.call, choice.kernel)
    if p.call.m == 0 or p.call.n == 0:
        return []
    if choice.kernel == "fused":
        return [_linear(device, p, choice.tile, load_s=False)]
    if choice.kernel == "vendor":
        return [VendorProduct(p.x, p.w, p.bias, p.y, p.call.add), *branch(device, p, p.y, s_is_there)]
    if s_is_there:
        return [_linear(device, p, choice.tile, load_s=True)]
    return _split(device, p, choice.tile)


def product_backward_launches(
    device: Device, p: Product, g: Gradients, choice: Choice | None
) -> list[Launch | VendorProduct]:
    """The launches for dX, ``p.y``, by the kernel chosen, and for dA and dB; ``choice`` None: without dX, and of ``p`` w and y
    are not read.

    Where dS is computed on its own, dB is computed in the same launch, which so reads dY once, and dA in dX's.
    """
    if p.call.m == 0 or (choice is None and g.da is None):
        return [*gradient_launches(device, g)]
    if choice is None:
        return [shrink(device, p, g), *gradient_launches(device, g._replace(db=None))]
    if choice.kernel == "split":
        return _split(device, p, choice.tile, g)
    return [*product_launches(device, p, choice), *gradient_launches(device, g)]


def _split(device: Device, p: Product, tile: Tile | None, g: Gradients | None = None) -> list[Launch | VendorProduct]:
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    return [shrink(device, p, g, lead=overlap(device)), _linear(device, p, tile, load_s=True, g=g)]


def _linear(device: Device, p: Product, tile: Tile | None, load_s: bool, g: Gradients | None = None) -> Launch:
    """The product and the branch: S computed beside it, and stored if wanted, or read; with ``g``, dA too, S being dS then."""
    c = p.call
    # None where it is not read: pointers and None would be compiled apart.
    p = p._replace(seed=p.seed if c.masked else None)
    wait = load_s and overlap(device)
    # A pointer that is never followed still needs a type.
    s = p.y if p.s is None else p.s
    block_r = rank_block(c.r, problem.MAX_FUSED_R)
    flags = {
        "HAS_BIAS": p.bias is not None,
        "LOAD_S": load_s,
        "STORE_S": p.s is not None and not load_s,
        "MASK_BRANCH": c.masked,
        "ADD": p.call.add,
        "WAIT": wait,
        "BLOCK_R": block_r,
        "INPUT_PRECISION": input_precision(device, c.dtype),
    }
    build = _small_linear if c.m <= problem.SMALL_M else _tma_linear if _takes_tma(device, p) else _pointer_linear
    launch = build(device, p, s, tile, flags, g)
    words = "dx" if c.direction == "backward" else "y"
    da = launch.constants["HAS_GRAD"]
    variant = f"{words} r{block_r}{words_of(fused=not load_s, masked=c.masked, add=p.call.add, dA=da)} {launch.variant}"
    options = launch.options | ({"launch_pdl": True} if wait else {})
    return launch._replace(variant=small(c) + variant, options=options)


def _da_beside(device: Device, g: Gradients | None, tile: Tile) -> tuple[Tensor | None, _Beside]:
    """X and the programs for dA in the launch of dX, whose tile is ``tile``."""
    beside = _beside(device, g, None if g is None else g.da, tile.num_warps, lane=3)
    return (None if g is None or not beside.programs else g.x), beside


def _strides(z: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if z is None else z.stride()


def _stage(c: Call, tile: Tile, flags: dict[str, Any]) -> int:
    """Bytes of shared memory that a step of the main loop takes."""
    a = 0 if flags["LOAD_S"] else flags["BLOCK_R"] * c.lora_dtype.itemsize
    return tile.BLOCK_K * ((tile.BLOCK_M + tile.BLOCK_N) * c.dtype.itemsize + a)


def _pointer_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(tiles_.LINEAR_TILES, device, c, tile)
    # The branch's operands are in shared memory beside the pipeline's buffers.
    branch = flags["BLOCK_R"] * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * c.lora_dtype.itemsize)
    tile = fit(tile, device, _stage(c, tile, flags), branch)
    tiles = cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles + beside.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, z, *beside.pointers, c.m, c.n, c.k, c.r, tiles, beside.splits,
         *p.x.stride(), *p.w.stride(), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0), *_strides(z), p.scaling,
         threshold(p.dropout_p)),
        flags | beside.constants | {"EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
                 "BLOCK_K": tile.BLOCK_K, "GROUP_M": 8},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _small_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(tiles_.SPLIT_K_TILES, device, c, tile)
    tile = tile._replace(BLOCK_M=16 if c.m <= 16 else 64)
    tile = fit(tile, device, _stage(c, tile, flags))
    tiles, steps = cdiv(c.n, tile.BLOCK_N), cdiv(c.k, tile.BLOCK_K)
    part = tile.BLOCK_N * tile.BLOCK_M + tile.BLOCK_M * flags["BLOCK_R"]
    # The parts of 64 rows are as large as what a program reads of W in a few steps: there one program a processor is enough.
    n, parts, count = share(device, tiles, steps, part, p.x, lane=1, programs=2 if tile.BLOCK_M == 16 else 1)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_split_k_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles * n + beside.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, parts, count, z, *beside.pointers, c.m, c.n, c.k, c.r, n, tiles * n,
         beside.splits, *p.x.stride(), *p.w.stride(), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0), *_strides(z),
         p.scaling, threshold(p.dropout_p)),
        flags | beside.constants | {"EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
                 "BLOCK_K": tile.BLOCK_K,
                 "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride that begin at multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0


def _takes_tma(device: Device, p: Product) -> bool:
    w = p.w.t() if p.w.stride(0) == 1 else p.w
    return device.tma and p.call.dtype != torch.float32 and all(_described(t) for t in (p.x, w, p.y)) and p.call.k > 0


def _tma_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(tiles_.TMA_TILES, device, c, tile)
    # Under 3.6 the compiler gives up on it, and it changes nothing on Hopper. With Y read too it outgrows shared memory.
    plain = flags["LOAD_S"] and not c.masked and not c.add
    specialize = 100 <= device.generation < 120 and plain and TRITON >= (3, 9) and tile.BLOCK_N <= 128
    # The mask's random numbers are what takes the registers.
    parts = 1 if specialize else max(2, tile.BLOCK_N // 32) if c.masked else 2
    part = tile.BLOCK_N // parts
    # Y's way out and the branch's operands are in shared memory beside the pipeline's buffers.
    beside = c.dtype.itemsize * (tile.BLOCK_M * part + flags["BLOCK_R"] * (tile.BLOCK_M + part))
    tile = fit(tile, device, _stage(c, tile, flags), beside)
    w, trans = (p.w.t(), True) if p.w.stride(0) == 1 else (p.w, False)
    a, trans_a = (p.a.t(), True) if p.a.stride(0) == 1 else (p.a, False)
    # A float32 A passes through registers to be rounded, whichever way it comes.
    described_a = not flags["LOAD_S"] and c.lora_dtype == c.dtype and _described(a)
    a_block = (tile.BLOCK_K, flags["BLOCK_R"]) if trans_a else (flags["BLOCK_R"], tile.BLOCK_K)
    products = min(cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N), device.processors)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_tma_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}{words_of(specialized=specialize)}",
        reason,
        (products + beside.programs,),
        (_descriptor(p.x, tile.BLOCK_M, tile.BLOCK_K),
         _descriptor(w, *((tile.BLOCK_K, tile.BLOCK_N) if trans else (tile.BLOCK_N, tile.BLOCK_K))),
         p.bias, _descriptor(a, *a_block) if described_a else p.a, p.b, s, _descriptor(p.y, tile.BLOCK_M, part), p.seed,
         z, *beside.pointers, c.m, c.n, c.k, c.r, products, beside.splits, *p.a.stride(), *p.b.stride(), s.stride(0),
         *_strides(z), p.scaling, threshold(p.dropout_p)),
        flags | beside.constants | {
                 "PARTS": parts, "TRANS_W": trans, "DESCRIBED_A": described_a, "TRANS_A": trans_a, "SPECIALIZE": specialize,
                 "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "GROUP_M": 8},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _descriptor(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])

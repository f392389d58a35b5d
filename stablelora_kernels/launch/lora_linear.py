"""From a call of ``lora_linear`` to its launches. Tensors are 2-D and of any strides unless a docstring says otherwise.

Nothing here launches. The functions return lists of launches, which the op runs, ``explain`` prints and the compile report
compiles. For the latter two, tensors may be on the meta device. ``dispatch`` makes every choice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.kernels.lora.linear import _lora_linear_kernel
from stablelora_kernels.kernels.lora.linear_split_k import _lora_linear_split_k_kernel
from stablelora_kernels.kernels.lora.linear_tma import _lora_linear_tma_kernel
from stablelora_kernels.launch.base import Launch, flag_words, tile_blocks, tile_options
from stablelora_kernels.launch.chained import chained_s
from stablelora_kernels.launch.lora_common import (
    CoScheduledGrad,
    Gradients,
    Product,
    VendorProduct,
    backward_product,
    co_scheduled_grad,
    dropout_threshold,
    expand,
    few_rows_word,
    forward_product,
    gate_flag,
    gate_name,
    gate_pointers,
    gradient_launches,
    shrink,
    split_k_buffers,
    with_s,
)
from stablelora_kernels.launch.workspace import scratch


def forward_launches(
    device: Device, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    y: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a forward on ``device``, by the kernel of ``choice`` or else of the table."""
    product = forward_product(x, weight, bias, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    return product_launches(device, product, choice or rules.choose(device, product.call))


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    s: Tensor | None, seed: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, *, scaling: float,
    dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """The launches of a backward on ``device``, for those of dX, dA and dB that are not None."""
    ds = scratch(grad, grad.shape[0], lora_A.shape[0]) if da is not None else None
    product, gradients = backward_product(x, grad, weight, lora_A, lora_B, s, ds, seed, dx, da, db, scaling, dropout_p)
    return product_backward_launches(device, product, gradients, choice or rules.choose(device, product.call))


def product_launches(
    device: Device, p: Product, choice: Choice, s_ready: bool = False, follows_s: bool = False
) -> list[Launch | VendorProduct]:
    """The launches for ``p`` by the kernel of ``choice``, which must be possible.

    ``s_ready``: an earlier launch fills ``p.s``. "fused" would compute it again. ``follows_s``: that launch comes right before
    and lets this one begin early.
    """
    rules.check_possible(p.call, choice.kernel)
    if p.call.m == 0 or p.call.n == 0:
        return []
    if p.call.r == 0 and choice.kernel != "vendor":
        return [_linear(device, p, choice.tile, load_s=True)]
    if choice.kernel == "fused":
        return [_linear(device, p, choice.tile, load_s=False)]
    if choice.kernel == "vendor":
        assert p.w is not None
        product = VendorProduct(p.x, p.w, p.bias, p.y, p.call.add)
        return [product, *(expand(device, p, p.y, s_ready or p.call.r == 0) if p.call.r or p.gate else ())]
    if s_ready:
        return [_linear(device, p, choice.tile, load_s=True, waits=follows_s)]
    return _by_s(device, p, choice)


def product_backward_launches(device: Device, p: Product, g: Gradients, choice: Choice) -> list[Launch | VendorProduct]:
    """The launches for dX, ``p.y``, by the kernel of ``choice``, and for dA and dB.

    dB goes with a separate dS, so that dY is read once, and dA with dX. If dX is not wanted, only "chained" is of use.
    """
    if p.call.m == 0 or not (p.wanted or g.da is not None):
        return [*gradient_launches(device, g)]
    if not p.wanted and choice.kernel != "chained":
        return [shrink(device, p, g), *gradient_launches(device, g._replace(db=None))]
    rules.check_possible(p.call, choice.kernel)
    if choice.kernel in ("chained", "split"):
        return _by_s(device, p, choice, g)
    return [*product_launches(device, p, choice), *gradient_launches(device, g)]


def _by_s(device: Device, p: Product, choice: Choice, g: Gradients | None = None) -> list[Launch | VendorProduct]:
    """S, and dB; then the product, and dA. "chained" has all in one launch, "split" in two."""
    if p.call.r == 0:
        return product_launches(device, p, choice)
    p = with_s(p)
    if choice.kernel == "chained":
        return [_linear(device, p, choice.tile, load_s=True, g=g, chained=True)]
    overlaps = rules.overlaps(device)
    first = shrink(device, p, g, triggers_dependents=overlaps)
    return [first, _linear(device, p, choice.tile, load_s=True, g=g, waits=overlaps)]


def _linear(
    device: Device, p: Product, tile: Tile | None, load_s: bool, g: Gradients | None = None, chained: bool = False,
    waits: bool = False,
) -> Launch:  # fmt: skip
    """The product, if it has a W, and the branch. S is read, or else computed and, if wanted, stored. With ``g`` also dA, for
    which S is dS.

    ``chained``: earlier programs of the launch compute the S that is read, and dB. ``waits``: the launch right before computes
    S and lets this one begin early (programmatic dependent launch). Behind any other launch that is no option: a launch that
    begins when that one's programs have ended may still not see their stores, and resets of counters are among these.
    """
    c = p.call
    # None where the kernel does not read it: the compiler tells None from a pointer.
    p = p._replace(seed=p.seed if c.masked or (chained and c.dropout) else None)
    # A pointer that the kernel never follows still needs a type.
    s = p.y if p.s is None else p.s
    flags = {
        "HAS_BIAS": p.bias is not None,
        "LOAD_S": load_s,
        "STORE_S": p.s is not None and not load_s,
        "S_UNIT": p.unit,
        "MASK_BRANCH": c.masked,
        "ADD": c.add,
        "GATE": gate_name(p.gate),
        "WAITS_FOR_PRIMARY": waits,
    }
    form = "pointers"
    if p.w is not None:
        matrices = [p.x, rows_contiguous(p.w)[0], p.y, *([] if p.gate is None else p.gate[1:])]
        form = rules.choose_form(device, c, described=all(described(t) for t in matrices))
    build = {"split_k": _split_k_linear, "tma": _tma_linear, "pointers": _pointers_linear}[form]
    launch = build(device, p, s, tile, flags, g, chained)
    words = f"{few_rows_word(c)}{'dx' if c.direction == 'backward' else 'y'} r{launch.constants['BLOCK_R']}"
    words += flag_words(
        fused=not load_s,
        chained=chained,
        alone=p.w is None,
        masked=c.masked,
        add=c.add,
        **gate_flag(p.gate),
        dA=launch.constants["HAS_GRAD"],
        dB=launch.constants["HAS_DB"],
    )
    options = launch.options | ({"launch_pdl": True} if waits else {})
    return launch._replace(variant=f"{words} {launch.variant}", options=options)


def _co_scheduled_da(
    device: Device, p: Product, g: Gradients | None, tile: Tile
) -> tuple[Tensor | None, CoScheduledGrad]:
    """X (of a gated MLP G), and the programs for dA in the launch of dX, whose tile is ``tile``."""
    grad = co_scheduled_grad(device, g, None if g is None else g.da, tile.num_warps, lane=3)
    if p.gate is not None:
        return p.gate.g, grad
    return (None if g is None or not grad.programs else g.x), grad


def _strides(z: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if z is None else z.stride()


def _pointers_linear(
    device: Device,
    p: Product,
    s: Tensor,
    tile: Tile | None,
    flags: dict[str, Any],
    g: Gradients | None,
    chained: bool,
) -> Launch:
    c = p.call
    plan = tiles.linear_plan(device, c, flags["LOAD_S"], tile)
    tile = plan.tile
    products = plan.tiles * p.wanted
    z, grad = _co_scheduled_da(device, p, g, tile)
    before = chained_s(device, p, g, tile, chained)
    return Launch(
        _lora_linear_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (before.programs + products + grad.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, z, *gate_pointers(p.gate), *grad.pointers, *before.pointers, c.m, c.n, c.k,
        c.r, products,
         grad.splits, *before.counts, *p.x.stride(), *_strides(p.w), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0),
         *_strides(z), before.stride, p.scaling, dropout_threshold(p.dropout_p)),
        flags | grad.constants | before.constants | tile_blocks(tile) | {
         "HAS_W": p.w is not None, "EVEN_K": p.w is None or c.k % tile.BLOCK_K == 0, "BLOCK_R": plan.block_r, "GROUP_M": 8,
         "INPUT_PRECISION": input_precision(device, c.dtype)},
        tile_options(tile),
    )  # fmt: skip


def _split_k_linear(
    device: Device,
    p: Product,
    s: Tensor,
    tile: Tile | None,
    flags: dict[str, Any],
    g: Gradients | None,
    chained: bool,
) -> Launch:
    c = p.call
    assert p.w is not None
    plan = tiles.linear_split_k_plan(device, c, flags["LOAD_S"], tile)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * (tile.BLOCK_N + plan.block_r), p.x, lane=1)
    products = plan.tiles * plan.splits * p.wanted
    z, grad = _co_scheduled_da(device, p, g, tile)
    before = chained_s(device, p, g, tile, chained)
    return Launch(
        _lora_linear_split_k_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (before.programs + products + grad.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, parts, count, z, *gate_pointers(p.gate),
         *grad.pointers, *before.pointers, c.m, c.n, c.k, c.r,
         plan.splits, products, grad.splits, *before.counts, *p.x.stride(), *p.w.stride(), *p.a.stride(), *p.b.stride(),
         s.stride(0), p.y.stride(0), *_strides(z), before.stride, p.scaling, dropout_threshold(p.dropout_p)),
        flags | grad.constants | before.constants | tile_blocks(tile) | {
         "EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_R": plan.block_r,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        tile_options(tile),
    )  # fmt: skip


def described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride that begin at multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0


def rows_contiguous(t: Tensor) -> tuple[Tensor, bool]:
    """``t`` or its transpose, whichever may have rows of unit stride, and whether it is the transpose."""
    return (t.t(), True) if t.stride(0) == 1 else (t, False)


def _tma_linear(
    device: Device,
    p: Product,
    s: Tensor,
    tile: Tile | None,
    flags: dict[str, Any],
    g: Gradients | None,
    chained: bool,
) -> Launch:
    c = p.call
    assert p.w is not None
    plan, parts, programs = tiles.linear_tma_plan(device, c, flags["LOAD_S"], tile)
    tile = plan.tile
    programs *= p.wanted
    (w, trans_w), (a, trans_a) = rows_contiguous(p.w), rows_contiguous(p.a)
    w_block = (tile.BLOCK_K, tile.BLOCK_N) if trans_w else (tile.BLOCK_N, tile.BLOCK_K)
    a_block = (tile.BLOCK_K, plan.block_r) if trans_a else (plan.block_r, tile.BLOCK_K)
    # A float32 A passes through registers to be rounded, with a descriptor or without.
    described_a = not flags["LOAD_S"] and c.lora_dtype == c.dtype and described(a)
    z, grad = _co_scheduled_da(device, p, g, tile)
    before = chained_s(device, p, g, tile, chained)
    part = tile.BLOCK_N // parts
    gate_descs = [None] * 3 if p.gate is None else [descriptor(t, tile.BLOCK_M, part) for t in p.gate[1:]]
    return Launch(
        _lora_linear_tma_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        plan.reason,
        (before.programs + programs + grad.programs,),
        (descriptor(p.x, tile.BLOCK_M, tile.BLOCK_K), descriptor(w, *w_block), p.bias,
         descriptor(a, *a_block) if described_a else p.a, p.b, s, descriptor(p.y, tile.BLOCK_M, part),
         p.seed, *gate_descs, z, *gate_pointers(p.gate)[:1], *grad.pointers, p.x if chained else None, *before.pointers, c.m,
         c.n, c.k, c.r, programs, grad.splits, *before.counts, *p.a.stride(), *p.b.stride(), s.stride(0), *_strides(z),
         *p.x.stride(), before.stride, p.scaling, dropout_threshold(p.dropout_p)),
        flags | grad.constants | before.constants | tile_blocks(tile) | {
         "PARTS": parts, "TRANS_W": trans_w, "DESCRIBED_A": described_a, "TRANS_A": trans_a,
         "BLOCK_R": plan.block_r, "GROUP_M": 8, "INPUT_PRECISION": input_precision(device, c.dtype)},
        tile_options(tile),
    )  # fmt: skip


def descriptor(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])

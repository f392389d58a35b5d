"""From a call of ``lora_linear`` to its launches: of one projection, of several that share x, or of
a branch alone.

Nothing here launches. The functions return lists of launches, which the op runs, ``explain`` prints
and the compile report compiles. For the latter two, tensors may be on the meta device. ``dispatch``
makes every choice. There is at least one row. Tensors are 2-D and of any strides unless a docstring
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch import autotune, problem, rules, tiles
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.dispatch.settings import get_autotune
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.linear import _lora_linear_kernel
from stablelora_kernels.kernels.lora.linear_quantized import (
    _dequantize_kernel,
    _lora_linear_quantized_kernel,
)
from stablelora_kernels.kernels.lora.linear_split_k import _lora_linear_split_k_kernel
from stablelora_kernels.kernels.lora.linear_tma import _lora_linear_tma_kernel
from stablelora_kernels.kernels.lora.thin_products import (
    _lora_down_kernel,
    _lora_weight_grads_kernel,
)
from stablelora_kernels.launch import jobs as make
from stablelora_kernels.launch.base import Launch, Launches, VendorProduct, flag_words, planned
from stablelora_kernels.launch.jobs import Chain, Gradient, Product, Random, matrix, rows, threshold
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored

GROUP_M = 8


def forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], random: Sequence[Random], s: Tensor | None,
    ys: Sequence[Tensor], dropout_p: float, base: Tensor | None = None, choice: Choice | None = None,
) -> Launches:  # fmt: skip
    """The launches of a forward: each Y [M, N] for x [M, K].

    Args:
        projections: with s' = scaling / (1 - p) for scaling. The only one has no weight if the
            branch is added to ``base``.
        s: [M, sum of ranks], every S side by side; None if it is not requested.
        base: contiguous [M, N].
        choice: of the only projection; the table's by default.
    """
    ranks = [p.rank for p in projections]
    if s is None and len(ranks) > 1:
        s = scratch(x, x.shape[0], sum(ranks))
    parts = [None] if s is None else s.split(ranks, 1)
    members = [
        make.forward_product(x, p, part, y, each, dropout_p)._replace(base=base)
        for p, part, y, each in zip(projections, parts, ys, random, strict=True)
    ]
    return member_launches(device, members, choice)


def member_launches(
    device: Device, members: Sequence[Product], choice: Choice | None = None
) -> Launches:
    """The launches of a forward of projections of one x."""
    choices = [choice or _choose(device, p, alone=len(members) == 1) for p in members]
    shared = len(members) > 1 and rules.choose_group([p.call for p in members], choices).shared
    launches: Launches = [lora_down(device, members)] if shared else []
    for p, chosen in zip(members, choices, strict=True):
        launches += product_launches(device, p, chosen, s_ready=shared)
    return launches


def backward_launches(
    device: Device, x: Tensor | None, grads: Sequence[Tensor], projections: Sequence[Projection], s: Sequence[Tensor | None],
    masks: Sequence[Tensor | None], dropout_p: float,
    results: tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]], choice: Choice | None = None,
    plain: Callable[[Projection], tuple[Launches, Projection]] = lambda p: ([], p),
) -> Launches:  # fmt: skip
    """The launches of a backward, for those of dX, the dA's and the dB's that are not None; ``s``
    is each projection's S.

    Each projection adds its part to the dX that the first one stores. Without a weight, dX is the
    branch's part alone. ``plain`` dequantizes a projection's weight by launches right before its
    product.
    """
    dx, das, dbs = results
    ranks = [p.rank for p in projections]
    every_ds = (
        scratch(grads[0], grads[0].shape[0], sum(ranks)).split(ranks, 1)
        if len(ranks) > 1
        else [None]
    )
    firsts, plains = zip(
        *[plain(p) if dx is not None else ([], p) for p in projections], strict=True
    )
    members = [
        make.backward_product(
            x, grad, p, each_s, mask, dropout_p, (dx, da, db), ds if da is not None else None
        )
        for grad, p, each_s, mask, da, db, ds in zip(
            grads, plains, s, masks, das, dbs, every_ds, strict=True
        )
    ]
    choices = [choice or _choose(device, p, alone=len(members) == 1) for p in members]
    shared = len(members) > 1 and all(p.da is not None for p in members)
    shared = (
        shared
        and rules.choose_group([p.call for p in members], choices if dx is not None else ()).shared
    )
    launches: Launches = []
    for i, (p, chosen) in enumerate(zip(members, choices, strict=True)):
        if i:
            p = p._replace(call=p.call._replace(add=True), base=p.y)
        launches += [
            *firsts[i],
            *product_launches(device, p._replace(da=None) if shared else p, chosen),
        ]
    return [*launches, weight_grads(device, members)] if shared else launches


def _choose(device: Device, p: Product, alone: bool) -> Choice:
    """``alone``: without other projections of one x, so that autotuning may measure it, with its dA
    and dB.
    """
    if isinstance(p.w, Stored):
        return rules.choose_quantized(device, p.call, p.w.layout.bits, p.w.layout.aligned)
    if p.w is None:
        return rules.choose_branch(p.call)
    tuned = None
    if alone and p.wanted and get_autotune():
        w, build = (
            p.w if p.call.direction == "forward" else p.w.t(),
            partial(product_launches, device, p),
        )
        tuned = autotune.choose(device, p.call, build, p.y, p.x, w, p.bias)
    return tuned or rules.choose(device, p.call)


def product_launches(device: Device, p: Product, choice: Choice, s_ready: bool = False) -> Launches:
    """The launches for ``p`` by the kernel of ``choice``, and for its dA and dB.

    dB goes with a separate dS, so that dY is read once, and dA with dX. If dX is not wanted, only
    "chained" is of use. ``s_ready``: an earlier launch has filled ``p.s``. "fused" would compute it
    again.
    """
    if isinstance(p.w, Stored) and choice.kernel == "dequantize":
        w = scratch(p.x, p.w.layout.n, p.w.layout.k)
        plain = p._replace(w=w if p.call.direction == "forward" else w.t())
        return [dequantize(w, p.w), *product_launches(device, plain, rules.choose(device, p.call))]
    if isinstance(p.w, Stored):
        # W is dequantized in the product's own loop.
        p = _with_s(p)
        return [lora_down(device, [p]), quantized(device, p), *_gradients(device, p, with_db=False)]
    if not p.wanted and (p.s is None or choice.kernel != "chained"):
        return [
            *([lora_down(device, [p])] if p.s is not None else []),
            *_gradients(device, p, with_db=p.s is None),
        ]
    rules.check_possible(p.call, choice.kernel)
    if choice.kernel == "vendor":
        return _onto_vendors(device, p, s_ready)
    if choice.kernel == "fused" and p.call.r:
        return [
            linear(device, p._replace(da=None), choice.tile, load_s=False),
            *_gradients(device, p),
        ]
    if s_ready or not p.call.r:
        return [linear(device, p, choice.tile, load_s=True)]
    p = _with_s(p)
    if choice.kernel == "chained":
        return [linear(device, p, choice.tile, load_s=True, chained=True)]
    return [lora_down(device, [p]), linear(device, p, choice.tile, load_s=True)]


def _with_s(p: Product) -> Product:
    """``p`` with memory for S."""
    return p if p.s is not None else p._replace(s=scratch(p.x, p.call.m, p.call.r))


def _gradients(device: Device, p: Product, with_db: bool = True) -> Launches:
    """dA and dB in a launch of their own, or dA without ``with_db``; none if none is wanted."""
    p = p if with_db else p._replace(db=None)
    return [weight_grads(device, [p])] if p.da is not None or p.db is not None else []


def _onto_vendors(device: Device, p: Product, s_ready: bool) -> Launches:
    """The vendor's product, then the branch onto it."""
    assert isinstance(p.w, Tensor)
    product = VendorProduct(p.x, p.w, p.bias, p.y, p.call.add)
    if not p.call.r and not p.activation:
        return [product]
    branch = p._replace(w=None, bias=None, base=p.y)
    return [product, *product_launches(device, branch, rules.choose_branch(p.call), s_ready)]


def lora_down(device: Device, members: Sequence[Product]) -> Launch:
    """S of ``members``, which share X; of a single one with dB, if wanted."""
    p, many, c = members[0], len(members), _largest(members)
    plan = tiles.down_plan(device, c, many)
    job, constants = make.s_job(device, members, plan)
    db = Gradient() if many > 1 else make.co_scheduled(device, p, True, plan.tile.num_warps)
    flags = flag_words(dropout=c.dropout and not c.masked, dB=db.programs > 0)
    args = (rows(p.x, c.k), job, db.job, c.m, plan.splits, db.programs, db.splits, threshold(p))
    words = f"{f'{many} of ' if many > 1 else ''}r{plan.block_r} {plan.tile.BLOCK_M}x{plan.tile.BLOCK_K}{flags}"
    return planned(
        _lora_down_kernel,
        words,
        plan,
        plan.programs + db.programs,
        args,
        {"S": constants, "DB": db.tile},
    )


def weight_grads(device: Device, members: Sequence[Product]) -> Launch:
    """dA of ``members``, which share Z; or dA and dB of a single one, those that are wanted."""
    p, many, c = members[0], len(members), _largest(members)
    need_a, need_b = p.da is not None, p.db is not None and many == 1
    plan, tiles_a = tiles.weight_grads_plan(device, c, need_a, need_b, many)
    of_a, of_b = (plan._replace(tiles=count) for count in (tiles_a, plan.tiles - tiles_a))
    da = make.grad_job(device, members, of_a, False) if need_a else Gradient()
    db = make.grad_job(device, members, of_b, True) if need_b else Gradient()
    flags = flag_words(dropout=c.dropout and need_a, **{p.activation: p.activation != ""})
    words = f"{f'{many} of ' if many > 1 else ''}r{plan.block_r} {plan.tile.BLOCK_M}x{plan.tile.BLOCK_K}{flags}"
    of_z = make.z_rows(p), da.job, rows(p.x, c.k), db.job
    args = (*of_z, c.m, da.programs, plan.splits)
    return planned(
        _lora_weight_grads_kernel, words, plan, plan.programs, args, {"DA": da.tile, "DB": db.tile}
    )


def _largest(members: Sequence[Product]) -> Call:
    """The call of ``members``, with the largest rank."""
    return members[0].call._replace(r=max(p.call.r for p in members))


# A kernel, its plan, the operands that follow X, its constants, memory for shared sums, and the
# product's programs.
_Form = tuple[Any, Plan, tuple[Any, ...], Any, tuple[Any, ...], int]


def linear(
    device: Device, p: Product, tile: Tile | None, *, load_s: bool, chained: bool = False
) -> Launch:
    """The product, if it has a W, and the branch, with dA if wanted.

    S is read, or else computed and, if wanted, stored. ``chained``: earlier programs of the launch
    compute the S that is read, and dB if wanted.
    """
    assert not isinstance(p.w, Stored)
    c, form = p.call, "pointers"
    if p.w is not None:
        wide = [p.x, rows_contiguous(p.w)[0], p.y, *([] if p.gate is None else p.gate)]
        form = rules.choose_form(device, c, described=all(described(t) for t in wide))
    by = (
        _by_descriptors(device, p, tile, load_s)
        if form == "tma"
        else _by_pointers(device, p, tile, load_s, form)
    )
    kernel, plan, operands, sizes, parts, programs = by
    tile = plan.tile
    branch, branch_tile = make.branch_job(p, plan.block_r, load_s, sizes.PRECISION)
    # Where a tile has one program, the product's last round may leave processors to S. A branch
    # alone is over too soon.
    spare = -plan.tiles % device.processors if p.wanted and p.w is not None and not parts else 0
    ahead = make.chain_ahead(device, p, tile, spare) if chained else Chain()
    da = make.co_scheduled(device, p, False, tile.num_warps)
    programs *= p.wanted
    flags = flag_words(
        fused=not load_s, chained=chained, alone=p.w is None, masked=c.masked, add=p.base is p.y,
        **{p.activation: p.activation != ""}, dA=da.programs > 0, dB=ahead.db.programs > 0,
    )  # fmt: skip
    args = (
        rows(p.x, c.k), *operands, branch, p.gate, *parts, ahead.job, ahead.db.job, make.z_rows(p), da.job, ahead.chain,
        c.m, c.n, *([plan.splits] if parts else []),
        programs, ahead.programs, ahead.splits, ahead.db.splits, da.splits, threshold(p),
    )  # fmt: skip
    constants = {
        "TILE": sizes,
        "BRANCH": branch_tile,
        "S": ahead.tile,
        "DB": ahead.db.tile,
        "DA": da.tile,
    }
    words = f"{_product_words(p, plan)}{flags} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    return planned(kernel, words, plan, ahead.programs + programs + da.programs, args, constants)


def _product_words(p: Product, plan: Plan) -> str:
    small = "small " if p.call.m <= problem.SMALL_M else ""
    return f"{small}{'dx' if p.call.direction == 'backward' else 'y'} r{plan.block_r}"


def product_tile(p: Product, tile: Tile, precision: str, activation: str = "") -> jobs.Tile:
    """The constants of a product that is read through pointers."""
    even = p.w is None or p.call.k % tile.BLOCK_K == 0
    return jobs.Tile(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, GROUP_M, even, activation, precision)


def _by_pointers(device: Device, p: Product, tile: Tile | None, load_s: bool, form: str) -> _Form:
    split_k = form == "split_k"
    if split_k:
        plan = tiles.linear_split_k_plan(device, p.call, load_s, tile)
    else:
        plan = tiles.linear_plan(device, p.call, load_s, tile, has_w=p.w is not None)
    transposed = split_k and p.call.direction == "backward"
    sizes = product_tile(
        p, plan.tile, input_precision(device, p.call.dtype, transposed), p.activation
    )
    operands = (matrix(p.w), matrix(None if load_s else p.a), p.bias, matrix(p.y), p.base)
    if not split_k:
        return _lora_linear_kernel, plan, operands, sizes, (), plan.programs
    parts = make.buffers(plan, plan.tile.BLOCK_M * (plan.tile.BLOCK_N + plan.block_r), p.x, lane=1)
    return _lora_linear_split_k_kernel, plan, operands, sizes, parts, plan.programs


def _by_descriptors(device: Device, p: Product, tile: Tile | None, load_s: bool) -> _Form:
    c = p.call
    assert isinstance(p.w, Tensor)
    plan, parts = tiles.linear_tma_plan(device, c, load_s, tile)
    m, n, k, *_ = plan.tile
    (w, trans_w), (a, trans_a) = rows_contiguous(p.w), rows_contiguous(p.a)
    # A float32 A passes through registers to be rounded, with a descriptor or without.
    described_a = not load_s and c.lora_dtype == c.dtype and described(a)
    operands = (
        descriptor(p.x, m, k),
        descriptor(w, n, k, trans_w),
        descriptor(a, plan.block_r, k, trans_a) if described_a else None,
        descriptor(p.y, m, n // parts),
        *([None] * 3 if p.gate is None else [descriptor(t, m, n // parts) for t in p.gate]),
        matrix(None if load_s or described_a else p.a),
        p.bias,
    )
    added, precision = p.base is not None, input_precision(device, c.dtype)
    sizes = jobs.DescribedTile(
        m, n, k, GROUP_M, parts, trans_w, trans_a, added, p.activation, precision
    )
    return _lora_linear_tma_kernel, plan, operands, sizes, (), min(plan.tiles, device.processors)


def described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride that begin at multiples of 16 bytes."""
    return (
        t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.stride(0) > 0
    )


def rows_contiguous(t: Tensor) -> tuple[Tensor, bool]:
    """``t`` or its transpose, whichever may have rows of unit stride, and whether it is the
    transpose.
    """
    return (t.t(), True) if t.stride(0) == 1 else (t, False)


def descriptor(t: Tensor, rows: int, cols: int, trans: bool = False) -> TensorDescriptor:
    """Of blocks of ``rows`` by ``cols``; the other way round with ``trans``."""
    return TensorDescriptor(
        t, list(t.shape), list(t.stride()), [cols, rows] if trans else [rows, cols]
    )


def _packed(weight: Stored) -> tuple[jobs.Packed, jobs.PackedTile, str]:
    """What kernels take for ``weight``, and its kind in words."""
    layout = weight.layout
    nf4, nested = layout.bits == 4, layout.nested_blocksize
    scales = (*weight.scales, *[None] * (5 - len(weight.scales)))
    words = ("nf4" if nf4 else "fp8") + flag_words(nested=nested > 0, unaligned=not layout.aligned)
    tile = jobs.PackedTile(nf4, layout.blocksize if nf4 else 1, nested, layout.aligned)
    return jobs.Packed(weight.data, layout.k * layout.bits // 8, *scales), tile, words


def quantized(device: Device, p: Product) -> Launch:
    """The product with W dequantized in the main loop, and the branch, for which S is read."""
    c = p.call
    assert isinstance(p.w, Stored)
    plan = tiles.linear_quantized_plan(device, c, p.w.layout.bits)
    tile, trans = plan.tile, c.direction == "backward"
    precision = input_precision(device, c.dtype, transposed=trans)
    parts = make.buffers(plan, tile.BLOCK_M * tile.BLOCK_N, p.x, lane=1)
    w, packed, kind = _packed(p.w)
    branch, branch_tile = make.branch_job(p, plan.block_r, True, precision)
    args = (matrix(p.x), w, p.bias, matrix(p.y), branch, *parts, c.m, c.n, c.k, plan.splits)
    constants = {
        "TILE": product_tile(p, tile, precision),
        "BRANCH": branch_tile,
        "PACKED": packed,
        "TRANS_W": trans,
    }
    words = f"{_product_words(p, plan)} {kind}{flag_words(masked=c.masked)}"
    words = f"{words} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    return planned(_lora_linear_quantized_kernel, words, plan, plan.programs, args, constants)


def dequantize(w: Tensor, weight: Stored) -> Launch:
    """The launch that fills ``w`` [N, K] with ``weight``."""
    n, k = w.shape
    packed, packed_tile, kind = _packed(weight)
    ((_, tile, reason),) = tiles.DEQUANTIZE_TILES
    plan = Plan(tile, reason, 0, cdiv(n, tile.BLOCK_N) * cdiv(k, tile.BLOCK_K))
    constants = {"PACKED": packed_tile, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    words = f"{kind} {tile.BLOCK_N}x{tile.BLOCK_K}"
    return planned(_dequantize_kernel, words, plan, plan.programs, (packed, w, n, k), constants)

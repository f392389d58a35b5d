"""From a call of ``lora_linear`` to its launches: of one projection, of several that share x, or of
a branch alone.

Nothing here launches. The functions return lists of launches, which the op runs, ``explain`` prints
and the compile report compiles. For the latter two, tensors may be on the meta device. ``dispatch``
makes every choice. There is at least one row. Tensors are 2-D and of any strides unless a docstring
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.formats import Stored
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.linear import _lora_linear_kernel
from stablelora_kernels.kernels.lora.linear_split_k import _lora_linear_split_k_kernel
from stablelora_kernels.kernels.lora.linear_tma import _lora_linear_tma_kernel
from stablelora_kernels.launch import fill_jobs, workspace
from stablelora_kernels.launch.base import (
    Arguments,
    Kernel,
    Launch,
    Launches,
    VendorProduct,
    described,
    descriptor,
    flag_words,
    planned,
    rows_contiguous,
    tile_words,
)
from stablelora_kernels.launch.fill_jobs import (
    Ahead,
    Product,
    backward_product,
    described_tile,
    forward_product,
    matrix,
    product_tile,
    product_words,
    rows,
    threshold,
)
from stablelora_kernels.launch.quantized import dequantize, quantized
from stablelora_kernels.launch.thin_products import lora_down, weight_grads
from stablelora_kernels.launch.workspace import counters, scratch
from stablelora_kernels.projection import Projection


class ForwardCall(NamedTuple):
    """What a forward computes: each Y for x [M, K]."""

    x: Tensor
    # With s' = scaling / (1 - p) for scaling. The only one has no weight if the branch is added to
    # ``base``.
    projections: Sequence[Projection]
    # Of dropout's masks, and memory that keeps the masks for backward; None: no such.
    seeds: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    # [M, sum of ranks], every S side by side; None if it is not requested.
    s: Tensor | None
    # [M, N].
    ys: Sequence[Tensor]
    dropout_p: float
    # Contiguous [M, N].
    base: Tensor | None = None


def forward_launches(device: Device, call: ForwardCall, choice: Choice | None = None) -> Launches:
    """The launches of a forward. ``choice``: of every projection that it can be; the table's by default."""
    projections = call.projections
    ranks = [p.rank for p in projections]
    s = call.s
    if s is None and len(ranks) > 1:
        s = scratch(call.x, call.x.shape[0], sum(ranks))
    every_s = [None] if s is None else s.split_with_sizes(ranks, 1)
    members = []
    for i, p in enumerate(projections):
        product = forward_product(
            call.x,
            p,
            call.ys[i],
            s=every_s[i],
            seed=call.seeds[i],
            mask=call.masks[i],
            dropout_p=call.dropout_p,
        )
        members.append(product._replace(base=call.base))
    return member_launches(device, members, choice)


def member_launches(
    device: Device, members: Sequence[Product], choice: Choice | None = None
) -> Launches:
    """The launches of a forward of projections of one x."""
    choices = [choose(p, choice) for p in members]
    shared = len(members) > 1 and rules.choose_group([p.call for p in members]).shared
    launches: Launches = [lora_down(device, members)] if shared else []
    for p, chosen in zip(members, choices, strict=True):
        launches += product_launches(device, p, chosen, s_ready=shared)
    return launches


class Gradients(NamedTuple):
    """Memory for the requested gradients, None for the others."""

    dx: Tensor | None
    das: Sequence[Tensor | None]
    dbs: Sequence[Tensor | None]


class BackwardCall(NamedTuple):
    """What a backward computes from the gradient of each Y.

    Each projection adds to the dX that the first one stores. Without a weight, dX is the branch's
    alone, or with ``adds``, it is added to what dX holds.
    """

    x: Tensor | None
    grads: Sequence[Tensor]
    projections: Sequence[Projection]
    # Of each projection.
    s: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    dropout_p: float
    results: Gradients
    adds: bool = False


class Plain(NamedTuple):
    """A projection with a plain weight, and the launches that dequantize the weight."""

    projection: Projection
    launches: Launches


def backward_launches(
    device: Device,
    call: BackwardCall,
    choice: Choice | None = None,
    dequantized: Callable[[Projection], Plain] | None = None,
) -> Launches:
    """The launches of a backward. ``choice`` as in :func:`forward_launches`.

    ``dequantized`` dequantizes a projection's weight by launches right before its product.
    """
    results = call.results
    if results.dx is None or dequantized is None:
        plains = [Plain(p, []) for p in call.projections]
    else:
        plains = [dequantized(p) for p in call.projections]
    members = _backward_members(call, [plain.projection for plain in plains])
    choices = [choose(p, choice) for p in members]
    # One launch for the dA of all.
    shared = (
        len(members) > 1
        and all(da is not None for da in results.das)
        and rules.choose_group([p.call for p in members]).shared
    )
    launches: Launches = []
    for index, (p, chosen, plain) in enumerate(zip(members, choices, plains, strict=True)):
        if index > 0 or (call.adds and p.wanted):
            p = p._replace(call=p.call._replace(add=True), base=p.y)
        if shared:
            p = p._replace(da=None)
        launches += plain.launches
        launches += product_launches(device, p, chosen)
    if shared:
        launches.append(weight_grads(device, members))
    return launches


def _backward_members(call: BackwardCall, projections: Sequence[Projection]) -> list[Product]:
    """The products of a backward, with the call's projections in plain weights."""
    results = call.results
    ranks = [p.rank for p in projections]
    every_ds: Sequence[Tensor | None] = [None]
    if len(ranks) > 1:
        grad = call.grads[0]
        every_ds = scratch(grad, grad.shape[0], sum(ranks)).split_with_sizes(ranks, 1)
    return [
        backward_product(
            call.x,
            call.grads[i],
            p,
            s=call.s[i],
            mask=call.masks[i],
            dropout_p=call.dropout_p,
            dx=results.dx,
            da=results.das[i],
            db=results.dbs[i],
            ds=None if results.das[i] is None else every_ds[i],
        )
        for i, p in enumerate(projections)
    ]


def choose(p: Product, choice: Choice | None) -> Choice:
    """The strategy of ``p``: that of ``choice`` if it can be, or else the table's.

    Of a quantized weight that is dequantized first, it is that of the product behind.
    """
    if p.w is None:
        return rules.choose_branch(p.call)
    if choice is not None and choice.strategy in rules.possible_strategies(p.call):
        # Without a branch there is nothing to choose.
        return choice if p.call.r else rules.choose(p.call)
    if isinstance(p.w, Stored):
        layout = p.w.layout
        reading = rules.choose_quantized(p.call, layout.bits, layout.aligned)
        if reading.strategy == "in_loop":
            return reading
    return rules.choose(p.call)


def product_launches(device: Device, p: Product, choice: Choice, s_ready: bool = False) -> Launches:
    """The launches for ``p`` by the strategy of ``choice``, and for its dA and dB.

    dB goes with a separate dS, so that dY is read once, and dA with dX. ``s_ready``: an earlier
    launch has filled ``p.s``.
    """
    strategy = choice.strategy
    if isinstance(p.w, Stored):
        return _quantized_launches(device, p, p.w, choice)
    # Without dX only one launch for the branch is of use.
    if not p.wanted and (p.s is None or strategy != "one_launch"):
        return _gradients_alone(device, p)
    if strategy == "branch_first":
        return _with_vendors(device, p, s_ready)
    if strategy == "few_rows" and p.call.r:
        return [linear(device, p, choice.tile, computes_s=True)]
    if s_ready or not p.call.r:
        return [linear(device, p, choice.tile)]
    p = _with_s(p)
    if strategy == "two_launches":
        return [lora_down(device, [p]), linear(device, p, choice.tile)]
    return [linear(device, p, choice.tile, chained=True)]


def _with_s(p: Product) -> Product:
    """``p`` with memory for S."""
    return p if p.s is not None else p._replace(s=scratch(p.x, p.call.m, p.call.r))


def _quantized_launches(device: Device, p: Product, weight: Stored, choice: Choice) -> Launches:
    """The launches for ``p`` with a quantized ``weight``, "in_loop", or dequantized before the
    launches of another strategy.
    """
    if choice.strategy != "in_loop":
        w = scratch(p.x, weight.layout.n, weight.layout.k)
        plain = p._replace(w=w if p.call.direction == "forward" else w.t())
        return [dequantize(w, weight), *product_launches(device, plain, choice)]
    p = _with_s(p)
    # The launch of S computes dB.
    gradients = _gradients(device, p._replace(db=None))
    return [lora_down(device, [p]), quantized(device, p, weight), *gradients]


def _gradients_alone(device: Device, p: Product) -> Launches:
    """The launches for dA and dB without dX."""
    if p.s is None:
        return _gradients(device, p)
    # The launch of S computes dB.
    return [lora_down(device, [p]), *_gradients(device, p._replace(db=None))]


def _gradients(device: Device, p: Product) -> Launches:
    """dA and dB in a launch of their own; none if none is wanted."""
    if p.da is None and p.db is None:
        return []
    return [weight_grads(device, [p])]


def _with_vendors(device: Device, p: Product, s_ready: bool) -> Launches:
    """The branch and the vendor's product.

    The branch comes first, with the bias, and the product adds to it: other tiles' main loops may
    hide that read. A gated MLP's gradients need all of Y at once, so there the branch comes last.
    """
    assert isinstance(p.w, Tensor)
    branch_choice = rules.choose_branch(p.call)
    if p.activation:
        product = VendorProduct(p.x, p.w, p.bias, p.y, p.call.add)
        branch = p._replace(w=None, bias=None, base=p.y)
        return [product, *product_launches(device, branch, branch_choice, s_ready)]
    if not p.call.r:
        return [VendorProduct(p.x, p.w, p.bias, p.y, p.call.add)]
    branch = p._replace(w=None)
    launches = product_launches(device, branch, branch_choice, s_ready)
    return [*launches, VendorProduct(p.x, p.w, None, p.y, add=True)]


class _ProductKernel(NamedTuple):
    """A kernel of the product, and what it takes that the others do not."""

    kernel: Kernel
    plan: Plan
    # Programs of the product.
    programs: int
    arguments: Arguments
    tile: jobs.Tile | jobs.DescribedTile
    # Whether programs of S may compute more than one part of it.
    loops: bool = True


def linear(
    device: Device,
    p: Product,
    tile: Tile | None,
    *,
    chained: bool = False,
    computes_s: bool = False,
) -> Launch:
    """The product, if it has a W, and the branch, with dA if wanted.

    S is read. ``chained``: earlier programs of the launch compute it, and dB if wanted.
    ``computes_s``: each program computes the S that it needs and, if wanted, one stores it.
    ``tile``: a measured one.
    """
    call = p.call
    by = _product_kernel(device, p, tile, computes_s)
    plan = by.plan
    tile = plan.tile
    ahead = Ahead()
    if chained:
        # The product's last round may leave processors to S. A branch alone is over too soon.
        spare = -plan.tiles % device.processors if p.wanted and by.loops else 0
        ahead = fill_jobs.chain_ahead(device, p, tile, spare)
    branch = fill_jobs.branch_job(p, plan.block_r, by.tile.PRECISION, computes_s)
    da = fill_jobs.co_scheduled_da(device, p, tile.num_warps)
    programs = by.programs if p.wanted else 0
    arguments: Arguments = {
        **by.arguments,
        "x": rows(p.x, call.k),
        "bias": p.bias,
        "branch": branch.branch,
        "gate": p.gate,
        "s_job": ahead.job,
        "db": ahead.db.job,
        "z": fill_jobs.z_rows(p),
        "da": da.job,
        "chain": ahead.chain,
        "M": call.m,
        "N": call.n,
        "PRODUCTS": programs,
        "S_PROGRAMS": ahead.programs,
        "S_SPLITS": ahead.splits,
        "DB_SPLITS": ahead.db.splits,
        "DA_SPLITS": da.splits,
        "threshold": threshold(p),
    }
    constants: Arguments = {
        "TILE": by.tile,
        "BRANCH": branch.tile,
        "S": ahead.tile,
        "DB": ahead.db.tile,
        "DA": da.tile,
    }
    flags = flag_words(
        few_rows=computes_s,
        chained=chained,
        alone=p.w is None,
        masked=call.masked,
        add=p.base is p.y,
        **{p.activation: p.activation != ""},
        dA=da.programs > 0,
        dB=ahead.db.programs > 0,
    )
    words = f"{product_words(p, plan)}{flags} {tile_words(tile)}"
    all_programs = ahead.programs + programs + da.programs
    return planned(by.kernel, words, plan, all_programs, arguments, constants)


def _product_kernel(
    device: Device, p: Product, tile: Tile | None, computes_s: bool
) -> _ProductKernel:
    """The kernel that dispatch chooses, with its tile, or with a measured ``tile``. With
    ``computes_s`` the rows are few, and only split-K can.
    """
    assert not isinstance(p.w, Stored)
    if p.w is None:
        # A branch alone has no other kernel.
        return _by_pointers(device, p, tile)
    whole_tiles = [p.x, rows_contiguous(p.w).matrix, p.y]
    if p.gate is not None:
        whole_tiles += p.gate
    kernel, reason = rules.choose_kernel(device, p.call, all(map(described, whole_tiles)))
    if kernel == "tma":
        by = _by_descriptors(device, p, tile)
    elif kernel == "split_k":
        by = _by_split_k(device, p, tile, computes_s)
    else:
        by = _by_pointers(device, p, tile)
    plan = by.plan
    return by._replace(plan=plan._replace(reason=f"{reason}. Its tile: {plan.reason}"))


def _pointer_arguments(p: Product) -> Arguments:
    """The product's operands through pointers."""
    assert not isinstance(p.w, Stored)
    return {"w": matrix(p.w), "y": matrix(p.y), "base": p.base}


def _by_pointers(device: Device, p: Product, tile: Tile | None) -> _ProductKernel:
    """The product by the kernel that reads every matrix through pointers."""
    plan = tiles.linear_plan(device, p.call, tile, has_w=p.w is not None)
    precision = input_precision(device, p.call.dtype)
    return _ProductKernel(
        kernel=_lora_linear_kernel,
        plan=plan,
        programs=plan.programs,
        arguments=_pointer_arguments(p),
        tile=product_tile(p, plan.tile, precision, p.activation),
        loops=p.w is not None,
    )


def _by_split_k(device: Device, p: Product, tile: Tile | None, computes_s: bool) -> _ProductKernel:
    """The product by the kernel in which several programs share a tile's sum over K."""
    plan = tiles.linear_split_k_plan(device, p.call, tile, computes_s)
    transposed = p.call.direction == "backward"
    precision = input_precision(device, p.call.dtype, transposed)
    elements = plan.tile.BLOCK_M * (plan.tile.BLOCK_N + plan.block_r)
    sums = fill_jobs.shared_sums(plan, elements, p.x, workspace.Y_LANE)
    arguments = _pointer_arguments(p)
    arguments["down"] = matrix(p.down if computes_s else None)
    arguments.update(parts=sums.parts, counter=sums.counter, SPLITS=plan.splits)
    return _ProductKernel(
        kernel=_lora_linear_split_k_kernel,
        plan=plan,
        programs=plan.programs,
        arguments=arguments,
        tile=product_tile(p, plan.tile, precision, p.activation),
        loops=False,
    )


def _by_descriptors(device: Device, p: Product, tile: Tile | None) -> _ProductKernel:
    """The product by the kernel that reads X and W through tensor descriptors."""
    call = p.call
    assert isinstance(p.w, Tensor)
    plan = tiles.linear_tma_plan(device, call, tile)
    tile = plan.tile
    columns = tile.BLOCK_N // plan.column_parts
    w = rows_contiguous(p.w)
    arguments: Arguments = {
        "x_desc": descriptor(p.x, tile.BLOCK_M, tile.BLOCK_K),
        "w_desc": descriptor(w.matrix, tile.BLOCK_N, tile.BLOCK_K, w.transposed),
        "y_desc": descriptor(p.y, tile.BLOCK_M, columns),
        "g_desc": None,
        "u_desc": None,
        "du_desc": None,
        "tickets": counters(1, p.x.device, workspace.Y_LANE),
    }
    if p.gate is not None:
        arguments["g_desc"] = descriptor(p.gate.g, tile.BLOCK_M, columns)
        arguments["u_desc"] = descriptor(p.gate.u, tile.BLOCK_M, columns)
        arguments["du_desc"] = descriptor(p.gate.du, tile.BLOCK_M, columns)
    constants = described_tile(
        plan, w.transposed, input_precision(device, call.dtype), p.activation
    )
    return _ProductKernel(
        kernel=_lora_linear_tma_kernel,
        plan=plan,
        # They stay and draw tile after tile.
        programs=min(plan.tiles, device.processors),
        arguments=arguments,
        tile=constants._replace(ADD=p.base is not None),
    )

"""A product with its LoRA branch and gradients, and the records that kernels take for each of its
jobs (``kernels/lora/jobs.py``): the functions here fill them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import chained, problem, tiles
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.formats import Stored
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.jobs import Gate, Matrix
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.workspace import counters, scratch
from stablelora_kernels.projection import Projection, s_unit
from stablelora_kernels.quantized import QuantizedWeight
from stablelora_kernels.utils.tensors import drop_share


class Product(NamedTuple):
    """Y = X W^T + bias + BASE + (S UP^T) ∘ keep, S = s' (X ∘ keep) DOWN^T; one mask is all ones.

    Forward: DOWN is A and UP is B. Backward: Y is dX, X is dY, W is W^T, DOWN is B^T, UP is A^T and
    S is dS; its other gradients are dA = S^T (Z ∘ keep) and dB = X^T T, for Z [M, N] and T [M, r].
    """

    # M, N and K of this product, and which of the two masks drops.
    call: Call
    # [M, K].
    x: Tensor
    # [N, K]. Without it, Y is BASE and the branch.
    w: Tensor | Stored | None
    # [N].
    bias: Tensor | None
    # [r, K].
    down: Tensor
    # [N, r].
    up: Tensor
    # [M, r], with unit column stride, in units of ``unit``. None: not requested.
    s: Tensor | None
    # [M, N], with unit column stride.
    y: Tensor
    # X's mask is drawn from the seed's first word, which is int64, and stored as ``mask`` if that is
    # not None. Backward reads the mask, see ``reference.unpack_mask``.
    seed: Tensor | None
    mask: Tensor | None
    # s' divided by ``unit``.
    scaling: float
    dropout_p: float
    unit: float = 1.0
    # Y itself, or a tensor with Y's strides.
    base: Tensor | None = None
    # Otherwise Y is not computed, and any tensor stands for it.
    wanted: bool = True
    z: Tensor | None = None
    # In units of ``t_unit``.
    t: Tensor | None = None
    t_unit: float = 1.0
    # Contiguous [r, N] and [K, r]. None: not requested.
    da: Tensor | None = None
    db: Tensor | None = None
    # Of a gated MLP: Y is dH, and Z stands for act(G) ∘ U.
    activation: str = ""
    gate: Gate | None = None


def _branch_of(p: Projection) -> tuple[Tensor, Tensor]:
    """A and B."""
    assert p.lora_A is not None and p.lora_B is not None
    return p.lora_A, p.lora_B


def _weight_of(p: Projection) -> Tensor | Stored | None:
    assert not isinstance(p.weight, QuantizedWeight)
    return p.weight


def forward_product(
    x: Tensor,
    p: Projection,
    y: Tensor,
    *,
    s: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
) -> Product:
    """Y as a product; the projection's scaling is s'."""
    lora_A, lora_B = _branch_of(p)
    n, r = lora_B.shape
    if r == 0:
        dropout_p = 0.0
    m, k = x.shape
    unit = s_unit(x.dtype, p.scaling)
    return Product(
        call=Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout=dropout_p > 0),
        x=x,
        w=_weight_of(p),
        # Kernels take no stride for it.
        bias=None if p.bias is None else p.bias.contiguous(),
        down=lora_A,
        up=lora_B,
        s=s,
        y=y,
        seed=seed,
        mask=mask,
        scaling=p.scaling / unit,
        dropout_p=dropout_p,
        unit=unit,
    )


def backward_product(
    x: Tensor | None,
    grad: Tensor,
    p: Projection,
    *,
    s: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    ds: Tensor | None = None,
) -> Product:
    """dX as the forward's formula with every matrix transposed, with dA and dB: those that are not
    None. ``ds``: memory for dS.
    """
    lora_A, lora_B = _branch_of(p)
    r, k = lora_A.shape
    if r == 0:
        dropout_p = 0.0
    m, n = grad.shape
    weight = _weight_of(p)
    if ds is None and da is not None:
        ds = scratch(grad, m, r)
    # A hook of saved tensors may have given S and the mask another layout.
    if s is not None and s.stride(1) != 1:
        s = s.contiguous()
    if mask is not None:
        mask = mask.contiguous()
    return Product(
        call=Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout=dropout_p > 0),
        x=grad,
        w=weight.t() if isinstance(weight, Tensor) else weight,
        bias=None,
        down=lora_B.t(),
        up=lora_A.t(),
        s=ds,
        y=grad if dx is None else dx,
        seed=None,
        mask=mask,
        scaling=p.scaling,
        dropout_p=dropout_p,
        wanted=dx is not None,
        z=x,
        t=None if db is None else s,
        t_unit=s_unit(grad.dtype, p.scaling),
        da=da,
        db=db,
    )


def threshold(p: Product) -> int:
    """A random number of 15 bits below this drops its element."""
    return int(drop_share(p.dropout_p) * 32768)


class SharedSums(NamedTuple):
    """Memory of tiles whose sum several programs share: their partial sums, and counters."""

    parts: Tensor
    counter: Tensor


def shared_sums(plan: Plan, elements: int, like: Tensor, lane: int, sums: int = 1) -> SharedSums:
    """Float32 scratch for partial sums of ``elements`` each, and the counters of ``sums`` for each
    tile. Both are empty if a tile has one program.

    Sums that may run at the same time need different lanes.
    """
    shared = plan.tiles * sums if plan.splits > 1 else 0
    parts = scratch(like, plan.splits * shared * elements, dtype=torch.float32)
    return SharedSums(parts, counters(shared, like.device, lane))


def matrix(t: Tensor | None) -> Matrix:
    """The kernels' record of a matrix: its memory and strides. None is a matrix that is not read."""
    if t is None:
        return Matrix(None, 0, 0)
    return Matrix(t, row=t.stride(0), col=t.stride(1))


def rows(t: Tensor | None, width: int, u: Tensor | None = None) -> jobs.Rows:
    """The kernels' record of rows of ``width`` elements that a sum runs over: X, or the Z of dA,
    which a gate ``u`` may multiply.
    """
    assert t is not None
    return jobs.Rows(t, u, row=t.stride(0), col=t.stride(1), width=width)


class Down(NamedTuple):
    """What kernels take for S of some projections."""

    job: jobs.SJob
    tile: jobs.STile


def s_job(device: Device, members: Sequence[Product], plan: Plan, flag_m: int = 0) -> Down:
    """S of ``members``, which share X. ``flag_m``: the rows that share a flag, in the launch of the
    product that reads S.
    """
    first = members[0]
    assert first.s is not None
    call = first.call
    tile = plan.tile
    downs = [member.down for member in members]
    row, col = first.down.stride()
    if len(members) > 1:
        # Several share their strides, too: not those of the first, of which a row of one element
        # has any.
        downs = [down.contiguous() for down in downs]
        row, col = call.k, 1
    records = tuple(
        jobs.SMember(
            down=down,
            s=member.s,
            seed=member.seed,
            mask=None if member.seed is None else member.mask,
            scaling=member.scaling,
            R=member.call.r,
        )
        for down, member in zip(downs, members, strict=True)
    )
    sums = shared_sums(
        plan, tile.BLOCK_M * plan.block_r, first.s, workspace.S_LANE, sums=len(members)
    )
    constants = jobs.STile(
        MEMBERS=len(members),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_K=tile.BLOCK_K,
        BLOCK_R=plan.block_r,
        STAGES=tile.num_stages,
        EVEN_K=call.k % tile.BLOCK_K == 0,
        FLAG_M=flag_m,
        # For dS, DOWN is B^T, whose rows are not contiguous.
        PRECISION=input_precision(device, call.dtype, transposed=call.direction == "backward"),
    )
    return Down(jobs.SJob(records, _shared(first.s, row, col, sums)), constants)


def _shared(t: Tensor | None, row: int, col: int, sums: SharedSums) -> jobs.Shared:
    """What members share, for the rows of S or T ``t`` and the strides of DOWN or OUT."""
    assert t is not None
    return jobs.Shared(stride=t.stride(0), row=row, col=col, parts=sums.parts, counter=sums.counter)


def z_rows(p: Product) -> jobs.Rows | None:
    """What dA, if wanted, reads beside S."""
    if p.da is None:
        return None
    if p.gate is None:
        return rows(p.z, p.call.n)
    return rows(p.gate.g, p.call.n, p.gate.u)


class Gradient(NamedTuple):
    """dA or dB in some launch: its programs, of which ``splits`` share a sum, and what the kernel
    takes for them.
    """

    programs: int = 0
    splits: int = 1
    job: jobs.GradJob | None = None
    tile: jobs.GradTile | None = None


def da_job(device: Device, members: Sequence[Product], plan: Plan) -> Gradient:
    """dA of ``members``, which share Z."""
    first = members[0]
    assert first.s is not None
    records = tuple(
        jobs.GradMember(t=member.s, out=member.da, mask=member.mask, R=member.call.r)
        for member in members
    )
    sums = shared_sums(
        plan, plan.tile.BLOCK_M * plan.block_r, first.s, workspace.DA_LANE, sums=len(members)
    )
    # dA[r, n], contiguous, is OUT[c, r] of the job.
    shared = _shared(first.s, 1, first.call.n, sums)
    tile = _grad_tile(device, first.call, plan, len(members), first.activation, unit=1.0)
    return Gradient(plan.programs, plan.splits, jobs.GradJob(records, shared), tile)


def db_job(device: Device, p: Product, plan: Plan) -> Gradient:
    """dB of ``p``."""
    assert p.t is not None
    record = jobs.GradMember(t=p.t, out=p.db, mask=None, R=p.call.r)
    sums = shared_sums(plan, plan.tile.BLOCK_M * plan.block_r, p.t, workspace.DB_LANE)
    shared = _shared(p.t, p.call.r, 1, sums)
    tile = _grad_tile(device, p.call, plan, members=1, activation="", unit=p.t_unit)
    return Gradient(plan.programs, plan.splits, jobs.GradJob((record,), shared), tile)


def _grad_tile(
    device: Device, call: Call, plan: Plan, members: int, activation: str, unit: float
) -> jobs.GradTile:
    return jobs.GradTile(
        MEMBERS=members,
        # The plan names the rows of the sum BLOCK_K, and columns of the result BLOCK_M.
        BLOCK_M=plan.tile.BLOCK_K,
        BLOCK_C=plan.tile.BLOCK_M,
        BLOCK_R=plan.block_r,
        STAGES=plan.tile.num_stages,
        GATE=activation,
        UNIT=unit,
        PRECISION=input_precision(device, call.dtype, transposed=True),
    )


def co_scheduled_da(device: Device, p: Product, warps: int) -> Gradient:
    """dA, if wanted, by programs of another launch, which has ``warps`` warps a program."""
    if p.da is None:
        return Gradient()
    plan = tiles.co_scheduled_grad_plan(device, p.call, False, warps)
    return da_job(device, [p], plan)


def co_scheduled_db(device: Device, p: Product, warps: int) -> Gradient:
    """dB, if wanted, likewise."""
    if p.db is None:
        return Gradient()
    plan = tiles.co_scheduled_grad_plan(device, p.call, True, warps)
    return db_job(device, p, plan)


class Ahead(NamedTuple):
    """Programs for S, then for dB, in the launch of the product that needs S; none by default."""

    # Tickets and flags, see ``kernels/lora/chain.py``.
    chain: Tensor | None = None
    programs: int = 0
    splits: int = 1
    job: jobs.SJob | None = None
    tile: jobs.STile | None = None
    db: Gradient = Gradient()


def chain_ahead(device: Device, p: Product, product: Tile, spare: int) -> Ahead:
    """S, and dB if it is wanted, for the launch of ``p``, whose tile is ``product``; see
    ``chained_plans``.
    """
    plans = chained.chained_plans(device, p.call, product, p.db is not None, spare)
    # A tile of S lies within the rows of one flag.
    flag_m = max(product.BLOCK_M, plans.s.tile.BLOCK_M)
    s = s_job(device, [p], plans.s, flag_m)
    db = Gradient() if plans.db is None else db_job(device, p, plans.db)
    flags = cdiv(p.call.m, flag_m)
    return Ahead(
        chain=counters(tiles.CHAIN_HEAD + flags, p.x.device, workspace.CHAIN_LANE),
        programs=plans.programs,
        splits=plans.s.splits,
        job=s.job,
        tile=s.tile,
        db=db,
    )


class BranchJob(NamedTuple):
    """What kernels take for the branch onto a tile of Y."""

    branch: jobs.Branch
    tile: jobs.BranchTile


def branch_job(p: Product, block_r: int, precision: str, computes_s: bool = False) -> BranchJob:
    """The branch of ``p`` with ranks in blocks of ``block_r``.

    ``computes_s``: the product's own loop computes S, which is stored if it is wanted.
    """
    s = p.s
    if s is None and not computes_s:
        # Rank 0: nothing is read, but a pointer still needs a type.
        s = p.y
    up = matrix(p.up)
    branch = jobs.Branch(
        s=s,
        stride_s=0 if s is None else s.stride(0),
        up=up.ptr,
        up_row=up.row,
        up_col=up.col,
        # Forward's mask drops X, not the branch.
        mask=p.mask if p.call.masked else None,
        scaling=p.scaling,
        R=p.call.r,
    )
    return BranchJob(branch, jobs.BranchTile(block_r, p.unit, precision))


# Rows of tiles that run column by column, see ``tile_of``.
GROUP_M = 8


def product_tile(p: Product, tile: Tile, precision: str, activation: str = "") -> jobs.Tile:
    """The constants of a product that is read through pointers."""
    return jobs.Tile(
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        GROUP_M=GROUP_M,
        EVEN_K=p.w is None or p.call.k % tile.BLOCK_K == 0,
        GATE=activation,
        PRECISION=precision,
    )


def described_tile(
    plan: Plan, trans_w: bool, precision: str, activation: str
) -> jobs.DescribedTile:
    """The constants of a product that is read through descriptors, which adds to no earlier Y."""
    return jobs.DescribedTile(
        BLOCK_M=plan.tile.BLOCK_M,
        BLOCK_N=plan.tile.BLOCK_N,
        BLOCK_K=plan.tile.BLOCK_K,
        GROUP_M=GROUP_M,
        PARTS=plan.column_parts,
        TRANS_W=trans_w,
        ADD=False,
        GATE=activation,
        PRECISION=precision,
    )


def product_words(p: Product, plan: Plan) -> str:
    """A product's size, its result and its block of ranks, in words."""
    small = "small " if p.call.m <= problem.SMALL_M else ""
    result = "dx" if p.call.direction == "backward" else "y"
    return f"{small}{result} r{plan.block_r}"

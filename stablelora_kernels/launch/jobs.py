"""A product with its LoRA branch and gradients, and what kernels take for each of its jobs
(``kernels/lora/jobs.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import chained, tiles
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.jobs import Gate, Matrix
from stablelora_kernels.launch.workspace import counters, scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import FP8Weight, NF4Weight, Stored
from stablelora_kernels.utils.tensors import drop_share

# What a forward draws a mask from, and where it stores the mask: each or both may be None.
Random = tuple[Tensor | None, Tensor | None]


class Product(NamedTuple):
    """Y = X W^T + bias + BASE + (S B^T) ∘ keep, S = s' (X ∘ keep) A^T, where one of the two masks
    is all ones; or dX likewise.

    x [M, K], w [N, K], bias [N], a [r, K], b [N, r]; s [M, r], None if not requested, and y [M, N]
    with unit column stride. ``call.masked`` says which mask drops. X's is drawn from ``seed``,
    int64 [1], and stored as ``mask`` if that is not None; backward reads it, see
    ``reference.unpack_mask``. Without w, Y is BASE and the branch. ``base`` is y, or has y's
    strides. S is in units of ``unit``, and ``scaling`` is s' divided by it. Without ``wanted`` y is
    not computed, and any tensor stands for it.

    Backward's gradients are dA = S^T (Z ∘ keep) and dB = X^T T, for Z [M, N] and T [M, r] in units
    of ``t_unit``; da [r, N] and db [K, r] are contiguous, None if not requested.
    """

    call: Call
    x: Tensor
    w: Tensor | Stored | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    s: Tensor | None
    y: Tensor
    seed: Tensor | None
    mask: Tensor | None
    scaling: float
    dropout_p: float
    unit: float = 1.0
    base: Tensor | None = None
    wanted: bool = True
    z: Tensor | None = None
    t: Tensor | None = None
    t_unit: float = 1.0
    da: Tensor | None = None
    db: Tensor | None = None
    # Of a gated MLP: Y is dH, and Z stands for act(G) ∘ U.
    activation: str = ""
    gate: Gate | None = None


def s_unit(dtype: torch.dtype, scaling: float) -> float:
    """What a stored 1 of S = ``scaling`` X A^T means: the power of two that keeps S no larger than
    X A^T in float16.
    """
    if dtype != torch.float16 or not 1 < abs(scaling) < math.inf:
        return 1.0
    fraction, exponent = math.frexp(scaling)
    # Far from float32's limits, where the kernels scale sums by it.
    return 2.0 ** min(exponent - (abs(fraction) == 0.5), 64)


def forward_product(
    x: Tensor, p: Projection, s: Tensor | None, y: Tensor, random: Random, dropout_p: float
) -> Product:
    """Y as a product; the projection's scaling is s'."""
    a, b, w = p.lora_A, p.lora_B, p.weight
    assert a is not None and b is not None and not isinstance(w, (NF4Weight, FP8Weight))
    # Kernels take no stride for it.
    bias = None if p.bias is None else p.bias.contiguous()
    (m, k), (n, r) = x.shape, b.shape
    dropout_p = dropout_p if r else 0.0
    call, unit = (
        Call("forward", m, n, k, r, x.dtype, a.dtype, dropout_p > 0),
        s_unit(x.dtype, p.scaling),
    )
    return Product(call, x, w, bias, a, b, s, y, *random, p.scaling / unit, dropout_p, unit)


def backward_product(
    x: Tensor | None, grad: Tensor, p: Projection, s: Tensor | None, mask: Tensor | None, dropout_p: float,
    results: tuple[Tensor | None, Tensor | None, Tensor | None], ds: Tensor | None = None,
) -> Product:  # fmt: skip
    """dX as the forward's formula with every matrix transposed, with dA and dB: those of
    ``results`` that are not None.
    """
    a, b, w = p.lora_A, p.lora_B, p.weight
    assert a is not None and b is not None and not isinstance(w, (NF4Weight, FP8Weight))
    (m, n), (r, k), (dx, da, db) = grad.shape, a.shape, results
    dropout_p = dropout_p if r else 0.0
    call = Call("backward", m, k, n, r, grad.dtype, a.dtype, dropout_p > 0)
    ds = scratch(grad, m, r) if ds is None and da is not None else ds
    # A hook of saved tensors may have given S and the mask another layout.
    s = s.contiguous() if s is not None and s.stride(1) != 1 else s
    mask = None if mask is None else mask.contiguous()
    return Product(
        call, grad, w.t() if isinstance(w, Tensor) else w, None, b.t(), a.t(), ds, grad if dx is None else dx, None, mask,
        p.scaling, dropout_p, wanted=dx is not None, z=x, t=None if db is None else s, t_unit=s_unit(grad.dtype, p.scaling),
        da=da, db=db,
    )  # fmt: skip


def threshold(p: Product) -> int:
    """A random number of 15 bits below this drops its element."""
    return int(drop_share(p.dropout_p) * 32768)


def buffers(plan: Plan, part: int, like: Tensor, lane: int, sums: int = 1) -> tuple[Tensor, Tensor]:
    """The float32 scratch for partial sums, each of ``part`` elements, and the counters of ``sums``
    for each tile.

    Sums that may run at the same time need different lanes: 0 and 1 for S and Y, 2 and 3 for dB and
    dA, and 4 for a chain.
    """
    shared = plan.tiles * sums if plan.splits > 1 else 0
    parts = scratch(like, plan.splits * shared * part, dtype=torch.float32)
    return parts, counters(shared, like.device, lane)


def matrix(t: Any) -> Matrix:
    """A tensor's, or that of None, which is not read."""
    return Matrix(None, 0, 0) if t is None else Matrix(t, *t.stride())


def rows(t: Tensor | None, width: int, u: Tensor | None = None) -> jobs.Rows:
    """Of X, or of dA's Z."""
    assert t is not None
    return jobs.Rows(t, u, t.stride(0), t.stride(1), width)


def s_job(
    device: Device, members: Sequence[Product], plan: Plan, flag_m: int = 0
) -> tuple[jobs.SJob, jobs.STile]:
    """S of ``members``, which share X. ``flag_m``: the rows that share a flag, in the launch of the
    product that reads S.
    """
    (p, *others), tile, c = members, plan.tile, members[0].call
    # Several share their strides, too: not those of the first, of which a row of one element has
    # any.
    lora_As, strides = (
        ([q.a.contiguous() for q in members], (c.k, 1)) if others else ([p.a], p.a.stride())
    )
    each = [
        jobs.SMember(a, q.s, q.seed, q.mask if q.seed is not None else None, q.scaling, q.call.r)
        for a, q in zip(lora_As, members, strict=True)
    ]
    shared = _shared(p.s, strides, plan, 0, len(members))
    # For dS, A is B^T, whose rows are not contiguous.
    precision = input_precision(device, c.dtype, transposed=c.direction == "backward")
    even = c.k % tile.BLOCK_K == 0
    constants = (
        len(each),
        tile.BLOCK_M,
        tile.BLOCK_K,
        plan.block_r,
        tile.num_stages,
        even,
        flag_m,
        precision,
    )
    return jobs.SJob(tuple(each), shared), jobs.STile(*constants)


def _shared(
    s: Tensor | None, strides: tuple[int, ...], plan: Plan, lane: int, sums: int
) -> jobs.Shared:
    assert s is not None
    row, col = strides
    return jobs.Shared(
        s.stride(0), row, col, *buffers(plan, plan.tile.BLOCK_M * plan.block_r, s, lane, sums)
    )


def z_rows(p: Product) -> jobs.Rows | None:
    """What dA, if wanted, reads beside S."""
    if p.da is None:
        return None
    return rows(p.z, p.call.n) if p.gate is None else rows(p.gate.g, p.call.n, p.gate.u)


class Gradient(NamedTuple):
    """dA or dB in some launch: its programs, of which ``splits`` share a sum, and what the kernel
    takes for them.
    """

    programs: int = 0
    splits: int = 1
    job: jobs.GradJob | None = None
    tile: jobs.GradTile | None = None


def grad_job(device: Device, members: Sequence[Product], plan: Plan, of_b: bool) -> Gradient:
    """dA of ``members``, which share Z; or dB of the only one."""
    p, c, tile = members[0], members[0].call, plan.tile
    if of_b:
        each = [jobs.GradMember(p.t, p.db, None, c.r)]
        shared, activation, unit = _shared(p.t, (c.r, 1), plan, 2, 1), "", p.t_unit
    else:
        each = [jobs.GradMember(q.s, q.da, q.mask, q.call.r) for q in members]
        shared, activation, unit = _shared(p.s, (1, c.n), plan, 3, len(members)), p.activation, 1.0
    sizes = (len(each), tile.BLOCK_K, tile.BLOCK_M, plan.block_r, tile.num_stages)
    constants = jobs.GradTile(
        *sizes, activation, unit, input_precision(device, c.dtype, transposed=True)
    )
    return Gradient(plan.programs, plan.splits, jobs.GradJob(tuple(each), shared), constants)


def co_scheduled(device: Device, p: Product, of_b: bool, warps: int) -> Gradient:
    """dA, or dB if ``of_b``, by programs of another launch, which has ``warps`` warps a program;
    none if it is not wanted.
    """
    if (p.db if of_b else p.da) is None:
        return Gradient()
    plan = tiles.co_scheduled_grad_plan(device, p.call, of_b, warps)
    return grad_job(device, [p], plan, of_b)


class Chain(NamedTuple):
    """Programs for S, and then for dB, in the launch of the product that needs S."""

    chain: Tensor | None = None
    programs: int = 0
    splits: int = 1
    job: jobs.SJob | None = None
    tile: jobs.STile | None = None
    db: Gradient = Gradient()


def chain_ahead(device: Device, p: Product, product: Tile, spare: int) -> Chain:
    """S, and dB if it is wanted, for the launch of ``p``, whose tile is ``product``; see
    ``chained_plans``.
    """
    c = p.call
    plan, of_b, programs = chained.chained_plans(device, c, product, p.db is not None, spare)
    flag_m = max(product.BLOCK_M, plan.tile.BLOCK_M)
    job, constants = s_job(device, [p], plan, flag_m)
    db = grad_job(device, [p], of_b, True) if of_b else Gradient()
    chain = counters(tiles.CHAIN_HEAD + cdiv(c.m, flag_m), p.x.device, lane=4)
    return Chain(chain, programs, plan.splits, job, constants, db)


def branch_job(
    p: Product, block_r: int, load_s: bool, precision: str
) -> tuple[jobs.Branch, jobs.BranchTile]:
    """The branch onto a tile of Y."""
    # With rank 0 nothing is read, but a pointer still needs a type.
    s = p.y if p.s is None and load_s else p.s
    branch = jobs.Branch(
        s,
        0 if s is None else s.stride(0),
        *matrix(p.b),
        p.mask if p.call.masked else None,
        p.scaling,
        p.call.r,
    )
    return branch, jobs.BranchTile(block_r, load_s, p.unit, precision)

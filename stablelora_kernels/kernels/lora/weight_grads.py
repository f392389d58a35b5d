"""dA and dB, in their own launch or by programs of another one; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, shared_sum
from stablelora_kernels.kernels.lora.gated import gated


@triton.jit
def part_of_rows(program, z, job, M, SPLITS, TILE: tl.constexpr):
    """The rows that the ``program``-th program of ``weight_grad`` sums up: from the first to before the second."""
    split = program // (tl.cdiv(z.width, TILE.BLOCK_C) * tl.cdiv(job.members[0].R, TILE.BLOCK_R))
    share = tl.cdiv(tl.cdiv(M, TILE.BLOCK_M), SPLITS) * TILE.BLOCK_M
    return split * share, tl.minimum(split * share + share, M)


@triton.jit
def weight_grad(program, z, job, M, SPLITS, threshold, TILE: tl.constexpr):
    """OUT[c, r] = sum_m (Z ∘ keep)[m, c] T[m, r] for each member of a ``GradJob``; the ``program``-th program.

    Programs: SPLITS parts of M one after another, in each the tiles of OUT. The last program of a tile to finish adds up the
    tile's parts in order. No float is added atomically, nothing is zeroed first, and the store casts the sum. Members of several
    projections have one block of ranks: Z is read once for all.
    """
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    MEMBERS: tl.constexpr = TILE.MEMBERS
    tiles_r = tl.cdiv(job.members[0].R, BLOCK_R)
    tiles = tl.cdiv(z.width, BLOCK_C) * tiles_r
    tile, split = program % tiles, program // tiles
    start, stop = part_of_rows(program, z, job, M, SPLITS, TILE)
    c0 = tile // tiles_r * BLOCK_C
    cs = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    c_mask = cs < z.width
    sums = ()
    for _ in tl.static_range(MEMBERS):
        sums += (tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32),)  # type: ignore[assignment]

    # No part is empty. Zeros of an empty loop would make ptxas serialize every WGMMA of the launch, those of a product beside it
    # included.
    tl.assume(start < stop)
    for m0 in tl.range(start, stop, TILE.BLOCK_M, num_stages=TILE.STAGES):
        rows = m0 + tl.arange(0, TILE.BLOCK_M).to(tl.int64)
        z_mask = (rows[:, None] < M) & c_mask[None, :]
        z_tile = tl.load(z.ptr + rows[:, None] * z.row + cs[None, :] * z.col, mask=z_mask, other=0.0)
        if z.u is not None:
            u = tl.load(z.u + rows[:, None] * z.row + cs[None, :] * z.col, mask=z_mask, other=0.0)
            z_tile = gated(z_tile, u, TILE.GATE)
        added = ()
        for i in tl.static_range(MEMBERS):
            member = job.members[i]
            t_mask = (rows[:, None] < M) & (rs[None, :] < member.R)
            t = tl.load(member.t + rows[:, None] * job.shared.stride + rs[None, :], mask=t_mask, other=0.0)
            kept = z_tile
            if member.seed is not None:
                kept = tl.where(keep_mask(tl.load(member.seed), rows, c0, z.width, threshold, BLOCK_C), z_tile, 0.0)
            added += (dot(tl.trans(kept), t, sums[i], TILE.PRECISION),)  # type: ignore[assignment]
        sums = added

    for i in tl.static_range(MEMBERS):
        member = job.members[i]
        place = tile * MEMBERS + i
        total, last = shared_sum(sums[i], job.shared.parts, job.shared.counter, place, split, SPLITS)
        if last:
            if TILE.UNIT != 1.0:
                total *= TILE.UNIT
            out_ptrs = member.out + cs[:, None] * job.shared.row + rs[None, :] * job.shared.col
            out_mask = c_mask[:, None] & (rs[None, :] < member.R)
            tl.store(out_ptrs, cast(total, member.out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["M", "DA_PROGRAMS", "SPLITS", "threshold"])
def _lora_weight_grads_kernel(z, da, dy, db, M, DA_PROGRAMS, SPLITS, threshold, DA: tl.constexpr, DB: tl.constexpr):
    """dA = dS^T (Z ∘ keep) by the first DA_PROGRAMS programs, dB = dY^T S by the others."""
    program = tl.program_id(0)
    if DB is None:
        weight_grad(program, z, da, M, SPLITS, threshold, DA)
    elif DA is None:
        weight_grad(program, dy, db, M, SPLITS, threshold, DB)
    elif program < DA_PROGRAMS:
        weight_grad(program, z, da, M, SPLITS, threshold, DA)
    else:
        weight_grad(program - DA_PROGRAMS, dy, db, M, SPLITS, threshold, DB)

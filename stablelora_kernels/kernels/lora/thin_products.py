"""The thin products of a branch, S or dS, dA and dB, in launches of their own or by programs of
another one.

Formulas and arguments are in this directory's ``__init__``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import (
    cast,
    dot,
    draw_keep,
    keep_of,
    load_keep,
    pack_keep,
    register_dot,
    shared_sum,
)
from stablelora_kernels.kernels.lora.chain import raise_flag
from stablelora_kernels.kernels.lora.gated import gated


@triton.jit(do_not_specialize=["M", "S_SPLITS", "DB_PROGRAMS", "DB_SPLITS", "threshold"])
def _lora_down_kernel(
    x, s, db, M, S_SPLITS, DB_PROGRAMS, DB_SPLITS, threshold, S: tl.constexpr, DB: tl.constexpr
):
    """S = s' (X ∘ keep) DOWN^T, and with DB dB = X^T T, for which X is dY.

    The DB_PROGRAMS programs of dB are spread evenly among those of S: both walk down the rows of X
    at one pace, so the second to read a row finds it in L2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Programs of dB before this one.
    before, is_db = 0, False
    if DB is not None:
        before = (program.to(tl.int64) * DB_PROGRAMS // programs).to(tl.int32)
        is_db = ((program + 1).to(tl.int64) * DB_PROGRAMS // programs).to(tl.int32) > before
        if is_db:
            weight_grad(before, x, db, M, DB_SPLITS, DB)
    if not is_db:
        down_part(program - before, x, s, None, M, S_SPLITS, threshold, S)


@triton.jit
def s_parts(M, job, SPLITS, TILE: tl.constexpr):
    """Parts of S: tiles of rows, in each blocks of ranks, in each SPLITS parts of K."""
    return tl.cdiv(M, TILE.BLOCK_M) * tl.cdiv(job.members[0].R, TILE.BLOCK_R) * SPLITS


@triton.jit
def down_part(index, x, job, chain, M, SPLITS, threshold, TILE: tl.constexpr):
    """Part ``index`` of ``s_parts``, for each member of an ``SJob``.

    The last part of K to finish adds up all parts in order. Members of several projections have one
    block of ranks: X is read once for all. Each has its own mask, so their DOWN can't be one
    matrix of a higher rank. Every block of ranks stores the same mask.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    MEMBERS: tl.constexpr = TILE.MEMBERS
    tiles_r = tl.cdiv(job.members[0].R, BLOCK_R)
    tile, split = index // SPLITS, index % SPLITS
    row0 = tile // tiles_r * BLOCK_M
    rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < M
    sums = ()
    seeds = ()
    for i in tl.static_range(MEMBERS):
        seeds += (tl.load(job.members[i].seed) if job.members[i].seed is not None else 0,)  # type: ignore[assignment]
        sums += (tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32),)  # type: ignore[assignment]

    share = tl.cdiv(tl.cdiv(x.width, BLOCK_K), SPLITS) * BLOCK_K
    start, stop = split * share, tl.minimum(split * share + share, x.width)
    if TILE.PRECISION == "tf32" or (MEMBERS > 1 and x.ptr.dtype.element_ty != tl.float32):
        # No part is empty, see ``weight_grad``. One sum is not serialized, and takes fewer
        # registers without this.
        tl.assume(start < stop)
    for k0 in tl.range(start, stop, BLOCK_K, num_stages=TILE.STAGES):
        x_mask, k_mask = row_mask[:, None], True
        if not TILE.EVEN_K:
            x_mask &= k0 + ks[None, :] < x.width
            k_mask = k0 + ks[:, None] < x.width
        x_tile = tl.load(
            x.ptr + rows[:, None] * x.row + (k0 + ks[None, :]) * x.col, mask=x_mask, other=0.0
        )
        added = ()
        for i in tl.static_range(MEMBERS):
            member = job.members[i]
            down_mask = (rs[None, :] < member.R) & k_mask
            down_ptrs = (
                member.down + rs[None, :] * job.shared.row + (k0 + ks[:, None]) * job.shared.col
            )
            down = tl.load(down_ptrs, mask=down_mask, other=0.0)
            kept = x_tile
            if member.seed is not None:
                # After the load, so that the load itself stays asynchronous.
                drawn = draw_keep(seeds[i], rows, k0, x.width, threshold, BLOCK_K)
                if member.mask is not None:
                    store_mask(member.mask, pack_keep(drawn), rows, k0, M, x.width)
                kept = tl.where(keep_of(drawn), x_tile, 0.0)
            down = cast(down, x_tile.dtype)
            if member.seed is not None or TILE.PRECISION == "tf32":
                total = register_dot(kept, down, sums[i], TILE.PRECISION)
            else:
                total = dot(kept, down, sums[i], TILE.PRECISION)
            added += (total,)  # type: ignore[assignment]
        sums = added

    for i in tl.static_range(MEMBERS):
        member = job.members[i]
        place = tile * MEMBERS + i
        total, last = shared_sum(
            sums[i], job.shared.parts, job.shared.counter, place, split, SPLITS
        )
        if last:
            s_ptrs = member.s + rows[:, None] * job.shared.stride + rs[None, :]
            s_mask = row_mask[:, None] & (rs[None, :] < member.R)
            tl.store(s_ptrs, cast(member.scaling * total, member.s.dtype.element_ty), mask=s_mask)
            if TILE.FLAG_M:
                raise_flag(chain, row0 // TILE.FLAG_M)


@triton.jit
def store_mask(mask_ptr, mask, rows, col0, M, n_cols):
    """Store ``mask``, of bytes, for backward. Its last word of a row may have bits beyond n_cols,
    which nothing reads.
    """
    row_bytes = 4 * tl.cdiv(n_cols, 32)
    cols = col0 // 8 + tl.arange(0, mask.shape[1])
    inside = (rows[:, None] < M) & (cols[None, :] < row_bytes)
    bytes_ptr = mask_ptr.to(tl.pointer_type(tl.uint8))
    tl.store(bytes_ptr + rows[:, None] * row_bytes + cols[None, :], mask, mask=inside)


@triton.jit
def grad_parts(z, job, SPLITS, TILE: tl.constexpr):
    """Parts of dA or dB: SPLITS parts of M one after another, in each the tiles of OUT."""
    return tl.cdiv(z.width, TILE.BLOCK_C) * tl.cdiv(job.members[0].R, TILE.BLOCK_R) * SPLITS


@triton.jit
def part_of_rows(index, z, job, M, SPLITS, TILE: tl.constexpr):
    """The first row that part ``index`` of ``grad_parts`` sums up, and the row behind its last."""
    split = index // grad_parts(z, job, 1, TILE)
    share = tl.cdiv(tl.cdiv(M, TILE.BLOCK_M), SPLITS) * TILE.BLOCK_M
    return split * share, tl.minimum(split * share + share, M)


@triton.jit
def weight_grad(index, z, job, M, SPLITS, TILE: tl.constexpr):
    """OUT[c, r] = sum_m (Z ∘ keep)[m, c] T[m, r] for each member of a ``GradJob``; the ``index``-th
    of ``grad_parts``.

    The last part of a tile to finish adds up the tile's parts in order. No float is added
    atomically, nothing is zeroed first, and the store casts the sum. Members of several projections
    have one block of ranks: Z is read once for all.
    """
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_R: tl.constexpr = TILE.BLOCK_R
    MEMBERS: tl.constexpr = TILE.MEMBERS
    tiles_r = tl.cdiv(job.members[0].R, BLOCK_R)
    tiles = grad_parts(z, job, 1, TILE)
    tile, split = index % tiles, index // tiles
    start, stop = part_of_rows(index, z, job, M, SPLITS, TILE)
    c0 = tile // tiles_r * BLOCK_C
    cs = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    c_mask = cs < z.width
    sums = ()
    for _ in tl.static_range(MEMBERS):
        sums += (tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32),)  # type: ignore[assignment]

    # No part is empty. Zeros of an empty loop would make ptxas serialize every WGMMA of the launch,
    # those of a product beside it included.
    tl.assume(start < stop)
    for m0 in tl.range(start, stop, TILE.BLOCK_M, num_stages=TILE.STAGES):
        rows = m0 + tl.arange(0, TILE.BLOCK_M).to(tl.int64)
        z_mask = (rows[:, None] < M) & c_mask[None, :]
        z_tile = tl.load(
            z.ptr + rows[:, None] * z.row + cs[None, :] * z.col, mask=z_mask, other=0.0
        )
        if z.u is not None:
            u = tl.load(z.u + rows[:, None] * z.row + cs[None, :] * z.col, mask=z_mask, other=0.0)
            z_tile = gated(z_tile, u, TILE.GATE)
        added = ()
        for i in tl.static_range(MEMBERS):
            member = job.members[i]
            t_mask = (rows[:, None] < M) & (rs[None, :] < member.R)
            t = tl.load(
                member.t + rows[:, None] * job.shared.stride + rs[None, :], mask=t_mask, other=0.0
            )
            kept = z_tile
            if member.mask is not None:
                kept = tl.where(load_keep(member.mask, rows, c0, M, z.width, BLOCK_C), z_tile, 0.0)
            if member.mask is not None or z.u is not None or TILE.PRECISION == "tf32":
                total = register_dot(tl.trans(kept), t, sums[i], TILE.PRECISION)
            else:
                total = dot(tl.trans(kept), t, sums[i], TILE.PRECISION)
            added += (total,)  # type: ignore[assignment]
        sums = added

    for i in tl.static_range(MEMBERS):
        member = job.members[i]
        place = tile * MEMBERS + i
        total, last = shared_sum(
            sums[i], job.shared.parts, job.shared.counter, place, split, SPLITS
        )
        if last:
            if TILE.UNIT != 1.0:
                total *= TILE.UNIT
            out_ptrs = member.out + cs[:, None] * job.shared.row + rs[None, :] * job.shared.col
            out_mask = c_mask[:, None] & (rs[None, :] < member.R)
            tl.store(out_ptrs, cast(total, member.out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["M", "DA_PROGRAMS", "SPLITS"])
def _lora_weight_grads_kernel(
    z, da, dy, db, M, DA_PROGRAMS, SPLITS, DA: tl.constexpr, DB: tl.constexpr
):
    """dA = dS^T (Z ∘ keep) by the first DA_PROGRAMS programs, dB = dY^T S by the others."""
    program = tl.program_id(0)
    if DB is None:
        weight_grad(program, z, da, M, SPLITS, DA)
    elif DA is None:
        weight_grad(program, dy, db, M, SPLITS, DB)
    elif program < DA_PROGRAMS:
        weight_grad(program, z, da, M, SPLITS, DA)
    else:
        weight_grad(program - DA_PROGRAMS, dy, db, M, SPLITS, DB)

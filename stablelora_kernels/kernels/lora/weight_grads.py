"""dA and dB, in their own launch or by programs of another one; formulas and arguments are in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, keep_mask, shared_sum
from stablelora_kernels.kernels.lora.gated import gated


@triton.jit
def part_of_rows(program, M, C, R, SPLITS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows that the ``program``-th program of ``weight_grad`` sums up: from the first to before the second."""
    split = program // (tl.cdiv(C, BLOCK_C) * tl.cdiv(R, BLOCK_R))
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    return split * share, tl.minimum(split * share + share, M)


@triton.jit
def weight_grad(
    program, z_ptr, u_ptr, t_ptr, out_ptr, seed_ptr, partial_ptr, counter_ptr, M, C, R, SPLITS, stride_zm, stride_zc, stride_tm,
    stride_oc, stride_or, threshold,
    T_UNIT: tl.constexpr, HAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """out[c, r] = sum_m (Z ∘ keep)[m, c] T[m, r];  Z [M, C], T [M, R] in units of T_UNIT; the ``program``-th program.

    With GATE, Z is act(G) ∘ U: z_ptr has G, and u_ptr U, of the same strides.

    Programs: SPLITS parts of M one after another, in each the tiles of out. The last program of a tile to finish adds up the
    tile's parts in order. No float is added atomically, nothing is zeroed first, and the store casts the sum. HAS_ROWS: no
    part of M is empty.
    """
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles = tl.cdiv(C, BLOCK_C) * tiles_r
    tile, split = program % tiles, program // tiles
    start, stop = part_of_rows(program, M, C, R, SPLITS, BLOCK_M, BLOCK_C, BLOCK_R)
    c0 = tile // tiles_r * BLOCK_C
    cs = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    rs = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    c_mask, r_mask = cs < C, rs < R
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    if HAS_ROWS:
        # Zeros of an empty loop would make ptxas serialize every WGMMA of the launch, those of the product beside it included.
        tl.assume(start < stop)
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m0 in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        rows = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        z_mask, t_mask = (rows[:, None] < M) & c_mask[None, :], (rows[:, None] < M) & r_mask[None, :]
        z = tl.load(z_ptr + rows[:, None] * stride_zm + cs[None, :] * stride_zc, mask=z_mask, other=0.0)
        t = tl.load(t_ptr + rows[:, None] * stride_tm + rs[None, :], mask=t_mask, other=0.0)
        if GATE != "":
            u = tl.load(u_ptr + rows[:, None] * stride_zm + cs[None, :] * stride_zc, mask=z_mask, other=0.0)
            z = gated(z, u, GATE)
        if DROPOUT:
            z = tl.where(keep_mask(seed, rows, c0, C, threshold, BLOCK_C), z, 0.0)
        acc = dot(tl.trans(z), t, acc, INPUT_PRECISION)

    parts_ptr = partial_ptr + tile.to(tl.int64) * SPLITS * (BLOCK_C * BLOCK_R)
    acc, last = shared_sum(acc, parts_ptr, counter_ptr + tile, split, SPLITS)
    if last:
        if T_UNIT != 1.0:
            acc *= T_UNIT
        out_ptrs = out_ptr + cs[:, None] * stride_oc + rs[None, :] * stride_or
        tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=c_mask[:, None] & r_mask[None, :])


@triton.jit(do_not_specialize=["M", "PROGRAMS_A", "SPLITS", "threshold"])
def _lora_weight_grads_kernel(
    x_ptr, u_ptr, s_ptr, ds_ptr, dy_ptr, da_ptr, db_ptr, seed_ptr, partial_ptr, counter_ptr,
    M, N, K, R, PROGRAMS_A, SPLITS,
    stride_xm, stride_xk, stride_sm, stride_dsm, stride_ym, stride_yn,
    threshold,
    S_UNIT: tl.constexpr, DROPOUT: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dA = dS^T (X ∘ keep), dB = dY^T S;  X [M, K], S and dS [M, R], dY [M, N], dA [R, K], dB [N, R].

    With GATE, X is act(G) ∘ U: x_ptr has G, and u_ptr U, of the same strides.

    Programs: PROGRAMS_A for dA, the others for dB.
    """
    program = tl.program_id(0)
    if program < PROGRAMS_A:
        weight_grad(
            program=program, z_ptr=x_ptr, u_ptr=u_ptr, t_ptr=ds_ptr, out_ptr=da_ptr, seed_ptr=seed_ptr, partial_ptr=partial_ptr,
            counter_ptr=counter_ptr, M=M, C=K, R=R, SPLITS=SPLITS, stride_zm=stride_xm, stride_zc=stride_xk,
            stride_tm=stride_dsm, stride_oc=1, stride_or=K, threshold=threshold, T_UNIT=1.0, HAS_ROWS=False, DROPOUT=DROPOUT,
            GATE=GATE, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, STAGES=STAGES, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
    else:
        # dB's scratch and counters start after dA's.
        tiles_a = PROGRAMS_A // SPLITS
        weight_grad(
            program=program - PROGRAMS_A, z_ptr=dy_ptr, u_ptr=dy_ptr, t_ptr=s_ptr, out_ptr=db_ptr, seed_ptr=seed_ptr,
            partial_ptr=partial_ptr + tiles_a.to(tl.int64) * SPLITS * (BLOCK_C * BLOCK_R), counter_ptr=counter_ptr + tiles_a,
            M=M, C=N, R=R, SPLITS=SPLITS, stride_zm=stride_ym, stride_zc=stride_yn, stride_tm=stride_sm, stride_oc=R,
            stride_or=1, threshold=threshold, T_UNIT=S_UNIT, HAS_ROWS=False, DROPOUT=False, GATE="", BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C, BLOCK_R=BLOCK_R, STAGES=STAGES, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip

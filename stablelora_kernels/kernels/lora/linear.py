"""Y, and dX by the same formula, from tiles read through pointers: any GPU, any strides.

All kernels of this directory, with s' = scaling / (1 - p) and a keep-mask of zeros and ones:

    forward   S  = s' (X ∘ keep) A^T             Y  = X W^T + bias + S B^T
    backward  dS = s' dY B                       dX = dY W + (dS A) ∘ keep
              dA = dS^T (X ∘ keep)               dB = dY^T S

S and dS are scaled in float32 and rounded once. In float16, s' > 1 could make S overflow where Y
does not, so S is stored in units of a power of two, UNIT; what is computed from S is multiplied by
it, exactly, in float32. dX is the forward's formula with W, A and B read through swapped strides,
so one kernel serves both. ``down_part`` has S; ``linear``, ``linear_split_k``, ``linear_tma`` and
``linear_quantized`` have Y for any GPU, few rows, Hopper and a quantized W; ``weight_grads`` has dA
and dB. Mostly, dA and dB take no launch of their own: dB is computed with dS, since both read dY,
and programs for dA run with those for dX.

``jobs`` has what each job takes. Arguments that several kernels take:

    M, N                  rows of X, columns of Y; x.width is K, the columns of X
    z                     what dA reads beside S: backward's X, or a gated MLP's G and U
    threshold             dropout: the number below which 15 random bits drop an element
    SPLITS                programs that share a tile's sum, through parts (float32 scratch) and counter (int32 zeros)
    branch, BRANCH        S B^T, of S that is read, or computed beside the product
    chain                 with S: this launch has S_PROGRAMS for S and dB too, in an order that ``chain`` makes
    PRODUCTS              programs of the product; those of dA follow
    base                  added to Y, of Y's strides: Y's own memory, or another tensor's

``do_not_specialize``: otherwise Triton recompiles for M = 1, for multiples of 16 and for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, load_words, tile_of, unpack_words
from stablelora_kernels.kernels.lora.chain import draw_ticket, leave, wait_for_flag
from stablelora_kernels.kernels.lora.gated import prefetch, store_gated_grads
from stablelora_kernels.kernels.lora.thin_products import (
    down_part,
    grad_parts,
    part_of_rows,
    s_parts,
    weight_grad,
)

# Of the three kernels of the product.
NOT_SPECIALIZED = ["M", "PRODUCTS", "S_PROGRAMS", "S_SPLITS", "DB_SPLITS", "DA_SPLITS", "threshold"]


@triton.jit
def add_branch(
    acc, s, branch, rows, cols, col0, first, M, N, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr
):
    """acc + (S B^T) ∘ keep for a tile, where S is read, or ``s``, which the ``first`` tile of its
    rows stores if it is wanted.
    """
    BLOCK_R: tl.constexpr = BRANCH.BLOCK_R
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    total = acc
    if branch.mask is not None:
        words = load_words(branch.mask, rows, col0, M, N, BLOCK_N)
        acc = tl.zeros(acc.shape, dtype=tl.float32)
    elif BRANCH.UNIT != 1.0:
        acc *= 1.0 / BRANCH.UNIT
    # One stage, because a pipeline would take the main loop's shared memory.
    for r0 in tl.range(0, branch.R if BRANCH.LOAD_S else BLOCK_R, BLOCK_R, num_stages=1):
        s_mask = (rows[:, None] < M) & (r0 + rs[None, :] < branch.R)
        if BRANCH.LOAD_S:
            s_low = tl.load(
                branch.s + rows[:, None] * branch.stride_s + (r0 + rs[None, :]),
                mask=s_mask,
                other=0.0,
            )
        else:
            s_low = s
            if branch.s is not None:  # noqa: SIM102 - only one of the two is a constant for the compiler
                if first:
                    tl.store(
                        branch.s + rows[:, None] * branch.stride_s + (r0 + rs[None, :]),
                        s_low,
                        mask=s_mask,
                    )
        b_mask = (r0 + rs[:, None] < branch.R) & (cols[None, :] < N)
        b_ptrs = branch.b + cols[None, :] * branch.b_row + (r0 + rs[:, None]) * branch.b_col
        b = cast(tl.load(b_ptrs, mask=b_mask, other=0.0), s_low.dtype)
        # Without a mask into the product's own accumulator: registers have no room for a second
        # one.
        acc = dot(s_low, b, acc, BRANCH.PRECISION)
    if BRANCH.UNIT != 1.0:
        acc *= BRANCH.UNIT
    if branch.mask is not None:
        acc = total + tl.where(unpack_words(words, BLOCK_N), acc, 0.0)
    return acc


@triton.jit
def wait_for_s(chain, row0, branch, M, S: tl.constexpr):
    """Wait until this launch's programs for S have stored it from row ``row0`` on, as far as the
    rows of its flag go.
    """
    if S is not None:
        wait_for_flag(chain, row0 // S.FLAG_M, M, branch.R, S)


@triton.jit
def _ahead(
    part,
    of_s,
    x,
    s_job,
    db,
    chain,
    M,
    S_SPLITS,
    DB_SPLITS,
    threshold,
    S: tl.constexpr,
    DB: tl.constexpr,
):
    """The ``part``-th part of S, of which there are ``of_s``, and then of dB."""
    if part < of_s:
        down_part(part, x, s_job, chain, M, S_SPLITS, threshold, S)
    elif DB is not None:
        weight_grad(part - of_s, x, db, M, DB_SPLITS, DB)


@triton.jit
def product_program(
    x, s_job, db, z, da, chain, M, PRODUCTS, S_PROGRAMS, S_SPLITS, DB_SPLITS, DA_SPLITS, threshold, S: tl.constexpr,
    DB: tl.constexpr, DA: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """This program's number among the product's. One of S, dB or dA does its job here and gets -1.

    With LOOPS, the S_PROGRAMS may be fewer than the parts of S and dB. A loop of one turn would
    take registers from others.
    """
    program = tl.program_id(0)
    if S is not None:
        program = draw_ticket(chain)
        if program < S_PROGRAMS:
            of_s = s_parts(M, s_job, S_SPLITS, S)
            if LOOPS:
                of_b = grad_parts(x, db, DB_SPLITS, DB) if DB is not None else 0
                for part in tl.range(program, of_s + of_b, S_PROGRAMS, disable_licm=True):
                    _ahead(
                        part, of_s, x, s_job, db, chain, M, S_SPLITS, DB_SPLITS, threshold, S, DB
                    )
            else:
                _ahead(program, of_s, x, s_job, db, chain, M, S_SPLITS, DB_SPLITS, threshold, S, DB)
            leave(chain, M, S)
            return -1
        program -= S_PROGRAMS
    if DA is not None:  # noqa: SIM102 - only one of the two is a constant for the compiler
        if program >= PRODUCTS:
            if S is not None:
                start, stop = part_of_rows(program - PRODUCTS, z, da, M, DA_SPLITS, DA)
                for flag in range(start // S.FLAG_M, tl.cdiv(stop, S.FLAG_M)):
                    wait_for_flag(chain, flag, M, da.members[0].R, S)
            weight_grad(program - PRODUCTS, z, da, M, DA_SPLITS, DA)
            if S is not None:
                leave(chain, M, S)
            return -1
    return program


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _lora_linear_kernel(
    x, w, a, bias, y, base, branch, gate, s_job, db, z, da, chain, M, N, PRODUCTS, S_PROGRAMS, S_SPLITS, DB_SPLITS,
    DA_SPLITS, threshold, TILE: tl.constexpr, BRANCH: tl.constexpr, S: tl.constexpr, DB: tl.constexpr, DA: tl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + BASE + (S B^T) ∘ keep,  S = s' X A^T;  X [M, K], W [N, K], A [R, K], BASE and Y [M, N].

    Without a W, there is no product: Y is BASE and the branch alone, for which S is read.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    program = product_program(
        x, s_job, db, z, da, chain, M, PRODUCTS, S_PROGRAMS, S_SPLITS, DB_SPLITS, DA_SPLITS, threshold, S, DB, DA,
        LOOPS=w.ptr is not None,
    )  # fmt: skip
    if program < 0:
        return
    pid_m, pid_n = tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TILE.GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    rs = tl.arange(0, BRANCH.BLOCK_R).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    if TILE.GATE != "":
        prefetch(gate, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BRANCH.BLOCK_R), dtype=tl.float32)
    if w.ptr is not None:
        for k0 in range(0, x.width, BLOCK_K):
            x_mask, w_mask, a_mask = row_mask[:, None], col_mask[None, :], rs[None, :] < branch.R
            if not TILE.EVEN_K:
                x_mask &= k0 + ks[None, :] < x.width
                w_mask &= k0 + ks[:, None] < x.width
                a_mask &= k0 + ks[:, None] < x.width
            x_tile = tl.load(
                x.ptr + rows[:, None] * x.row + (k0 + ks[None, :]) * x.col, mask=x_mask, other=0.0
            )
            w_tile = tl.load(
                w.ptr + cols[None, :] * w.row + (k0 + ks[:, None]) * w.col, mask=w_mask, other=0.0
            )
            acc = dot(x_tile, w_tile, acc, TILE.PRECISION)
            if not BRANCH.LOAD_S:
                a_tile = tl.load(
                    a.ptr + rs[None, :] * a.row + (k0 + ks[:, None]) * a.col, mask=a_mask, other=0.0
                )
                s = dot(x_tile, cast(a_tile, x_tile.dtype), s, TILE.PRECISION)

    if bias is not None:
        acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    wait_for_s(chain, pid_m * BLOCK_M, branch, M, S)
    s_low = cast(branch.scaling * s, x.ptr.dtype.element_ty)
    acc = add_branch(
        acc, s_low, branch, rows, cols, pid_n * BLOCK_N, pid_n == 0, M, N, BLOCK_N, BRANCH
    )
    y_ptrs, y_mask = (
        y.ptr + rows[:, None] * y.row + cols[None, :],
        row_mask[:, None] & col_mask[None, :],
    )
    if base is not None:
        acc += tl.load(base + rows[:, None] * y.row + cols[None, :], mask=y_mask, other=0.0).to(
            tl.float32
        )
    if TILE.GATE != "":
        store_gated_grads(acc, gate, y.ptr, rows, pid_n * BLOCK_N, y.row, M, N, TILE.GATE, PARTS=2)
    else:
        tl.store(y_ptrs, cast(acc, y.ptr.dtype.element_ty), mask=y_mask)
    if S is not None:
        leave(chain, M, S)

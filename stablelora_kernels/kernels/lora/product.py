"""What the kernels of the product share: the branch onto a tile of Y, and the programs for S, dB
and dA before and behind the product's.

Formulas and arguments are in this directory's ``__init__``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, dot, load_words, unpack_words
from stablelora_kernels.kernels.lora.chain import draw_ticket, leave, wait_for_flag
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
def add_branch(acc, branch, rows, cols, col0, M, N, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr):
    """acc + (S UP^T) ∘ keep for a tile of Y. S is read."""
    BLOCK_R: tl.constexpr = BRANCH.BLOCK_R
    rs = tl.arange(0, BLOCK_R).to(tl.int64)
    total = acc
    if branch.mask is not None:
        words = load_words(branch.mask, rows, col0, M, N, BLOCK_N)
        acc = tl.zeros(acc.shape, dtype=tl.float32)
    elif BRANCH.UNIT != 1.0:
        acc *= 1.0 / BRANCH.UNIT
    # One stage, because a pipeline would take the main loop's shared memory.
    for r0 in tl.range(0, branch.R, BLOCK_R, num_stages=1):
        s_mask = (rows[:, None] < M) & (r0 + rs[None, :] < branch.R)
        s_low = tl.load(
            branch.s + rows[:, None] * branch.stride_s + (r0 + rs[None, :]), mask=s_mask, other=0.0
        )
        # Without a mask into the product's own accumulator: registers have no room for a second
        # one.
        acc = add_ranks(acc, s_low, r0, branch, cols, N, BRANCH)
    if BRANCH.UNIT != 1.0:
        acc *= BRANCH.UNIT
    if branch.mask is not None:
        acc = total + tl.where(unpack_words(words, BLOCK_N), acc, 0.0)
    return acc


@triton.jit
def add_ranks(acc, s, r0, branch, cols, N, BRANCH: tl.constexpr):
    """acc + S UP^T for the block of ranks ``s`` that begins at ``r0``."""
    rs = tl.arange(0, BRANCH.BLOCK_R).to(tl.int64)
    up_mask = (r0 + rs[:, None] < branch.R) & (cols[None, :] < N)
    up_ptrs = branch.up + cols[None, :] * branch.up_row + (r0 + rs[:, None]) * branch.up_col
    up = cast(tl.load(up_ptrs, mask=up_mask, other=0.0), s.dtype)
    return dot(s, up, acc, BRANCH.PRECISION)


@triton.jit
def wait_for_s(chain, row0, branch, M, S: tl.constexpr):
    """Wait until this launch's programs for S have stored it from row ``row0`` on, as far as the
    rows of its flag go.
    """
    if S is not None:
        wait_for_flag(chain, row0 // S.FLAG_M, M, branch.R, S)


@triton.jit
def _s_or_db(
    index,
    parts_of_s,
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
    """Part ``index`` of S, which has ``parts_of_s`` parts, or after these of dB."""
    if index < parts_of_s:
        down_part(index, x, s_job, chain, M, S_SPLITS, threshold, S)
    elif DB is not None:
        weight_grad(index - parts_of_s, x, db, M, DB_SPLITS, DB)


@triton.jit
def product_program(
    x,
    s_job,
    db,
    z,
    da,
    chain,
    M,
    PRODUCTS,
    S_PROGRAMS,
    S_SPLITS,
    DB_SPLITS,
    DA_SPLITS,
    threshold,
    S: tl.constexpr,
    DB: tl.constexpr,
    DA: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """This program's number among the product's. One of S, dB or dA does its job here and gets -1.

    With LOOPS, the S_PROGRAMS may be fewer than the parts of S and dB. A loop of one turn would
    take registers from others.
    """
    program = tl.program_id(0)
    if S is not None:
        program = draw_ticket(chain)
        if program < S_PROGRAMS:
            parts_of_s = s_parts(M, s_job, S_SPLITS, S)
            if LOOPS:
                parts_of_db = grad_parts(x, db, DB_SPLITS, DB) if DB is not None else 0
                parts = parts_of_s + parts_of_db
                for index in tl.range(program, parts, S_PROGRAMS, disable_licm=True):
                    _s_or_db(
                        index,
                        parts_of_s,
                        x,
                        s_job,
                        db,
                        chain,
                        M,
                        S_SPLITS,
                        DB_SPLITS,
                        threshold,
                        S,
                        DB,
                    )
            else:
                _s_or_db(
                    program,
                    parts_of_s,
                    x,
                    s_job,
                    db,
                    chain,
                    M,
                    S_SPLITS,
                    DB_SPLITS,
                    threshold,
                    S,
                    DB,
                )
            leave(chain, M, S)
            return -1
        program -= S_PROGRAMS
    # Only one of the two conditions is a constant for the compiler.
    if DA is not None:  # noqa: SIM102
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

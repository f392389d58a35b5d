"""Gate and up of a gated MLP with its activation: H = act(G) ∘ U; this directory's
``__init__`` explains the arguments, ``gated`` the activation.

    G = X W_g^T + bias_g + S_g B_g^T      U = X W_u^T + bias_u + S_u B_u^T

Both products are in one kernel, which reads X once. S_g and S_u come from a launch before. H is
computed from G and U as they are rounded, so that backward can compute the same H again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, column_parts, dot, tile_of
from stablelora_kernels.kernels.lora.gated import gated
from stablelora_kernels.kernels.lora.product import add_branch
from stablelora_kernels.kernels.lora.tickets import request_tile, requested_tile


@triton.jit
def _with_branch(acc, branch, bias, rows, cols, M, N, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr):
    """acc + S UP^T + bias."""
    acc = add_branch(acc, branch, rows, cols, 0, M, N, BLOCK_N, BRANCH)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "PRODUCTS"])
def _lora_gate_up_tma_kernel(
    x_desc,
    wg_desc,
    wu_desc,
    g_desc,
    u_desc,
    h_desc,
    branch_g,
    branch_u,
    bias_g,
    bias_u,
    tickets,
    M,
    N,
    K,
    PRODUCTS,
    TILE: tl.constexpr,
    BRANCH_G: tl.constexpr,
    BRANCH_U: tl.constexpr,
):
    """H, and where they have descriptors G and U, [M, N];  X [M, K], W_g and W_u [N, K].

    Persistent, through tensor descriptors, as ``_lora_linear_tma_kernel``.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PARTS: tl.constexpr = TILE.PARTS
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    tile = tl.program_id(0)
    while tile < tiles:
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, TILE.GROUP_M)
        row0, col0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, TILE.BLOCK_K):
            x = x_desc.load([row0, k0])
            if TILE.TRANS_W:
                wg, wu = wg_desc.load([k0, col0]), wu_desc.load([k0, col0])
            else:
                wg, wu = tl.trans(wg_desc.load([col0, k0])), tl.trans(wu_desc.load([col0, k0]))
            g = dot(x, wg, g, TILE.PRECISION)
            u = dot(x, wu, u, TILE.PRECISION)

        rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col0.to(tl.int64) + tl.arange(0, BLOCK_N)
        # Onto the whole accumulators, see ``_lora_linear_tma_kernel``.
        g = _with_branch(g, branch_g, bias_g, rows, cols, M, N, BLOCK_N, BRANCH_G)
        u = _with_branch(u, branch_u, bias_u, rows, cols, M, N, BLOCK_N, BRANCH_U)
        # One part at a time: the activation takes fewer registers, and the stores less shared
        # memory.
        g_parts, u_parts = column_parts(g, PARTS), column_parts(u, PARTS)
        for i in tl.static_range(PARTS):
            if i == PARTS // 2:
                # As in ``_lora_linear_tma_kernel``. In another part, an exact GELU spills.
                request = request_tile(tickets, tiles, PRODUCTS)
            g_low, u_low = cast(g_parts[i], h_desc.dtype), cast(u_parts[i], h_desc.dtype)
            column = col0 + i * (BLOCK_N // PARTS)
            if g_desc is not None:
                g_desc.store([row0, column], g_low)
                u_desc.store([row0, column], u_low)
            h_desc.store([row0, column], gated(g_low, u_low, TILE.GATE))
        tile = requested_tile(request, tickets, tiles, PRODUCTS)


@triton.jit(do_not_specialize=["M"])
def _lora_gate_up_kernel(
    x,
    wg,
    wu,
    g_ptr,
    u_ptr,
    h_ptr,
    branch_g,
    branch_u,
    bias_g,
    bias_u,
    M,
    N,
    K,
    TILE: tl.constexpr,
    BRANCH_G: tl.constexpr,
    BRANCH_U: tl.constexpr,
):
    """As ``_lora_gate_up_tma_kernel``, through pointers. G, U and H are contiguous."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TILE.GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask, w_mask = row_mask[:, None], col_mask[None, :]
        if not TILE.EVEN_K:
            x_mask &= k0 + ks[None, :] < K
            w_mask &= k0 + ks[:, None] < K
        x_tile = tl.load(
            x.ptr + rows[:, None] * x.row + (k0 + ks[None, :]) * x.col, mask=x_mask, other=0.0
        )
        wg_tile = tl.load(
            wg.ptr + cols[None, :] * wg.row + (k0 + ks[:, None]) * wg.col, mask=w_mask, other=0.0
        )
        wu_tile = tl.load(
            wu.ptr + cols[None, :] * wu.row + (k0 + ks[:, None]) * wu.col, mask=w_mask, other=0.0
        )
        g = dot(x_tile, wg_tile, g, TILE.PRECISION)
        u = dot(x_tile, wu_tile, u, TILE.PRECISION)

    g = _with_branch(g, branch_g, bias_g, rows, cols, M, N, BLOCK_N, BRANCH_G)
    u = _with_branch(u, branch_u, bias_u, rows, cols, M, N, BLOCK_N, BRANCH_U)
    g_low, u_low = cast(g, h_ptr.dtype.element_ty), cast(u, h_ptr.dtype.element_ty)
    offsets, mask = rows[:, None] * N + cols[None, :], row_mask[:, None] & col_mask[None, :]
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g_low, mask=mask)
        tl.store(u_ptr + offsets, u_low, mask=mask)
    tl.store(h_ptr + offsets, gated(g_low, u_low, TILE.GATE), mask=mask)


@triton.jit
def _gated_activation_kernel(g_ptr, u_ptr, h_ptr, SIZE, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """H = act(G) ∘ U of SIZE elements, where G and U come from products of their own."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0)
    tl.store(h_ptr + offsets, gated(g, u, GATE), mask=mask)

"""Gate and up of a gated MLP with its activation: H = act(G) ∘ U; ``linear`` explains the arguments, ``gated`` the activation.

    G = X W_g^T + bias_g + S_g B_g^T      U = X W_u^T + bias_u + S_u B_u^T

Both products are in one kernel, which reads X once. S_g and S_u come from a launch before. H is computed from G and U as they are
rounded, so that backward can compute the same H again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast, column_parts, dot, tile_of
from stablelora_kernels.kernels.lora.gated import gated
from stablelora_kernels.kernels.lora.linear import add_branch


@triton.jit
def _branch(
    acc, s_ptr, b_ptr, bias_ptr, rows, cols, M, N, R, stride_sm, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, S_UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + S B^T + bias."""
    acc = add_branch(
        acc=acc, s=acc, s_ptr=s_ptr, b_ptr=b_ptr, seed_ptr=None, rows=rows, cols=cols, col0=0, store_s=False, M=M, N=N, R=R,
        stride_sm=stride_sm, stride_bn=stride_bn, stride_br=stride_br, scaling=1.0, threshold=0, LOAD_S=True, S_UNIT=S_UNIT,
        MASK_BRANCH=False, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _with_branches(
    g, u, sg_ptr, su_ptr, bg_ptr, bu_ptr, bias_g_ptr, bias_u_ptr, rows, cols, M, N, R_G, R_U, stride_sm, stride_bgn, stride_bgr,
    stride_bun, stride_bur,
    HAS_BIAS_G: tl.constexpr, HAS_BIAS_U: tl.constexpr, UNIT_G: tl.constexpr, UNIT_U: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """G and U from their products."""
    g = _branch(
        acc=g, s_ptr=sg_ptr, b_ptr=bg_ptr, bias_ptr=bias_g_ptr, rows=rows, cols=cols, M=M, N=N, R=R_G, stride_sm=stride_sm,
        stride_bn=stride_bgn, stride_br=stride_bgr, HAS_BIAS=HAS_BIAS_G, S_UNIT=UNIT_G, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
        INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip
    u = _branch(
        acc=u, s_ptr=su_ptr, b_ptr=bu_ptr, bias_ptr=bias_u_ptr, rows=rows, cols=cols, M=M, N=N, R=R_U, stride_sm=stride_sm,
        stride_bn=stride_bun, stride_br=stride_bur, HAS_BIAS=HAS_BIAS_U, S_UNIT=UNIT_U, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
        INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip
    return g, u


@triton.jit(do_not_specialize=["M", "PRODUCTS"])
def _lora_gate_up_tma_kernel(
    x_desc, wg_desc, wu_desc, bias_g_ptr, bias_u_ptr, bg_ptr, bu_ptr, sg_ptr, su_ptr, g_desc, u_desc, h_desc,
    M, N, K, R_G, R_U, PRODUCTS,
    stride_bgn, stride_bgr, stride_bun, stride_bur, stride_sm,
    GATE: tl.constexpr, HAS_BIAS_G: tl.constexpr, HAS_BIAS_U: tl.constexpr, UNIT_G: tl.constexpr, UNIT_U: tl.constexpr,
    STORE_GU: tl.constexpr, PARTS: tl.constexpr, TRANS_W: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """H, and with STORE_GU G and U, [M, N];  X [M, K], W_g and W_u [N, K], B_g [N, R_G], B_u [N, R_U], S_g and S_u [M, R].

    Persistent, through tensor descriptors, as ``_lora_linear_tma_kernel``. Rows of S_g and S_u are stride_sm apart. With
    TRANS_W, descriptors hold W^T [K, N].
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PRODUCTS, flatten=False):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row0, col0 = pid_m * BLOCK_M, pid_n * BLOCK_N
        g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([row0, k0])
            if TRANS_W:
                wg, wu = wg_desc.load([k0, col0]), wu_desc.load([k0, col0])
            else:
                wg, wu = tl.trans(wg_desc.load([col0, k0])), tl.trans(wu_desc.load([col0, k0]))
            g = dot(x, wg, g, INPUT_PRECISION)
            u = dot(x, wu, u, INPUT_PRECISION)

        if WAITS_FOR_PRIMARY:
            tl.extra.cuda.gdc_wait()
        rows = row0.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col0.to(tl.int64) + tl.arange(0, BLOCK_N)
        # Onto the whole accumulators, see ``_lora_linear_tma_kernel``.
        g, u = _with_branches(
            g=g, u=u, sg_ptr=sg_ptr, su_ptr=su_ptr, bg_ptr=bg_ptr, bu_ptr=bu_ptr, bias_g_ptr=bias_g_ptr, bias_u_ptr=bias_u_ptr,
            rows=rows, cols=cols, M=M, N=N, R_G=R_G, R_U=R_U, stride_sm=stride_sm, stride_bgn=stride_bgn, stride_bgr=stride_bgr,
            stride_bun=stride_bun, stride_bur=stride_bur, HAS_BIAS_G=HAS_BIAS_G, HAS_BIAS_U=HAS_BIAS_U, UNIT_G=UNIT_G,
            UNIT_U=UNIT_U, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
        )  # fmt: skip
        # One part at a time: the activation takes fewer registers, and the stores less shared memory.
        g_parts, u_parts = column_parts(g, PARTS), column_parts(u, PARTS)
        for i in tl.static_range(PARTS):
            g_low, u_low = cast(g_parts[i], h_desc.dtype), cast(u_parts[i], h_desc.dtype)
            column = col0 + i * (BLOCK_N // PARTS)
            if STORE_GU:
                g_desc.store([row0, column], g_low)
                u_desc.store([row0, column], u_low)
            h_desc.store([row0, column], gated(g_low, u_low, GATE))


@triton.jit(do_not_specialize=["M"])
def _lora_gate_up_kernel(
    x_ptr, wg_ptr, wu_ptr, bias_g_ptr, bias_u_ptr, bg_ptr, bu_ptr, sg_ptr, su_ptr, g_ptr, u_ptr, h_ptr,
    M, N, K, R_G, R_U,
    stride_xm, stride_xk, stride_wgn, stride_wgk, stride_wun, stride_wuk, stride_bgn, stride_bgr, stride_bun, stride_bur,
    stride_sm,
    GATE: tl.constexpr, HAS_BIAS_G: tl.constexpr, HAS_BIAS_U: tl.constexpr, UNIT_G: tl.constexpr, UNIT_U: tl.constexpr,
    STORE_GU: tl.constexpr, EVEN_K: tl.constexpr, WAITS_FOR_PRIMARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``_lora_gate_up_tma_kernel``, through pointers. G, U and H are contiguous."""
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask, col_mask = rows < M, cols < N

    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask, w_mask = row_mask[:, None], col_mask[None, :]
        if not EVEN_K:
            x_mask &= k0 + ks[None, :] < K
            w_mask &= k0 + ks[:, None] < K
        x = tl.load(x_ptr + rows[:, None] * stride_xm + (k0 + ks[None, :]) * stride_xk, mask=x_mask, other=0.0)
        wg = tl.load(wg_ptr + cols[None, :] * stride_wgn + (k0 + ks[:, None]) * stride_wgk, mask=w_mask, other=0.0)
        wu = tl.load(wu_ptr + cols[None, :] * stride_wun + (k0 + ks[:, None]) * stride_wuk, mask=w_mask, other=0.0)
        g = dot(x, wg, g, INPUT_PRECISION)
        u = dot(x, wu, u, INPUT_PRECISION)

    if WAITS_FOR_PRIMARY:
        tl.extra.cuda.gdc_wait()
    g, u = _with_branches(
        g=g, u=u, sg_ptr=sg_ptr, su_ptr=su_ptr, bg_ptr=bg_ptr, bu_ptr=bu_ptr, bias_g_ptr=bias_g_ptr, bias_u_ptr=bias_u_ptr,
        rows=rows, cols=cols, M=M, N=N, R_G=R_G, R_U=R_U, stride_sm=stride_sm, stride_bgn=stride_bgn, stride_bgr=stride_bgr,
        stride_bun=stride_bun, stride_bur=stride_bur, HAS_BIAS_G=HAS_BIAS_G, HAS_BIAS_U=HAS_BIAS_U, UNIT_G=UNIT_G,
        UNIT_U=UNIT_U, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, INPUT_PRECISION=INPUT_PRECISION,
    )  # fmt: skip
    g_low, u_low = cast(g, h_ptr.dtype.element_ty), cast(u, h_ptr.dtype.element_ty)
    offsets, mask = rows[:, None] * N + cols[None, :], row_mask[:, None] & col_mask[None, :]
    if STORE_GU:
        tl.store(g_ptr + offsets, g_low, mask=mask)
        tl.store(u_ptr + offsets, u_low, mask=mask)
    tl.store(h_ptr + offsets, gated(g_low, u_low, GATE), mask=mask)


@triton.jit
def _gated_activation_kernel(g_ptr, u_ptr, h_ptr, SIZE, GATE: tl.constexpr, BLOCK: tl.constexpr):
    """H = act(G) ∘ U of SIZE elements, where G and U come from products of their own."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    g, u = tl.load(g_ptr + offsets, mask=mask, other=0.0), tl.load(u_ptr + offsets, mask=mask, other=0.0)
    tl.store(h_ptr + offsets, gated(g, u, GATE), mask=mask)

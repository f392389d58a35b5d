"""A gated MLP's activation, H = act(G) ∘ U, and its gradients, for the epilogues and operands of
other kernels.

    dG = dH ∘ U ∘ act'(G)      dU = dH ∘ act(G)

``reference/lora.py`` has act. GATE names it: "silu", "gelu" or "gelu_tanh"; "" where a kernel
computes no such thing. G and U are read as they were rounded and stored, so H is the same in all
kernels; all arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import INTERPRETING, cast, column_parts, targets_amd


@triton.jit
def _sigmoid(z):
    e = 1.0 + tl.exp2(-1.4426950408889634 * z)
    # A division would take a quarter more instructions, and registers.
    if INTERPRETING or targets_amd():
        return 1.0 / e
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def act(g, GATE: tl.constexpr):
    """act(g) and act'(g) of float32."""
    if GATE == "gelu":
        below = 0.5 + 0.5 * tl.erf(0.7071067811865476 * g)
        return g * below, below + 0.3989422804014327 * g * tl.exp2(-0.7213475204444817 * g * g)
    elif GATE == "gelu_tanh":
        # 2 sqrt(2 / pi)
        square = g * g
        below = _sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * square))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return g * below, below + g * below * (1.0 - below) * slope
    else:
        tl.static_assert(GATE == "silu")
        below = _sigmoid(g)
        return g * below, below + g * below * (1.0 - below)


@triton.jit
def gated(g, u, GATE: tl.constexpr):
    """H in the dtype of G and U."""
    return cast(act(g.to(tl.float32), GATE)[0] * u.to(tl.float32), g.dtype)


@triton.jit
def gated_grads(dh, g, u, GATE: tl.constexpr):
    """dG and dU in float32, for dH in float32."""
    a, slope = act(g.to(tl.float32), GATE)
    return dh * u.to(tl.float32) * slope, dh * a


@triton.jit
def store_gated_grads(
    dh, gate, dg_ptr, rows, col0, stride, M, N, GATE: tl.constexpr, PARTS: tl.constexpr
):
    """Store dG and dU for a tile of dH. Rows of all four matrices are ``stride`` apart.

    PARTS of the tile's columns take turns, for the registers.
    """
    parts = column_parts(dh, PARTS)
    PART: tl.constexpr = dh.shape[1] // PARTS
    for i in tl.static_range(PARTS):
        cols = col0 + i * PART + tl.arange(0, PART)
        offsets = rows[:, None] * stride + cols[None, :]
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        g = tl.load(gate.g + offsets, mask=mask, other=0.0)
        u = tl.load(gate.u + offsets, mask=mask, other=0.0)
        dg, du = gated_grads(parts[i], g, u, GATE)
        tl.store(dg_ptr + offsets, cast(dg, dg_ptr.dtype.element_ty), mask=mask)
        tl.store(gate.du + offsets, cast(du, gate.du.dtype.element_ty), mask=mask)


@triton.jit
def prefetch(gate, row0, col0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bring a tile of G and of U into L2, for their reader at the end of a long sum."""
    if not INTERPRETING:  # noqa: SIM102 - the interpreter does not know the other one
        if not targets_amd():
            # Elements of 128 bytes.
            LINE: tl.constexpr = 1024 // gate.g.dtype.element_ty.primitive_bitwidth
            rows = tl.minimum(row0 + tl.arange(0, BLOCK_M).to(tl.int64), M - 1)
            cols = tl.minimum(col0 + LINE * tl.arange(0, BLOCK_N // LINE), N - 1)
            offsets = rows[:, None] * N + cols[None, :]
            for ptr in tl.static_range(2):
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(gate.g if ptr == 0 else gate.u) + offsets],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip

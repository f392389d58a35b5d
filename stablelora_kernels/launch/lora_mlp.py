"""From a call of ``lora_mlp`` to its launches: S of gate and up, their products with the activation, down; and backward.

Quantized weights are dequantized first, each right before its product, in memory that the next one takes over.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stablelora_kernels.dispatch import mlp, rules
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.gate_up import (
    _gated_activation_kernel,
    _lora_gate_up_kernel,
    _lora_gate_up_tma_kernel,
)
from stablelora_kernels.launch.base import Launch, Launches, flag_words, tile_options
from stablelora_kernels.launch.jobs import Product, backward_product, branch_job, forward_product, matrix
from stablelora_kernels.launch.lora_linear import (
    GROUP_M,
    dequantize,
    described,
    descriptor,
    member_launches,
    product_launches,
    product_tile,
    rows_contiguous,
    shrink,
)
from stablelora_kernels.launch.lora_linear import backward_launches as linear_backward_launches
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored

_ACTIVATION_BLOCK = 2048


class _Plain:
    """Plain weights in place of quantized ones: memory for up to ``slots`` of them at a time."""

    def __init__(self, like: Tensor, projections: Sequence[Projection], slots: int) -> None:
        stored = [p.weight for p in projections if isinstance(p.weight, Stored)]
        largest = max([w.layout.n * w.layout.k for w in stored], default=0)
        self._memory = [scratch(like, largest) for _ in range(min(slots, len(stored)))]
        self._taken = 0

    def of(self, p: Projection) -> tuple[Launches, Projection]:
        """The dequantizing launch (or none) and ``p`` with a plain weight. Its memory is reused after ``slots`` more weights."""
        if not isinstance(p.weight, Stored):
            return [], p
        memory = self._memory[self._taken % len(self._memory)]
        self._taken += 1
        n, k = p.weight.layout.n, p.weight.layout.k
        w = memory[: n * k].view(n, k)
        return [dequantize(w, p.weight)], p._replace(weight=w)


def mlp_forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], seeds: Sequence[Tensor | None], dropout_p: float,
    activation: str, results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Launches:  # fmt: skip
    """The launches of a forward. A projection without a branch has an A and a B of rank 0; its scaling is s' = scaling / (1 - p).

    ``results``: Y; G, U, gate's and up's S side by side and down's S, which are None if they are not requested.
    """
    y, g, u, s, s_down = results
    (m, _), lora_B, plain = x.shape, projections[0].lora_B, _Plain(x, projections, slots=2)
    assert lora_B is not None
    f = lora_B.shape[0]
    h, ranks = scratch(x, m, f), [p.rank for p in projections[:2]]
    s = scratch(x, m, sum(ranks)) if s is None else s
    launches: Launches = []
    members = []
    for p, part, out, seed in zip(projections, s.split(ranks, 1), (g, u), seeds, strict=False):
        first, p = plain.of(p)
        launches += first
        # An output that is not requested is left out below, or needs memory.
        members.append(forward_product(x, p, part, h if out is None else out, seed, dropout_p))
    gate, up = members
    by_rows = [rows_contiguous(p.w) for p in members if isinstance(p.w, Tensor)]
    alike = len({trans for _, trans in by_rows}) == 1 and all(described(t) for t in (x, h, *(w for w, _ in by_rows)))
    choice = mlp.choose_gate_up(device, gate.call._replace(r=max(ranks)), alike)
    if choice.kernel == "separate":
        gate, up = members = [p._replace(y=scratch(x, m, f) if p.y is h else p.y) for p in members]
        launches += [*member_launches(device, members), _activation(gate.y, up.y, h, activation, choice.reason)]
    else:
        shared = rules.choose_group([p.call for p in members], [None, None]).shared
        launches += [shrink(device, members)] if shared else [shrink(device, [p]) for p in members if p.call.r]
        launches.append(_gate_up(device, members, h, activation, choice.kernel == "tma", keep=g is not None))
    first, p = plain.of(projections[2])
    down = forward_product(h, p, s_down, y, seeds[2], dropout_p)
    return [*launches, *first, *product_launches(device, down, rules.choose(device, down.call))]


def mlp_backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, kept: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    projections: Sequence[Projection], seeds: Sequence[Tensor | None], dropout_p: float, activation: str,
    results: tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]],
) -> Launches:  # fmt: skip
    """The launches of a backward, for those of dX, the dA's and the dB's that are not None.

    ``kept``: G, U, gate's and up's S side by side, and down's S.
    """
    g, u, s, s_down = kept
    dx, das, dbs = results
    need_h = dx is not None or any(t is not None for t in (*das[:2], *dbs[:2]))
    plain = _Plain(grad, projections, slots=1)
    g, u = g.contiguous(), u.contiguous()
    dg, du = (scratch(g, *g.shape), scratch(u, *u.shape)) if need_h else (None, g)
    first, down = plain.of(projections[2])
    p = backward_product(g, grad, down, s_down, seeds[2], dropout_p, (dg, das[2], dbs[2]))
    p = p._replace(call=p.call._replace(gated=True), activation=activation, gate=jobs.Gate(g, u, du))
    launches = [*first, *product_launches(device, p, rules.choose(device, p.call))]
    if dg is None:
        return launches
    ranks = [p.rank for p in projections[:2]]
    parts: Sequence[Tensor | None] = [None, None] if s is None else s.split(ranks, 1)
    return launches + linear_backward_launches(
        device, x, [dg, du], projections[:2], parts, seeds[:2], dropout_p, (dx, das[:2], dbs[:2]), plain=plain.of
    )


def _activation(g: Tensor, u: Tensor, h: Tensor, activation: str, reason: str) -> Launch:
    """H = act(G) ∘ U in a launch of its own."""
    return Launch(
        _gated_activation_kernel,
        activation,
        reason,
        (cdiv(h.numel(), _ACTIVATION_BLOCK),),
        (g, u, h, h.numel()),
        {"GATE": activation, "BLOCK": _ACTIVATION_BLOCK},
        {"num_warps": 8, "num_stages": 1},
    )


def _gate_up(device: Device, members: Sequence[Product], h: Tensor, activation: str, tma: bool, keep: bool) -> Launch:
    """Gate, up and the activation in one launch; ``keep``: store G and U too. S is read."""
    gate, up = members
    assert isinstance(gate.w, Tensor) and isinstance(up.w, Tensor)
    c = gate.call._replace(r=max(gate.call.r, up.call.r))
    plan, parts = mlp.gate_up_plan(device, c, tma, activation)
    tile, precision = plan.tile, input_precision(device, c.dtype)
    words = f"r{plan.block_r} {activation}{flag_words(alone=not keep)} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    (branch_g, tile_g), (branch_u, tile_u) = (branch_job(p, plan.block_r, True, precision) for p in members)
    branches, constants = (branch_g, branch_u, gate.bias, up.bias), {"BRANCH_G": tile_g, "BRANCH_U": tile_u}
    outputs = (gate.y, up.y, h) if keep else (None, None, h)
    if not tma:
        sizes = product_tile(gate, tile, precision, activation)
        args = (matrix(gate.x), matrix(gate.w), matrix(up.w), *outputs, *branches, c.m, c.n, c.k)
        kernel, programs = _lora_gate_up_kernel, plan.tiles
        return Launch(kernel, words, plan.reason, (programs,), args, {"TILE": sizes} | constants, tile_options(tile))
    (wg, trans_w), (wu, _) = rows_contiguous(gate.w), rows_contiguous(up.w)
    programs = min(plan.tiles, device.processors)
    args = (
        descriptor(gate.x, tile.BLOCK_M, tile.BLOCK_K),
        *(descriptor(w, tile.BLOCK_N, tile.BLOCK_K, trans_w) for w in (wg, wu)),
        *(None if t is None else descriptor(t, tile.BLOCK_M, tile.BLOCK_N // parts) for t in outputs),
        *branches,
        c.m,
        c.n,
        c.k,
        programs,
    )
    described_sizes = jobs.DescribedTile(
        tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, GROUP_M, parts, trans_w, False, False, activation, precision
    )
    kernel = _lora_gate_up_tma_kernel
    return Launch(
        kernel, words, plan.reason, (programs,), args, {"TILE": described_sizes} | constants, tile_options(tile)
    )

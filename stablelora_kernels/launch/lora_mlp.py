"""From a call of ``lora_mlp`` to its launches: S of gate and up, their products with the
activation, down; and backward.

Quantized weights are dequantized first, each right before its product, in memory that the next one
takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.gate_up import (
    _gated_activation_kernel,
    _lora_gate_up_kernel,
    _lora_gate_up_tma_kernel,
)
from stablelora_kernels.launch.base import Launch, Launches, flag_words, tile_options
from stablelora_kernels.launch.jobs import (
    Product,
    Random,
    backward_product,
    branch_job,
    forward_product,
    matrix,
)
from stablelora_kernels.launch.lora_linear import (
    GROUP_M,
    backward_launches,
    dequantize,
    described,
    descriptor,
    lora_down,
    member_launches,
    product_launches,
    product_tile,
    rows_contiguous,
)
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored

_ACTIVATION_BLOCK = 2048


def _dequantizer(
    like: Tensor, projections: Sequence[Projection], slots: int
) -> Callable[[Projection], tuple[Launches, Projection]]:
    """A function that returns the dequantizing launch (or none) and a projection with a plain
    weight.

    There is memory for ``slots`` weights at a time: it is reused after that many more.
    """
    sizes = [
        p.weight.layout.n * p.weight.layout.k for p in projections if isinstance(p.weight, Stored)
    ]
    memory = cycle([scratch(like, max(sizes)) for _ in sizes[:slots]])

    def plain(p: Projection) -> tuple[Launches, Projection]:
        if not isinstance(p.weight, Stored):
            return [], p
        n, k = p.weight.layout.n, p.weight.layout.k
        w = next(memory)[: n * k].view(n, k)
        return [dequantize(w, p.weight)], p._replace(weight=w)

    return plain


def mlp_forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], random: Sequence[Random], dropout_p: float,
    activation: str, results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Launches:  # fmt: skip
    """The launches of a forward. A projection without a branch has an A and a B of rank 0; its
    scaling is s' = scaling / (1 - p).

    ``results``: Y; G, U, gate's and up's S side by side and down's S, which are None if they are
    not requested.
    """
    y, g, u, s, s_down = results
    (m, _), lora_B, plain = x.shape, projections[0].lora_B, _dequantizer(x, projections, slots=2)
    assert lora_B is not None
    f = lora_B.shape[0]
    h, ranks = scratch(x, m, f), [p.rank for p in projections[:2]]
    s = scratch(x, m, sum(ranks)) if s is None else s
    launches: Launches = []
    members = []
    for p, part, out, each in zip(projections, s.split(ranks, 1), (g, u), random, strict=False):
        first, p = plain(p)
        launches += first
        # An output that is not requested is left out below, or needs memory.
        members.append(forward_product(x, p, part, h if out is None else out, each, dropout_p))
    by_rows = [rows_contiguous(p.w) for p in members if isinstance(p.w, Tensor)]
    alike = len({trans for _, trans in by_rows}) == 1 and all(
        described(t) for t in (x, h, *(w for w, _ in by_rows))
    )
    choice = rules.choose_gate_up(device, members[0].call._replace(r=max(ranks)), alike)
    if choice.kernel == "separate":
        members = [p._replace(y=scratch(x, m, f) if p.y is h else p.y) for p in members]
        launches += [
            *member_launches(device, members),
            _activation(members, h, activation, choice.reason),
        ]
    else:
        shared = rules.choose_group([p.call for p in members], [None, None]).shared
        launches += (
            [lora_down(device, members)]
            if shared
            else [lora_down(device, [p]) for p in members if p.call.r]
        )
        launches.append(
            _gate_up(device, members, h, activation, choice.kernel == "tma", keep=g is not None)
        )
    first, p = plain(projections[2])
    down = forward_product(h, p, s_down, y, random[2], dropout_p)
    return [*launches, *first, *product_launches(device, down, rules.choose(device, down.call))]


def mlp_backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, kept: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    projections: Sequence[Projection], masks: Sequence[Tensor | None], dropout_p: float, activation: str,
    results: tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]],
) -> Launches:  # fmt: skip
    """The launches of a backward, for those of dX, the dA's and the dB's that are not None.

    ``kept``: G, U, gate's and up's S side by side, and down's S.
    """
    g, u, s, s_down = kept
    dx, das, dbs = results
    need_h = dx is not None or any(t is not None for t in (*das[:2], *dbs[:2]))
    plain = _dequantizer(grad, projections, slots=1)
    g, u = g.contiguous(), u.contiguous()
    dg, du = (scratch(g, *g.shape), scratch(u, *u.shape)) if need_h else (None, g)
    first, down = plain(projections[2])
    p = backward_product(g, grad, down, s_down, masks[2], dropout_p, (dg, das[2], dbs[2]))
    p = p._replace(
        call=p.call._replace(gated=True), activation=activation, gate=jobs.Gate(g, u, du)
    )
    launches = [*first, *product_launches(device, p, rules.choose(device, p.call))]
    if dg is None:
        return launches
    parts = [None, None] if s is None else s.split([p.rank for p in projections[:2]], 1)
    wanted = (dx, das[:2], dbs[:2])
    return launches + backward_launches(
        device, x, [dg, du], projections[:2], parts, masks[:2], dropout_p, wanted, plain=plain
    )


def _activation(members: Sequence[Product], h: Tensor, activation: str, reason: str) -> Launch:
    """H = act(G) ∘ U in a launch of its own."""
    return Launch(
        _gated_activation_kernel,
        activation,
        reason,
        (cdiv(h.numel(), _ACTIVATION_BLOCK),),
        (*(p.y for p in members), h, h.numel()),
        {"GATE": activation, "BLOCK": _ACTIVATION_BLOCK},
        {"num_warps": 8, "num_stages": 1},
    )


def _gate_up(
    device: Device, members: Sequence[Product], h: Tensor, activation: str, tma: bool, keep: bool
) -> Launch:
    """Gate, up and the activation in one launch; ``keep``: store G and U too. S is read."""
    gate, up = members
    assert isinstance(gate.w, Tensor) and isinstance(up.w, Tensor)
    c = gate.call._replace(r=max(gate.call.r, up.call.r))
    plan, parts = tiles.gate_up_plan(device, c, tma, activation)
    tile, precision = plan.tile, input_precision(device, c.dtype)
    words = f"r{plan.block_r} {activation}{flag_words(alone=not keep)} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    branches, (tile_g, tile_u) = zip(
        *[branch_job(p, plan.block_r, True, precision) for p in members], strict=True
    )
    outputs = (gate.y, up.y, h) if keep else (None, None, h)
    args: tuple[Any, ...] = (*branches, gate.bias, up.bias, c.m, c.n, c.k)
    sizes: Any
    if tma:
        kernel, programs = _lora_gate_up_tma_kernel, min(plan.tiles, device.processors)
        (wg, trans_w), (wu, _) = rows_contiguous(gate.w), rows_contiguous(up.w)
        args = (
            descriptor(gate.x, tile.BLOCK_M, tile.BLOCK_K),
            *(descriptor(w, tile.BLOCK_N, tile.BLOCK_K, trans_w) for w in (wg, wu)),
            *(
                None if t is None else descriptor(t, tile.BLOCK_M, tile.BLOCK_N // parts)
                for t in outputs
            ),
            *args,
            programs,
        )
        sizes = jobs.DescribedTile(
            tile.BLOCK_M,
            tile.BLOCK_N,
            tile.BLOCK_K,
            GROUP_M,
            parts,
            trans_w,
            False,
            False,
            activation,
            precision,
        )
    else:
        kernel, programs = _lora_gate_up_kernel, plan.tiles
        args = (matrix(gate.x), matrix(gate.w), matrix(up.w), *outputs, *args)
        sizes = product_tile(gate, tile, precision, activation)
    constants = {"TILE": sizes, "BRANCH_G": tile_g, "BRANCH_U": tile_u}
    return Launch(kernel, words, plan.reason, (programs,), args, constants, tile_options(tile))

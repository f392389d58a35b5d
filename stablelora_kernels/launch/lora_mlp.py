"""From a call of ``lora_mlp`` to its launches: S of gate and up, their products with the activation, down; and backward.

Quantized weights are dequantized first, each right before its product, in memory that the next one takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import mlp, rules
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.kernels.lora.gate_up import (
    _gated_activation_kernel,
    _lora_gate_up_kernel,
    _lora_gate_up_tma_kernel,
)
from stablelora_kernels.launch import lora_linear as single
from stablelora_kernels.launch import lora_linear_group as group
from stablelora_kernels.launch.base import Launch, flag_words, tile_blocks, tile_options
from stablelora_kernels.launch.lora_common import (
    Gate,
    Product,
    backward_product,
    forward_product,
)
from stablelora_kernels.launch.lora_linear_quantized import dequantize
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.quantized import Stored

_ACTIVATION_BLOCK = 2048


class _Plain:
    """Plain weights in place of quantized ones: memory for up to ``slots`` of them at a time."""

    def __init__(self, like: Tensor, weights: Sequence[Tensor | Stored], slots: int) -> None:
        sizes = [w.layout.n * w.layout.k for w in weights if isinstance(w, Stored) and w.data is not None]
        self._weights = weights
        self._memory = [scratch(like, max(sizes)) for _ in range(min(slots, len(sizes)))]
        self._taken = 0

    def of(self, index: int) -> tuple[list[Launch], Tensor]:
        """Return the dequantize launch (or none) and weight ``index``. Its buffer is reused after ``slots`` more weights."""
        weight = self._weights[index]
        if not isinstance(weight, Stored):
            return [], weight
        memory = self._memory[self._taken % len(self._memory)]
        self._taken += 1
        n, k = weight.layout.n, weight.layout.k
        launch, w = dequantize(memory[: n * k].view(n, k), weight)
        return [launch], w


def forward_launches(
    device: Device, x: Tensor, weights: Sequence[Tensor | Stored], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], seeds: Sequence[Tensor | None], scalings: Sequence[float], dropout_p: float, activation: str,
    y: Tensor, g: Tensor | None, u: Tensor | None, s: Tensor | None, s_down: Tensor | None,
) -> list[Any]:  # fmt: skip
    """The launches of a forward on ``device``. ``s`` holds gate's and up's S, side by side.

    g, u, s and s_down are None if they are not requested.
    """
    m, f = x.shape[0], lora_Bs[0].shape[0]
    if m == 0:
        return []
    h, plain, ranks = scratch(x, m, f), _Plain(x, weights, slots=2), [a.shape[0] for a in lora_As]
    drops = [dropout_p if r else 0.0 for r in ranks]
    s = scratch(x, m, ranks[0] + ranks[1]) if s is None else s
    launches: list[Any] = []
    members = []
    for i, (part, out) in enumerate(zip(group.columns(s, ranks[:2]), (g, u), strict=True)):
        first, w = plain.of(i)
        launches += first
        # An output that is not requested is left out below, or needs memory.
        out = h if out is None else out
        a = lora_As[i].contiguous()
        members.append(forward_product(x, w, biases[i], a, lora_Bs[i], part, out, seeds[i], scalings[i], drops[i]))
    by_rows = [single.rows_contiguous(p.w) for p in members if p.w is not None]
    described = len({trans for _, trans in by_rows}) == 1
    described = described and all(single.described(t) for t in (x, h, *(w for w, _ in by_rows)))
    call = members[0].call._replace(r=max(ranks[:2]))
    choice = mlp.choose_gate_up(device, call, described)
    if choice.kernel == "separate":
        members = [p._replace(y=scratch(x, m, f) if p.y is h else p.y) for p in members]
        launches += group.member_launches(device, members, s)
        launches.append(_activation(device, members[0].y, members[1].y, h, activation, choice.reason))
    else:
        shared = rules.choose_group([p.call for p in members], [None, None]).shared
        overlaps = shared and rules.overlaps(device)
        if shared:
            launches.append(group.shrink_members(device, members, s, triggers_dependents=overlaps))
        else:
            launches += [single.shrink(device, p) for p in members if p.call.r]
        tma, keep = choice.kernel == "tma", g is not None
        launches.append(_gate_up(device, members, h, activation, tma, keep, waits=overlaps))
    first, w = plain.of(2)
    down = forward_product(h, w, biases[2], lora_As[2], lora_Bs[2], s_down, y, seeds[2], scalings[2], drops[2])
    return [*launches, *first, *single.product_launches(device, down, rules.choose(device, down.call))]


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, g: Tensor, u: Tensor, weights: Sequence[Tensor | Stored],
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], s: Tensor | None, s_down: Tensor | None,
    seeds: Sequence[Tensor | None], scalings: Sequence[float], dropout_p: float, activation: str, dx: Tensor | None,
    das: Sequence[Tensor | None], dbs: Sequence[Tensor | None],
) -> list[Any]:  # fmt: skip
    """The launches of a backward on ``device``, for those of dX, the dA's and the dB's that are not None."""
    ranks = [a.shape[0] for a in lora_As]
    need_h = dx is not None or any(t is not None for t in (*das[:2], *dbs[:2]))
    plain = _Plain(grad, weights, slots=1)
    g, u = g.contiguous(), u.contiguous()
    dg, du = (scratch(g, *g.shape), scratch(u, *u.shape)) if need_h else (None, g)
    first, w = plain.of(2) if need_h else ([], None)
    ds = scratch(grad, grad.shape[0], ranks[2]) if das[2] is not None else None
    p, gradients = backward_product(
        g, grad, w, lora_As[2], lora_Bs[2], s_down, ds, seeds[2], dg, das[2], dbs[2], scalings[2],
        dropout_p if ranks[2] else 0.0,
    )  # fmt: skip
    gate = Gate(activation, g, u, du)
    call = p.call._replace(gated=True)
    p, gradients = p._replace(call=call, gate=gate), gradients._replace(call=call, gate=gate)
    launches = [*first, *single.product_backward_launches(device, p, gradients, rules.choose(device, p.call))]
    if dg is None:
        return launches
    before: list[list[Launch]] = []
    plain_weights: list[Any] = []
    for i in range(2):
        first, w = plain.of(i) if dx is not None else ([], None)
        before.append(first)
        plain_weights.append(w)
    parts: Any = [None, None] if s is None else group.columns(s, ranks[:2])
    of_group = group.backward_launches(
        device, x, [dg, du], plain_weights, lora_As[:2], lora_Bs[:2], parts, seeds[:2], scalings[:2], dropout_p, dx, das[:2],
        dbs[:2], before,
    )  # fmt: skip
    return launches + of_group


def _activation(device: Device, g: Tensor, u: Tensor, h: Tensor, activation: str, reason: str) -> Launch:
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


def _gate_up(
    device: Device, members: Sequence[Product], h: Tensor, activation: str, tma: bool, keep: bool, waits: bool
) -> Launch:
    """Gate, up and the activation in one launch; ``keep``: store G and U too. S is read; ``waits`` as ``lora_linear`` has it."""
    gate, up = members
    assert gate.w is not None and up.w is not None
    c = gate.call._replace(r=max(gate.call.r, up.call.r))
    plan, parts = mlp.gate_up_plan(device, c, tma, activation)
    tile = plan.tile
    flags = {
        "GATE": activation,
        "HAS_BIAS_G": gate.bias is not None,
        "HAS_BIAS_U": up.bias is not None,
        "UNIT_G": gate.unit,
        "UNIT_U": up.unit,
        "STORE_GU": keep,
        "WAITS_FOR_PRIMARY": waits,
        "BLOCK_R": plan.block_r,
        "GROUP_M": 8,
        "INPUT_PRECISION": input_precision(device, c.dtype),
    }
    words = f"r{plan.block_r} {activation}{flag_words(alone=not keep)} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    options = tile_options(tile) | ({"launch_pdl": True} if waits else {})
    pointers = (gate.bias, up.bias, gate.b, up.b, gate.s, up.s)
    sizes, strides = (c.m, c.n, c.k, gate.call.r, up.call.r), (*gate.b.stride(), *up.b.stride())
    stride_s = gate.s.stride(0) if gate.s is not None else 0
    outputs = (gate.y, up.y, h) if keep else (h, h, h)
    if not tma:
        matrices = (gate.x, gate.w, up.w)
        strides = (*(stride for t in matrices for stride in t.stride()), *strides, stride_s)
        args = (*matrices, *pointers, *outputs, *sizes, *strides)
        constants = flags | tile_blocks(tile) | {"EVEN_K": c.k % tile.BLOCK_K == 0}
        return Launch(_lora_gate_up_kernel, words, plan.reason, (plan.tiles,), args, constants, options)
    (wg, trans_w), (wu, _) = single.rows_contiguous(gate.w), single.rows_contiguous(up.w)
    block = (tile.BLOCK_K, tile.BLOCK_N) if trans_w else (tile.BLOCK_N, tile.BLOCK_K)
    programs = min(plan.tiles, device.processors)
    args = (
        single.descriptor(gate.x, tile.BLOCK_M, tile.BLOCK_K),
        *(single.descriptor(w, *block) for w in (wg, wu)),
        *pointers,
        *(single.descriptor(t, tile.BLOCK_M, tile.BLOCK_N // parts) for t in outputs),
        *sizes,
        programs,
        *strides,
        stride_s,
    )
    constants = flags | tile_blocks(tile) | {"TRANS_W": trans_w, "PARTS": parts}
    return Launch(_lora_gate_up_tma_kernel, words, plan.reason, (programs,), args, constants, options)

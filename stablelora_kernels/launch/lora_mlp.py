"""From a call of ``lora_mlp`` to its launches: S of gate and up, their products with the
activation, down; and backward.

Quantized weights are dequantized first, each right before its product, in memory that the next one
takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from torch import Tensor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.formats import Stored
from stablelora_kernels.kernels.lora import jobs
from stablelora_kernels.kernels.lora.gate_up import (
    _gated_activation_kernel,
    _lora_gate_up_kernel,
    _lora_gate_up_tma_kernel,
)
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import (
    Arguments,
    Launch,
    Launches,
    described,
    descriptor,
    flag_words,
    planned,
    rows_contiguous,
    tile_words,
)
from stablelora_kernels.launch.fill_jobs import (
    Product,
    backward_product,
    branch_job,
    described_tile,
    forward_product,
    matrix,
    product_tile,
)
from stablelora_kernels.launch.lora_linear import (
    BackwardCall,
    Gradients,
    Plain,
    backward_launches,
    choose,
    member_launches,
    product_launches,
)
from stablelora_kernels.launch.quantized import dequantize
from stablelora_kernels.launch.thin_products import lora_down
from stablelora_kernels.launch.workspace import counters, scratch
from stablelora_kernels.projection import Projection

_ACTIVATION_BLOCK = 2048


class _Dequantizer:
    """Makes projections with plain weights. It has memory for ``slots`` weights at a time, which is
    reused after that many more.
    """

    def __init__(self, like: Tensor, projections: Sequence[Projection], slots: int) -> None:
        weights = [p.weight for p in projections if isinstance(p.weight, Stored)]
        sizes = [weight.layout.n * weight.layout.k for weight in weights]
        self._memory = cycle([scratch(like, max(sizes)) for _ in sizes[:slots]])

    def plain(self, p: Projection) -> Plain:
        """``p`` with a plain weight, and the launch that dequantizes it, or none."""
        weight = p.weight
        if not isinstance(weight, Stored):
            return Plain(p, [])
        n, k = weight.layout.n, weight.layout.k
        w = next(self._memory)[: n * k].view(n, k)
        return Plain(p._replace(weight=w), [dequantize(w, weight)])


class MLPForwardCall(NamedTuple):
    """What a forward computes. There are three of each sequence: gate's, up's and down's."""

    x: Tensor
    # Without a branch, A and B have rank 0. The scaling is s' = scaling / (1 - p).
    projections: Sequence[Projection]
    seeds: Sequence[Tensor | None]
    # Memory that keeps dropout's masks for backward, None where nothing reads one.
    masks: Sequence[Tensor | None]
    dropout_p: float
    activation: str
    # Y, G, U, gate's and up's S side by side, down's S. None: not requested.
    y: Tensor | None
    g: Tensor | None
    u: Tensor | None
    s: Tensor | None
    s_down: Tensor | None


def mlp_forward_launches(
    device: Device, call: MLPForwardCall, choice: Choice | None = None
) -> Launches:
    """The launches of a forward. ``choice``: of every product that it can be, and by one kernel
    gate and up have only its "one_launch"; the table's by default.
    """
    x = call.x
    dequantizer = _Dequantizer(x, call.projections, slots=2)
    lora_B = call.projections[0].lora_B
    assert lora_B is not None
    h = scratch(x, x.shape[0], lora_B.shape[0])
    ranks = [p.rank for p in call.projections[:2]]
    s = scratch(x, x.shape[0], sum(ranks)) if call.s is None else call.s
    outputs = (call.g, call.u)
    launches: Launches = []
    members = []
    for i, s_of_p in enumerate(s.split_with_sizes(ranks, 1)):
        plain = dequantizer.plain(call.projections[i])
        launches += plain.launches
        # An output that is not requested is left out below, or needs memory.
        output = outputs[i]
        members.append(
            _product(call, i, plain.projection, x, h if output is None else output, s_of_p)
        )
    launches += _gate_and_up(device, call, members, h, choice)
    if call.y is None:
        # S and the mask of down follow from H and A. For a Y that nothing writes any tensor stands.
        p = call.projections[2]._replace(weight=None)
        if p.rank:
            launches.append(lora_down(device, [_product(call, 2, p, h, h, call.s_down)]))
        return launches
    plain = dequantizer.plain(call.projections[2])
    down = _product(call, 2, plain.projection, h, call.y, call.s_down)
    launches += plain.launches
    launches += product_launches(device, down, choose(down, choice))
    return launches


def _product(
    call: MLPForwardCall, index: int, p: Projection, x: Tensor, y: Tensor, s: Tensor | None
) -> Product:
    """Y of the projection of this index, with its seed and mask."""
    return forward_product(
        x,
        p,
        y,
        s=s,
        seed=call.seeds[index],
        mask=call.masks[index],
        dropout_p=call.dropout_p,
    )


def _gate_and_up(
    device: Device,
    call: MLPForwardCall,
    members: Sequence[Product],
    h: Tensor,
    choice: Choice | None,
) -> Launches:
    """The launches from X to H, of the products ``members`` with plain weights."""
    largest = members[0].call._replace(r=max(p.call.r for p in members))
    is_described = _all_described(call.x, h, members)
    strategy = None if choice is None else choice.strategy
    gate_up = rules.choose_gate_up(device, largest, is_described, strategy)
    if gate_up.kernel == rules.SEPARATE:
        members = [p._replace(y=scratch(call.x, *h.shape)) if p.y is h else p for p in members]
        launches = member_launches(device, members, choice)
        launches.append(_activation(members, h, call.activation, gate_up.reason))
        return launches
    if rules.choose_group([p.call for p in members]).shared:
        launches = [lora_down(device, members)]
    else:
        launches = [lora_down(device, [p]) for p in members if p.call.r]
    keep = call.g is not None
    if gate_up.kernel == "tma":
        launches.append(_gate_up_by_descriptors(device, members, h, call.activation, keep))
    else:
        launches.append(_gate_up_by_pointers(device, members, h, call.activation, keep))
    return launches


def _all_described(x: Tensor, h: Tensor, members: Sequence[Product]) -> bool:
    """Whether descriptors can hold X, H and the weights, both of which lie the same way."""
    weights = [rows_contiguous(p.w) for p in members if isinstance(p.w, Tensor)]
    ways = {w.transposed for w in weights}
    return len(ways) == 1 and all(described(t) for t in (x, h, *(w.matrix for w in weights)))


class MLPBackwardCall(NamedTuple):
    """What a backward computes. There are three of each sequence: gate's, up's and down's."""

    x: Tensor | None
    grad: Tensor
    # What the forward kept: G, U, gate's and up's S side by side, down's S.
    g: Tensor
    u: Tensor
    s: Tensor | None
    s_down: Tensor | None
    projections: Sequence[Projection]
    masks: Sequence[Tensor | None]
    dropout_p: float
    activation: str
    results: Gradients


def mlp_backward_launches(
    device: Device, call: MLPBackwardCall, choice: Choice | None = None
) -> Launches:
    """The launches of a backward: down's, with dG and dU in place of dH, then gate's and up's.
    ``choice``: of every product that it can be; the table's by default.
    """
    results = call.results
    wanted = Gradients(results.dx, results.das[:2], results.dbs[:2])
    need_h = any(t is not None for t in (wanted.dx, *wanted.das, *wanted.dbs))
    dequantizer = _Dequantizer(call.grad, call.projections, slots=1)
    g = call.g.contiguous()
    u = call.u.contiguous()
    dg = scratch(g, *g.shape) if need_h else None
    # Without dG nothing writes it, and any tensor stands for it.
    du = scratch(u, *u.shape) if need_h else g
    plain = dequantizer.plain(call.projections[2])
    down = backward_product(
        # H is computed again, from G and U.
        g,
        call.grad,
        plain.projection,
        s=call.s_down,
        mask=call.masks[2],
        dropout_p=call.dropout_p,
        dx=dg,
        da=results.das[2],
        db=results.dbs[2],
    )
    down = down._replace(
        call=down.call._replace(gated=True),
        activation=call.activation,
        gate=jobs.Gate(g, u, du),
    )
    launches = [*plain.launches]
    launches += product_launches(device, down, choose(down, choice))
    if dg is None:
        return launches
    projections = call.projections[:2]
    every_s: Sequence[Tensor | None] = [None, None]
    if call.s is not None:
        every_s = call.s.split_with_sizes([p.rank for p in projections], 1)
    gate_and_up = BackwardCall(
        x=call.x,
        grads=[dg, du],
        projections=projections,
        s=every_s,
        masks=call.masks[:2],
        dropout_p=call.dropout_p,
        results=wanted,
    )
    launches += backward_launches(device, gate_and_up, choice, dequantizer.plain)
    return launches


def _activation(members: Sequence[Product], h: Tensor, activation: str, reason: str) -> Launch:
    """H = act(G) ∘ U in a launch of its own."""
    gate, up = members
    return Launch(
        kernel=_gated_activation_kernel,
        variant=activation,
        reason=reason,
        grid=(cdiv(h.numel(), _ACTIVATION_BLOCK),),
        args=(gate.y, up.y, h, h.numel()),
        constants={"GATE": activation, "BLOCK": _ACTIVATION_BLOCK},
        options={"num_warps": 8, "num_stages": 1},
    )


def _gate_up_by_descriptors(
    device: Device, members: Sequence[Product], h: Tensor, activation: str, keep: bool
) -> Launch:
    """Gate, up and the activation in one launch, with operands read through tensor descriptors.

    S is read. ``keep``: store G and U too.
    """
    gate, up = members
    assert isinstance(gate.w, Tensor) and isinstance(up.w, Tensor)
    plan = _gate_up_plan(device, members, True, activation)
    tile = plan.tile
    columns = tile.BLOCK_N // plan.column_parts
    gate_w = rows_contiguous(gate.w)
    up_w = rows_contiguous(up.w)
    programs = min(plan.tiles, device.processors)
    arguments: Arguments = {
        "x_desc": descriptor(gate.x, tile.BLOCK_M, tile.BLOCK_K),
        "wg_desc": descriptor(gate_w.matrix, tile.BLOCK_N, tile.BLOCK_K, gate_w.transposed),
        "wu_desc": descriptor(up_w.matrix, tile.BLOCK_N, tile.BLOCK_K, gate_w.transposed),
        "g_desc": descriptor(gate.y, tile.BLOCK_M, columns) if keep else None,
        "u_desc": descriptor(up.y, tile.BLOCK_M, columns) if keep else None,
        "h_desc": descriptor(h, tile.BLOCK_M, columns),
        "tickets": counters(1, h.device, workspace.Y_LANE),
        "PRODUCTS": programs,
    }
    precision = input_precision(device, gate.call.dtype)
    constants = described_tile(plan, gate_w.transposed, precision, activation)
    branches = _Branches(members, plan.block_r, precision)
    return planned(
        _lora_gate_up_tma_kernel,
        _gate_up_words(plan, activation, keep),
        plan,
        programs,
        arguments | branches.arguments,
        {"TILE": constants, **branches.constants},
    )


def _gate_up_by_pointers(
    device: Device, members: Sequence[Product], h: Tensor, activation: str, keep: bool
) -> Launch:
    """The same launch with operands read through pointers."""
    gate, up = members
    assert isinstance(gate.w, Tensor) and isinstance(up.w, Tensor)
    plan = _gate_up_plan(device, members, False, activation)
    arguments: Arguments = {
        "x": matrix(gate.x),
        "wg": matrix(gate.w),
        "wu": matrix(up.w),
        "g_ptr": gate.y if keep else None,
        "u_ptr": up.y if keep else None,
        "h_ptr": h,
    }
    precision = input_precision(device, gate.call.dtype)
    branches = _Branches(members, plan.block_r, precision)
    return planned(
        _lora_gate_up_kernel,
        _gate_up_words(plan, activation, keep),
        plan,
        plan.tiles,
        arguments | branches.arguments,
        {"TILE": product_tile(gate, plan.tile, precision, activation), **branches.constants},
    )


def _gate_up_plan(
    device: Device, members: Sequence[Product], tma: bool, activation: str
) -> tiles.Plan:
    largest = members[0].call._replace(r=max(p.call.r for p in members))
    return tiles.gate_up_plan(device, largest, tma, activation)


def _gate_up_words(plan: tiles.Plan, activation: str, keep: bool) -> str:
    return f"r{plan.block_r} {activation}{flag_words(alone=not keep)} {tile_words(plan.tile)}"


class _Branches:
    """What kernels of gate and up take for both branches, beside their products' operands."""

    def __init__(self, members: Sequence[Product], block_r: int, precision: str) -> None:
        gate, up = members
        gate_branch = branch_job(gate, block_r, precision)
        up_branch = branch_job(up, block_r, precision)
        self.arguments: Arguments = {
            "branch_g": gate_branch.branch,
            "branch_u": up_branch.branch,
            "bias_g": gate.bias,
            "bias_u": up.bias,
            "M": gate.call.m,
            "N": gate.call.n,
            "K": gate.call.k,
        }
        self.constants: Arguments = {
            "BRANCH_G": gate_branch.tile,
            "BRANCH_U": up_branch.tile,
        }

"""From a call of ``lora_linear_group`` to its launches: ``lora_linear``'s, with one read of X for every projection's S and dA.

Each projection's product is its own launch, since their weights lie apart. The later ones add their dX to the first's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import MAX_GROUP, Device
from stablelora_kernels.dispatch.rules import Choice, input_precision
from stablelora_kernels.kernels.lora.group import _lora_shrink_group_kernel, _lora_weight_grads_group_kernel
from stablelora_kernels.launch import lora_linear as single
from stablelora_kernels.launch.base import Launch, flag_words, tile_options
from stablelora_kernels.launch.lora_common import (
    Gradients,
    Product,
    VendorProduct,
    backward_product,
    dropout_threshold,
    forward_product,
    shrink,
    split_k_buffers,
)
from stablelora_kernels.launch.workspace import scratch

Launches = list[Launch | VendorProduct]


def columns(s: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Each projection's S [M, r], from the matrix that holds them side by side."""
    return [*s.split([*ranks], 1)]


def forward_launches(
    device: Device, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Tensor, ys: Sequence[Tensor], seeds: Sequence[Tensor], scalings: Sequence[float],
    dropout_p: float,
) -> list[Any]:  # fmt: skip
    """The launches of a forward on ``device``; ``s`` holds every S, side by side; ``seeds`` is empty without dropout."""
    parts, members = columns(s, [a.shape[0] for a in lora_As]), []
    for i, (w, a) in enumerate(zip(weights, lora_As, strict=True)):
        seed = seeds[i] if seeds else None
        a = a.contiguous()
        members.append(forward_product(x, w, biases[i], a, lora_Bs[i], parts[i], ys[i], seed, scalings[i], dropout_p))
    return member_launches(device, members, s)


def member_launches(device: Device, members: Sequence[Product], s: Tensor) -> Launches:
    """The launches of ``members``, projections of one X whose S lie side by side in ``s``."""
    choices = [rules.choose(device, p.call) for p in members]
    launches: Launches = []
    shared = rules.choose_group([p.call for p in members], choices).shared
    triggers = shared and rules.overlaps(device) and choices[0].kernel != "vendor"
    if shared:
        launches.append(shrink_members(device, members, s, triggers_dependents=triggers))
    for i, (p, choice) in enumerate(zip(members, choices, strict=True)):
        launches += single.product_launches(device, p, choice, s_ready=shared, follows_s=triggers and i == 0)
    return launches


def backward_launches(
    device: Device, x: Tensor | None, grads: Sequence[Tensor], weights: Sequence[Tensor], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Sequence[Tensor], seeds: Sequence[Tensor | None], scalings: Sequence[float], dropout_p: float,
    dx: Tensor | None, das: Sequence[Tensor | None], dbs: Sequence[Tensor | None], before: Sequence[Sequence[Launch]] = (),
) -> list[Any]:  # fmt: skip
    """The launches of a backward on ``device``; ``s`` is each projection's S; das and dbs are empty if not requested.

    ``before``: launches that fill each projection's weight.
    """
    ranks = [a.shape[0] for a in lora_As]
    every_ds = scratch(grads[0], grads[0].shape[0], sum(ranks))
    parts = columns(every_ds, ranks)
    members, gradients = [], []
    choices: list[Choice] = []
    for i, (grad, a, b) in enumerate(zip(grads, lora_As, lora_Bs, strict=True)):
        da, db = das[i] if das else None, dbs[i] if dbs else None
        seed, ds = seeds[i] if seeds else None, None if da is None else parts[i]
        weight, drop = None if dx is None else weights[i], dropout_p if ranks[i] else 0.0
        p, g = backward_product(x, grad, weight, a, b, s[i] if dbs else None, ds, seed, dx, da, db, scalings[i], drop)
        members.append(p)
        gradients.append(g)
        choices.append(rules.choose(device, p.call))
    wanted = bool(das) and all(da is not None for da in das)
    shared = wanted and rules.choose_group([p.call for p in members], choices if dx is not None else ()).shared
    launches: Launches = []
    for i, (p, g, choice) in enumerate(zip(members, gradients, choices, strict=True)):
        p = p._replace(call=p.call._replace(add=i > 0))
        launches += before[i] if before else ()
        if not shared:
            launches += single.product_backward_launches(device, p, g, choice)
        elif dx is None:
            launches.append(shrink(device, p, g))
        else:
            launches += single.product_backward_launches(device, p, g._replace(da=None), choice)
    return [*launches, _weight_grads(device, gradients, every_ds)] if shared else launches


def _columns_of(ranks: list[int], whole: Tensor, parts: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The ranks, padded to three, and the first columns of the second and third part in ``whole``."""
    first = [part.storage_offset() - whole.storage_offset() for part in parts[1:] if part is not None]
    return (*ranks, *[1] * (MAX_GROUP - len(ranks)), *first, *[0] * (MAX_GROUP - 1 - len(first)))


def _padded(members: Sequence[Any]) -> tuple[Any, ...]:
    """``members`` padded to three. A pointer that the kernel never follows still needs a type."""
    return (*members, *[members[0]] * (MAX_GROUP - len(members)))


def shrink_members(device: Device, members: Sequence[Product], s: Tensor, triggers_dependents: bool) -> Launch:
    """The members' S, columns of ``s``."""
    c, x, many = members[0].call, members[0].x, len(members)
    ranks = [p.call.r for p in members]
    plan = tiles.shrink_group_plan(device, c, ranks)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * plan.block_r, x, sums=many)
    words = flag_words(dropout=c.dropout, ahead=triggers_dependents)
    return Launch(
        _lora_shrink_group_kernel,
        f"{many} of r{plan.block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{words}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (x, *_padded([p.a for p in members]), s, *_padded([p.seed if c.dropout else None for p in members]), parts, count,
         c.m, c.k, *_columns_of(ranks, s, [p.s for p in members]), plan.splits, *x.stride(), s.stride(0),
         *_padded([p.scaling for p in members]), dropout_threshold(members[0].dropout_p)),
        {"MEMBERS": many, "DROPOUT": c.dropout, "EVEN_K": c.k % tile.BLOCK_K == 0, "TRIGGERS_DEPENDENTS": triggers_dependents,
         "BLOCK_M": tile.BLOCK_M, "BLOCK_K": tile.BLOCK_K, "BLOCK_R": plan.block_r,
         "INPUT_PRECISION": input_precision(device, c.dtype)},
        tile_options(tile),
    )  # fmt: skip


def _weight_grads(device: Device, members: Sequence[Gradients], ds: Tensor) -> Launch:
    """The members' dA, from their dS, columns of ``ds``."""
    c, x, many = members[0].call, members[0].x, len(members)
    assert x is not None
    ranks = [g.call.r for g in members]
    plan = tiles.weight_grads_group_plan(device, c, ranks)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * plan.block_r, x, sums=many)
    return Launch(
        _lora_weight_grads_group_kernel,
        f"{many} of r{plan.block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{flag_words(dropout=c.dropout)}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (x, ds, *_padded([g.da for g in members]), *_padded([g.seed if c.dropout else None for g in members]), parts, count,
         c.m, c.n, *_columns_of(ranks, ds, [g.ds for g in members]), plan.splits, *x.stride(), ds.stride(0),
         dropout_threshold(members[0].dropout_p)),
        {"MEMBERS": many, "DROPOUT": c.dropout, "BLOCK_M": tile.BLOCK_K, "BLOCK_C": tile.BLOCK_M, "BLOCK_R": plan.block_r,
         "STAGES": tile.num_stages, "INPUT_PRECISION": input_precision(device, c.dtype, transposed=True)},
        tile_options(tile),
    )  # fmt: skip

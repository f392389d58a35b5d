"""From a call of ``lora_linear_group`` to its launches: ``lora_linear``'s, with S and dA of all projections from one read of X.

Of the products each stays its own: their weights are apart. Those of dX add to what the one before has stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import problem, rules
from stablelora_kernels.dispatch import tiles as tiles_
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import fit, pick_tile, rank_block
from stablelora_kernels.kernels.lora.group import _lora_shrink_group_kernel, _lora_weight_grads_group_kernel
from stablelora_kernels.launch import lora_common
from stablelora_kernels.launch import lora_linear as single
from stablelora_kernels.launch.base import Launch, input_precision
from stablelora_kernels.launch.lora_common import Gradients, Product, VendorProduct

Launches = list[Launch | VendorProduct]


def columns(s: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Each projection's S [M, r], of the matrix that holds them side by side."""
    return [*s.split([*ranks], 1)]


def forward_launches(
    device: Device, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Tensor, ys: Sequence[Tensor], seeds: Sequence[Tensor], scalings: Sequence[float],
    dropout_p: float,
) -> list[Any]:  # fmt: skip
    """What a forward launches on ``device``; ``s`` holds all S, side by side; ``seeds`` is empty without dropout."""
    members, (m, k) = [], x.shape
    parts = columns(s, [a.shape[0] for a in lora_As])
    for i, (w, a) in enumerate(zip(weights, lora_As, strict=True)):
        call = Call("forward", m, w.shape[0], k, a.shape[0], x.dtype, a.dtype, dropout_p > 0)
        seed = seeds[i] if seeds else None
        a = a.contiguous()
        members.append(Product(call, x, w, biases[i], a, lora_Bs[i], parts[i], ys[i], seed, scalings[i], dropout_p))
    return product_launches(device, members, s, [rules.choose(device, p.call) for p in members])


def backward_launches(
    device: Device, x: Tensor | None, grads: Sequence[Tensor], weights: Sequence[Tensor], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Sequence[Tensor], seeds: Sequence[Tensor], scalings: Sequence[float], dropout_p: float,
    dx: Tensor | None, das: Sequence[Tensor], dbs: Sequence[Tensor],
) -> list[Any]:  # fmt: skip
    """What a backward launches on ``device``; ``s`` is each projection's S; das and dbs are empty where they are not wanted."""
    m, k = grads[0].shape[0], lora_As[0].shape[1]
    ranks = [a.shape[0] for a in lora_As]
    every_ds = grads[0].new_empty(m, sum(ranks))
    parts = columns(every_ds, ranks)
    members, gradients = [], []
    choices: list[Choice | None] = []
    for i, (grad, a, b) in enumerate(zip(grads, lora_As, lora_Bs, strict=True)):
        call = Call("backward", m, k, grad.shape[1], ranks[i], grad.dtype, a.dtype, dropout_p > 0)
        seed, ds = seeds[i] if seeds else None, parts[i] if das else None
        # Without dX neither it nor the weight is looked at, and any tensor will do.
        w, y = (grad, grad) if dx is None else (weights[i].t(), dx)
        members.append(Product(call, grad, w, None, b.t(), a.t(), ds, y, seed, scalings[i], dropout_p))
        da, db = das[i] if das else None, dbs[i] if dbs else None
        gradients.append(Gradients(call, x, s[i] if dbs else None, ds, grad, da, db, seed, dropout_p))
        choices.append(None if dx is None else rules.choose(device, call))
    return product_backward_launches(device, members, gradients, every_ds, choices)


def product_launches(device: Device, members: Sequence[Product], s: Tensor, choices: Sequence[Choice]) -> Launches:
    """The launches for every member's Y. The members' x is one tensor, their a contiguous, and their s columns of ``s``."""
    if not rules.choose_group([p.call for p in members], choices).shared:
        return [
            launch
            for p, choice in zip(members, choices, strict=True)
            for launch in single.product_launches(device, p, choice)
        ]
    launches: Launches = [
        _shrink(device, members, s, lead=lora_common.overlap(device) and choices[0].kernel == "split")
    ]
    for p, choice in zip(members, choices, strict=True):
        launches += single.product_launches(device, p, choice, s_is_there=True)
    return launches


def product_backward_launches(
    device: Device,
    members: Sequence[Product],
    gradients: Sequence[Gradients],
    ds: Tensor,
    choices: Sequence[Choice | None],
) -> Launches:
    """The launches for dX, which is every member's ``y``, and for the dA's and dB's; the members' dS are columns of ``ds``.

    ``choices`` None: without dX.
    """
    shared = rules.choose_group([p.call for p in members], choices).shared and gradients[0].da is not None
    launches: Launches = []
    for number, (p, g, choice) in enumerate(zip(members, gradients, choices, strict=True)):
        p = p._replace(call=p.call._replace(add=number > 0))
        if not shared:
            launches += single.product_backward_launches(device, p, g, choice)
        elif choice is None:
            launches.append(lora_common.shrink(device, p, g))
        else:
            launches += single.product_backward_launches(device, p, g._replace(da=None), choice)
    return [*launches, _grads(device, gradients, ds)] if shared else launches


def _ranks(members: Sequence[Any], whole: Tensor, parts: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Of three members, of which one may be missing: the ranks, and where the second's and third's columns begin."""
    ranks = [member.call.r for member in members]
    columns = [part.storage_offset() - whole.storage_offset() for part in parts[1:] if part is not None]
    return (*ranks, *[1] * (3 - len(ranks)), *columns, *[0] * (2 - len(columns)))


def _padded(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Three of them. A pointer that is never followed still needs a type."""
    return (*tensors, *[tensors[0]] * (3 - len(tensors)))


def _shrink(device: Device, members: Sequence[Product], s: Tensor, lead: bool) -> Launch:
    """The members' S, columns of ``s``."""
    c, x = members[0].call, members[0].x
    block_r = rank_block(max(p.call.r for p in members), problem.MAX_FUSED_R)
    tile, reason = pick_tile(tiles_.SHRINK_GROUP_TILES, device, c._replace(r=block_r))
    stage = tile.BLOCK_K * (tile.BLOCK_M * c.dtype.itemsize + len(members) * block_r * c.lora_dtype.itemsize)
    tile = fit(tile, device, stage)
    tiles, steps, many = cdiv(c.m, tile.BLOCK_M), cdiv(c.k, tile.BLOCK_K), len(members)
    n, parts, count = lora_common.share(device, tiles, steps, tile.BLOCK_M * block_r, x, sums=many)
    seeds = _padded([p.seed if c.dropout else None for p in members])
    return Launch(
        _lora_shrink_group_kernel,
        f"{many} of r{block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{lora_common.words_of(dropout=c.dropout, ahead=lead)}",
        reason,
        (tiles * n,),
        (x, *_padded([p.a for p in members]), s, *seeds, parts, count, c.m, c.k, *_ranks(members, s, [p.s for p in members]), n,
         *x.stride(),
         s.stride(0), *_padded([p.scaling for p in members]), lora_common.threshold(members[0].dropout_p)),
        {"MEMBERS": many, "DROPOUT": c.dropout, "EVEN_K": c.k % tile.BLOCK_K == 0, "LEAD": lead, "BLOCK_M": tile.BLOCK_M,
         "BLOCK_K": tile.BLOCK_K, "BLOCK_R": block_r, "INPUT_PRECISION": input_precision(device, c.dtype)},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _grads(device: Device, members: Sequence[Gradients], ds: Tensor) -> Launch:
    """The members' dA, from their dS, columns of ``ds``."""
    g = members[0]
    c, x = g.call, g.x
    assert x is not None
    block_r = rank_block(max(g.call.r for g in members), problem.MAX_FUSED_R)
    tile, reason = pick_tile(tiles_.WEIGHT_GRADS_GROUP_TILES, device, c._replace(r=block_r))
    tile = fit(tile, device, tile.BLOCK_K * (tile.BLOCK_M + len(members) * block_r) * c.dtype.itemsize)
    tiles, steps, many = cdiv(c.n, tile.BLOCK_M), cdiv(c.m, tile.BLOCK_K), len(members)
    n, parts, count = lora_common.share(device, tiles, steps, tile.BLOCK_M * block_r, x, sums=many)
    seeds = _padded([g.seed if c.dropout else None for g in members])
    return Launch(
        _lora_weight_grads_group_kernel,
        f"{many} of r{block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{lora_common.words_of(dropout=c.dropout)}",
        reason,
        (tiles * n,),
        (x, ds, *_padded([g.da for g in members]), *seeds, parts, count, c.m, c.n,
         *_ranks(members, ds, [g.ds for g in members]), n, *x.stride(), ds.stride(0), lora_common.threshold(g.dropout_p)),
        {"MEMBERS": many, "DROPOUT": c.dropout, "BLOCK_M": tile.BLOCK_K, "BLOCK_C": tile.BLOCK_M, "BLOCK_R": block_r,
         "STAGES": tile.num_stages, "INPUT_PRECISION": input_precision(device, c.dtype, transposed=True)},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip

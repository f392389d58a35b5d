"""``lora_linear`` for a projection group, up to three projections of one X (q, k and v; gate and up), with its gradients.

    forward   S_g  = s'_g (X ∘ keep_g) A_g^T           Y_g = X W_g^T + bias_g + S_g B_g^T
    backward  dS_g = s'_g dY_g B_g                     dX  = Σ_g dY_g W_g + (dS_g A_g) ∘ keep_g
              dA_g = dS_g^T (X ∘ keep_g)               dB_g = dY_g^T S_g

Compared with separate projections, it reads X once for all S and once for all dA, and each projection adds its dX to the stored
sum. The masks are those of projections computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops.library import apply, first_derivative
from stablelora_kernels.ops.lora_linear import draw_seed, lora_linear_op
from stablelora_kernels.ops.matmul import add_wide_product, product, row_count, wide_product
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_path import (
    add_branch,
    as_float,
    as_matrix,
    draw_dropout,
    expanded,
    is_few,
    like_rows_of,
    masked,
    torch_db,
    torch_ds,
    torch_s,
)
from stablelora_kernels.quantized import Stored, as_plain


def _fwd_fake(x, weights, biases, lora_As, lora_Bs, seeds, scalings, dropout_p):  # type: ignore[no-untyped-def]
    ranks = [a.shape[0] for a in lora_As]
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return ys, x.new_empty(row_count(x), sum(ranks))


@define_launches(
    "lora_linear_group_fwd",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] seeds, float[] scalings, "
    "float dropout_p) -> (Tensor[], Tensor)",
    _fwd_fake,
)
def lora_linear_group_fwd(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], seeds: Sequence[Tensor], scalings: Sequence[float], dropout_p: float,
) -> tuple[tuple[list[Tensor], Tensor], list[Any]]:  # fmt: skip
    """The Y's [..., N], and the S's [M, r] side by side, for x [..., K]; ``scalings`` are s' = scaling / (1 - p)."""
    from stablelora_kernels.launch.lora_linear_group import forward_launches

    results = ys, s = _fwd_fake(x, weights, biases, lora_As, lora_Bs, seeds, scalings, dropout_p)
    rows = [as_matrix(y) for y in ys]
    given = (as_matrix(x), weights, biases, lora_As, lora_Bs, s, rows, seeds, scalings, dropout_p)
    return results, forward_launches(problem.device_of(x.device), *given)


def _bwd_fake(x, grads, weights, lora_As, lora_Bs, s, seeds, scalings, dropout_p, need_x, need_a, need_b):  # type: ignore[no-untyped-def]
    return (
        grads[0].new_empty((*grads[0].shape[:-1], lora_As[0].shape[1]) if need_x else (0, lora_As[0].shape[1])),
        [torch.empty_like(a, memory_format=torch.contiguous_format) for a in lora_As] if need_a else [],
        [torch.empty_like(b, memory_format=torch.contiguous_format) for b in lora_Bs] if need_b else [],
    )


@define_launches(
    "lora_linear_group_bwd",
    "(Tensor? x, Tensor[] grads, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] s, Tensor[] seeds, "
    "float[] scalings, float dropout_p, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor[], Tensor[])",
    _bwd_fake,
)
def lora_linear_group_bwd(
    x: Tensor | None, grads: Sequence[Tensor], weights: Sequence[Tensor], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Sequence[Tensor], seeds: Sequence[Tensor], scalings: Sequence[float], dropout_p: float,
    need_x: bool, need_a: bool, need_b: bool,
) -> tuple[tuple[Tensor, list[Tensor], list[Tensor]], list[Any]]:  # fmt: skip
    """dX [..., K], the dA's and the dB's, for x [..., K] and each dY [..., N]; those that are not needed are empty.

    ``s``: each projection's S, or one matrix that has all of them side by side.
    """
    from stablelora_kernels.launch.lora_linear_group import backward_launches

    rest = (weights, lora_As, lora_Bs, _parts(s, lora_As), seeds, scalings, dropout_p)
    results = dx, das, dbs = _bwd_fake(x, grads, *rest, need_x, need_a, need_b)
    given = (None if x is None else as_matrix(x), [as_matrix(grad) for grad in grads], *rest)
    device = problem.device_of(grads[0].device)
    return results, backward_launches(device, *given, as_matrix(dx) if need_x else None, das, dbs)


def torch_group_fwd(
    x: Tensor, weights: Sequence[Tensor | Stored], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], scalings: Sequence[float], keeps: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The Y's and the unscaled S's. All tensors have one dtype. Without dropout, ``keeps`` is empty."""
    if keeps:
        parts = [torch_s(x, a, keep) for a, keep in zip(lora_As, keeps, strict=True)]
    else:
        parts = [*torch_s(x, torch.cat([*lora_As]), None).split([a.shape[0] for a in lora_As], 1)]
    ys = []
    for w, bias, b, scaling, s in zip(weights, biases, lora_Bs, scalings, parts, strict=True):
        y = wide_product(x, as_plain(w, x.dtype).t(), bias)
        ys.append(add_branch(y, s, b, scaling))
    return ys, parts


def torch_group_bwd(
    x: Tensor | None, grads: Sequence[Tensor], weights: Sequence[Tensor | Stored], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], s: Sequence[Tensor], keeps: Sequence[Tensor | None], scalings: Sequence[float],
    lora_dtype: torch.dtype, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:  # fmt: skip
    """dX, and the dA's and dB's in ``lora_dtype``, by the formulas of ``torch_path.torch_bwd``."""
    dx, das, dbs, every_ds = None, [], [], []
    masks = [None if keep is None else as_float(keep, grads[0].dtype) for keep in keeps]
    for i, (grad, b, scaling) in enumerate(zip(grads, lora_Bs, scalings, strict=True)):
        if need_x or need_a:
            every_ds.append(torch_ds(grad, b, scaling))
        if need_b:
            dbs.append(torch_db(grad, s[i], scaling, lora_dtype))
        if need_x:
            w = as_plain(weights[i], grad.dtype)
            dx = wide_product(grad, w) if dx is None else add_wide_product(dx, grad, w)
            # In a call with dropout, a projection without a mask has no branch.
            if masks and (mask := masks[i]) is not None:
                dx.addcmul_(product(every_ds[i], lora_As[i]), mask)
    if dx is not None and not masks:
        dx.addmm_(torch.cat(every_ds, 1), torch.cat([*lora_As]))
    if need_a:
        assert x is not None
        for i, ds in enumerate(every_ds):
            das.append(product(ds.t(), masked(x, keeps[i]) if keeps else x).to(lora_dtype))
    return dx, das, dbs


def _parts(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, if one matrix has all of them or they are apart already."""
    return [*s[0].split([a.shape[0] for a in lora_As], 1)] if len(s) == 1 < len(lora_As) else [*s]


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], scalings: Sequence[float], dropout_p: float, backend: str,
    entry: Entry | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:  # fmt: skip
    """The Y's [..., N], the S's [M, r], dropout's seeds or masks, and the s' for x [..., K]. On Triton one matrix has every S."""
    if backend == "triton":
        # One by one, in the order in which separate projections draw theirs.
        seeds: Any = [draw_seed(x, dropout_p) for _ in lora_As] if dropout_p else []
        scalings = [scaling / (1 - dropout_p) for scaling in scalings]
        ys, s = lora_linear_group_fwd((x, weights, biases, lora_As, lora_Bs, seeds, scalings, dropout_p), entry)
        return ys, [s], seeds, scalings
    rows = as_matrix(x)
    drawn = [draw_dropout(rows, dropout_p, scaling) for scaling in scalings]
    keeps = [keep for keep, _ in drawn if keep is not None]
    scalings = [scaling for _, scaling in drawn]
    ys, parts = torch_group_fwd(rows, weights, biases, lora_As, lora_Bs, scalings, keeps)
    return [like_rows_of(y, x) for y in ys], parts, keeps, scalings


class _LoRALinearGroup(torch.autograd.Function):
    """``tensors`` are the weights, the biases, the A's and the B's. Either all A's require gradients or none; so do the B's."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scalings: Sequence[float], dropout_p: float, backend: str, entry: Entry | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        g = len(scalings)
        weights, biases, lora_As, lora_Bs = (tensors[i * g : i * g + g] for i in range(4))
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        need_w, need_a, need_b = any(needs[:g]), any(needs[2 * g : 3 * g]), any(needs[3 * g :])
        ctx.lora_dtype = lora_As[0].dtype
        if backend == "torch":
            lora_As, lora_Bs = ([t.to(x.dtype) for t in given] for given in (lora_As, lora_Bs))  # type: ignore[assignment]
        ys, s, random, scalings = _forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, backend, entry)
        # Weights, A's, B's, S's, and dropout's seeds or masks.
        kept: list[Sequence[Tensor]] = [
            weights if need_x else (), lora_As, lora_Bs, s if need_b else (), random if need_x or need_a else (),
        ]  # fmt: skip
        ctx.save_for_backward(x if need_w or need_a else None, *chain.from_iterable(kept))
        ctx.lengths = [len(tensors) for tensors in kept]
        ctx.set_materialize_grads(False)
        ctx.scalings, ctx.dropout_p, ctx.backend = scalings, dropout_p, backend
        ctx.needs = need_x, need_a, need_b
        return tuple(ys)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, needs = len(given), ctx.needs_input_grad[5:]
        x, *saved = ctx.saved_tensors
        left = iter(saved)
        lists = [[*islice(left, length)] for length in ctx.lengths]
        # Skip projections whose outputs were not used.
        used = [i for i, grad in enumerate(given) if grad is not None]
        if len(used) < g:
            lists[3] = _parts(lists[3], lists[1])
            lists = [[tensors[i] for i in used if tensors] for tensors in lists]
        weights, lora_As, lora_Bs, s, random = lists
        grads = [grad for grad in given if grad is not None]
        scalings = [ctx.scalings[i] for i in used]
        need_x, need_a, need_b = ctx.needs
        dx, das, dbs = None, [], []
        if used and any(ctx.needs):
            if ctx.backend == "triton":
                dx, das, dbs = lora_linear_group_bwd((
                    x, grads, weights, lora_As, lora_Bs, s, random, scalings, ctx.dropout_p, need_x, need_a, need_b,
                ))  # fmt: skip
            else:
                leading, grads = grads[0].shape[:-1], [expanded(as_matrix(grad)) for grad in grads]
                dx, das, dbs = torch_group_bwd(
                    None if x is None else as_matrix(x), grads, weights, lora_As, lora_Bs, s, random, scalings,
                    ctx.lora_dtype, need_x, need_a, need_b,
                )  # fmt: skip
                dx = None if dx is None else dx.view(*leading, dx.shape[1])
        dws = [as_matrix(grad).t() @ as_matrix(x) if needs[i] else None for i, grad in zip(used, grads, strict=True)]
        dbiases = [as_matrix(grad).sum(0) if needs[g + i] else None for i, grad in zip(used, grads, strict=True)]
        results: list[Tensor | None] = []
        for wanted, found in zip((True, True, need_a, need_b), (dws, dbiases, das, dbs), strict=True):
            by_index = dict(zip(used, found, strict=True)) if wanted else {}
            results += [by_index.get(i) for i in range(g)]
        return dx if need_x else None, None, None, None, None, *results


def lora_linear_group_op(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], scalings: Sequence[float], dropout_p: float, backend: str, entry: Entry | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``functional.lora_linear_group`` with checked arguments and a chosen backend. ``entry``: as in ``lora_linear_op``."""
    way = None if entry is None else entry.way
    if way is None:
        way = _way(x, weights, biases, lora_As, lora_Bs, backend)
        if entry is not None:
            entry.way = way
    if way == "one by one":
        members = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
        return tuple(lora_linear_op(x, *member, dropout_p, backend) for member in members)
    if way == "with gradients":
        tensors = (*weights, *biases, *lora_As, *lora_Bs)
        return apply(_LoRALinearGroup, x, tuple(scalings), dropout_p, backend, entry, *tensors)
    if backend == "torch":
        lora_As, lora_Bs = ([t.to(x.dtype) for t in given] for given in (lora_As, lora_Bs))
    return tuple(_forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, backend, entry)[0])


def _way(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], backend: str,
) -> str:  # fmt: skip
    """How to compute a group: "one by one", "with gradients" or "without gradients"."""
    uniform = all(len({t.requires_grad for t in tensors}) == 1 for tensors in (lora_As, lora_Bs))
    if len(weights) == 1 or not uniform or (backend == "torch" and is_few(x, *weights)):
        return "one by one"
    tensors = (x, *weights, *biases, *lora_As, *lora_Bs)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "with gradients" if needs_grad else "without gradients"

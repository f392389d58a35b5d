"""``lora_rows``: a layer's output for a batch whose rows run several adapters, each on a range of
rows of its own.

    forward   Y = X W^T + bias, or BASE;  for each branch, on its rows: Y += s (X ∘ keep) A^T B^T
    backward  dX = dY W, or 0;            for each branch, on its rows: dX += (dS A) ∘ keep, dA, dB

The product with W is one for all rows. On Triton each branch has the launches of ``lora_branch`` on
its rows; one op runs all of them (``triton.py``). The PyTorch path calls the formulas of
one projection for each branch. Autograd saves x, each branch's S and the masks, nothing of the size
of Y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.cpu_products import by_float32, wide_product, without_autocast
from stablelora_kernels.ops.dropout import draw_seeds, draw_to_keep, scalings_after_dropout
from stablelora_kernels.ops.formulas import Saved, Wanted, add_branch_, gradients_of
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsForwardCall,
    RowsSettings,
)
from stablelora_kernels.ops.lora_rows.triton import (
    lora_rows_bwd,
    lora_rows_fwd,
)
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.ops.plans import tally_of_operators, tensors_of
from stablelora_kernels.projection import Projection, split
from stablelora_kernels.utils.tensors import autocast_dtype, cast


class RowsBranch(NamedTuple):
    """An adapter's branch, and its rows of x as a matrix: from ``start`` to before ``end``."""

    start: int
    end: int
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


class _Facts(NamedTuple):
    """What backward knows besides tensors."""

    backend: str
    # With the scalings and probabilities of dropout as the backend takes them.
    settings: RowsSettings
    x_dtype: torch.dtype
    lora_dtypes: tuple[torch.dtype, ...]


class _RowsContext(Context, Protocol):
    facts: _Facts
    # s' of each branch.
    scalings: tuple[float, ...]


class _Added(NamedTuple):
    """What was saved when the branches were added to Y, and s' of each."""

    saved: list[Saved]
    scalings: tuple[float, ...]


def lora_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    branches: Sequence[RowsBranch],
) -> Tensor:
    """``x W^T + bias``, or ``base``, with each branch added on its own rows: [..., N].

    Args:
        x: [..., K]. Under ``torch.autocast``, x, weight and bias are cast as by ``lora_linear``.
        weight: [N, K], frozen, in x's dtype; None with ``base``.
        bias: [N], frozen, or None.
        base: [..., N], what another layer has computed for x; None with ``weight``. It is not
            changed.
        branches: at least one, their rows ascending and apart. Shapes, dtypes and devices fit
            :func:`~stablelora_kernels.functional.lora_linear`; the caller has checked them.

    Returns:
        [..., N] in x's dtype, or base's.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x = cast(x, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
        branches = [_in_dtype(branch, dtype) for branch in branches]
    backend = resolve_backend(x.device)
    pairs = [t for branch in branches for t in (branch.lora_A, branch.lora_B)]
    if x.numel() == 0 or not all(t.numel() for t in pairs):
        # Kernels need something to multiply.
        backend = "torch"
    grad = torch.is_grad_enabled()
    dropout_ps = tuple([branch.dropout_p for branch in branches])
    settings = RowsSettings(
        starts=tuple([branch.start for branch in branches]),
        ends=tuple([branch.end for branch in branches]),
        scalings=tuple([branch.scaling for branch in branches]),
        dropout_ps=dropout_ps,
        need_x=grad and x.requires_grad,
        need_ab=grad and any(t.requires_grad for t in pairs),
    )
    if backend == "triton":
        scalings = [scalings_after_dropout([b.scaling], b.dropout_p)[0] for b in branches]
        settings = settings._replace(scalings=tuple(scalings))
    if backend == "torch" and not torch.compiler.is_compiling():
        tally_of_operators("lora_rows", x.device).calls += 1
    facts = _Facts(backend, settings, x.dtype, tuple([b.lora_A.dtype for b in branches]))
    apply: Callable[..., Tensor] = _LoRARows.apply
    return apply(facts, x, weight, bias, base, *pairs)


def _in_dtype(branch: RowsBranch, dtype: torch.dtype) -> RowsBranch:
    """``branch`` under autocast: float32 A and B are cast on the fly."""
    if branch.lora_A.dtype == torch.float32:
        return branch
    return branch._replace(lora_A=cast(branch.lora_A, dtype), lora_B=cast(branch.lora_B, dtype))


class _LoRARows(torch.autograd.Function):
    """``pairs``: A and B of each branch, one after another."""

    @staticmethod
    def forward(
        ctx: _RowsContext,
        facts: _Facts,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *pairs: Tensor,
    ) -> Tensor:
        rows = as_matrix(x)
        if base is not None:
            # Another backward may need it.
            y = as_matrix(base).clone(memory_format=torch.contiguous_format)
        else:
            assert weight is not None
            y = _product(rows, weight.t(), bias)
        add = _add_by_kernels if facts.backend == "triton" else _add_by_formulas
        added = add(rows, y, pairs, facts.settings)
        settings = facts.settings
        ctx.save_for_backward(
            x if settings.need_ab else None,
            weight if settings.need_x else None,
            *[t for saved in added.saved for t in saved],
        )
        ctx.facts = facts
        ctx.scalings = added.scalings
        return like_rows_of(y, x if base is None else base)

    @staticmethod
    @first_derivative
    def backward(ctx: _RowsContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        x, weight, *tensors = ctx.saved_tensors
        saved = [Saved(*five) for five in split(tensors, [len(Saved._fields)] * len(ctx.scalings))]
        # The branches compute in x's dtype.
        grad = with_own_memory(as_matrix(cast(dy, facts.x_dtype)))
        dx: Tensor | None = None
        if facts.settings.need_x:
            if weight is not None:
                dx = _product(grad, weight, None)
            else:
                lora_A = saved[0].lora_A
                assert lora_A is not None
                # Rows without a branch keep their zeros.
                dx = grad.new_zeros(grad.shape[0], lora_A.shape[1])
        matrix = None if x is None else as_matrix(x)
        backward = _backward_by_kernels if facts.backend == "triton" else _backward_by_formulas
        of_pairs = backward(matrix, grad, dx, saved, ctx.scalings, facts)
        dbase = dy if weight is None and ctx.needs_input_grad[4] else None
        return (None, None if dx is None else like_rows_of(dx, dy), None, None, dbase, *of_pairs)


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a b + bias`` for the frozen weight, in a's dtype."""
    if not by_float32(a):
        return wide_product(a, b, bias)
    with without_autocast(a):
        wide = wide_product(a.float(), b.float(), None if bias is None else bias.float())
    return wide.to(a.dtype)


# On the PyTorch path.


def _add_by_formulas(
    x: Tensor, y: Tensor, pairs: Sequence[Tensor], settings: RowsSettings
) -> _Added:
    """Add the branches of x [M, K] to y [M, N] in place."""
    saved = []
    scalings = []
    for i, rows in enumerate(settings.rows):
        branch = Projection(None, None, pairs[2 * i], pairs[2 * i + 1], settings.scalings[i])
        drawn = draw_to_keep(x[rows], settings.dropout_ps[i])
        projected = add_branch_(y[rows], x[rows], branch, drawn)
        needs_mask = settings.need_x or settings.need_ab
        saved.append(projected.saved(None, settings.need_ab, needs_mask))
        scalings.append(projected.p.scaling)
    return _Added(saved, tuple(scalings))


def _backward_by_formulas(
    x: Tensor | None,
    grad: Tensor,
    dx: Tensor | None,
    saved: Sequence[Saved],
    scalings: Sequence[float],
    facts: _Facts,
) -> list[Tensor | None]:
    """Add the branches' gradients to dx [M, K] in place; return dA and dB of each."""
    need_ab = facts.settings.need_ab
    wanted = Wanted(dx is not None, need_ab, need_ab)
    of_pairs: list[Tensor | None] = []
    for i, rows in enumerate(facts.settings.rows):
        dx_of_rows = None if dx is None else dx[rows]
        # In float32 the branch's gradient is of another dtype than dx.
        in_place = not by_float32(grad)
        gradients = gradients_of(
            x[rows] if x is not None else None,
            grad[rows],
            saved[i].as_projection(scalings[i]),
            saved[i].s,
            saved[i].recipe,
            facts.lora_dtypes[i],
            wanted,
            dx_of_rows if in_place else None,
        )
        if dx_of_rows is not None and gradients.dx is not None and not in_place:
            dx_of_rows += gradients.dx
        of_pairs += (gradients.da, gradients.db)
    return of_pairs


# On Triton.


def _add_by_kernels(
    x: Tensor, y: Tensor, pairs: Sequence[Tensor], settings: RowsSettings
) -> _Added:
    """:func:`_add_by_formulas` by the op."""
    seeds = draw_seeds(x.device, settings.dropout_ps)
    call = RowsForwardCall(x, y, pairs[::2], pairs[1::2], seeds, settings)
    results = lora_rows_fwd(None, tensors_of(call), settings)
    saved = []
    for lora_A, lora_B, s, mask in zip(
        call.lora_As, call.lora_Bs, results.s, results.masks, strict=True
    ):
        saved.append(Saved(None, lora_A, lora_B, s, mask))
    return _Added(saved, settings.scalings)


def _backward_by_kernels(
    x: Tensor | None,
    grad: Tensor,
    dx: Tensor | None,
    saved: Sequence[Saved],
    scalings: Sequence[float],
    facts: _Facts,
) -> list[Tensor | None]:
    """:func:`_backward_by_formulas` by the op."""
    settings = facts.settings._replace(scalings=tuple(scalings))
    call = RowsBackwardCall(
        grad=grad,
        x=x,
        dx=dx,
        lora_As=[branch.lora_A for branch in saved if branch.lora_A is not None],
        lora_Bs=[branch.lora_B for branch in saved if branch.lora_B is not None],
        s=[branch.s for branch in saved if branch.s is not None],
        masks=[branch.recipe for branch in saved if branch.recipe is not None],
        settings=settings,
    )
    results = lora_rows_bwd(None, tensors_of(call), settings)
    if not settings.need_ab:
        return [None] * (2 * len(saved))
    of_pairs: list[Tensor | None] = []
    for da, db in zip(results.das, results.dbs, strict=True):
        of_pairs += (da, db)
    return of_pairs

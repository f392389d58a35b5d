"""``lora_rows``: a layer's output for a batch whose rows run several adapters, each on a range of
rows of its own.

    forward   Y = X W^T + bias, or BASE;  for each branch, on its rows: Y += s (X ∘ keep) A^T B^T
    backward  dX = dY W, or 0;            for each branch, on its rows: dX += (dS A) ∘ keep, dA, dB

The product with W is one for all rows. On Triton each branch has the launches of ``lora_branch`` on
its rows; one op runs all of them (``triton.py``). The PyTorch path (``torch.py``) calls the formulas
of one projection for each branch. Autograd saves x, each branch's S and the masks, nothing of the size
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
from stablelora_kernels.ops.dropout import draw_seeds, scalings_after_dropout
from stablelora_kernels.ops.lora_rows.call import (
    RowsBackwardCall,
    RowsFacts,
    RowsForwardCall,
    RowsSettings,
)
from stablelora_kernels.ops.lora_rows.torch import rows_backward_torch, rows_forward_torch
from stablelora_kernels.ops.lora_rows.triton import lora_rows_bwd, lora_rows_fwd
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.ops.plans import Backend, on_torch, tally_of_operators
from stablelora_kernels.utils.tensors import autocast_dtype, cast


class RowsBranch(NamedTuple):
    """An adapter's branch, and its rows of x as a matrix: from ``start`` to before ``end``."""

    start: int
    end: int
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float


_BACKENDS = {
    "triton": Backend(lora_rows_fwd, lora_rows_bwd),
    "torch": Backend(
        on_torch(RowsForwardCall.of, rows_forward_torch),
        on_torch(RowsBackwardCall.of, rows_backward_torch),
    ),
}


class _RowsContext(Context, Protocol):
    facts: RowsFacts


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
    operands = [*[branch.lora_A for branch in branches], *[branch.lora_B for branch in branches]]
    if x.numel() == 0 or not all(t.numel() for t in operands):
        # Kernels need something to multiply.
        backend = "torch"
    grad = torch.is_grad_enabled()
    dropout_ps = tuple([branch.dropout_p for branch in branches])
    settings = RowsSettings(
        starts=tuple([branch.start for branch in branches]),
        ends=tuple([branch.end for branch in branches]),
        scalings=tuple([scalings_after_dropout([b.scaling], b.dropout_p)[0] for b in branches]),
        dropout_ps=dropout_ps,
        need_x=grad and x.requires_grad,
        need_ab=grad and any(t.requires_grad for t in operands),
    )
    if backend == "torch" and not torch.compiler.is_compiling():
        tally_of_operators("lora_rows", x.device).calls += 1
    apply: Callable[..., Tensor] = _LoRARows.apply
    return apply(RowsFacts(backend, settings, x.dtype), x, weight, bias, base, *operands)


def _in_dtype(branch: RowsBranch, dtype: torch.dtype) -> RowsBranch:
    """``branch`` under autocast: float32 A and B are cast on the fly."""
    if branch.lora_A.dtype == torch.float32:
        return branch
    return branch._replace(lora_A=cast(branch.lora_A, dtype), lora_B=cast(branch.lora_B, dtype))


class _LoRARows(torch.autograd.Function):
    """``operands``: the A's of all branches, then their B's."""

    @staticmethod
    def forward(
        ctx: _RowsContext,
        facts: RowsFacts,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        *operands: Tensor,
    ) -> Tensor:
        rows = as_matrix(x)
        if base is not None:
            # Another backward may need it.
            y = as_matrix(base).clone(memory_format=torch.contiguous_format)
        else:
            assert weight is not None
            y = _product(rows, weight.t(), bias)
        settings = facts.settings
        nothing: list[Tensor | None] = [None] * len(settings.starts)
        seeds = nothing
        if facts.backend == "triton":
            seeds = draw_seeds(x.device, settings.dropout_ps)
        forward = _BACKENDS[facts.backend].forward
        results = forward(None, [rows, y, *operands, *seeds], settings)
        # Save x itself, not its rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if settings.need_ab else None,
            weight if settings.need_x else None,
            *operands,
            *(results.s if settings.need_ab else nothing),
            *(results.masks if settings.need_x or settings.need_ab else nothing),
        )
        ctx.facts = facts
        return like_rows_of(y, x if base is None else base)

    @staticmethod
    @first_derivative
    def backward(ctx: _RowsContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        settings = facts.settings
        x, weight, *tensors = ctx.saved_tensors
        # The branches compute in x's dtype.
        grad = with_own_memory(as_matrix(cast(dy, facts.x_dtype)))
        dx: Tensor | None = None
        if settings.need_x:
            if weight is not None:
                dx = _product(grad, weight, None)
            else:
                lora_A = tensors[0]
                assert lora_A is not None
                # Rows without a branch keep their zeros.
                dx = grad.new_zeros(grad.shape[0], lora_A.shape[1])
        matrix = None if x is None else as_matrix(x)
        backward = _BACKENDS[facts.backend].backward
        gradients = backward(None, [grad, matrix, dx, *tensors], settings)
        of_operands: list[Tensor | None] = [None] * (2 * len(settings.starts))
        if settings.need_ab:
            of_operands = [*gradients.das, *gradients.dbs]
        dbase = dy if weight is None and ctx.needs_input_grad[4] else None
        dx = None if dx is None else like_rows_of(dx, dy)
        return (None, dx, None, None, dbase, *of_operands)


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a b + bias`` for the frozen weight, in a's dtype."""
    if not by_float32(a):
        return wide_product(a, b, bias)
    with without_autocast(a):
        wide = wide_product(a.float(), b.float(), None if bias is None else bias.float())
    return wide.to(a.dtype)

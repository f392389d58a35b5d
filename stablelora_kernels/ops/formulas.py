"""The PyTorch path of the ops: forward and backward of one projection on PyTorch's own operators,
without autograd.

A group, a gated MLP and experts are several projections. Under ``by_float32`` the same formulas run
on float32 copies, and results are rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from stablelora_kernels.formats import Stored
from stablelora_kernels.ops.cpu_products import (
    add_wide_product,
    by_float32,
    db_product,
    ds_product,
    product,
    wide_product,
    without_autocast,
)
from stablelora_kernels.ops.dropout import (
    applicable,
    draw_dropout,
    is_positions,
    mask_,
    masked,
)
from stablelora_kernels.ops.matrices import as_matrix
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import as_plain
from stablelora_kernels.utils.tensors import cast


class Wanted(NamedTuple):
    """Whether gradients of x, A and B are wanted."""

    x: bool
    a: bool
    b: bool


class Gradients(NamedTuple):
    """dX, dA and dB; None if they are not wanted."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None


def to_multiply(p: Projection, dtype: torch.dtype) -> Projection:
    """``p`` with A and B in ``dtype``; itself if they have it."""
    if p.lora_A is not None and p.lora_A.dtype is dtype:
        return p
    return Projection(p.weight, p.bias, cast(p.lora_A, dtype), cast(p.lora_B, dtype), p.scaling)


def lora_dtype_of(p: Projection) -> torch.dtype:
    """That of A and B, and so of their gradients."""
    return _branch_of(p)[0].dtype


def add_branch_(y: Tensor, x: Tensor, p: Projection, mask: Tensor | None) -> Tensor:
    """Add a lone branch of x [M, K] to y [M, N] in place, and return its S. ``p`` and ``mask`` are
    those of :func:`project`.
    """
    if by_float32(x) or y.dtype is not x.dtype or p.scaling == 0:
        added, s = project(x, p, mask, y)
        y.copy_(added)
        return s
    lora_A, lora_B = _branch_of(p)
    s = product(masked(x, mask), lora_A.t())
    y.addmm_(s, lora_B.t(), alpha=p.scaling)
    return s


def project(
    x: Tensor,
    p: Projection,
    mask: Tensor | None,
    base: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = X W^T + bias + s' S B^T, and the unscaled S = (X ∘ keep) A^T.

    Args:
        x: [M, K].
        p: what :func:`to_multiply` returns, with s' for a scaling.
        mask: of x; None if nothing is dropped.
        base: what a lone branch is added to in place of X W^T + bias, [M, N] of any dtype.
        weight_dtype: what the values of a quantized weight are rounded to, if it is not x's dtype.
    """
    if by_float32(x):
        with without_autocast(x):
            y, s = project(x.float(), _in_float32(p), mask, base, x.dtype)
        return y.to(x.dtype if base is None else base.dtype), s.to(x.dtype)
    lora_A, lora_B = _branch_of(p)
    # S first: then X is in the cache for the wide product.
    s = product(masked(x, mask), lora_A.t())
    if base is not None:
        return with_branch(base, s, lora_B, p.scaling), s
    weight = _weight_of(p, x.dtype, weight_dtype)
    y = wide_product(x, weight.t(), p.bias)
    if p.scaling == 0:
        return with_branch(y, s, lora_B, p.scaling), s
    if torch.compiler.is_compiling():
        # torch 2.11 gives a compiled autograd function gradients of zeros if it wrote to its output.
        return torch.addmm(y, s, lora_B.t(), alpha=p.scaling), s
    # In place, the branch needs no second activation.
    return y.addmm_(s, lora_B.t(), alpha=p.scaling), s


def thin_product(x: Tensor, p: Projection, mask: Tensor | None) -> Tensor:
    """S alone, as :func:`project` computes it."""
    lora_A = _branch_of(p)[0]
    if by_float32(x):
        with without_autocast(x):
            return product(masked(x.float(), mask), lora_A.float().t()).to(x.dtype)
    return product(masked(x, mask), lora_A.t())


def _in_float32(p: Projection) -> Projection:
    """Without a copy of the weight, which is made when it is read."""
    return Projection(p.weight, _float(p.bias), _float(p.lora_A), _float(p.lora_B), p.scaling)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _weight_of(p: Projection, dtype: torch.dtype, rounded_to: torch.dtype | None) -> Tensor:
    """W in ``dtype``; a quantized one is rounded to another dtype first, if there is one."""
    weight = p.weight
    assert weight is not None
    if isinstance(weight, Tensor):
        return cast(weight, dtype)
    return cast(weight.dequantize(rounded_to or dtype), dtype)


def _branch_of(p: Projection) -> tuple[Tensor, Tensor]:
    """A and B of a projection that has them."""
    assert p.lora_A is not None and p.lora_B is not None
    return p.lora_A, p.lora_B


def with_branch(base: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``base + scaling S B^T`` in base's dtype."""
    # With alpha 0, BLAS does not read S and B, whatever they hold.
    if s.dtype is base.dtype and scaling != 0:
        return torch.addmm(base, s, lora_B.t(), alpha=scaling)
    return base.add(torch.mm(s, lora_B.t()), alpha=scaling).to(base.dtype)


def gradients_of(
    x: Tensor | None,
    grad: Tensor,
    p: Projection,
    s: Tensor | None,
    mask: Tensor | None,
    lora_dtype: torch.dtype,
    wanted: Wanted,
    dx: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Gradients:
    """The wanted gradients for dY.

    Where products run in float32, so does the sum of several dX: it is not rounded yet.

    Args:
        x: [M, K], read for dA.
        grad: dY [M, N] in x's dtype.
        p: what :func:`project` has multiplied. Without a weight, dX is the branch's part alone.
        s: [M, r], read for dB.
        mask: that of :func:`project`.
        lora_dtype: that of dA and dB.
        wanted: which gradients.
        dx: the sum of other projections' dX, to which this one's is added in place.
        weight_dtype: that of :func:`project`.
    """
    if by_float32(grad):
        p = _in_float32(p)
        x = _float(x)
        s = _float(s)
        return gradients_of(x, grad.float(), p, s, mask, lora_dtype, wanted, dx, grad.dtype)
    lora_A, lora_B = _branch_of(p)
    mask = applicable(mask, grad.dtype)
    first_scaling, last_scaling = _split(p.scaling, grad.dtype, lora_dtype)
    # Products that read only dY come before the wide product, while dY is in the cache.
    da = None
    db = None
    if wanted.b:
        assert s is not None
        db = db_product(grad, s, first_scaling, lora_dtype)
    if wanted.x or wanted.a:
        ds = ds_product(grad, lora_B, first_scaling)
    if wanted.x:
        if p.weight is not None:
            weight = _weight_of(p, grad.dtype, weight_dtype)
            dx = wide_product(grad, weight) if dx is None else add_wide_product(dx, grad, weight)
        dx = _with_dx_of_branch(dx, ds, lora_A, mask, last_scaling)
    if wanted.a:
        assert x is not None
        da = product(ds.t(), masked(x, mask))
    da = cast(da, lora_dtype)
    db = cast(db, lora_dtype)
    if last_scaling != 1.0 and (wanted.a or wanted.b):
        torch._foreach_mul_([sums for sums in (da, db) if sums is not None], last_scaling)
    return Gradients(dx, da, db)


def _split(scaling: float, dtype: torch.dtype, lora_dtype: torch.dtype) -> tuple[float, float]:
    """By how much dS and dB are scaled as they are computed, and by how much what follows is.

    bfloat16 is scaled last, where sums are float32 and not rounded again. What float16 holds as
    zero or as infinity may be an ordinary number once it is scaled.
    """
    # BLAS does not multiply by 0 what is not finite.
    if dtype is torch.bfloat16 and lora_dtype is torch.float32 and scaling != 0:
        return 1.0, scaling
    return scaling, 1.0


def _with_dx_of_branch(
    dx: Tensor | None, ds: Tensor, lora_A: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """``dx + scaling (dS A) ∘ keep`` in the memory of ``dx``, or the branch's part alone."""
    if dx is None:
        return mask_(product(ds, lora_A), mask).mul_(scaling)
    if mask is None:
        return dx.addmm_(ds, lora_A, alpha=scaling)
    of_branch = product(ds, lora_A)
    if is_positions(mask):
        return dx.add_(mask_(of_branch, mask), alpha=scaling)
    return dx.addcmul_(of_branch, mask, value=scaling)


def plain_operators(x: Tensor, p: Projection, base: Tensor | None, dropout_p: float) -> Tensor:
    """The output of one projection or of a lone branch by PyTorch's operators under ordinary
    autograd.
    """
    lora_A, lora_B = _branch_of(p)
    rows = as_matrix(x)
    if base is not None:
        matrix = as_matrix(base)
    else:
        assert p.weight is not None
        matrix = linear(rows, as_plain(p.weight, x.dtype), p.bias)
    keep, scaling = draw_dropout(rows, dropout_p, p.scaling)
    if lora_A.dtype is x.dtype or rows.shape[0] > p.rank or isinstance(p.weight, Stored):
        s = linear(masked(rows, keep), cast(lora_A, x.dtype))
        y = with_branch(matrix, s, cast(lora_B, x.dtype), scaling)
    else:
        # The rows are smaller than A and B, and cast instead.
        with without_autocast(x):
            s = linear(masked(rows.to(lora_A.dtype), keep), lora_A)
            y = matrix.add(torch.mm(s, lora_B.t()), alpha=scaling).to(matrix.dtype)
    like = x if base is None else base
    return y if like.dim() == 2 else y.view(*like.shape[:-1], y.shape[-1])

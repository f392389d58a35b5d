"""The PyTorch path of the ops: forward and backward of projections on PyTorch's own operators, of
one dtype and without autograd; and a projection under ordinary autograd.

Under ``by_float32`` the same formulas run on float32 copies, and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from stablelora_kernels.ops.cpu_products import (
    add_wide_product,
    by_float32,
    db_product,
    ds_product,
    product,
    wide_product,
    without_autocast,
)
from stablelora_kernels.ops.dropout import applicable, draw_dropout, is_positions, mask_, masked
from stablelora_kernels.ops.matrices import as_matrix
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored, as_plain
from stablelora_kernels.utils.tensors import cast


class Wanted(NamedTuple):
    """Whether gradients of x, of the A's and of the B's are wanted."""

    x: bool
    a: bool
    b: bool


class Gradients(NamedTuple):
    """dX, None if it is not wanted; the dA's and the dB's, no dA or no dB if they are not wanted."""

    dx: Tensor | None
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


def _in_float32(p: Projection) -> Projection:
    """Without a copy of the weight, which is made when it is read."""
    return Projection(p.weight, _float(p.bias), _float(p.lora_A), _float(p.lora_B), p.scaling)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _branch_of(p: Projection) -> tuple[Tensor, Tensor]:
    """A and B of a projection that has them."""
    assert p.lora_A is not None and p.lora_B is not None
    return p.lora_A, p.lora_B


def with_branch(base: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``base + scaling S B^T`` of matrices of one dtype."""
    if scaling == 0:
        # With alpha 0, BLAS does not read S and B, whatever they hold.
        return base + torch.mm(s, lora_B.t()) * 0.0
    return torch.addmm(base, s, lora_B.t(), alpha=scaling)


def torch_fwd(
    x: Tensor,
    projections: Sequence[Projection],
    keeps: Sequence[Tensor | None],
    base: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The Y's, and the unscaled S = (X ∘ keep) A^T. All tensors but ``base`` have one dtype; the
    scalings are s'.

    ``weight_dtype``: what the values of a quantized weight are rounded to, if it is not x's dtype.
    """
    if by_float32(x):
        copies = [_in_float32(p) for p in projections]
        with without_autocast(x):
            ys, every_s = torch_fwd(x.float(), copies, keeps, base, x.dtype)
        y_dtype = x.dtype if base is None else base.dtype
        return [y.to(y_dtype) for y in ys], [s.to(x.dtype) for s in every_s]
    # S first: then X is in the cache for the wide products.
    every_s = _every_s(x, projections, keeps)
    ys = []
    for p, s in zip(projections, every_s, strict=True):
        if base is None:
            ys.append(_projected(x, p, s, weight_dtype or x.dtype))
        else:
            ys.append(_added_to(base, p, s))
    return ys, every_s


def _every_s(
    x: Tensor, projections: Sequence[Projection], keeps: Sequence[Tensor | None]
) -> list[Tensor]:
    """Each S = (X ∘ keep) A^T, by one product if nothing is dropped."""
    lora_As = [_branch_of(p)[0] for p in projections]
    if len(lora_As) > 1 and all(keep is None for keep in keeps):
        side_by_side = product(x, torch.cat(lora_As).t())
        return list(side_by_side.split([lora_A.shape[0] for lora_A in lora_As], 1))
    return [product(masked(x, keep), a.t()) for a, keep in zip(lora_As, keeps, strict=True)]


def _projected(x: Tensor, p: Projection, s: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """Y = X W^T + bias + s' S B^T, with a quantized W rounded to ``weight_dtype``."""
    assert p.weight is not None and p.lora_B is not None
    weight = as_plain(p.weight, weight_dtype).to(x.dtype)
    y = wide_product(x, weight.t(), p.bias)
    if p.scaling == 0:
        return with_branch(y, s, p.lora_B, p.scaling)
    # In place, the branch needs no second activation.
    return y.addmm_(s, p.lora_B.t(), alpha=p.scaling)


def _added_to(base: Tensor, p: Projection, s: Tensor) -> Tensor:
    """BASE + s' S B^T, in base's dtype."""
    assert p.lora_B is not None
    if base.dtype == s.dtype:
        return with_branch(base, s, p.lora_B, p.scaling)
    return base.add(torch.mm(s, p.lora_B.t()), alpha=p.scaling).to(base.dtype)


def torch_bwd(
    x: Tensor | None,
    grads: Sequence[Tensor],
    projections: Sequence[Projection],
    every_s: Sequence[Tensor | None],
    keeps: Sequence[Tensor | None],
    lora_dtype: torch.dtype,
    wanted: Wanted,
    weight_dtype: torch.dtype | None = None,
) -> Gradients:
    """The wanted gradients, the dA's and dB's in ``lora_dtype``, for each dY. All tensors have one
    dtype; the scalings are s'.

    x is read for dA, S for dB. Without a weight, dX is the branch's part alone. ``weight_dtype`` is
    that of :func:`torch_fwd`.
    """
    dtype = grads[0].dtype
    if by_float32(grads[0]):
        gradients = torch_bwd(
            _float(x),
            [grad.float() for grad in grads],
            [_in_float32(p) for p in projections],
            [_float(s) for s in every_s],
            keeps,
            lora_dtype,
            wanted,
            dtype,
        )
        dx = gradients.dx
        return gradients._replace(dx=None if dx is None else dx.to(dtype))
    masks = [applicable(keep, dtype) for keep in keeps]
    every_ds: list[Tensor] = []
    dbs: list[Tensor] = []
    dx = None
    for i, (grad, p) in enumerate(zip(grads, projections, strict=True)):
        # Products that read only dY come before the wide product, while dY is in the cache.
        lora_A, lora_B = _branch_of(p)
        if wanted.x or wanted.a:
            every_ds.append(ds_product(grad, lora_B, p.scaling))
        if wanted.b:
            s = every_s[i]
            assert s is not None
            dbs.append(db_product(grad, s, p.scaling, lora_dtype))
        if wanted.x and p.weight is not None:
            weight = as_plain(p.weight, weight_dtype or dtype).to(dtype)
            dx = wide_product(grad, weight) if dx is None else add_wide_product(dx, grad, weight)
        if wanted.x:
            dx = _with_masked_branch(dx, every_ds[i], lora_A, masks[i])
    if dx is not None and projections[0].weight is not None and all(m is None for m in masks):
        # All branches by one product.
        lora_As = [_branch_of(p)[0] for p in projections]
        dx.addmm_(_joined(every_ds, 1), _joined(lora_As, 0))
    das = []
    if wanted.a:
        assert x is not None
        for ds, mask in zip(every_ds, masks, strict=True):
            das.append(product(ds.t(), masked(x, mask)).to(lora_dtype))
    return Gradients(dx, das, dbs)


def _with_masked_branch(
    dx: Tensor | None, ds: Tensor, lora_A: Tensor, mask: Tensor | None
) -> Tensor | None:
    """dX with (dS A) ∘ mask, if there is a mask; that alone, if there is no dX because there is no
    weight.
    """
    if dx is None:
        return mask_(product(ds, lora_A), mask)
    if mask is None:
        # In a call with dropout, a projection without a mask has no branch.
        return dx
    branch = product(ds, lora_A)
    if is_positions(mask):
        return dx.add_(mask_(branch, mask))
    return dx.addcmul_(branch, mask)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


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

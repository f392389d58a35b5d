"""DoRA (arXiv 2402.09353) without a matrix of the weight's size: the norms of the rows of W + s B
A, and the scale of columns.

    n^2 = |W_n|^2 + 2 s <B_n, (W A^T)_n> + s^2 B_n (A A^T) B_n^T
    Y = f (Z - bias) + bias,   f = m / n,   Z = X W^T + bias + s X A^T B^T

W A^T is the base layer's product for the r rows of A, so W itself may be stored in any form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative

# Elements of W, and rows of dY ∘ Z, at a time, which bounds the float32 copies.
_ELEMENTS = 1 << 18
_ROWS = 256


def row_norms(
    square_sums: Tensor, products: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The norm of each row of W + s B A, [N].

    Computed in float32, or in float64 for a float64 A. A row that cancels to next to nothing keeps
    the rounding errors of its parts.

    Args:
        square_sums: |W_n|^2, [N].
        products: A W^T, [r, N].
        lora_A: [r, K].
        lora_B: [N, r].
        scaling: s.
    """
    dtype = square_sums.dtype
    a = lora_A.to(dtype)
    b = lora_B.to(dtype)
    both = (products.to(dtype).t() * (2 * scaling)).addmm_(b, a @ a.t(), alpha=scaling**2)
    return both.mul_(b).sum(1).add_(square_sums).clamp_min_(0).sqrt_()


def square_sums(weight: Tensor) -> Tensor:
    """|W_n|^2 for each row of W [N, K], in float32 or, for a float64 W, in float64."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, _ELEMENTS // max(1, weight.shape[1]))
    # vector_norm's own conversion would copy the whole weight.
    norms = [
        torch.linalg.vector_norm(block.to(dtype), dim=1) for block in weight.detach().split(rows)
    ]
    return torch.cat(norms).square_()


def square_sums_by_products(
    product: Callable[[Tensor], Tensor], shape: tuple[int, int], like: Tensor
) -> Tensor:
    """|W_n|^2 for each row of a W that nothing but its layer reads, in float32.

    Args:
        product: returns x W^T for x [M, K].
        shape: N and K.
        like: a tensor of the dtype and on the device that x must have.
    """
    n, k = shape
    total = torch.zeros(n, dtype=torch.float32, device=like.device)
    step = max(1, _ELEMENTS // max(n, k))
    for start in range(0, k, step):
        # Some rows of the identity matrix, whose products are columns of W.
        rows = like.new_zeros(min(step, k - start), k)
        rows.diagonal(start).fill_(1)
        total += product(rows).float().square_().sum(0)
    return total


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, z: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        # Z is saved for dm alone.
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factor, bias)
        y = torch.mul(z, factor, out=torch.empty_like(z))
        return y if bias is None else y.add_((1 - factor) * bias)

    @staticmethod
    @first_derivative
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, factor, bias = ctx.saved_tensors
        assert factor is not None
        dz, dfactor, dbias = None, None, None
        if ctx.needs_input_grad[0]:
            dz = torch.mul(grad, factor, out=torch.empty_like(grad))
        if z is not None:
            dfactor = torch.zeros_like(factor)
            shift = 0.0 if bias is None else bias.to(factor.dtype)
            grad_blocks = grad.reshape(-1, grad.shape[-1]).split(_ROWS)
            z_blocks = z.reshape(-1, z.shape[-1]).split(_ROWS)
            for grad_rows, z_rows in zip(grad_blocks, z_blocks, strict=True):
                dfactor += (grad_rows.to(factor.dtype) * (z_rows - shift)).sum(0)
        if bias is not None and ctx.needs_input_grad[2]:
            total = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=factor.dtype)
            dbias = ((1 - factor) * total).to(bias.dtype)
        return dz, dfactor, dbias


def scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """``factor ∘ (Z - bias) + bias`` for Z [..., N], factor [N] in float32 or float64 and bias [N];
    rounded to z's dtype twice at most.

    Where the factor is 1, as for a new adapter beside float32 weights, this is Z to the bit.
    """
    y: Tensor = _ScaleColumns.apply(z, factor, bias)  # type: ignore[no-untyped-call]
    return y

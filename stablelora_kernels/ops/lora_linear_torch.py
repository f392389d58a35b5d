"""``lora_linear`` on PyTorch's own operators: the formulas, and dropout's mask. ``lora_branch`` and the group share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.products import pays, product, wide_product


def draw_keep(x: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """A keep-mask of x's shape, bool, from torch's generator, and the probability of dropping that it really has."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p), dropout_p
    # bernoulli_ draws a double an element, one after another. Sixteen bits an element, four elements a word, are
    # several times as fast; the probability is rounded to 1/65536, and the scale follows the rounded one, so no bias is left.
    dropped = round(dropout_p * 65536)
    count = -(-x.numel() // 4)
    if torch.compiler.is_compiling():
        # torch.compile takes no random_(). The same bits: what randint adds to a word turns its highest bit around.
        words = torch.randint(-(2**63), 2**63 - 1, (count,)) ^ -(2**63)
    else:
        words = torch.empty(count, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return keep, dropped / 65536


def as_float(keep: Tensor, dtype: torch.dtype) -> Tensor:
    # From uint8, the conversion is vectorised; from bool, it is not.
    return keep.view(torch.uint8).to(dtype)


# Below this many rows a call is a matter of microseconds, of which a Python autograd function would be the most, unless the
# weight is wide and oneDNN's product, which autograd does not know, saves more than that.
FEW_ROWS = 64


def is_few(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a call on x [..., K] is best made of plain operators under ordinary autograd."""
    # A graph is for any number of rows, and has no Python in it.
    if torch.compiler.is_compiling() or x.numel() // x.shape[-1] >= FEW_ROWS:
        return False
    return not any(w is not None and pays(x, w) for w in weights)


def as_matrix(x: Tensor) -> Tensor:
    """[..., K] as [M, K]."""
    # Of a matrix not even a view: a view is a node of the graph too, and costs a third of a small product.
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def torch_thin(x: Tensor, lora_A: Tensor, keep: Tensor | None) -> Tensor:
    """(X ∘ keep) A^T, of one dtype."""
    dropped = x if keep is None else x * as_float(keep, x.dtype)
    # Of the two ways to write a thin product, oneDNN's bfloat16 one is faster with the small side first, MKL's float32 one
    # with the tall side first.
    tall_first = x.dtype in (torch.float32, torch.float64)
    return product(dropped, lora_A.t()) if tall_first else product(lora_A, dropped.t()).t()


def torch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Y and S = (X ∘ keep) A^T, which is not scaled here: the scaling is the second product's alpha. One dtype."""
    # S before the wide product, which finds X in the cache then.
    s = torch_thin(x, lora_A, keep)
    y = wide_product(x, weight.t(), bias)
    # In place, so that the branch costs no second activation.
    y.addmm_(s, lora_B.t(), alpha=scaling)
    return y, s


def expanded(grad: Tensor) -> Tensor:
    """A broadcast gradient, as of sum(), with memory of its own: each product would expand it anew."""
    # Older compilers know no strides.
    return grad.contiguous() if not torch.compiler.is_compiling() and 0 in grad.stride() else grad


def torch_bwd(
    grad: Tensor, x: Any, weight: Any, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, keep: Tensor | None,
    scaling: float, lora_dtype: torch.dtype, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dX, and dA and dB in ``lora_dtype``; the arguments are of one dtype. Without a weight, the branch's dX alone."""
    dx = da = db = None
    mask = None if keep is None else as_float(keep, grad.dtype)
    # What reads dY alone goes before the wide product, while dY is in the cache; small sides first, dS^T and S^T being rows.
    if need_x or need_a:
        dst = product(lora_B.t(), grad.t()).mul_(scaling)
    if need_b:
        assert s is not None
        db = product(s.t().contiguous(), grad).t().to(lora_dtype, memory_format=torch.contiguous_format)
        db.mul_(scaling)
    if need_x and weight is None:
        dx = product(dst.t(), lora_A)
        if mask is not None:
            dx.mul_(mask)
    elif need_x:
        dx = wide_product(grad, weight)
        if mask is None:
            dx.addmm_(dst.t(), lora_A)
        else:
            dx.addcmul_(product(dst.t(), lora_A), mask)
    if need_a:
        da = product(dst, x if mask is None else x * mask).to(lora_dtype)
    return dx, da, db

"""``lora_linear`` on PyTorch's own operators: the formulas, and dropout's mask. ``lora_branch`` and the group share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.matmul import pays, product, wide_product


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
    # From uint8, the conversion is vectorized; from bool, it is not.
    return keep.view(torch.uint8).to(dtype)


# Below this many rows a call is a matter of microseconds, of which a Python autograd function would be the most, unless the
# weight is wide and oneDNN's product, which autograd does not know, saves more than that. In 16 bits and without a mask the
# function's in-place products gain so little that it is the slower way up to some hundred rows.
FEW_ROWS, FEW_ROWS_IN_16_BITS = 64, 512


def is_few(x: Tensor, *weights: Tensor | None, limit: int = FEW_ROWS) -> bool:
    """Whether a call on x [..., K] is best made of plain operators under ordinary autograd."""
    # A graph is for any number of rows, and has no Python in it.
    if torch.compiler.is_compiling() or x.numel() // x.shape[-1] >= limit:
        return False
    return not any(w is not None and pays(x, w) for w in weights)


def few_rows(x: Tensor, dropout_p: float) -> int:
    """What ``limit`` is of a call by itself."""
    return FEW_ROWS_IN_16_BITS if x.dtype in (torch.bfloat16, torch.float16) and not dropout_p else FEW_ROWS


def as_matrix(x: Tensor) -> Tensor:
    """[..., K] as [M, K]."""
    # Of a matrix not even a view: a view is a node of the graph too, and costs a third of a small product.
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def torch_s(x: Tensor, lora_A: Tensor, keep: Tensor | None) -> Tensor:
    """S = (X ∘ keep) A^T, [M, r], of one dtype; not scaled."""
    return product(x if keep is None else x * as_float(keep, x.dtype), lora_A.t())


# A thin product can be written with the small side first or with the tall one. In backward the float32 libraries are faster with
# the small one, up to several times; oneDNN's bfloat16 with the tall one, where rows are few enough to notice.


def _small_first(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def torch_ds(grad: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """dS = s' dY B, [M, r], of one dtype."""
    if _small_first(grad.dtype):
        return product(lora_B.t(), grad.t()).mul_(scaling).t()
    return product(grad, lora_B).mul_(scaling)


def torch_db(grad: Tensor, s: Tensor, scaling: float, lora_dtype: torch.dtype) -> Tensor:
    """dB = s' dY^T S, [N, r], in ``lora_dtype``."""
    if _small_first(grad.dtype):
        db = product(s.t().contiguous(), grad).t().to(lora_dtype, memory_format=torch.contiguous_format)
    else:
        db = product(grad.t(), s).to(lora_dtype)
    return db.mul_(scaling)


def torch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Y and S = (X ∘ keep) A^T, which is not scaled here: the scaling is the second product's alpha. One dtype."""
    # S before the wide product, which finds X in the cache then.
    s = torch_s(x, lora_A, keep)
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
    # What reads dY alone goes before the wide product, while dY is in the cache.
    if need_x or need_a:
        ds = torch_ds(grad, lora_B, scaling)
    if need_b:
        assert s is not None
        db = torch_db(grad, s, scaling, lora_dtype)
    if need_x and weight is None:
        dx = product(ds, lora_A)
        if mask is not None:
            dx.mul_(mask)
    elif need_x:
        dx = wide_product(grad, weight)
        if mask is None:
            dx.addmm_(ds, lora_A)
        else:
            dx.addcmul_(product(ds, lora_A), mask)
    if need_a:
        da = product(ds.t(), x if mask is None else x * mask).to(lora_dtype)
    return dx, da, db

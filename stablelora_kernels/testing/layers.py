"""What the rounding analysis and tests read of a layer: operands as rounded numbers, and the mask
that its op saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import masked
from stablelora_kernels.quantized import QuantizedWeight
from stablelora_kernels.reference import unpack_mask
from stablelora_kernels.reference.rounding import Rounded, dequantized, operand
from stablelora_kernels.testing.inputs import dequantized_ref


def rounded_operand(t: Tensor | QuantizedWeight | None, dtype: torch.dtype) -> Rounded | None:
    """An operand in float64, with the rounding that it takes to be used in ``dtype``."""
    if t is None:
        return None
    return (
        operand(t.detach(), dtype)
        if isinstance(t, Tensor)
        else dequantized(dequantized_ref(t), dtype)
    )


def as_rows(t: Tensor, dtype: torch.dtype) -> Rounded:
    """An operand of any leading sizes as a matrix, with the rounding that it takes to be used in
    ``dtype``.
    """
    return operand(t.detach().reshape(t.shape[:-1].numel(), t.shape[-1]), dtype)


def kept_for_backward(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The first tensor of ``dtype`` that the node which made ``y`` keeps: dropout's mask is int32
    on Triton; on the PyTorch path bool, or int32 positions of one dimension.
    """
    node = y.grad_fn
    while node is not None:
        for saved in getattr(node, "saved_tensors", ()):
            if saved is not None and saved.dtype == dtype:
                return saved
        # Skip the views that autograd recorded after the op.
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def keep_of(y: Tensor, x: Tensor) -> Tensor:
    """The dropout mask that the op of ``y`` saved for backward, bool in x's shape."""
    mask = kept_for_backward(y, torch.bool)
    if mask is None:
        mask = kept_for_backward(y, torch.int32)
    if mask is None:
        raise LookupError("the op saved no mask for backward")
    if mask.dim() == 1:
        return masked(torch.ones(x.shape, dtype=torch.bool), mask)
    if mask.dtype == torch.int32:
        mask = unpack_mask(mask, x.shape[-1])
    return mask.view(x.shape)

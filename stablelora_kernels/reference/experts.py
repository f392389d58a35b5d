"""A stack of experts with LoRA: each expert is a ``lora_linear_ref`` of the rows that are its own."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from stablelora_kernels.reference.lora import lora_linear_grads_ref, lora_linear_ref


def lora_experts_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``Y`` [T, N] of x [T, K], weight [E, N, K], bias [E, N], lora_A [E, r, K], lora_B [E, N, r]; keep [T, K] is D's mask.

    Expert e has the rows from ``offsets[e - 1]``, or 0, to before ``offsets[e]``; rows behind the last offset give zeros.
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in enumerate(expert_rows(offsets)):
        kept = None if keep is None else keep[rows]
        given = (x[rows], weight[e], None if bias is None else bias[e], lora_A[e], lora_B[e])
        y[rows] = lora_linear_ref(*given, scaling, kept, dropout_p)
    return y


def lora_experts_grads_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients by name for an incoming grad [T, N]: dX [T, K], dA [E, r, K], dB [E, N, r]; zeros where there are no rows."""
    grads = {"dX": x.new_zeros(x.shape), "dA": lora_A.new_zeros(lora_A.shape), "dB": lora_B.new_zeros(lora_B.shape)}
    for e, rows in enumerate(expert_rows(offsets)):
        kept = None if keep is None else keep[rows]
        part = lora_linear_grads_ref(grad[rows], x[rows], weight[e], lora_A[e], lora_B[e], scaling, kept, dropout_p)
        grads["dX"][rows], grads["dA"][e], grads["dB"][e] = part["dX"], part["dA"], part["dB"]
    return grads


def expert_rows(offsets: Tensor) -> list[slice]:
    """The rows of each expert."""
    ends = [0, *offsets.tolist()]
    return [slice(start, end) for start, end in pairwise(ends)]

"""``lora_linear_cross_entropy`` and ``lora_linear_log_probs``: the loss of a head with LoRA, and its
labels' log-probabilities, without logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.ops.checks import check_cross_entropy
from stablelora_kernels.ops.lora_linear_cross_entropy.autograd import (
    cross_entropy_op,
    with_entropies,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    CrossEntropyCall,
    CrossEntropySettings,
)
from stablelora_kernels.ops.matrices import as_matrix
from stablelora_kernels.projection import Projection
from stablelora_kernels.utils.tensors import autocast_dtype, cast
from stablelora_kernels.utils.validation import check_choice, check_float

REDUCTIONS = ("mean", "sum", "none")
OUTPUTS = ("log_probs", "entropy")


def lora_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """The cross-entropy of ``softcap(logit_scale · lora_linear(hidden))``, whose logits [..., V]
    are never held together.

    ``softcap(z)`` is ``softcap · tanh(z / softcap)``. Logits are computed for a chunk of tokens at
    a time, of 32 MiB on a CPU and 256 MiB on a GPU. Sums are in float32, and in float64 for float64.

    A training step takes two products with the weight, whatever is incoming in backward: forward
    computes the gradient of each token's hidden state, and backward scales it. With ``reduction=
    "none"`` and a lora_B or a bias that requires a gradient, backward takes a third one, which
    computes the logits again. Without gradients, a call takes one.

    Args:
        hidden: [..., H], in any of the dtypes of :func:`lora_linear`'s x. Under ``torch.autocast``,
            hidden, weight and bias are first cast to its dtype.
        weight: [V, H], frozen, in hidden's dtype. It may be an embedding's.
        labels: [...], int64, in [0, V) or ``ignore_index``. They are those of hidden's positions: a
            causal model's must be shifted before. On a CPU another one raises; elsewhere its loss
            and its gradients are NaN.
        bias: [V] in hidden's dtype, or None. It may require a gradient.
        lora_A: [r, H], as in :func:`lora_linear`; None with lora_B None for a head without LoRA.
        lora_B: [V, r].
        scaling: s, a number.
        ignore_index: the label of tokens that do not count: their loss and gradients are zeros.
        reduction: "mean" over the tokens that count, which is NaN without any, as PyTorch's; "sum";
            or "none".
        softcap: the cap of the logits, or None.
        logit_scale: by how much logits are multiplied before the cap.
        dropout_p: as in :func:`lora_linear`, on the branch's input; PyTorch draws the mask.
        training: whether to apply dropout.

    Returns:
        The loss in float32, or float64 for float64: a scalar, or with "none" in labels' shape. Only
        requested gradients are computed. They have no second derivative.

    Raises:
        ValueError: shapes or devices do not fit, a label on a CPU is out of range, the weight
            requires a gradient, or an option is out of range.
        TypeError: dtypes do not fit, or an operand is a DTensor or quantized.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    call = _call_of(
        hidden,
        Projection(weight, bias, lora_A, lora_B, scaling),
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        dropout_p=dropout_p,
        training=training,
    )
    losses = cross_entropy_op(call, summed=reduction != "none")
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses
    count = (call.labels != ignore_index).sum()
    # Not 0 / 0, whose gradients would be NaN.
    return torch.where(count > 0, losses / count.clamp(min=1), torch.nan)


def lora_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = ("log_probs", "entropy"),
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """The logarithms of the labels' probabilities under ``softmax(softcap(logit_scale ·
    lora_linear(hidden)) / temperature)``, and the entropies of these softmaxes, for the losses of
    reinforcement learning and of preferences. The logits [..., V] are never held together.

    A token's values depend on its own hidden state alone, and a repeated call gives the same bits.
    So the ratio of a policy's probabilities is exactly 1 before its first update.

    Memory and dtypes are those of :func:`lora_linear_cross_entropy` with ``reduction="none"``, of
    which ``log_probs`` are the negative. With "entropy" among ``outputs``, forward takes one product
    with the weight and backward two; without it, as there.

    Args:
        hidden: [..., H].
        weight: [V, H], frozen, in hidden's dtype. It may be an embedding's.
        bias: [V], or None.
        lora_A: [r, H]; None with lora_B None for a head without LoRA.
        lora_B: [V, r].
        scaling: s, a number.
        labels: [...], int64, in [0, V) or ``ignore_index``: the tokens whose probabilities are asked
            for, at hidden's positions. A causal model's must be shifted before.
        temperature: above 0, what the logits are divided by behind the cap.
        outputs: "log_probs", "entropy" or both, in the order of the results.
        ignore_index: the label of tokens that do not count: their values and gradients are zeros.
        softcap: as in :func:`lora_linear_cross_entropy`; so are the other arguments.
        logit_scale: by how much logits are multiplied before the cap.
        dropout_p: of the branch's input.
        training: whether to apply dropout.

    Returns:
        A tensor in labels' shape for each of ``outputs``, in float32, or float64 for float64. They
        have no second derivative.

    Raises:
        ValueError: ``temperature`` or ``outputs`` is out of range; or as
            :func:`lora_linear_cross_entropy`.
        TypeError: as :func:`lora_linear_cross_entropy`.
    """
    check_float("temperature", temperature, low=0.0, low_open=True)
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not names or len({*names}) < len(names) or not {*names} <= {*OUTPUTS}:
        raise ValueError(
            f"outputs must be some of {', '.join(map(repr, OUTPUTS))}, got {outputs!r}"
        )
    call = _call_of(
        hidden,
        Projection(weight, bias, lora_A, lora_B, scaling),
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        dropout_p=dropout_p,
        training=training,
        temperature=temperature,
    )
    found: dict[str, Tensor] = {}
    if "entropy" in names:
        losses, found["entropy"] = with_entropies(call)
    else:
        losses = cross_entropy_op(call, summed=False)
    found["log_probs"] = -losses
    return tuple(found[name].view(labels.shape) for name in names)


def _call_of(
    hidden: Tensor,
    head: Projection,
    labels: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    dropout_p: float,
    training: bool,
    temperature: float = 1.0,
) -> CrossEntropyCall:
    """The op's call, of arguments that it checks and casts under autocast."""
    weight, bias, lora_A, lora_B, scaling = head
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and hidden.is_floating_point() and hidden.dtype != torch.float64:
        hidden = cast(hidden, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
        if lora_A is not None and lora_A.dtype != torch.float32:
            lora_A = cast(lora_A, dtype)
            lora_B = cast(lora_B, dtype)
    head = Projection(weight, bias, lora_A, lora_B, scaling)
    check_cross_entropy(hidden, head, labels, ignore_index, softcap, logit_scale)
    assert isinstance(weight, Tensor)
    check_float("dropout_p", dropout_p, low=0.0, high=1.0)
    rows = as_matrix(hidden)
    row_labels = labels.reshape(-1)
    s = None
    if lora_A is not None:
        dropped = torch.nn.functional.dropout(rows, dropout_p, training)
        # Its operands have autocast's dtype, or float64, which autocast leaves alone.
        s = torch.nn.functional.linear(dropped, cast(lora_A, hidden.dtype))
    return CrossEntropyCall(
        hidden=rows,
        weight=weight,
        bias=bias,
        s=s,
        lora_B=lora_B,
        labels=row_labels,
        row_scale=None,
        entropy_scale=None,
        settings=CrossEntropySettings(
            ignore_index,
            scaling,
            # cap · tanh(z / cap) / t is the cap of z / t at cap / t.
            (softcap or 0.0) / temperature,
            logit_scale / temperature,
            _backend_of(rows),
        ),
    )


def _backend_of(hidden: Tensor) -> str:
    """The backend of a call with checked operands."""
    backend = resolve_backend(hidden.device)
    if backend == "triton" and hidden.dtype == torch.float64:
        raise TypeError(
            "hidden is torch.float64, which the Triton kernels do not compute in; set slk.settings.backend = 'torch'"
        )
    return backend

"""A single layer's results by eager PyTorch and by the reference, and how far rounding may move
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.quantized import FP8Weight, NF4Weight
from stablelora_kernels.reference import (
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    unpack_mask,
)
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    RoundedLayer,
    dequantized,
    operand,
)
from stablelora_kernels.testing.inputs import dequantized_ref
from stablelora_kernels.utils.tensors import drop_share

#: The inputs that get gradients, and the gradients' names.
GRADIENTS = {"base_out": "dBASE", "x": "dX", "lora_A": "dA", "lora_B": "dB"}


def run(
    call: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Y and the gradients dX, dA and dB of ``call(inputs)``, whose ``grad`` comes in; dBASE too if
    there is a ``base_out``.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADIENTS if name in inputs}
    y = call(inputs | leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
    return {"Y": y.detach(), **dict(zip((GRADIENTS[name] for name in leaves), grads, strict=True))}


def eager(
    inputs: dict[str, Any], scaling: float, keep: torch.Tensor | None = None, p: float = 0.0
) -> dict[str, torch.Tensor]:
    """The baseline: what a user writes by hand, operator by operator in x's dtype. A ``base_out``
    replaces the product.

    ``keep``: the mask of a dropout of probability p, which is rounded as
    ``utils.tensors.drop_share`` does.
    """
    kept = 1 - drop_share(p)

    def call(given: dict[str, Any]) -> torch.Tensor:
        x, base = given["x"], given.get("base_out")
        x_kept = x if keep is None else x * keep.to(x.dtype) / kept
        branch = x_kept @ given["lora_A"].to(x.dtype).T @ given["lora_B"].to(x.dtype).T
        if base is None:
            weight = given["weight"]
            weight = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x.dtype)
            base = torch.nn.functional.linear(x, weight, given.get("bias"))
        return (base + branch * scaling).to(base.dtype)

    return run(call, inputs)


def oracle(
    inputs: dict[str, Any], scaling: float, keep: torch.Tensor | None = None, p: float = 0.0
) -> dict[str, torch.Tensor]:
    """The same results by the reference in float64, from the values of ``inputs``."""
    if isinstance(inputs.get("weight"), (FP8Weight, NF4Weight)):
        inputs = inputs | {"weight": dequantized_ref(inputs["weight"]).to(inputs["x"].device)}
    d: dict[str, Any] = {
        name: t if t is None else t.detach().double() for name, t in inputs.items()
    }
    pair: tuple[Any, ...] = (d["lora_A"], d["lora_B"], scaling, keep, drop_share(p))
    if "base_out" in d:
        # dY is base_out's gradient as it is.
        y, base = lora_branch_ref(d["base_out"], d["x"], *pair), {"dBASE": d["grad"]}
        return {"Y": y, **base, **lora_branch_grads_ref(d["grad"], d["x"], *pair)}
    y = lora_linear_ref(d["x"], d["weight"], d.get("bias"), *pair)
    return {"Y": y, **lora_linear_grads_ref(d["grad"], d["x"], d["weight"], *pair)}


def rounded_operand(t: Tensor | NF4Weight | FP8Weight | None, dtype: torch.dtype) -> Rounded | None:
    """An operand in float64, with the rounding that it takes to be used in ``dtype``."""
    if t is None:
        return None
    return (
        operand(t.detach(), dtype)
        if isinstance(t, Tensor)
        else dequantized(dequantized_ref(t), dtype)
    )


def roundings(
    inputs: dict[str, Any],
    scaling: float,
    keep: torch.Tensor | None = None,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Rounded]:
    """How far rounding may move Y, dX, dA and dB (of a branch alone also dBASE) on any processor,
    by these names.

    ``dtype``: that in which a call multiplies and stores, which is x's unless given.
    """
    storage = dtype or inputs["x"].dtype
    names = ("weight", "bias", "lora_A", "lora_B")
    operands = {name: rounded_operand(inputs.get(name), storage) for name in names}
    layer = RoundedLayer(
        Arithmetic(storage), **operands, scaling=scaling, keep=keep, dropout_p=drop_share(p)
    )
    x, grad = (as_rows(inputs[name], storage) for name in ("x", "grad"))
    results = {}
    base = inputs.get("base_out")
    if base is None:
        results["Y"] = layer.forward(x)
    else:
        results["Y"] = layer.forward(x, as_rows(base, base.dtype), base.dtype)
        # The gradient itself.
        results["dBASE"] = as_rows(inputs["grad"], inputs["grad"].dtype)
    gradients = layer.backward(grad)
    return results | {GRADIENTS[name]: gradients[name] for name in ("x", "lora_A", "lora_B")}


def as_rows(t: Tensor, dtype: torch.dtype) -> Rounded:
    """An operand of any leading sizes as a matrix, with the rounding that it takes to be used in
    ``dtype``.
    """
    return operand(t.detach().reshape(t.shape[:-1].numel(), t.shape[-1]), dtype)


def kept_for_backward(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The first tensor of ``dtype`` that the node which made ``y`` keeps: dropout's mask is int32
    on Triton, else bool.
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
    if mask is None and (words := kept_for_backward(y, torch.int32)) is not None:
        mask = unpack_mask(words, x.shape[-1])
    if mask is None:
        raise LookupError("the op saved no mask for backward")
    return mask.view(x.shape)

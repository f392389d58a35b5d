"""The checks of ``doctor``'s self-test that no ``Case`` describes and that compare a whole layer: the
loss of a head, and DoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.functional import lora_linear, lora_linear_cross_entropy
from stablelora_kernels.ops.dora import row_norms, scale_columns, square_sums
from stablelora_kernels.reference import lora_linear_cross_entropy_ref
from stablelora_kernels.reference.rounding import Arithmetic, RoundedDoRA, RoundedLayer
from stablelora_kernels.testing import Deviation
from stablelora_kernels.testing.cases import FP32

SCALING = 1.7
Tensors = dict[str, Tensor]


def check_shape(name: str, value: Tensor, ref: Tensor) -> None:
    if value.shape != ref.shape:
        raise AssertionError(f"{name} must be {list(ref.shape)}, got {list(value.shape)}")


def check_loss(device: torch.device, *, dtype: torch.dtype) -> list[Deviation]:
    """The loss of a head with LoRA and a soft cap, without logits, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (37, 48), "weight": (211, 48), "lora_A": (8, 48), "lora_B": (211, 8)}
    inputs: Tensors = {
        name: torch.randn(shape, generator=generator).div(shape[1] ** 0.5).to(device, dtype)
        for name, shape in shapes.items()
    }
    inputs["hidden"] = inputs["hidden"] * 7
    labels = torch.randint(211, (37,), generator=generator).to(device)
    labels[::5] = -100
    names = ("hidden", "lora_A", "lora_B")

    def results(call: Callable[..., Tensor], to: torch.dtype) -> Tensors:
        operands = {name: t.detach().to(to, copy=True) for name, t in inputs.items()}
        leaves = [operands[name].requires_grad_() for name in names]
        loss = call(
            operands["hidden"],
            operands["weight"],
            labels,
            bias=None,
            lora_A=operands["lora_A"],
            lora_B=operands["lora_B"],
            scaling=SCALING,
            softcap=5.0,
        )
        gradients = torch.autograd.grad(loss, leaves)
        return {
            "loss": loss.detach(),
            **{f"d{name}": t for name, t in zip(names, gradients, strict=True)},
        }

    computed = results(lora_linear_cross_entropy, dtype)
    baselines = results(loss_of_logits, dtype)
    refs = results(lora_linear_cross_entropy_ref, torch.float64)
    measured = []
    for name, value in computed.items():
        check_shape(name, value, refs[name])
        measured += testing.deviations(value, refs[name], baselines[name], dtype=dtype, name=name)
    return measured


def loss_of_logits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    softcap: float,
) -> Tensor:
    """As :func:`lora_linear_cross_entropy`, operator by operator as PEFT and transformers do: logits
    in the operands' dtype, and the loss of their float32 copy.
    """
    logits = hidden @ weight.T + hidden @ lora_A.T @ lora_B.T * scaling
    logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def dora(t: dict[str, Tensor]) -> Tensor:
    """``(m / n) ∘ (X W^T + s X A^T B^T) + bias``, n the norms of the rows of W + s B A: operator by
    operator, n a constant.
    """
    lora_A, lora_B = t["lora_A"].to(t["x"].dtype), t["lora_B"].to(t["x"].dtype)
    with torch.no_grad():
        norms = (t["weight"] + SCALING * (lora_B @ lora_A)).to(t["magnitude"].dtype).norm(dim=1)
    product = t["x"] @ t["weight"].T + t["x"] @ lora_A.T @ lora_B.T * SCALING
    return (t["magnitude"] / norms).to(product.dtype) * product + t["bias"]


def check_dora(device: torch.device, *, dtype: torch.dtype) -> list[Deviation]:
    """A layer with DoRA, as ``accelerate_peft`` computes it."""
    inputs: Any = testing.make_inputs((70, 48), 72, 8, dtype=dtype, lora_dtype=FP32, device=device)
    grad = inputs.pop("grad")
    inputs["magnitude"] = torch.linspace(0.5, 1.5, 72, device=device)
    names = ("x", "lora_A", "lora_B", "magnitude")

    def results(call: Callable[[Tensors], Tensor], to: torch.dtype | None) -> Tensors:
        operands = {name: t.detach().to(to or t.dtype, copy=True) for name, t in inputs.items()}
        leaves = [operands[name].requires_grad_() for name in names]
        y = call(operands)
        gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype))
        return {
            "Y": y.detach(),
            **{f"d{name}": t for name, t in zip(names, gradients, strict=True)},
        }

    def ours(t: Tensors) -> Tensor:
        z = lora_linear(t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], SCALING)
        with torch.no_grad():
            of_a = t["lora_A"].to(dtype) @ t["weight"].T
            norms = row_norms(square_sums(t["weight"]), of_a, t["lora_A"], t["lora_B"], SCALING)
        return scale_columns(z, t["magnitude"] / norms, t["bias"])

    computed, baselines = results(ours, None), results(dora, None)
    refs = results(dora, torch.float64)
    operands = {
        name: testing.rounded_operand(inputs[name], dtype)
        for name in ("weight", "bias", "lora_A", "lora_B")
    }
    layer = RoundedLayer(
        Arithmetic(dtype),
        operands["weight"],
        operands["bias"],
        operands["lora_A"],
        operands["lora_B"],
        SCALING,
    )
    norms = (
        inputs["weight"].double() + SCALING * inputs["lora_B"].double() @ inputs["lora_A"].double()
    ).norm(dim=1)
    rounded = RoundedDoRA(layer, inputs["magnitude"].double(), norms)
    roundings = {"Y": rounded.forward(testing.as_rows(inputs["x"], dtype))}
    roundings |= {
        f"d{name}": t for name, t in rounded.backward(testing.as_rows(grad, dtype)).items()
    }
    measured = []
    for name, value in computed.items():
        check_shape(name, value, refs[name])
        measured += testing.deviations(
            value, refs[name], baselines[name], dtype=dtype, rounding=roundings[name], name=name
        )
    return measured

"""Calls of a layer with DoRA, as ``accelerate_peft`` computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.dora import row_norms, scale_columns, square_sums
from stablelora_kernels.reference.lora import dora_ref
from stablelora_kernels.reference.rounding import Rounded, RoundedDoRA
from stablelora_kernels.testing.cases import FP32, FP64, Case, Mask, Operands
from stablelora_kernels.testing.ops.lora_linear import (
    Linear,
    numbered,
    reference_layers,
    rounded_layers,
    rounded_rows,
)


class DoRA(Linear):
    """One projection with magnitudes, and without dropout."""

    def differentiable(self, case: Case) -> list[str]:
        return [*super().differentiable(case), "magnitude"]

    def make(self, case: Case) -> Operands:
        dtype = FP64 if case.dtype == FP64 else FP32
        magnitude = torch.linspace(0.5, 1.5, case.sizes[0], dtype=dtype, device=case.device)
        return super().make(case) | {"magnitude": magnitude}

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        (z,) = super().call(case, operands)
        weight, pair = operands["weight0"], (operands["lora_A0"], operands["lora_B0"])
        with torch.no_grad():
            of_a = pair[0].to(weight.dtype) @ weight.T
            norms = row_norms(square_sums(weight), of_a, *pair, case.scalings[0])
        return (scale_columns(z, operands["magnitude"] / norms, operands["bias0"]),)

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        x, magnitude, scaling = operands["x"], operands["magnitude"], case.scalings[0]
        weight, bias = operands["weight0"], operands["bias0"]
        lora_A, lora_B = (operands[name].to(x.dtype) for name in ("lora_A0", "lora_B0"))
        with torch.no_grad():
            merged = weight + scaling * (lora_B @ lora_A)
            norms = merged.to(magnitude.dtype).norm(dim=1)
        product = x @ weight.T + x @ lora_A.T @ lora_B.T * scaling
        y = (magnitude / norms).to(product.dtype) * product
        return (y if bias is None else y + bias,)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        (layer,) = reference_layers(case, operands)
        arguments: list[Any] = [*layer, case.scalings[0], operands["magnitude"]]
        return (dora_ref(operands["x"], *arguments),)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        (layer,) = rounded_layers(case, operands, masks)
        x, grads = rounded_rows(case, operands)
        weight, lora_A, lora_B = (
            operands[name].double() for name in ("weight0", "lora_A0", "lora_B0")
        )
        norms = (weight + case.scalings[0] * lora_B @ lora_A).norm(dim=1)
        dora = RoundedDoRA(layer, operands["magnitude"].double(), norms)
        outputs = {"Y0": dora.forward(x)}
        gradients = dora.backward(grads[0])
        of_magnitude = {"magnitude": gradients.pop("magnitude")}
        return outputs | numbered([gradients]) | {"x": gradients["x"]} | of_magnitude

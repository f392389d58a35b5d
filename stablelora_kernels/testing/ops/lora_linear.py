"""Calls of ``lora_linear``, ``lora_branch`` and ``lora_linear_group``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.functional import LoRAWeights, lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.reference import lora_branch_ref, lora_linear_ref
from stablelora_kernels.reference.rounding import Arithmetic, Rounded, RoundedLayer
from stablelora_kernels.testing.cases import (
    FP64,
    Case,
    Dropout,
    Mask,
    Op,
    Operands,
    projections,
)
from stablelora_kernels.testing.inputs import QUANTIZED, dequantized_ref, make_inputs
from stablelora_kernels.testing.layers import as_rows, rounded_operand


class Group(Op):
    """Projections of one x."""

    def width(self, case: Case, i: int) -> int:
        """In features of projection ``i``."""
        return case.shape[-1]

    def make(self, case: Case) -> Operands:
        operands: Operands = {}
        for i in range(case.count):
            tensors = self.projection(case, i)
            if i:
                del tensors["x"]
            if i not in case.outputs():
                del tensors["grad"]
            for name, t in tensors.items():
                operands[name if name in ("x", "base_out") else f"{name}{i}"] = t
        return operands

    def projection(self, case: Case, i: int) -> Operands:
        """The operands of projection ``i`` alone, by names without numbers."""
        n, r, k = case.sizes[i], case.ranks[i], self.width(case, i)
        tensors: Operands = make_inputs(
            (*case.shape[:-1], max(k, 1)), n, r or 1, dtype=case.dtype, lora_dtype=case.lora_dtype,
            bias=case.bias[i % len(case.bias)], device=case.device, seed=case.seed + i,
        )  # fmt: skip
        tensors |= {name: tensors[name][..., :k] for name in ("x", "weight", "lora_A")}
        if r is None:
            del tensors["lora_A"], tensors["lora_B"]
        if (kind := case.quantized[i % len(case.quantized)]) is not None:
            tensors["weight"] = on_device(QUANTIZED[kind](n, k), case.device)
        return tensors

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        loras: list[Any] = [*projections(case, operands)]
        return lora_linear_group(
            operands["x"],
            [lora.weight for lora in loras],
            [lora.bias for lora in loras],
            [lora.lora_A for lora in loras],
            [lora.lora_B for lora in loras],
            [lora.scaling for lora in loras],
            case.p,
            case.training,
        )

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        return [
            Dropout(
                (*case.shape[:-1], self.width(case, i)),
                case.p if r is not None and case.training else 0.0,
            )
            for i, r in enumerate(case.ranks)
        ]

    def combined(
        self, case: Case, layer: Callable[[Tensor, int], Tensor], x: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs of a call whose projection ``i`` of an input is ``layer(input, i)``."""
        return tuple(layer(x, i) for i in range(case.count))

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        loras = projections(case, operands)
        base = operands.get("base_out")
        return self.combined(
            case, lambda x, i: layer_by_hand(x, loras[i], masks[i], base), operands["x"]
        )

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        outputs = []
        for i, layer in enumerate(reference_layers(case, operands)):
            arguments: list[Any] = [*layer, case.scalings[i % len(case.scalings)], *masks[i]]
            outputs.append(lora_linear_ref(operands["x"], *arguments))
        return tuple(outputs)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        layers = rounded_layers(case, operands, masks)
        x, grads = rounded_rows(case, operands)
        outputs = {f"Y{i}": layer.forward(x) for i, layer in enumerate(layers)}
        gradients = [layer.backward(grads[i]) for i, layer in enumerate(layers)]
        of_x = [of_layer["x"] for of_layer in gradients]
        dx = layers[0].arithmetic.total(of_x, [grads[i].exact.shape[1] for i in grads])
        return outputs | numbered(gradients) | {"x": dx}


class Linear(Group):
    """One projection."""

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*projections(case, operands)[0], case.p, case.training]
        return (lora_linear(operands["x"], *arguments),)


class Branch(Group):
    """A branch that is added to another layer's output."""

    def differentiable(self, case: Case) -> list[str]:
        return ["base_out", *super().differentiable(case)]

    def projection(self, case: Case, i: int) -> Operands:
        tensors = super().projection(case, i)
        base = torch.nn.functional.linear(tensors["x"].double(), tensors.pop("weight").double())
        dtype = case.base_dtype or case.dtype
        return tensors | {
            "base_out": base.to(dtype),
            # All digits of its dtype, of which a product in x's dtype may take fewer.
            "grad": make_inputs(
                (*case.shape[:-1], 1),
                case.sizes[i],
                1,
                dtype=dtype,
                device=case.device,
                seed=case.seed + i,
            )["grad"],
            "bias": None,
        }

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*projections(case, operands)[0][2:], case.p, case.training]
        return (lora_branch(operands["base_out"], operands["x"], *arguments),)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*projections(case, operands)[0][2:], *masks[0]]
        return (lora_branch_ref(operands["base_out"], operands["x"], *arguments),)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        (layer,) = rounded_layers(case, operands, masks)
        x, grads = rounded_rows(case, operands)
        base, grad = operands["base_out"], operands["grad0"]
        outputs = {"Y0": layer.forward(x, as_rows(base, base.dtype), base.dtype)}
        gradients = layer.backward(grads[0])
        # The gradient of base_out is the incoming one.
        of_inputs = {"base_out": as_rows(grad, grad.dtype), "x": gradients["x"]}
        return outputs | numbered([gradients]) | of_inputs


def on_device(weight: Any, device: str) -> Any:
    """A quantized weight on ``device``."""
    values = {attribute.name: getattr(weight, attribute.name) for attribute in fields(weight)}
    return type(weight)(
        **{name: t.to(device) if isinstance(t, Tensor) else t for name, t in values.items()}
    )


def plain(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight in full."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return (
        dequantized_ref(weight).to(weight.stored.data.device)
        if dtype == FP64
        else weight.dequantize(dtype)
    )


def layer_by_hand(x: Tensor, lora: LoRAWeights, mask: Mask, base: Tensor | None = None) -> Tensor:
    """A layer's output operator by operator in x's dtype. ``base`` replaces the product."""
    if base is None:
        base = torch.nn.functional.linear(x, plain(lora.weight, x.dtype), lora.bias)
    if lora.lora_A is None or lora.lora_B is None:
        return base
    dropped = x if mask.keep is None else x * mask.keep.to(x.dtype) / (1 - mask.p)
    branch = dropped @ lora.lora_A.to(x.dtype).T @ lora.lora_B.to(x.dtype).T
    return (base + branch * lora.scaling).to(base.dtype)


def reference_layers(case: Case, operands: Operands) -> list[tuple[Any, ...]]:
    """weight, bias, lora_A and lora_B of each projection, for the reference: no branch is one of
    rank 0.
    """
    layers: list[tuple[Any, ...]] = []
    for lora in projections(case, operands):
        weight: Any = lora.weight
        lora_A, lora_B = lora.lora_A, lora.lora_B
        if lora_A is None:
            lora_A = weight.new_zeros(0, weight.shape[1])
            lora_B = weight.new_zeros(weight.shape[0], 0)
        layers.append((weight, lora.bias, lora_A, lora_B))
    return layers


def rounded_layers(case: Case, operands: Operands, masks: Sequence[Mask]) -> list[RoundedLayer]:
    """The projections, for the analysis of rounding."""
    loras = projections(case, operands)
    return [
        rounded_layer(lora, case.arithmetic, mask) for lora, mask in zip(loras, masks, strict=True)
    ]


def rounded_layer(lora: LoRAWeights, storage: torch.dtype, mask: Mask) -> RoundedLayer:
    """One projection, for the analysis of rounding, with products stored in ``storage``."""
    tensors: list[Any] = [*lora[:4]]
    arguments: list[Any] = [*(rounded_operand(t, storage) for t in tensors), lora.scaling, *mask]
    return RoundedLayer(Arithmetic(storage), *arguments)


def rounded_rows(case: Case, operands: Operands) -> tuple[Rounded, dict[int, Rounded]]:
    """x, and the incoming gradients by their projections."""
    grads = {i: as_rows(operands[f"grad{i}"], case.arithmetic) for i in case.outputs()}
    return as_rows(operands["x"], case.arithmetic), grads


def numbered(gradients: Sequence[dict[str, Rounded]]) -> dict[str, Rounded]:
    """The gradients of each projection's own operands by their names in a case."""
    return {
        f"{name}{i}": t
        for i, of_layer in enumerate(gradients)
        for name, t in of_layer.items()
        if name != "x"
    }

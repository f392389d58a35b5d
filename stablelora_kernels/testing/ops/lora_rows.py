"""Calls of ``lora_rows``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.reference.lora import lora_branch_ref
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing.cases import Case, Dropout, Mask, Op, Operands
from stablelora_kernels.testing.inputs import make_inputs
from stablelora_kernels.testing.layers import as_rows
from stablelora_kernels.testing.ops.lora_linear import layer_by_hand, rounded_layer


class Span(NamedTuple):
    """The rows of one branch, from ``start`` to before ``end``, and the probability of its dropout."""

    start: int
    end: int
    dropout_p: float = 0.0


class RowsLayer(NamedTuple):
    """A range of rows with its layer; without a branch for ``branch`` None, else that of this number."""

    rows: slice
    branch: int | None
    layer: LoRAWeights
    mask: Mask


@dataclass(frozen=True)
class Rows(Op):
    """A batch of several branches, each on rows of its own; a rank and a scaling for each."""

    spans: tuple[Span, ...] = (Span(0, 22), Span(22, 33, 0.25), Span(44, 70, 0.75))
    # Branches are added to another layer's output.
    with_base: bool = False

    def differentiable(self, case: Case) -> list[str]:
        names = super().differentiable(case)
        return ["base_out", *names] if self.with_base else names

    def make(self, case: Case) -> Operands:
        operands: Operands = {}
        for i, r in enumerate(case.ranks):
            tensors: Operands = make_inputs(
                case.shape, case.sizes[0], r or 1, dtype=case.dtype, lora_dtype=case.lora_dtype,
                bias=case.bias[0], device=case.device, seed=case.seed + i,
            )  # fmt: skip
            if not i:
                operands = {name: tensors[name] for name in ("x",)}
                if self.with_base:
                    operands["base_out"] = tensors["grad"].flip(-1)
                else:
                    operands |= {"weight0": tensors["weight"], "bias0": tensors["bias"]}
                operands["grad0"] = tensors["grad"]
            operands |= {f"{name}{i}": tensors[name] for name in ("lora_A", "lora_B")}
        return operands

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        branches = [
            RowsBranch(
                start,
                end,
                operands[f"lora_A{i}"],
                operands[f"lora_B{i}"],
                case.scalings[i],
                p if case.training else 0.0,
            )
            for i, (start, end, p) in enumerate(self.spans)
        ]
        weight, bias = operands.get("weight0"), operands.get("bias0")
        return (lora_rows(operands["x"], weight, bias, operands.get("base_out"), branches),)

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        return [
            Dropout((end - start, case.shape[-1]), p if case.training else 0.0)
            for start, end, p in self.spans
        ]

    def layers(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> Iterator[RowsLayer]:
        """The ranges of rows, those without a branch too."""
        rows, done = operands["x"].shape[:-1].numel(), 0
        without = LoRAWeights(operands.get("weight0"), operands.get("bias0"), None, None, 1.0)
        for i, (start, end, _) in enumerate(self.spans):
            if done < start:
                yield RowsLayer(slice(done, start), None, without, Mask())
            lora = without._replace(
                lora_A=operands[f"lora_A{i}"],
                lora_B=operands[f"lora_B{i}"],
                scaling=case.scalings[i],
            )
            yield RowsLayer(slice(start, end), i, lora, masks[i])
            done = end
        if done < rows:
            yield RowsLayer(slice(done, rows), None, without, Mask())

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        x, base = operands["x"].flatten(0, -2), operands.get("base_out")
        base = None if base is None else base.flatten(0, -2)
        parts = [
            layer_by_hand(x[rows], layer, mask, None if base is None else base[rows])
            for rows, _, layer, mask in self.layers(case, operands, masks)
        ]
        return (torch.cat(parts).view(*case.shape[:-1], *case.sizes),)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        x, base = operands["x"].flatten(0, -2), operands.get("base_out")
        parts = []
        for rows, branch, layer, mask in self.layers(case, operands, masks):
            arguments: list[Any] = [*layer, *mask]
            if base is None:
                weight, bias, *_ = arguments
                y = x[rows] @ weight.T
                y = y if bias is None else y + bias
            else:
                y = base.flatten(0, -2)[rows]
            parts.append(y if branch is None else lora_branch_ref(y, x[rows], *arguments[2:]))
        return (torch.cat(parts).view(*case.shape[:-1], *case.sizes),)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        """A layer of its own for each range of rows."""
        storage, base = case.arithmetic, operands.get("base_out")
        x, grad = operands["x"].flatten(0, -2), operands["grad0"].flatten(0, -2)
        named: dict[str, Rounded] = {}
        outputs, of_x = [], []
        for rows, branch, layer, mask in self.layers(case, operands, masks):
            rounded = rounded_layer(layer, storage, mask)
            of_base = None if base is None else as_rows(base.flatten(0, -2)[rows], storage)
            outputs.append(rounded.forward(as_rows(x[rows], storage), of_base))
            gradients = rounded.backward(as_rows(grad[rows], storage))
            of_x.append(gradients.get("x", as_rows(torch.zeros_like(x[rows]), storage)))
            if branch is not None:
                named |= {f"{name}{branch}": gradients[name] for name in ("lora_A", "lora_B")}
        named |= {"Y0": stacked(outputs), "x": stacked(of_x)}
        return named if base is None else named | {"base_out": as_rows(operands["grad0"], storage)}


def stacked(parts: Sequence[Rounded]) -> Rounded:
    """Rows below one another."""
    return Rounded(
        torch.cat([part.value for part in parts]),
        torch.cat([part.deviation for part in parts]),
        frozenset().union(*(part.errors for part in parts)),
    )

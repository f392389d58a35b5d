"""Calls of ``lora_linear_cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.reference import lora_linear_cross_entropy_ref
from stablelora_kernels.reference.rounding import Rounded, RoundedLoss
from stablelora_kernels.testing.cases import FP32, FP64, Case, Mask, Op, Operands, projections
from stablelora_kernels.testing.inputs import make_inputs
from stablelora_kernels.testing.layers import as_rows
from stablelora_kernels.testing.ops.lora_linear import layer_by_hand, numbered, rounded_layers


@dataclass(frozen=True)
class CrossEntropy(Op):
    """The loss of a head, for the hidden states x. Its results are "Y0", the loss, and gradients."""

    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    # Every so many labels are ignored.
    ignored: int = 5
    slopes = None

    def make(self, case: Case) -> Operands:
        *leading, k = case.shape
        (n,), (r,) = case.sizes, case.ranks
        tensors: Operands = make_inputs(
            (*leading, k), n, r or 1, dtype=case.dtype, lora_dtype=case.lora_dtype,
            bias=case.bias[0], device=case.device, seed=case.seed,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(case.seed)
        labels = torch.randint(n, leading, generator=generator)
        labels.view(-1)[self.ignored - 1 :: self.ignored] = -100
        of_losses = leading if self.reduction == "none" else []
        grad = torch.randn(of_losses, generator=generator, dtype=FP64)
        return {
            "x": tensors["x"],
            "labels": labels.to(case.device),
            "weight0": tensors["weight"],
            "bias0": tensors["bias"],
            "lora_A0": tensors["lora_A"] if r else None,
            "lora_B0": tensors["lora_B"] if r else None,
            "grad0": grad.to(case.device, FP64 if case.dtype == FP64 else FP32),
        }

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        return (self.loss(case, operands, lora_linear_cross_entropy),)

    def loss(self, case: Case, operands: Operands, function: Callable[..., Tensor]) -> Tensor:
        (head,) = projections(case, operands)
        return function(
            operands["x"],
            head.weight,
            operands["labels"],
            bias=head.bias,
            lora_A=head.lora_A,
            lora_B=head.lora_B,
            scaling=head.scaling,
            reduction=self.reduction,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
        )

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        """PEFT's head, and transformers' loss, whose logits are float32."""
        (head,) = projections(case, operands)
        labels = operands["labels"]
        logits = layer_by_hand(operands["x"], head, Mask()) * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        flat = logits.float().flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction=self.reduction)
        return (loss.view(labels.shape) if self.reduction == "none" else loss,)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        return (self.loss(case, operands, lora_linear_cross_entropy_ref),)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        (layer,) = rounded_layers(case, operands, [Mask()])
        labels, grad = operands["labels"].flatten(), operands["grad0"].double()
        counts = labels >= 0
        z = layer.forward(as_rows(operands["x"], case.arithmetic))
        loss = RoundedLoss(layer.arithmetic, z, labels.clamp(min=0), self.logit_scale, self.softcap)
        weights = counts.double() / (counts.sum() if self.reduction == "mean" else 1)
        losses = loss.losses() * weights[:, None]
        if self.reduction == "none":
            gradients = layer.backward(loss.backward(weights * grad.flatten()))
        else:
            ones = torch.ones_like(losses.exact)
            losses = layer.arithmetic.product(losses.T, Rounded(ones, torch.zeros_like(ones)))
            storage = layer.arithmetic.storage
            # They are multiplied by the loss's gradient after the products.
            gradients = {
                name: (t * grad).stored(storage)
                for name, t in layer.backward(loss.backward(weights)).items()
            }
        return {"Y0": losses.stored(FP32), "x": gradients["x"]} | numbered([gradients])

    def dtype_of(self, case: Case, name: str, value: Any) -> torch.dtype:
        """Logits are rounded to x's dtype, though the loss is float32."""
        return case.arithmetic

"""Calls of ``lora_experts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.functional import LoRAWeights, lora_experts
from stablelora_kernels.reference import lora_experts_ref
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing.cases import Case, Dropout, Mask, Op, Operands, Results
from stablelora_kernels.testing.inputs import make_inputs
from stablelora_kernels.testing.layers import as_rows
from stablelora_kernels.testing.ops.lora_linear import layer_by_hand, numbered, rounded_layer


class Expert(NamedTuple):
    """One expert of a call: its rows of x, its layer, and its part of the mask."""

    rows: slice
    layer: LoRAWeights
    mask: Mask


@dataclass(frozen=True)
class Experts(Op):
    """A stack of experts. Each expert's part of a result has a bound of its own, as a layer of its
    rows.
    """

    # Behind which row each expert ends.
    ends: tuple[int, ...] = (23, 23, 54, 70)
    offsets_dtype: torch.dtype = torch.int32
    transposed: bool = False
    # B as PEFT packs it, with the expert fastest.
    packed: bool = False
    has_kernels = False

    def make(self, case: Case) -> Operands:
        tensors: Operands = make_inputs(
            case.shape, case.sizes[0], 1, dtype=case.dtype, device=case.device, seed=case.seed
        )
        return {
            "x": tensors["x"],
            **make_stack(case, 0, case.shape[-1], len(self.ends), self.transposed, self.packed),
            "grad0": tensors["grad"],
            "offsets": torch.tensor(self.ends, dtype=self.offsets_dtype, device=case.device),
        }

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        return (
            lora_experts(
                operands["x"],
                operands["weight0"],
                operands["bias0"],
                operands["lora_A0"],
                operands["lora_B0"],
                case.scalings[0],
                operands["offsets"],
                transposed=self.transposed,
                dropout_p=case.p,
                training=case.training,
            ),
        )

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        return [Dropout(case.shape, case.p if case.ranks[0] and case.training else 0.0)]

    def experts(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> Iterator[tuple[int, Expert]]:
        """The experts by their places."""
        start = 0
        (mask,) = masks
        for e, end in enumerate(self.ends):
            rows = slice(start, end)
            start = end
            weight, bias = operands["weight0"][e], operands["bias0"]
            has_branch = case.ranks[0] is not None
            layer = LoRAWeights(
                weight.T if self.transposed else weight,
                None if bias is None else bias[e],
                operands["lora_A0"][e] if has_branch else None,
                operands["lora_B0"][e] if has_branch else None,
                case.scalings[0],
            )
            of_rows = mask if mask.keep is None else mask._replace(keep=mask.keep[rows])
            yield e, Expert(rows, layer, of_rows)

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        x = operands["x"]
        parts = [
            layer_by_hand(x[expert.rows], expert.layer, expert.mask)
            for _, expert in self.experts(case, operands, masks)
        ]
        return (torch.cat([*parts, x.new_zeros(x.shape[0] - self.ends[-1], case.sizes[0])]),)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        weight = operands["weight0"]
        return (
            lora_experts_ref(
                operands["x"],
                weight.transpose(1, 2) if self.transposed else weight,
                operands["bias0"],
                operands["lora_A0"],
                operands["lora_B0"],
                case.scalings[0],
                operands["offsets"],
                *masks[0],
            ),
        )

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        storage, named = case.arithmetic, {}
        for e, expert in self.experts(case, operands, masks):
            if expert.rows.start == expert.rows.stop:
                continue
            layer = rounded_layer(expert.layer, storage, expert.mask)
            named[f"Y0 of expert {e}"] = layer.forward(as_rows(operands["x"][expert.rows], storage))
            gradients = layer.backward(as_rows(operands["grad0"][expert.rows], storage))
            named[f"x of expert {e}"] = gradients["x"]
            named |= {f"{name} of expert {e}": t for name, t in numbered([gradients]).items()}
        return named

    def parts(self, case: Case, name: str, value: Tensor) -> Results:
        """By experts; and rows behind the last one's."""
        if name not in ("Y0", "x"):
            return {f"{name} of expert {e}": of_expert for e, of_expert in enumerate(value)}
        starts = (0, *self.ends)
        rows = {
            f"{name} of expert {e}": value[start:end]
            for e, (start, end) in enumerate(zip(starts, self.ends, strict=False))
        }
        return rows | {f"{name} of no expert": value[self.ends[-1] :]}


def make_stack(
    case: Case, i: int, width: int, count: int, transposed: bool, packed: bool
) -> Operands:
    """The operands of projection ``i`` of ``count`` experts, with ``width`` features in; a rank of
    None is one of 0.

    ``transposed`` and ``packed``: how the weights and the B's lie in memory.
    """
    experts: list[Operands] = [
        make_inputs(
            (1, width), case.sizes[i], case.ranks[i] or 1, dtype=case.dtype, lora_dtype=case.lora_dtype,
            bias=case.bias[i], device=case.device, seed=case.seed + 1 + i * count + e,
        )
        for e in range(count)
    ]  # fmt: skip
    lora_A, lora_B = (torch.stack([t[name] for t in experts]) for name in ("lora_A", "lora_B"))
    weight = torch.stack([t["weight"] for t in experts])
    if not case.ranks[i]:
        lora_A, lora_B = lora_A[:, :0], lora_B[..., :0]
    if packed:
        lora_B = lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return {
        f"weight{i}": weight.transpose(1, 2).contiguous() if transposed else weight,
        f"bias{i}": torch.stack([t["bias"] for t in experts]) if case.bias[i] else None,
        f"lora_A{i}": lora_A,
        f"lora_B{i}": lora_B,
    }

"""Calls of ``lora_mlp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.functional import lora_mlp
from stablelora_kernels.ops.lora_mlp.call import Options, facts_of
from stablelora_kernels.ops.matrices import row_count, row_tiles
from stablelora_kernels.reference.lora import lora_mlp_ref
from stablelora_kernels.reference.rounding import Rounded, RoundedMLP
from stablelora_kernels.testing.bounds import MLP_SLOPES
from stablelora_kernels.testing.cases import Case, Dropout, Mask, Operands, leaves, projections
from stablelora_kernels.testing.ops.lora_linear import (
    Group,
    numbered,
    reference_layers,
    rounded_layers,
    rounded_rows,
)


@dataclass(frozen=True)
class MLP(Group):
    """gate, up and down. With ``case.shared``, gate's A and its mask are up's too."""

    slopes = MLP_SLOPES

    # A tile's rows; 0: there are no tiles.
    tile_rows: int = 0

    def outputs(self, case: Case) -> list[int]:
        return [2]

    def width(self, case: Case, i: int) -> int:
        return case.sizes[0] if i == 2 else case.shape[-1]

    def make(self, case: Case) -> Operands:
        operands = super().make(case)
        if case.shared:
            del operands["lora_A1"]
        return operands

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        gate, up, down = projections(case, operands)
        how = (case.activation, case.p, case.training, self.tile_rows or False)
        return (lora_mlp(operands["x"], gate, up, down, *how),)

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        gate, up, down = super().dropouts(case, operands)
        return [gate, up._replace(p=0.0) if case.shared else up, down]

    def mask_tiles(self, case: Case, operands: Operands) -> list[int]:
        leaf = leaves(case, operands)
        parts = [p.stored() for p in projections(case, leaf)]
        options = Options(case.activation, case.p, case.backend, case.shared, self.tile_rows)
        most = facts_of(leaf["x"], parts, options).tile_rows
        rows = [tile.rows for tile in row_tiles(row_count(leaf["x"]), most)] if most else []
        return [each.stop - each.start for each in rows]

    def combined(
        self, case: Case, layer: Callable[[Tensor, int], Tensor], x: Tensor
    ) -> tuple[Tensor, ...]:
        return (layer(ACTIVATIONS[case.activation].forward(layer(x, 0)) * layer(x, 1), 2),)

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        return super().by_hand(case, operands, self.of_projections(case, masks))

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        masks = self.of_projections(case, masks)
        scalings = [lora.scaling for lora in projections(case, operands)]
        keeps, p = [mask.keep for mask in masks], max(mask.p for mask in masks)
        layers = reference_layers(case, operands)
        return (lora_mlp_ref(operands["x"], layers, scalings, case.activation, keeps, p),)

    def roundings(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> dict[str, Rounded]:
        gate, up, down = rounded_layers(case, operands, self.of_projections(case, masks))
        x, grads = rounded_rows(case, operands)
        mlp = RoundedMLP(gate, up, down, case.activation)
        outputs = {"Y0": mlp.forward(x)}
        gradients = mlp.backward(grads[2])
        dx = gradients[0]["x"]
        if case.shared and "lora_A" in gradients[1]:
            of_a = [of_layer["lora_A"] for of_layer in gradients[:2]]
            gradients[0]["lora_A"] = mlp.arithmetic.total(of_a, [x.exact.shape[0]] * 2)
        return outputs | numbered(gradients) | {"x": dx}

    def of_projections(self, case: Case, masks: Sequence[Mask]) -> list[Mask]:
        """A mask for each projection, of those that are drawn."""
        gate, up, down = masks
        return [gate, gate if case.shared else up, down]

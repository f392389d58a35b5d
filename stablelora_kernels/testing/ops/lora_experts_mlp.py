"""Calls of the op of ``fuse_mlp`` for modules of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.ops.lora_experts_mlp.autograd import lora_experts_mlp_op
from stablelora_kernels.ops.lora_experts_mlp.call import Routing
from stablelora_kernels.ops.matrices import row_tiles
from stablelora_kernels.reference.lora import lora_experts_mlp_ref
from stablelora_kernels.testing.cases import Case, Dropout, Mask, Op, Operands
from stablelora_kernels.testing.inputs import make_inputs
from stablelora_kernels.testing.ops.lora_experts import make_stack


def interleaved_gate(g: Tensor) -> Tensor:
    """gpt-oss's, without its limits, at which a gradient jumps."""
    gate, up = g[..., ::2], g[..., 1::2]
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


@dataclass(frozen=True)
class ExpertsMLP(Op):
    """A module of experts: up, as projection 0, a gate and down, as projection 1, for tokens x.

    The bound is by the baseline's error alone.
    """

    gate: Callable[[Tensor], Tensor] = interleaved_gate
    # Experts of the stacks; those that tokens choose from; and how many a token chooses. A number
    # behind the stacks' last is no expert here.
    experts: int = 4
    chosen: tuple[int, ...] = (0, 1, 3, 5)
    slots: int = 2
    # Of the routing weights, if it is not x's.
    weights_dtype: torch.dtype | None = None
    # Dropout's probability of down, if it is not up's.
    down_p: float | None = None
    transposed: bool = False
    # B as PEFT packs it, with the expert fastest.
    packed: bool = False
    # As ``lora_experts_mlp_op`` takes it.
    tiled: bool | int = False
    has_kernels = False
    slopes = None

    def outputs(self, case: Case) -> list[int]:
        return [1]

    def differentiable(self, case: Case) -> list[str]:
        return [*super().differentiable(case), "weights"]

    def widths(self, case: Case) -> tuple[int, int]:
        """In features of up and of down."""
        return case.shape[-1], self.gate(torch.zeros(1, case.sizes[0])).shape[-1]

    def make(self, case: Case) -> Operands:
        tensors: Operands = make_inputs(
            case.shape, case.sizes[1], 1, dtype=case.dtype, device=case.device, seed=case.seed
        )
        generator = torch.Generator().manual_seed(case.seed)
        tokens, count = case.shape[0], len(self.chosen)
        # A token chooses different experts, as long as there are some.
        order = torch.rand(tokens, count, generator=generator).argsort(1)
        index = torch.tensor(self.chosen)[order[:, torch.arange(self.slots) % count]]
        weights = torch.rand(tokens, self.slots, generator=generator, dtype=torch.float64) + 0.1
        operands = {
            "x": tensors["x"],
            "index": index.to(case.device),
            "weights": weights.to(case.device, self.weights_dtype or case.dtype),
            "grad1": tensors["grad"],
        }
        for i, width in enumerate(self.widths(case)):
            operands |= make_stack(case, i, width, self.experts, self.transposed, self.packed)
        return operands

    def probabilities(self, case: Case) -> tuple[float, float]:
        """Dropout's, of up and of down."""
        ps = (case.p, case.p if self.down_p is None else self.down_p)
        up, down = (p if r and case.training else 0.0 for p, r in zip(ps, case.ranks, strict=True))
        return up, down

    def call(self, case: Case, operands: Operands) -> tuple[Tensor, ...]:
        expert_of_slot, order = torch.sort(operands["index"].reshape(-1), stable=True)
        places = torch.arange(self.experts, device=order.device)
        offsets = torch.searchsorted(expert_of_slot, places, right=True, out_int32=True)
        up, down = (
            ExpertStack(
                operands[f"weight{i}"],
                operands[f"bias{i}"],
                operands[f"lora_A{i}"],
                operands[f"lora_B{i}"],
                case.scalings[i],
                self.transposed,
                p,
            )
            for i, p in enumerate(self.probabilities(case))
        )
        routing = Routing(order, offsets, operands["weights"])
        return (lora_experts_mlp_op(operands["x"], routing, self.gate, up, down, self.tiled),)

    def mask_tiles(self, case: Case, operands: Operands) -> list[int]:
        if not self.tiled:
            return []
        tokens = case.shape[0]
        # In these sizes the default is one tile.
        most = max(1, tokens) if self.tiled is True else self.tiled
        rows = [tile.rows for tile in row_tiles(tokens, most)]
        return [(each.stop - each.start) * self.slots for each in rows]

    def dropouts(self, case: Case, operands: Operands) -> list[Dropout]:
        rows = operands["index"].numel()
        return [
            Dropout((rows, width), p)
            for width, p in zip(self.widths(case), self.probabilities(case), strict=True)
        ]

    def by_hand(self, case: Case, operands: Operands, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        dtype = operands["x"].dtype
        of_x = {
            name: t.to(dtype) if isinstance(t, Tensor) and name != "index" else t
            for name, t in operands.items()
        }
        return self.by_reference(case, of_x, masks)

    def by_reference(
        self, case: Case, operands: Operands, masks: Sequence[Mask]
    ) -> tuple[Tensor, ...]:
        stacks: list[tuple[Any, ...]] = []
        for i in range(2):
            weight = operands[f"weight{i}"]
            weight = weight.transpose(1, 2) if self.transposed else weight
            branch = (operands[f"lora_A{i}"], operands[f"lora_B{i}"], case.scalings[i])
            stacks.append((weight, operands[f"bias{i}"], *branch))
        keeps, ps = zip(*masks, strict=True)
        slots = self.mask_tiles(case, operands) or [operands["index"].numel()]
        of_slots = [[None] * len(slots) if keep is None else keep.split(slots) for keep in keeps]
        tokens = [count // self.slots for count in slots]
        by_token = [operands[name].split(tokens) for name in ("x", "index", "weights")]
        # Each tile sorts its own slots by expert.
        outputs = [
            lora_experts_mlp_ref(x, index, weights, self.gate, stacks, [*of_tile], ps)
            for x, index, weights, of_tile in zip(
                *by_token, zip(*of_slots, strict=True), strict=True
            )
        ]
        return (torch.cat(outputs),)

"""What the op of a module of experts reads: its stacks, its routing, and one call of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.packed_experts import PackedExperts
from stablelora_kernels.utils.tensors import cast

# Maps up's output G [rows, 2 I], or [rows, I] without a gate, to H [rows, I], row by row.
Gate = Callable[[Tensor], Tensor]


class StoredStack(NamedTuple):
    """A stack as the ops of ``lora_experts`` take it."""

    data: Tensor
    scales: Sequence[Tensor]
    layout: Sequence[int]


class FrozenStack(NamedTuple):
    """One projection of all experts, all but its A and B."""

    # [E, N, K]; transposed, [E, K, N].
    weight: Tensor | PackedExperts
    # [E, N].
    bias: Tensor | None
    transposed: bool
    # s; s' in a call with dropout.
    scaling: float
    dropout_p: float = 0.0

    def expert(self, place: int, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] of the expert at a place of the stack. Only here is one read."""
        matrix = self._matrix(place, dtype)
        return matrix.t() if self.transposed else matrix

    def _matrix(self, place: int, dtype: torch.dtype) -> Tensor:
        if isinstance(self.weight, Tensor):
            return cast(self.weight[place], dtype)
        return self.weight.expert(place, dtype)

    def stored(self, dtype: torch.dtype) -> StoredStack:
        """All experts, those of a plain stack in ``dtype``."""
        if isinstance(self.weight, Tensor):
            return StoredStack(cast(self.weight, dtype), (), ())
        return StoredStack(self.weight.data, self.weight.scales, self.weight.layout)

    def expert_bias(self, place: int, dtype: torch.dtype) -> Tensor | None:
        """The bias [N] of the expert at a place of the stack."""
        return None if self.bias is None else cast(self.bias[place], dtype)


class ExpertStack(NamedTuple):
    """One projection of all experts; a rank of 0 is no branch."""

    frozen: FrozenStack
    # [E, r, K].
    lora_A: Tensor
    # [E, N, r].
    lora_B: Tensor

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[2]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[1]

    def without_branch_for(self, dtype: torch.dtype) -> ExpertStack:
        """Itself, a stack without a branch, for an x of ``dtype``."""
        return self._replace(lora_A=self.lora_A.to(dtype), lora_B=self.lora_B.to(dtype))


class Routing(NamedTuple):
    """The slots of T tokens that choose k experts each. A slot is a token's choice of an expert."""

    # [slots]: the slots' numbers, sorted by expert. Slots of no expert here come last.
    order: Tensor
    # [E]: behind which of them each expert ends.
    offsets: Tensor
    # [T, k].
    weights: Tensor

    @property
    def slots(self) -> int:
        return self.order.shape[0]

    def tokens(self) -> Tensor:
        """The token of each slot in their order."""
        return self.order // self.weights.shape[1]

    def weights_in_order(self) -> Tensor:
        """The routing weight of each slot in their order."""
        return self.weights.reshape(-1)[self.order]

    def place(self) -> Tensor:
        """Where in their order each slot is."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.slots, device=self.order.device)
        return place


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of sums over a token's slots, for summands of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


class MLPCall(NamedTuple):
    """One call, as forward and backward read it."""

    gate: Gate
    up: ExpertStack
    down: ExpertStack
    # Dropout's masks of all slots.
    up_mask: Tensor | None
    down_mask: Tensor | None
    routing: Routing
    # Each slot's token and routing weight, in the slots' order.
    tokens: Tensor
    weights: Tensor
    # That of the products.
    dtype: torch.dtype

    def hidden(self, gate_up: Tensor) -> Tensor:
        """H of G."""
        return self.gate(gate_up).to(self.dtype)

    def hidden_again(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """G as the leaf of a graph, and H at its end."""
        leaf = gate_up.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, self.hidden(leaf)

    def weighted(self, h: Tensor, rows: slice) -> Tensor:
        """``w ∘ H`` of some rows."""
        return (h * self.weights[rows, None]).to(self.dtype)


class Kept(NamedTuple):
    """What backward reads beside the call's arguments."""

    # [T, H], for the gradient of up's A.
    x: Tensor | None
    # G, [slots, 2 I].
    gate_up: Tensor
    # Up's S, [slots, r], for the gradient of up's B.
    s: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weights: bool
    up_a: bool
    up_b: bool
    down_a: bool
    down_b: bool

    @property
    def gate_up(self) -> bool:
        """dG."""
        return self.x or self.up_a or self.up_b

    @property
    def z(self) -> bool:
        """Z itself, for the gradients of down's A and B."""
        return self.down_a or self.down_b

    @property
    def of_up(self) -> Wanted:
        return Wanted(self.x, self.up_a, self.up_b)

    @property
    def of_down(self) -> Wanted:
        return Wanted(self.gate_up or self.weights, self.down_a, self.down_b)


class MLPGradients(NamedTuple):
    """In the order of :class:`Needs`; those that are not wanted are empty."""

    # In the dtype of sums.
    x: Tensor
    # [slots], in the slots' order; in the dtype of sums.
    weights: Tensor
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor

"""The records of a module of experts: its routing, its calls, and their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Gradients, Wanted
from stablelora_kernels.ops.lora_experts.call import ExpertStack

# Maps up's output G [rows, 2 I], or [rows, I] without a gate, to H [rows, I], row by row.
Gate = Callable[[Tensor], Tensor]


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

    def experts(self) -> Tensor:
        """The expert of each token's slots, [T, k]; the number of experts for none here."""
        expert = torch.searchsorted(self.offsets, self.place().to(self.offsets.dtype), right=True)
        return expert.view_as(self.weights)

    def of_tokens(self, tokens: slice) -> Routing:
        """That of some tokens alone."""
        count = self.offsets.shape[0]
        return sorted_routing(self.experts()[tokens], self.weights[tokens], count)

    def by_token(self, values: Tensor) -> Tensor:
        """``values`` [slots], in the slots' order, by token: [T, k]."""
        return values[self.place()].view_as(self.weights)

    def place(self) -> Tensor:
        """Where in their order each slot is."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.slots, device=self.order.device)
        return place


def sorted_routing(index: Tensor, weights: Tensor, count: int) -> Routing:
    """The slots of ``index`` [tokens, k] sorted by expert, of whom there are ``count`` here."""
    # Experts of other processes have numbers behind the last one here, and so the last rows.
    expert_of_row, order = torch.sort(index.reshape(-1), stable=True)
    numbers = torch.arange(count, device=index.device, dtype=expert_of_row.dtype)
    offsets = torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)
    return Routing(order, offsets, weights.reshape(index.shape))


class ExpertsMLPForwardCall(NamedTuple):
    """The output Y [T, N] of a module of experts for x [T, H]."""

    x: Tensor
    routing: Routing
    gate: Gate
    up: ExpertStack
    down: ExpertStack
    # Whether G and up's S are results.
    save: bool


class ExpertsMLPForwardResults(NamedTuple):
    """Y, and what backward needs; empty if it is not saved."""

    y: Tensor
    # G, [slots, 2 I].
    gate_up: Tensor
    # Up's S, [slots, r].
    s: Tensor


class ExpertsMLPWanted(NamedTuple):
    """Which gradients are wanted."""

    # Of the routing weights.
    weights: bool
    # X is that of up; dX of down is dZ.
    up: Wanted
    down: Wanted


class ExpertsMLPBackwardCall(NamedTuple):
    """The gradients of :class:`ExpertsMLPForwardCall` for dY [T, N]."""

    # Read for the gradient of up's A, and for G.
    x: Tensor | None
    grad: Tensor
    # None, as is up's S then: computed again.
    gate_up: Tensor | None
    # Up's S, read for the gradient of up's B.
    s: Tensor | None
    routing: Routing
    gate: Gate
    up: ExpertStack
    down: ExpertStack
    wanted: ExpertsMLPWanted


class ExpertsMLPGradients(NamedTuple):
    """The wanted gradients."""

    # [slots], in the slots' order; in the dtype of sums.
    weights: Tensor | None
    # Its dX is that of the tokens, in the dtype of sums.
    up: Gradients
    # Its dX, dZ, is no result.
    down: Gradients


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of sums over a token's slots, for summands of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def hidden(gate: Gate, gate_up: Tensor) -> Tensor:
    """H of G."""
    return gate(gate_up).to(gate_up.dtype)


def hidden_again(gate: Gate, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """G as the leaf of a graph, and H at its end."""
    leaf = gate_up.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, hidden(gate, leaf)


def weighted(h: Tensor, weights: Tensor) -> Tensor:
    """``w ∘ H`` for the routing weights of H's rows."""
    return (h * weights[:, None]).to(h.dtype)


def weight_gradients(dz: Tensor, h: Tensor, dy: Tensor, bias: Tensor | None) -> Tensor:
    """Those of rows' routing weights: Σ dZ ∘ H + Σ dY ∘ bias, [rows]."""
    dtype = sum_dtype(dz.dtype)
    gradients = (dz * h).sum(-1, dtype=dtype)
    return gradients if bias is None else gradients.add_((dy * bias).sum(-1, dtype=dtype))

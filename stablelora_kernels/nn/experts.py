"""How transformers' modules of experts are computed on ``lora_experts``, for PEFT's wrappers
(``integrations/peft/experts.py``).

Rows are sorted by expert, and each projection of all experts is one op.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import lora_experts
from stablelora_kernels.nn.fused_experts import gate_of
from stablelora_kernels.nn.stacks import (
    computed_parameters,
    is_packed,
    is_stored_as_taken,
    read_stack,
)
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.ops.lora_experts_mlp.call import sorted_routing

# The ways to compute experts, in transformers, that :func:`compute_experts` stands for.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class Experts(Protocol):
    """What is read of transformers' modules of experts. Llama 4's has neither has_gate nor
    is_transposed, nor a norm.
    """

    num_experts: int
    has_gate: bool
    is_transposed: bool
    has_post_expert_norm: bool

    def act_fn(self, gate: Tensor, /) -> Tensor: ...

    def _apply_gate(self, gate_up: Tensor, /) -> Tensor: ...

    def post_expert_norm(self, h: Tensor, /) -> Tensor: ...


def is_llama4(experts: object) -> bool:
    """Whether it is Llama 4's module, which is called without routing: its x has the rows of each
    expert.
    """
    # A parametrization makes a subclass of it.
    return any(kind.__name__ == "Llama4TextExperts" for kind in type(experts).__mro__)


def reason_experts_do_not_fit(experts: nn.Module) -> str | None:
    """Why :func:`compute_experts` cannot compute a module of experts, or None."""
    kind = type(experts)
    if not is_llama4(experts):
        if not hasattr(kind, "_apply_gate") or not hasattr(experts, "is_transposed"):
            return f"{kind.__name__} is not a stack of experts that lora_experts is known to fit"
        way = getattr(experts.config, "_experts_implementation", None)
        if way not in IMPLEMENTATIONS:
            return f"its experts are computed by {way!r}"
    if any(not is_packed(experts, name) for name in computed_parameters(experts)):
        return "another parametrization changes its weights"
    return None


def projections_of(experts: Experts) -> list[str]:
    """The names of the parameters that stack the projections up (or gate and up) and down."""
    has_gate = is_llama4(experts) or experts.has_gate
    return ["gate_up_proj" if has_gate else "up_proj", "down_proj"]


class StackedPair(NamedTuple):
    """The branch of a stack, as PEFT stores it."""

    # [E r, in], the expert slowest.
    lora_A: Tensor
    # [out, r E], the expert fastest.
    lora_B: Tensor
    scaling: float
    # Whether PEFT takes the weight for [E, in, out]. If it is wrong, A is on the output's side.
    taken_transposed: bool

    def by_expert(self, count: int) -> tuple[Tensor, Tensor]:
        """[E, r, in] and [E, out, r]."""
        a = self.lora_A.reshape(count, -1, self.lora_A.shape[1])
        b = self.lora_B.reshape(self.lora_B.shape[0], -1, count)
        return a, b.permute(2, 0, 1)


def stack_of(experts: Experts, name: str, pair: StackedPair | None) -> ExpertStack:
    """The stack ``name`` of a module of experts, packed or not, and its branch, if it has one."""
    module = cast(nn.Module, experts)
    stack = read_stack(module, name)
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    is_taken_so = is_llama4(experts) or experts.is_transposed
    transposed = is_taken_so and is_stored_as_taken(module, name)
    count, rows, columns = stack.shape
    if pair is not None:
        a, b = pair.by_expert(count)
        if is_taken_so != pair.taken_transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return ExpertStack(stack, bias, a, b, pair.scaling, transposed)
    in_features, out_features = (rows, columns) if transposed else (columns, rows)
    a = torch.empty(count, 0, in_features, dtype=torch.float32, device=stack.device)
    b = torch.empty(count, out_features, 0, dtype=torch.float32, device=stack.device)
    return ExpertStack(stack, bias, a, b, 1.0, transposed)


def _product(stack: ExpertStack, x: Tensor, offsets: Tensor) -> Tensor:
    """The product of rows [T, K], sorted by expert, with a stack and its branch, [T, N]."""
    stack = stack.without_branch_for(x.dtype) if stack.rank == 0 else stack
    assert stack.weight is not None
    return lora_experts(
        x,
        stack.weight,
        stack.bias,
        stack.lora_A,
        stack.lora_B,
        stack.scaling,
        offsets,
        transposed=stack.transposed,
    )


def compute_experts(
    experts: Experts, up: ExpertStack, down: ExpertStack, x: Tensor, *routing: Tensor
) -> Tensor:
    """The output of a module of experts for x [tokens, H], with the stacks ``up`` and ``down`` in
    place of its parameters.

    ``routing``: the experts of each token [tokens, k], and their weights [tokens, k].
    """
    if not is_llama4(experts):
        return _compute_routed(experts, up, down, x, *routing)
    # Each expert has as many rows, and they are sorted.
    count = experts.num_experts
    offsets = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * (x.shape[0] // count)
    gate, h = _product(up, x, offsets).chunk(2, -1)
    return _product(down, h * experts.act_fn(gate), offsets)


def _compute_routed(
    experts: Experts,
    up: ExpertStack,
    down: ExpertStack,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """The experts' outputs, summed for each token with its weights. A slot of no expert here adds
    nothing.
    """
    tokens, top_k = index.shape
    routing = sorted_routing(index, weights, experts.num_experts)
    h = _product(up, x[routing.tokens()], routing.offsets)
    h = _product(down, gate_of(experts)(h), routing.offsets)
    if experts.has_post_expert_norm:
        h = experts.post_expert_norm(h)
    h = h * routing.weights_in_order().unsqueeze(-1)
    return h[routing.place()].view(tokens, top_k, h.shape[-1]).sum(1).to(x.dtype)

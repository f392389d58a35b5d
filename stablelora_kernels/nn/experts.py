"""Stacks of experts: ``LoRAExperts``, and how transformers' modules of experts are computed on
``lora_experts``.

Rows are sorted by expert, and each projection of all experts is one op. PEFT's wrappers of experts
are computed by the same function (``integrations/peft_experts.py``), and A and B are stored as PEFT
stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import PackedExperts, lora_experts
from stablelora_kernels.nn.fused_experts import (
    FusableExperts,
    compute_fused_experts,
    gate_of,
    sorted_routing,
)
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.nn.stacks import (
    computed_parameters,
    dtype_of_stack,
    format_of_stack,
    is_packed,
    is_stored_as_taken,
    read_stack,
    reason_stack_does_not_fit,
    shape_of_stack,
    stored_parameter,
)
from stablelora_kernels.ops.lora_experts_mlp_call import ExpertStack, FrozenStack
from stablelora_kernels.utils.modules import is_hooked

# The ways to compute experts, in transformers, that :func:`compute_experts` stands for.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Maps rows [T, K], sorted by expert, and offsets [E] to [T, N].
Product = Callable[[Tensor, Tensor], Tensor]


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


def is_taken_transposed(experts: object) -> bool:
    """Whether PEFT takes the weights for [E, in, out]. It is wrong about Llama 4's, so that their A
    is on the output's side.
    """
    return getattr(experts, "is_transposed", False)


def stack_of(
    experts: Experts,
    name: str,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    weight: Tensor | None = None,
    taken_transposed: bool | None = None,
) -> ExpertStack:
    """The stack ``name`` of a module of experts, packed or not, or ``weight`` in its place, and its
    branch.

    As PEFT stores them: A [E r, in], the expert slowest, and B [out, r E], the expert fastest.
    ``taken_transposed``: whether it takes the weights for [E, in, out]; what newer releases do if
    not given.
    """
    module = cast(nn.Module, experts)
    stack: Tensor | PackedExperts = read_stack(module, name) if weight is None else weight
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    is_taken_so = is_llama4(experts) or experts.is_transposed
    transposed = is_taken_so and is_stored_as_taken(module, name)
    count = stack.shape[0]
    if lora_A is None or lora_B is None:
        rows, columns = stack.shape[1:]
        in_features, out_features = (rows, columns) if transposed else (columns, rows)
        device = stack.device
        a = torch.empty(count, 0, in_features, dtype=torch.float32, device=device)
        b = torch.empty(count, out_features, 0, dtype=torch.float32, device=device)
    else:
        a, b = pairs_by_expert(lora_A, lora_B, count)
        if taken_transposed is None:
            taken_transposed = is_taken_transposed(experts)
        if is_taken_so != taken_transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
    return ExpertStack(FrozenStack(stack, bias, transposed, scaling, dropout_p), a, b)


def product_of(stack: ExpertStack) -> Product:
    """The product with a stack and its branch."""

    def product(x: Tensor, offsets: Tensor) -> Tensor:
        frozen = stack.frozen
        branch = stack.without_branch_for(x.dtype) if stack.rank == 0 else stack
        return lora_experts(
            x,
            frozen.weight,
            frozen.bias,
            branch.lora_A,
            branch.lora_B,
            frozen.scaling,
            offsets,
            transposed=frozen.transposed,
            dropout_p=frozen.dropout_p,
        )

    return product


def pairs_by_expert(lora_A: Tensor, lora_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[E, r, in] and [E, out, r] of a stack's A and B."""
    a = lora_A.reshape(count, -1, lora_A.shape[1])
    b = lora_B.reshape(lora_B.shape[0], -1, count)
    return a, b.permute(2, 0, 1)


def compute_experts(
    experts: Experts, products: Mapping[str, Product], x: Tensor, *routing: Tensor
) -> Tensor:
    """The output of a module of experts for x [tokens, H], with ``products`` in place of those with
    its parameters.

    ``routing``: the experts of each token [tokens, k], and their weights [tokens, k].
    """
    names = projections_of(experts)
    up, down = (products.get(name) or product_of(stack_of(experts, name)) for name in names)
    if not is_llama4(experts):
        return _compute_routed(experts, up, down, x, *routing)
    # Each expert has as many rows, and they are sorted.
    count = experts.num_experts
    offsets = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * (x.shape[0] // count)
    gate, h = up(x, offsets).chunk(2, -1)
    return down(h * experts.act_fn(gate), offsets)


def _compute_routed(
    experts: Experts, up: Product, down: Product, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The experts' outputs, summed for each token with its weights. A slot of no expert here adds
    nothing.
    """
    tokens, top_k = index.shape
    routing = sorted_routing(index, weights, experts.num_experts)
    h = up(x[routing.tokens()], routing.offsets)
    h = down(gate_of(experts)(h), routing.offsets)
    if experts.has_post_expert_norm:
        h = experts.post_expert_norm(h)
    h = h * routing.weights_in_order().unsqueeze(-1)
    return h[routing.place()].view(tokens, top_k, h.shape[-1]).sum(1).to(x.dtype)


def compute_fused(
    experts: Experts, stacks: Mapping[str, ExpertStack], x: Tensor, *routing: Tensor
) -> Tensor:
    """As :func:`compute_experts` of a module with routing, in one autograd node."""
    up, down = (stacks.get(name) or stack_of(experts, name) for name in projections_of(experts))
    return compute_fused_experts(gate_of(experts), up, down, x, *routing)


# This library's layers


class StackedWeight:
    """A parameter of a module of experts, with what :class:`LoRALinear` reads of its ``nn.Linear``."""

    def __init__(self, experts: nn.Module, name: str, depth: int) -> None:
        self.experts: Any = experts
        self.name = name
        # PEFT nests a module for each adapted parameter. So many come behind this one's.
        self.depth = depth
        self.count, rows, columns = shape_of_stack(experts, name)
        transposed = is_taken_transposed(self.experts)
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self.training = experts.training

    @property
    def weight(self) -> nn.Parameter:
        """[E, out, in] or [E, in, out]; of a packed stack, the parameter with its bytes."""
        return stored_parameter(self.experts, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the module gives the stack to products."""
        return dtype_of_stack(self.experts, self.name)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]


class LoRAStack(LoRALinear):
    """LoRA on one projection of all experts, a part of :class:`LoRAExperts`; ``apply_lora`` makes
    it.

    Attributes:
        weight: the experts' parameter, [E, out_features, in_features] or [E, in_features,
            out_features], frozen; of a packed stack, which cannot be merged, the parameter with its
            bytes.
        bias: None; the experts' own bias is theirs.
        lora_A: [E r, in_features], the expert slowest.
        lora_B: [out_features, r E], the expert fastest.
    """

    def _attach(self, base: StackedWeight) -> None:  # type: ignore[override]
        self.register_parameter("bias", None)
        self.num_experts = base.count
        self.__dict__["_base"] = base

    @staticmethod
    def _compute_dtype(base: StackedWeight) -> torch.dtype:  # type: ignore[override]
        return base.dtype

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self.__dict__["_base"].weight  # type: ignore[no-any-return]

    @property
    def packed_format(self) -> str | None:
        """What reports call the format of a packed stack, or None."""
        base: StackedWeight = self.__dict__["_base"]
        return format_of_stack(base.experts, base.name)

    def merge(self) -> MergeError:
        """As :meth:`LoRALinear.merge`.

        Raises:
            ValueError: also if the stack is packed: the sum would have to be quantized again.
        """
        packed_format = self.packed_format
        if packed_format is not None:
            name = self.__dict__["_base"].name
            raise ValueError(
                f"{name} is a stack in {packed_format}, which would have to be quantized anew to be merged; keep the "
                "branch, or remove_lora(model, merge=False)"
            )
        return super().merge()

    @property
    def holder(self) -> nn.Module:
        """The module of experts."""
        return self.__dict__["_base"].experts  # type: ignore[no-any-return]

    @property
    def depth(self) -> int:
        """How many modules PEFT nests around the one of this projection."""
        return self.__dict__["_base"].depth  # type: ignore[no-any-return]

    def to_linear(self) -> nn.Module:
        """The module of experts, which holds the weight, merged or not."""
        return self.holder

    def set_weight(self, weight: nn.Parameter) -> None:
        self.holder.register_parameter(self.__dict__["_base"].name, weight)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``x`` [T, K], its rows sorted by expert, to [T, N]; ``offsets`` [E] say behind which
        row each expert ends.

        Raises:
            RuntimeError: as ``LoRALinear.forward``.
            ValueError, TypeError: as :func:`~stablelora_kernels.functional.lora_experts`.
        """
        return product_of(self.stack())(x, offsets)

    def stack(self) -> ExpertStack:
        """The projection of all experts as it is now.

        Raises:
            RuntimeError: it is merged and trains.
        """
        base = self.__dict__["_base"]
        if self._disabled:
            unmerged = self.frozen_weight if self.merged else None
            return stack_of(base.experts, base.name, weight=unmerged)
        if self.merged:
            self._check_trains()
            return stack_of(base.experts, base.name)
        dropout_p = self.lora_dropout if self.training else 0.0
        return stack_of(base.experts, base.name, self.lora_A, self.lora_B, self.scaling, dropout_p)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` of each expert, in the weight's layout, in float32 (float64 for float64
        weights).
        """
        base: StackedWeight = self.__dict__["_base"]
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        a, b = pairs_by_expert(self.lora_A.to(dtype), self.lora_B.to(dtype), base.count)
        with torch.autocast(a.device.type, enabled=False):
            delta = self.scaling * (b @ a)
        return delta.transpose(1, 2) if is_taken_transposed(base.experts) else delta

    def _weight_key(self, prefix: str) -> str:
        """The experts' own name of the weight, in ``LoRAExperts.base_layer``."""
        name = self.__dict__["_base"].name
        return f"{prefix.removesuffix(f'{name}.')}base_layer.{name}"

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {super().extra_repr()}"


class LoRAExperts(FusableExperts, nn.Module):
    """A module of experts whose stacked parameters have LoRA, dropout included: each is a
    :class:`LoRAStack` of its name.

    ``apply_lora`` makes it for ``target_parameters``. ``base_layer`` is the module of experts.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)

    def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
        """The experts' output, for the arguments of ``base_layer``: x [tokens, H], each token's
        experts and their weights.
        """
        stacks = self._stacks()
        if not all(stack._disabled or stack.merged for stack in stacks.values()):
            if self.are_experts_fused(x):
                read = {name: stack.stack() for name, stack in stacks.items()}
                return compute_fused(self.base_layer, read, x, *routing)  # type: ignore[arg-type]
            return compute_experts(self.base_layer, stacks, x, *routing)  # type: ignore[arg-type]
        frozen: dict[str, Tensor] = {}
        for name, stack in stacks.items():
            if not stack._disabled:
                stack._check_trains()
            elif stack.merged:
                frozen[name] = stack.frozen_weight
        if frozen:
            return torch.func.functional_call(self.base_layer, frozen, (x, *routing))
        return self.base_layer(x, *routing)

    def _stacks(self) -> dict[str, LoRAStack]:
        """By the name of the parameter."""
        return {
            name: module for name, module in self._modules.items() if isinstance(module, LoRAStack)
        }

    def module_of_experts(self) -> nn.Module:
        return self.base_layer

    def reason_experts_are_not_fused(self) -> str | None:
        for name, stack in self._stacks().items():
            if is_hooked(stack):
                return f"{name!r} has hooks, which would not run"
        return super().reason_experts_are_not_fused()


def reason_parameter_gets_no_lora(experts: Any, name: str) -> str | None:
    """Why the parameter ``name`` of a module cannot get a :class:`LoRAStack`, or None."""
    if (reason := reason_experts_do_not_fit(experts)) is not None:
        return reason
    if name not in projections_of(experts):
        return f"its {name} is none of {', '.join(projections_of(experts))}"
    if "forward" in experts.__dict__:
        return "its module's forward was replaced (as accelerate's hooks do)"
    return reason_stack_does_not_fit(experts, name, gathered=True)

"""``fuse_mlp`` and ``tile_mlp`` for modules of experts: which of them one autograd node computes, and why not the
others.

Each call looks again; a call that does not fit is computed by two ops of ``lora_experts``, or by
PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.ops.checks import check_stack
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.ops.lora_experts_mlp.autograd import lora_experts_mlp_op
from stablelora_kernels.ops.lora_experts_mlp.call import Gate, sorted_routing
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import autocast_dtype, cast

# The key of a module's __dict__ that says that its experts are fused, and whether in tiles. state_dict
# does not have it.
_ATTRIBUTE = "_stablelora_experts_mlp"


class FusableExperts:
    """A module that computes a module of experts with LoRA: PEFT's wrapper, accelerated."""

    def fuse_experts(self: Any, tiled: bool | int) -> str | None:
        """Compute the experts in one node from now on, ``tiled`` or not; or return why not."""
        reason = _reason_against(self.module_of_experts())
        if reason is None:
            self.__dict__[_ATTRIBUTE] = tiled
        return reason

    def unfuse_experts(self: Any) -> None:
        self.__dict__.pop(_ATTRIBUTE, None)

    def are_experts_fused(self: Any, x: Tensor) -> bool:
        """Whether one node computes a call with the input ``x``."""
        if _ATTRIBUTE not in self.__dict__ or type(x) is not Tensor or x.is_meta:
            return False
        # A compiled graph cannot hold the gate's backward. Global hooks and tracing must see every
        # module's call.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _has_any_global_hook():
            return False
        return _reason_against(self.module_of_experts()) is None

    def are_experts_tiled(self: Any) -> bool | int:
        """As :func:`compute_fused_experts` takes it."""
        tiled: bool | int = self.__dict__[_ATTRIBUTE]
        return tiled

    def module_of_experts(self) -> Any:
        """transformers' module."""
        raise NotImplementedError


def _reason_against(experts: Any) -> str | None:
    """Why one node cannot compute a module of experts that ``lora_experts`` fits, or None."""
    if not hasattr(type(experts), "_apply_gate"):
        return f"{type(experts).__name__} is called without routing weights"
    if experts.has_post_expert_norm:
        return "a norm comes between its experts and their routing weights"
    for name, module in experts.named_modules():
        if module is experts:
            continue
        if is_hooked(module):
            return f"its {name!r} has hooks, which would run once more"
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return f"its {name!r} has parameters that train"
    return None


def gate_of(experts: Any) -> Gate:
    """What a module of experts computes between its two projections."""
    return experts._apply_gate if experts.has_gate else experts.act_fn  # type: ignore[no-any-return]


def compute_fused_experts(
    gate: Gate,
    up: ExpertStack,
    down: ExpertStack,
    x: Tensor,
    *routing: Tensor,
    tiled: bool | int,
) -> Tensor:
    """The output of a module of experts whose ``gate`` is between the stacks ``up`` and ``down``,
    for x [tokens, H], the experts of each token [tokens, k], and their weights [tokens, k].

    ``tiled``: keep x alone, as :func:`~stablelora_kernels.functional.lora_mlp` does; a tile has so
    many tokens.

    Raises:
        ValueError, TypeError: as :func:`~stablelora_kernels.functional.lora_experts`.
    """
    index, weights = routing
    dtype = autocast_dtype(x.device.type)
    rows = x
    if dtype is not None:
        rows = cast(x, dtype)
        up = _for_autocast(up, dtype)
        down = _for_autocast(down, dtype)
    if up.rank == 0:
        up = up.without_branch_for(rows.dtype)
    if down.rank == 0:
        down = down.without_branch_for(rows.dtype)
    check_stack(rows, up, dtype is not None)
    check_stack(rows.new_empty(0, down.in_features), down, dtype is not None)
    slots = sorted_routing(index, weights, up.lora_A.shape[0])
    y = lora_experts_mlp_op(rows, slots, gate, up, down, tiled)
    return y.to(x.dtype)


def _for_autocast(stack: ExpertStack, dtype: torch.dtype) -> ExpertStack:
    """``stack`` with A and B as autocast casts them. Weights are cast expert by expert."""
    if stack.lora_A.dtype == torch.float32:
        return stack
    return stack._replace(lora_A=cast(stack.lora_A, dtype), lora_B=cast(stack.lora_B, dtype))

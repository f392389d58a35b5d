"""PEFT's ``ParamWrapper`` over a stack of experts, with a forward on ``lora_experts``. This module
imports peft.

PEFT folds ``W + s B A`` into a stack of experts at each call: a copy of the stack that autograd
keeps, and its gradient. Here the rows are sorted by expert, and each projection is one op. As in
``layers.py``, a mixin takes the forward over, that of the outermost wrapper where PEFT has nested
one for each parameter, and each call reads what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from stablelora_kernels.dispatch.tallies import note_fallback
from stablelora_kernels.integrations.peft.faults import fault_of_packed
from stablelora_kernels.integrations.peft.merging import KeepsBase
from stablelora_kernels.integrations.peft.read import is_observed, plain_tensors
from stablelora_kernels.integrations.peft.wrappers import (
    nest_as_pefts,
    nest_as_plain,
    wrapped_parameters,
)
from stablelora_kernels.model.reports import SkippedModule
from stablelora_kernels.nn.experts import (
    StackedPair,
    compute_experts,
    is_llama4,
    projections_of,
    reason_experts_do_not_fit,
    stack_of,
)
from stablelora_kernels.nn.fused_experts import FusableExperts, compute_fused_experts, gate_of
from stablelora_kernels.nn.stacks import (
    format_of_stack,
    has_hooks_of_others,
    is_packed,
    reason_stack_does_not_fit,
    stored_parameter,
)
from stablelora_kernels.nn.take_over import give_back, take_over
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.refusal import Refusal
from stablelora_kernels.utils.tensors import autocast_dtype


class Stacks(NamedTuple):
    """A model's outermost wrappers, by name, and those that PEFT's own forward computes."""

    accelerated: dict[str, ParamWrapper]
    skipped: list[SkippedModule]


class AcceleratedExperts(FusableExperts, KeepsBase):
    """A mixin in front of ``ParamWrapper``. Calls that it does not support run PEFT's forward, and
    raise where that computes packed experts wrongly.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output for x [tokens, H], the experts of each token [tokens, k], and their
        weights [tokens, k].

        Raises:
            RuntimeError: the experts are packed, the op does not support the call, and PEFT's
                forward would be wrong.
        """
        base: Any = self.get_base_layer()
        has_routing = len(args) == (0 if is_llama4(base) else 2)
        reason = "its call is observed, or has other arguments than transformers gives"
        if has_routing and not kwargs and not is_observed(self):
            stacks = read_stacks(self, x)
            if not isinstance(stacks, Refusal):
                up, down = stacks
                if self.are_experts_fused(x):
                    tiled = self.are_experts_tiled()
                    return compute_fused_experts(gate_of(base), up, down, x, *args, tiled=tiled)
                return compute_experts(base, up, down, x, *args)
            reason = stacks.reason
        fault = fault_of_packed(self) if self._has_effect() else None
        if fault is not None:
            raise RuntimeError(f"{reason}, and {fault}")
        if not torch.compiler.is_compiling():
            note_fallback(self, reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def module_of_experts(self: Any) -> nn.Module:
        return self.get_base_layer()  # type: ignore[no-any-return]

    def _has_effect(self: Any) -> bool:
        """Whether an adapter of a parameter is active and enabled."""
        wrappers = [w for w in wrapped_parameters(self).values() if not w.disable_adapters]
        return any(name in w.lora_A for w in wrappers for name in w.active_adapters)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which adds to a copy of packed experts that it then drops.

        Raises:
            ValueError: an adapted stack is packed.
        """
        base = self.get_base_layer()
        for name in wrapped_parameters(self):
            packed_format = format_of_stack(base, name)
            if packed_format is not None:
                raise ValueError(
                    f"{name} is a stack in {packed_format}, which would have to be quantized anew to be merged; keep the "
                    "adapter, or unload() it"
                )
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]


def accelerate(model: nn.Module, outermost: ParamWrapper) -> None:
    """Compute the experts of a model's outermost wrapper by ``lora_experts``. Packed ones get the
    names of plain ones.
    """
    take_over(nest_as_plain(model, outermost), AcceleratedExperts)


def restore(model: nn.Module, outermost: ParamWrapper) -> None:
    """Undo :func:`accelerate`."""
    give_back(outermost, AcceleratedExperts)
    nest_as_pefts(model, outermost)


def read_wrappers(wrappers: Mapping[str, ParamWrapper]) -> Stacks:
    """Those of a model's ``wrappers`` that no other one wraps: which ``lora_experts`` can compute,
    and why not.

    Raises:
        ValueError: it cannot compute packed experts, and PEFT's forward would be wrong.
    """
    nested = {id(wrapper.base_layer) for wrapper in wrappers.values()}
    stacks = Stacks({}, [])
    for name, wrapper in wrappers.items():
        if id(wrapper) in nested:
            continue
        reading = read_stacks(wrapper, None)
        if isinstance(reading, Refusal):
            fault = fault_of_packed(wrapper)
            if fault is not None:
                raise ValueError(f"{name}: {reading.reason}, and {fault}")
            stacks.skipped.append(SkippedModule(name, reading.reason))
        else:
            stacks.accelerated[name] = wrapper
    return stacks


def read_stacks(wrapper: ParamWrapper, x: Tensor | None) -> list[ExpertStack] | Refusal:
    """The stacks up and down for an input like ``x``, or why PEFT must compute them.

    Without ``x``, whether there is an input that they are computed for; there are no stacks then.
    """
    wrappers = wrapped_parameters(wrapper)
    base: Any = wrapper.get_base_layer()
    reason = reason_experts_do_not_fit(base)
    if reason is not None:
        return Refusal(reason)
    if x is None and "forward" in wrapper.__dict__:
        return Refusal("its forward was replaced")
    inner = [module for module in wrappers.values() if module is not wrapper]
    if any(is_hooked(module) for module in inner) or has_hooks_of_others(base):
        return Refusal("it holds a module with hooks")
    names = projections_of(base)
    unknown = [name for name in wrappers if name not in names]
    if unknown:
        return Refusal(f"PEFT adapts its {unknown[0]}")
    stacks: list[ExpertStack] = []
    for name in names:
        reason = reason_stack_does_not_fit(base, name, x is not None)
        reason = reason or _reason_against_tensors(base, name, x)
        if reason is not None:
            return Refusal(reason)
        pair = _read_pair(name, wrappers[name], x) if name in wrappers else None
        if isinstance(pair, Refusal):
            return pair
        if x is not None:
            stacks.append(stack_of(base, name, pair))
    return stacks


def _reason_against_tensors(experts: nn.Module, name: str, x: Tensor | None) -> str | None:
    """Why the op cannot read a projection's weight and bias beside ``x``, or None."""
    weight = stored_parameter(experts, name)
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return f"its {name} trains"
    if x is None:
        return None
    # A packed stack is dequantized to any dtype.
    fits = is_packed(experts, name) or weight.dtype == _dtype_of_products(x)
    if weight.device != x.device or not fits:
        return f"its {name} is {weight.dtype} on {weight.device}"
    return None


def _dtype_of_products(x: Tensor) -> torch.dtype:
    return autocast_dtype(x.device.type) or x.dtype


def _read_pair(name: str, wrapper: ParamWrapper, x: Tensor | None) -> StackedPair | Refusal:
    """The pair of a wrapper for an input like ``x``, or why PEFT must compute it. Without ``x``,
    that of any adapter.
    """
    if wrapper.num_experts < 2:
        return Refusal(f"its {name} is of one expert")
    adapters = list(wrapper.lora_A)
    if x is not None:
        if wrapper.merged:
            return Refusal(f"its {name} is merged")
        if wrapper.disable_adapters:
            return Refusal(f"its {name} is disabled")
        adapters = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
        if len(adapters) != 1:
            return Refusal(f"its {name} has {len(adapters)} active adapters")
    pairs: list[tuple[Tensor, Tensor]] = []
    for adapter in adapters:
        lora_A = _matrix(wrapper.lora_A[adapter], x is None)
        lora_B = _matrix(wrapper.lora_B[adapter], x is None)
        if lora_A is None or lora_B is None:
            return Refusal(
                f"adapter {adapter!r} of its {name} is not of plain nn.Linears, or has hooks"
            )
        pairs.append((lora_A, lora_B))
    lora_A, lora_B = pairs[-1]
    if x is not None:
        is_allowed = lora_A.dtype == lora_B.dtype and lora_A.dtype in (
            torch.float32,
            _dtype_of_products(x),
        )
        if lora_A.device != x.device or not is_allowed:
            return Refusal(
                f"adapter {adapter!r} of its {name} is {lora_A.dtype} on {lora_A.device}"
            )
    # PEFT before 0.19 takes all weights for [E, in, out].
    taken_transposed = not getattr(wrapper, "_did_swap_in_out_features", False)
    return StackedPair(lora_A, lora_B, wrapper.scaling[adapter], taken_transposed)


def _matrix(module: nn.Module, between_calls: bool) -> Tensor | None:
    """The weight of a plain ``nn.Linear`` without a bias, and without hooks; None of others."""
    tensors = plain_tensors(module, between_calls)
    return None if tensors is None or tensors[1] is not None else tensors[0]

"""PEFT's ``ParamWrapper`` over a stack of experts, with a forward on ``lora_experts``. This module imports peft.

PEFT folds ``W + s B A`` into a stack of experts at each call: a copy of the stack that autograd keeps, and its gradient. Here the
rows are sorted by expert, and each projection is one op. As in ``peft_layers``, only the ``__class__`` of an instance changes,
that of the outermost wrapper where PEFT has nested one for each parameter, and each call reads what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES, lora_experts
from stablelora_kernels.integrations.peft_operands import is_observed
from stablelora_kernels.model.reports import SkippedModule
from stablelora_kernels.nn.linear import weight_and_bias
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded

# The ways to compute experts, in transformers, that this forward stands for.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_LLAMA4 = "Llama4TextExperts"


class Stack(NamedTuple):
    """One projection of all experts, as ``lora_experts`` takes it."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    transposed: bool

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        return lora_experts(x, *self[:5], offsets, transposed=self.transposed)


class AcceleratedExperts(ParamWrapper):
    """``peft.tuners.lora.ParamWrapper``. Calls that it does not support run PEFT's forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output for x [tokens, H], the experts of each token [tokens, k], and their weights [tokens, k]."""
        base: Any = self.get_base_layer()
        of_llama = type(base).__name__ == _LLAMA4
        fits = not kwargs and len(args) == (0 if of_llama else 2) and not is_observed(self)
        stacks = read_stacks(self, x) if fits else ""
        if isinstance(stacks, str):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not of_llama:
            return _routed(base, stacks, x, *args)
        # Each expert has as many rows, and they are sorted.
        count = base.num_experts
        offsets = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * (x.shape[0] // count)
        gate, up = stacks[0](x, offsets).chunk(2, -1)
        return stacks[1](up * base.act_fn(gate), offsets)


# PEFT knows its wrappers by this name, and a printed model must look the same.
AcceleratedExperts.__name__ = ParamWrapper.__name__


def _routed(base: Any, stacks: list[Stack], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' outputs, summed for each token with its weights. A slot of no expert here adds nothing."""
    (tokens, top_k), (up, down) = index.shape, stacks
    # Experts of other processes have numbers behind the last one here, and so the last rows.
    experts, order = torch.sort(index.reshape(-1), stable=True)
    numbers = torch.arange(base.num_experts, device=x.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    h = up(x[order // top_k], offsets)
    h = down(base._apply_gate(h) if base.has_gate else base.act_fn(h), offsets)
    if base.has_post_expert_norm:
        h = base.post_expert_norm(h)
    h = h * weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return h[place].view(tokens, top_k, -1).sum(1).to(x.dtype)


def read_wrappers(wrappers: Mapping[str, ParamWrapper]) -> tuple[dict[str, ParamWrapper], list[SkippedModule]]:
    """The outermost of a model's ``wrappers``: those that ``lora_experts`` can compute, and the others with the reason."""
    nested = {id(wrapper.base_layer) for wrapper in wrappers.values()}
    found = {name: read_stacks(each, None) for name, each in wrappers.items() if id(each) not in nested}
    skipped = [SkippedModule(name, reason) for name, reason in found.items() if isinstance(reason, str)]
    return {name: wrappers[name] for name, each in found.items() if not isinstance(each, str)}, skipped


def wrapped_parameters(wrapper: Any) -> dict[str, Any]:
    """A wrapper and those nested in it, by the name of the parameter that each adapts."""
    found = {}
    while isinstance(wrapper, ParamWrapper):
        found[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return found


def read_stacks(wrapper: Any, x: Tensor | None) -> list[Stack] | str:
    """The projections up (or gate and up) and down for an input like ``x``, or why PEFT must compute them.

    Without ``x``, whether there is an input that they are computed for; the projections are then as PEFT stores them.
    """
    wrappers, base = wrapped_parameters(wrapper), wrapper.get_base_layer()
    kind = type(base)
    of_llama = kind.__name__ == _LLAMA4
    if not of_llama and not hasattr(kind, "_apply_gate"):
        return f"{kind.__name__} is not a stack of experts that lora_experts is known to fit"
    if not of_llama and (way := getattr(base.config, "_experts_implementation", None)) not in IMPLEMENTATIONS:
        return f"its experts are computed by {way!r}"
    if hasattr(base, "parametrizations"):
        return "another parametrization changes its weights"
    if x is None and "forward" in wrapper.__dict__:
        return "its forward was replaced"
    if any(is_hooked(each) for each in (*wrappers.values(), base) if each is not wrapper):
        return "it holds a module with hooks"
    names = ["gate_up_proj" if of_llama or base.has_gate else "up_proj", "down_proj"]
    if other := [name for name in wrappers if name not in names]:
        return f"PEFT adapts its {other[0]}"
    stacks: list[Stack] = []
    for name in names:
        stack = _read_stack(base, name, wrappers.get(name), of_llama or base.is_transposed, x)
        if isinstance(stack, str):
            return stack
        stacks.append(stack)
    return stacks


def _read_stack(base: Any, name: str, wrapper: Any, transposed: bool, x: Tensor | None) -> Stack | str:
    weight, bias = getattr(base, name), getattr(base, f"{name}_bias", None)
    for t in (weight, bias):
        if t is None or (x is None and is_sharded(t)):
            continue
        if type(t) not in (nn.Parameter, Tensor) or t.dtype not in FLOAT_DTYPES:
            return f"its {name} is a {type(t).__name__} of {t.dtype}"
        if t.requires_grad:
            return f"its {name} trains"
    if x is not None and (weight.device != x.device or weight.dtype != (autocast_dtype(x.device.type) or x.dtype)):
        return f"its {name} is {weight.dtype} on {weight.device}"
    count = weight.shape[0]
    if wrapper is None:
        k, n = weight.shape[1:] if transposed else weight.shape[:0:-1]
        return Stack(weight, bias, weight.new_empty(count, 0, k), weight.new_empty(count, n, 0), 1.0, transposed)
    if wrapper.num_experts < 2:
        return f"its {name} is of one expert"
    if x is None:
        adapters = [*wrapper.lora_A]
    else:
        if wrapper.merged or wrapper.disable_adapters:
            return f"its {name} is {'merged' if wrapper.merged else 'disabled'}"
        adapters = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
        if len(adapters) != 1:
            return f"its {name} has {len(adapters)} active adapters"
    for adapter in adapters:
        a, b = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
        if any(type(t) is not nn.Linear or is_hooked(t) or weight_and_bias(t)[1] is not None for t in (a, b)):
            return f"adapter {adapter!r} of its {name} is not of plain nn.Linears, or has hooks"
    a, b, scaling = a.weight, b.weight, wrapper.scaling[adapter]
    if x is None:
        return Stack(weight, bias, a, b, scaling, transposed)
    if a.device != x.device or a.dtype != b.dtype or a.dtype not in (torch.float32, weight.dtype):
        return f"adapter {adapter!r} of its {name} is {a.dtype} on {a.device}"
    # PEFT's files have the expert slowest in A [E r, in], and fastest in B [out, r E].
    a, b = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    if transposed == getattr(wrapper, "_did_swap_in_out_features", False):
        # PEFT has taken the stack's inputs for its outputs, as it does with Llama 4's: its A is on the output's side.
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return Stack(weight, bias, a, b, scaling, transposed)

"""PEFT's ``ParamWrapper`` over a stack of experts, with a forward on ``lora_experts``. This module
imports peft.

PEFT folds ``W + s B A`` into a stack of experts at each call: a copy of the stack that autograd
keeps, and its gradient. Here the rows are sorted by expert, and each projection is one op. As in
``peft_layers``, only the ``__class__`` of an instance changes, that of the outermost wrapper where
PEFT has nested one for each parameter, and each call reads what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from stablelora_kernels.integrations.peft_operands import is_observed
from stablelora_kernels.model.reports import SkippedModule
from stablelora_kernels.nn.experts import (
    Product,
    compute_experts,
    is_llama4,
    product_of,
    projections_of,
    reason_against,
    reason_against_stack,
)
from stablelora_kernels.nn.linear import weight_and_bias
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import autocast_dtype


class AcceleratedExperts(ParamWrapper):
    """``peft.tuners.lora.ParamWrapper``. Calls that it does not support run PEFT's forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output for x [tokens, H], the experts of each token [tokens, k], and their
        weights [tokens, k].
        """
        base = self.get_base_layer()
        fits = not kwargs and len(args) == (0 if is_llama4(base) else 2) and not is_observed(self)
        products = read_products(self, x) if fits else ""
        if isinstance(products, str):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return compute_experts(base, products, x, *args)


# PEFT knows its wrappers by this name, and a printed model must look the same.
AcceleratedExperts.__name__ = ParamWrapper.__name__


def read_wrappers(
    wrappers: Mapping[str, ParamWrapper],
) -> tuple[dict[str, ParamWrapper], list[SkippedModule]]:
    """The outermost of a model's ``wrappers``: those that ``lora_experts`` can compute, and the
    others with the reason.
    """
    nested = {id(wrapper.base_layer) for wrapper in wrappers.values()}
    found = {
        name: read_products(each, None) for name, each in wrappers.items() if id(each) not in nested
    }
    skipped = [
        SkippedModule(name, reason) for name, reason in found.items() if isinstance(reason, str)
    ]
    return {
        name: wrappers[name] for name, each in found.items() if not isinstance(each, str)
    }, skipped


def wrapped_parameters(wrapper: Any) -> dict[str, Any]:
    """A wrapper and those nested in it, by the name of the parameter that each adapts."""
    found = {}
    while isinstance(wrapper, ParamWrapper):
        found[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return found


def read_products(wrapper: Any, x: Tensor | None) -> dict[str, Product] | str:
    """The products of the adapted parameters for an input like ``x``, or why PEFT must compute
    them.

    Without ``x``, whether there is an input that they are computed for; there are no products then.
    """
    wrappers, base = wrapped_parameters(wrapper), wrapper.get_base_layer()
    if (reason := reason_against(base)) is not None:
        return reason
    if x is None and "forward" in wrapper.__dict__:
        return "its forward was replaced"
    if any(is_hooked(each) for each in (*wrappers.values(), base) if each is not wrapper):
        return "it holds a module with hooks"
    names = projections_of(base)
    if other := [name for name in wrappers if name not in names]:
        return f"PEFT adapts its {other[0]}"
    products: dict[str, Product] = {}
    for name in names:
        if (reason := reason_against_stack(base, name, x is not None)) is not None:
            return reason
        weight, bias = getattr(base, name), getattr(base, f"{name}_bias", None)
        if any(t is not None and t.requires_grad for t in (weight, bias)):
            return f"its {name} trains"
        dtype = None if x is None else autocast_dtype(x.device.type) or x.dtype
        if x is not None and (weight.device != x.device or weight.dtype != dtype):
            return f"its {name} is {weight.dtype} on {weight.device}"
        if name in wrappers:
            pair = _read_pair(name, wrappers[name], weight.dtype, x)
            if isinstance(pair, str):
                return pair
            if x is not None:
                products[name] = product_of(base, name, *pair)
    return products


def _read_pair(
    name: str, wrapper: Any, dtype: torch.dtype, x: Tensor | None
) -> tuple[Tensor, Tensor, float] | str:
    """A, B and the scaling of a wrapper for an input like ``x``, or why PEFT must compute them;
    ``dtype`` is the weight's.
    """
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
        if any(
            type(t) is not nn.Linear or is_hooked(t) or weight_and_bias(t)[1] is not None
            for t in (a, b)
        ):
            return f"adapter {adapter!r} of its {name} is not of plain nn.Linears, or has hooks"
    a, b = a.weight, b.weight
    if x is not None and (
        a.device != x.device or a.dtype != b.dtype or a.dtype not in (torch.float32, dtype)
    ):
        return f"adapter {adapter!r} of its {name} is {a.dtype} on {a.device}"
    return a, b, wrapper.scaling[adapter]

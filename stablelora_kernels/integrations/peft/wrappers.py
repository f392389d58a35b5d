"""PEFT's nested ``ParamWrapper``s, one for each adapted parameter of a module. This module imports
peft.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from stablelora_kernels.nn.stacks import computed_parameters, parameter_names
from stablelora_kernels.utils.modules import HOOKS

_HOOK_ATTRIBUTES = (
    *HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip


def wrapped_parameters(wrapper: nn.Module) -> dict[str, ParamWrapper]:
    """A wrapper and those nested in it, by the name of the parameter that each adapts."""
    wrappers = {}
    while isinstance(wrapper, ParamWrapper):
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return wrappers


def nest_as_plain(model: nn.Module, outermost: ParamWrapper) -> ParamWrapper:
    """Nest wrappers in the order of the parameters' definition, the last one outermost. Return that
    one.

    The nesting names A and B in the adapter's file. Plain parameters are nested so by PEFT itself,
    those that a parametrization computes by the alphabet.
    """
    base = outermost.get_base_layer()
    if not computed_parameters(base):
        return outermost
    adapted = wrapped_parameters(outermost)
    names = [name for name in parameter_names(base) if name in adapted]
    return _nest(model, outermost, names)


def nest_as_pefts(model: nn.Module, outermost: ParamWrapper) -> ParamWrapper:
    """Undo :func:`nest_as_plain`."""
    if not computed_parameters(outermost.get_base_layer()):
        return outermost
    return _nest(model, outermost, sorted(wrapped_parameters(outermost)))


def _nest(model: nn.Module, outermost: ParamWrapper, names: Sequence[str]) -> ParamWrapper:
    """Nest the wrappers of the parameters ``names``, the last one outermost."""
    wrappers = wrapped_parameters(outermost)
    new = wrappers[names[-1]]
    if new is outermost:
        return outermost
    inner = outermost.get_base_layer()
    for name in names:
        wrappers[name].base_layer = inner
        inner = wrappers[name]
    # Hooks are those of the place.
    for key in _HOOK_ATTRIBUTES:
        # The dicts themselves: handles that remove hooks refer to them.
        vars(outermost)[key], vars(new)[key] = vars(new)[key], vars(outermost)[key]
    for parent in model.modules():
        if parent in wrappers.values():
            continue
        for name, child in parent._modules.items():
            if child is outermost:
                parent._modules[name] = new
    return new

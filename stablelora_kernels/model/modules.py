"""A model's LoRA layers: find them, put modules in others' places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from stablelora_kernels.nn.linear import LoRALinear

# The attribute of a model that remembers the config its layers were made from; save_adapter writes it.
CONFIG_ATTRIBUTE = "_stablelora_config"


# What nn.Module.__call__ looks up.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by their first dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _some_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    if layers := lora_layers(model):
        return layers
    raise ValueError(
        f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
    )


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Counter[nn.Module]:
    """Put ``new``'s values where its keys are, wherever these are registered, with their hooks. Counts the places."""
    places = [
        (parent, key, old) for parent in model.modules() for key, old in parent._modules.items() if old and old in new
    ]
    for old, module in new.items():
        # The dicts themselves, not copies: the handles that remove hooks hold on to them. The old module may be called yet,
        # by the one around it.
        for attribute in (*HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook"):
            hooks = getattr(old, attribute)
            setattr(module, attribute, hooks)
            setattr(old, attribute, None if attribute == "_is_full_backward_hook" else type(hooks)())
    for parent, key, old in places:
        parent.register_module(key, new[old])
    return Counter(old for _, _, old in places)


def _untie(model: nn.Module, name: str, module: nn.Module) -> list[str]:
    """Give ``module`` its own copy of the parameters that modules outside it hold too; the names of these.

    Training a tied weight would train the frozen module it is tied to; and PEFT trains, saves and loads a copy.
    """
    inside = set(module.modules())
    outside = {
        id(p) for other in model.modules() if other not in inside for p in other._parameters.values() if p is not None
    }
    copies: dict[int, nn.Parameter] = {}
    untied = []
    for prefix, owner in module.named_modules(prefix=name):
        for key, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in outside:
                copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                setattr(owner, key, copies[id(parameter)])
                untied.append(f"{prefix}.{key}")
    return untied

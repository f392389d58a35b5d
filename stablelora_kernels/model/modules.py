"""Find a model's LoRA layers and replace modules in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from stablelora_kernels.nn.fused_mlp import is_fused, unfuse_mlps
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.projection_group import remove_projection_groups
from stablelora_kernels.utils.hooks import HOOKS

# The attribute of a model that holds the config of its LoRA layers. save_adapter writes it.
CONFIG_ATTRIBUTE = "_stablelora_config"
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put modules, their classes, hooks, parameters and flags back if the body raises. Values are not kept."""
    names = (*HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook")
    modules = [
        (module, dict(module._modules), dict(module._parameters), {name: getattr(module, name) for name in names})
        for module in model.modules()
    ]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = model.__dict__.get(CONFIG_ATTRIBUTE)
    known = set(model.modules())
    unfused = [module for module in known if not is_fused(module)]
    try:
        yield
    except BaseException:
        unfuse_mlps(unfused)
        remove_projection_groups(set(model.modules()) - known)
        for module, children, parameters, hooks in modules:
            # In place, which keeps their order and who else refers to them.
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.__dict__.update(hooks)
        for parameter, flag in flags.items():
            parameter.requires_grad = flag
        model.__dict__.pop(CONFIG_ATTRIBUTE, None)
        if config is not None:
            model.__dict__[CONFIG_ATTRIBUTE] = config
        raise


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by their first dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def require_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """As :func:`lora_layers`; raises ValueError if there are none."""
    if layers := lora_layers(model):
        return layers
    raise ValueError(
        f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
    )


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Counter[nn.Module]:
    """Replace each key of ``new`` by its value wherever it is registered, and move its hooks. Count its registrations."""
    registrations = [
        (parent, key, old) for parent in model.modules() for key, old in parent._modules.items() if old and old in new
    ]
    for old, module in new.items():
        # Move the dicts themselves: handles that remove hooks refer to them. The old module gets empty ones, because the new
        # module may call it.
        for attribute in (*HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook"):
            hooks = getattr(old, attribute)
            setattr(module, attribute, hooks)
            setattr(old, attribute, None if attribute == "_is_full_backward_hook" else type(hooks)())
    for parent, key, old in registrations:
        parent.register_module(key, new[old])
    return Counter(old for _, _, old in registrations)


def untie(model: nn.Module, name: str, module: nn.Module) -> list[str]:
    """Give ``module`` its own copies of parameters that it shares with modules outside it. Return their names.

    Training a tied weight would also train the frozen module. PEFT, too, trains, saves and loads a copy.
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

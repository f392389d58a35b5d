"""Find a model's LoRA layers and replace modules in it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.nn.experts import LoRAExperts, LoRAStack
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.utils.modules import HOOKS, clean

# The attribute of a model that holds the config of its LoRA layers. save_adapter writes it.
CONFIG_ATTRIBUTE = "_stablelora_config"
_HOOK_ATTRIBUTES = (
    *HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip


class _Snapshot(NamedTuple):
    """A module's class, and its dicts (attributes, parameters, modules, hooks), each with a copy."""

    module: nn.Module
    kind: type[nn.Module]
    contents: list[tuple[dict[str, Any], dict[str, Any]]]


def _snapshot_of(module: nn.Module) -> _Snapshot:
    dicts = [vars(module)]
    dicts += [value for value in vars(module).values() if type(value) in (dict, OrderedDict)]
    return _Snapshot(module, type(module), [(entries, dict(entries)) for entries in dicts])


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put modules' classes, attributes and hooks and parameters' flags back if the body raises.
    Values are not kept.
    """
    snapshots = [_snapshot_of(module) for module in model.modules()]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.module.__class__ = snapshot.kind
            # In place, which keeps their order and who else refers to them.
            for attributes, content in snapshot.contents:
                attributes.clear()
                attributes.update(content)
        for parameter, flag in flags.items():
            parameter.requires_grad = flag
        raise


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by their first dotted name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def check_not_pefts(model: nn.Module, method: str) -> None:
    """Raise ValueError if PEFT's layers hold the model's LoRA. ``method`` says which of PEFT's
    methods do the same.
    """
    of_peft = any(
        hasattr(module, "base_layer")
        and any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        for module in model.modules()
    )
    if of_peft and not lora_layers(model):
        raise ValueError(
            f"the LoRA layers of this {type(model).__name__} are PEFT's: call {method} instead"
        )


def require_lora_layers(
    model: nn.Module, not_alone: str = "", of_peft: str = ""
) -> dict[str, LoRALinear]:
    """As :func:`lora_layers`; raises ValueError if there are none, or if ``model`` is itself one
    and ``not_alone`` is given.

    ``of_peft``: the method of PEFT's that a PEFT model has for this.
    """
    layers = lora_layers(model)
    if not layers and of_peft:
        check_not_pefts(model, of_peft)
    if not layers:
        raise ValueError(
            f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
        )
    if "" in layers and not_alone:
        raise ValueError(
            f"model must be a module that contains LoRALinear layers, got a LoRALinear, which {not_alone}"
        )
    return layers


def saved_modules(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` names, by their names without wrappers."""
    # A wrapper and its module have the same name; the module comes last and stays.
    named = ((clean(path), module) for path, module in model.named_modules())
    return {name: module for name, module in named if name and config.saves(name)}


def registrations(
    model: nn.Module, modules: Collection[nn.Module]
) -> list[tuple[nn.Module, str, Any]]:
    """Each parent in ``model`` of one of ``modules``, the name that it has there, and the module."""
    return [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and child in modules
    ]


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Counter[nn.Module]:
    """Replace each key of ``new`` by its value wherever it is registered, and move its hooks. Count
    its registrations.
    """
    places = registrations(model, new)
    for old, module in new.items():
        # The old module gets the new one's empty hooks, because the new module may call it.
        swap_hooks(old, module)
    for parent, key, old in places:
        parent.register_module(key, new[old])
    return Counter(old for _, _, old in places)


def swap_hooks(one: nn.Module, other: nn.Module) -> None:
    """Give each of two modules the hooks of the other one."""
    # Swap the dicts themselves: handles that remove hooks refer to them.
    for key in _HOOK_ATTRIBUTES:
        vars(one)[key], vars(other)[key] = vars(other)[key], vars(one)[key]


def plain_modules(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What stands in place of each of the model's LoRA layers without LoRA: the weights are merged
    or not, as they are there.
    """
    plain: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, LoRAExperts):
            plain[module] = module.base_layer
        elif isinstance(module, LoRALinear) and not isinstance(module, LoRAStack):
            plain[module] = module.to_linear()
    return plain


def parameter_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """For each parameter the modules that hold it, and its dotted names. A merged layer holds its
    frozen weight.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        frozen = {"weight": module.frozen_weight} if isinstance(module, LoRALinear) else {}
        for key, parameter in (module._parameters | frozen).items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, f"{prefix}.{key}".lstrip(".")))
    return owners


def untie(model: nn.Module, module: nn.Module) -> list[str]:
    """Give ``module`` its own copies of parameters that it shares with modules outside it. Return
    their names.

    Training a tied weight would also train the frozen module. PEFT, too, trains, saves and loads a
    copy.
    """
    inside = set(module.modules())
    untied = []
    for parameter, owners in parameter_owners(model).items():
        if len({owner in inside for owner, _ in owners}) > 1:
            copy = nn.Parameter(parameter.detach().clone())
            for owner, name in owners:
                if owner in inside:
                    setattr(owner, name.rpartition(".")[2], copy)
                    untied.append(name)
    return untied

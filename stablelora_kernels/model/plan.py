"""Which layers ``apply_lora`` replaces, which it skips, and why. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from stablelora_kernels.config import LoRAConfig, unmatched_names, unmatched_patterns
from stablelora_kernels.model.modules import saved_modules
from stablelora_kernels.model.reports import SkippedModule, list_some, stacks_without_adapter
from stablelora_kernels.nn.experts import LoRAStack, StackedWeight, reason_parameter_gets_no_lora
from stablelora_kernels.nn.factory import is_conv1d, replacement_class
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.stacks import parameter_names
from stablelora_kernels.utils.modules import (
    check_module,
    check_not_in_ddp,
    is_fully_sharded,
    without_parametrization,
)
from stablelora_kernels.utils.tensors import is_sharded


class Target(NamedTuple):
    """A layer to replace, or a stack of experts, and the class of the new layer."""

    # An nn.Linear, a Conv1D or a StackedWeight.
    base: Any
    layer_class: type[LoRALinear]


class LoRAPlan(NamedTuple):
    """The changes that :func:`~stablelora_kernels.apply_lora` will make, by dotted name."""

    config: LoRAConfig
    targets: dict[str, Target]
    skipped: tuple[SkippedModule, ...]
    modules_to_save: dict[str, nn.Module]
    notes: tuple[str, ...]
    # A message on names of target_modules and target_parameters that match nothing, or an empty
    # one.
    unmatched: str = ""


def plan_lora(model: nn.Module, config: LoRAConfig) -> LoRAPlan:
    """The first half of :func:`~stablelora_kernels.apply_lora`: match and check everything, change
    nothing.
    """
    check_module(model)
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"config must be a LoRAConfig, got {type(config).__name__}; PEFT's LoraConfig will do, too"
        )
    check_not_in_ddp(model)
    targets: dict[str, Target] = {}
    skipped: list[SkippedModule] = []
    _add_layers(model, config, targets, skipped)
    _add_stacks(model, config, targets, skipped)
    if config.all_linear:
        skipped += _skipped_stacks(model, config, targets)
    if not targets:
        raise ValueError(_nothing_matched(model, config, skipped))
    saved = _checked_modules_to_save(model, config)
    unmatched = _unmatched(model, config)
    notes = [unmatched] if unmatched else []
    notes += _notes_on_modules_to_save(config, saved)
    notes += _notes_on_patterns(config, targets, skipped)
    notes += _notes_on_layout(config, targets)
    return LoRAPlan(config, targets, tuple(skipped), saved, tuple(notes), unmatched)


def _add_layers(
    model: nn.Module,
    config: LoRAConfig,
    targets: dict[str, Target],
    skipped: list[SkippedModule],
) -> None:
    """Add the layers that ``target_modules`` matches."""
    first_names: dict[nn.Module, str] = {}
    heads = _output_heads(model) if config.all_linear else {}
    for name, module in model.named_modules(remove_duplicate=False):
        first_name = first_names.setdefault(module, name)
        if not name or not config.targets(name):
            continue
        if config.all_linear and not _looks_linear(module):
            continue
        if first_name != name:
            if not config.targets(first_name):
                reason = f"it is the same module as {first_name!r}, which is not matched"
                skipped.append(SkippedModule(name, reason))
            continue
        skip = (
            config.reason_to_exclude(name)
            or heads.get(module)
            or _reason_by_position(model, name, module)
        )
        if skip is not None:
            skipped.append(SkippedModule(name, skip))
            continue
        try:
            targets[name] = Target(module, replacement_class(module))
        except (TypeError, ValueError) as error:
            skipped.append(SkippedModule(name, str(error)))


def _skipped_stacks(
    model: nn.Module, config: LoRAConfig, targets: Mapping[str, Target]
) -> list[SkippedModule]:
    """The stacks of matrices that "all-linear" leaves without an adapter."""
    bases = [target.base for target in targets.values()]
    adapted = {base.weight for base in bases if isinstance(base, StackedWeight)}
    return [
        SkippedModule(name, config.reason_to_exclude(name) or reason)
        for name, reason in stacks_without_adapter(model, adapted).items()
    ]


def _modules_asked_for(config: LoRAConfig) -> list[str]:
    """The names in ``modules_to_save`` that the task has not brought."""
    return [end for end in config.modules_to_save or () if end not in config.heads_of_task]


def _checked_modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that train whole; raises ValueError if one cannot, or if none is found."""
    saved = saved_modules(model, config)
    if _modules_asked_for(config) and not saved:
        raise ValueError(
            f"modules_to_save must name modules of the model, got {config.modules_to_save}, which match nothing"
        )
    for name, module in saved.items():
        for key, parameter in module.named_parameters(prefix=name):
            if is_lazy(parameter):
                raise ValueError(
                    f"modules_to_save names {name!r}, but {key!r} has no shape before its first forward"
                )
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save names {name!r}, but {key!r} holds {parameter.dtype}, which cannot be trained"
                )
    return saved


def _unmatched(model: nn.Module, config: LoRAConfig) -> str:
    """A message on names that match nothing, or an empty one."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    parameters = [without_parametrization(name) for name, _ in model.named_parameters()]
    messages = (
        unmatched_names(config.target_modules, names),
        unmatched_names(config.target_parameters, parameters, "target_parameters"),
    )
    return ", and ".join(filter(None, messages))


def _notes_on_modules_to_save(config: LoRAConfig, saved: Mapping[str, nn.Module]) -> list[str]:
    """Notes on names that match nothing, and on the heads that the task has brought."""
    notes = [
        f"modules_to_save {end!r} matches nothing"
        for end in _modules_asked_for(config)
        if not any(name.endswith(end) for name in saved)
    ]
    heads = [name for name in saved if name.endswith(config.heads_of_task)]
    if heads:
        notes.append(
            f"{list_some(heads)} trained whole, as PEFT does for task_type {config.task_type!r}"
        )
    return notes


def _notes_on_patterns(
    config: LoRAConfig, targets: Mapping[str, Target], skipped: list[SkippedModule]
) -> list[str]:
    """Notes on the config's other patterns that match nothing."""
    notes = []
    for field in ("rank_pattern", "alpha_pattern"):
        for key in unmatched_patterns(getattr(config, field), targets):
            notes.append(f"{field} {key!r} matches nothing")
    is_excluding = any(module.reason.startswith("exclude_modules") for module in skipped)
    if config.exclude_modules and not is_excluding:
        notes.append(
            f"exclude_modules {config.exclude_modules!r} matches nothing that target_modules does"
        )
    return notes


def _notes_on_layout(config: LoRAConfig, targets: Mapping[str, Target]) -> list[str]:
    """A note if ``fan_in_fan_out`` is wrong about layers; their own layout counts."""
    transposed: list[str] = []
    usual: list[str] = []
    for name, target in targets.items():
        if is_conv1d(target.base):
            transposed.append(name)
        elif target.layer_class is not LoRAStack:
            usual.append(name)
    if config.fan_in_fan_out and usual:
        return [f"fan_in_fan_out is True, but {list_some(usual)} hold [out, in], and are taken so"]
    if not config.fan_in_fan_out and transposed:
        return [
            f"fan_in_fan_out is False, but {list_some(transposed)} hold [in, out], and are taken so"
        ]
    return []


def _add_stacks(
    model: nn.Module,
    config: LoRAConfig,
    targets: dict[str, Target],
    skipped: list[SkippedModule],
) -> None:
    """Add the stacks of experts that ``target_parameters`` matches."""
    for prefix, module in model.named_modules():
        # PEFT nests its modules in the order of the parameters.
        names = [
            name
            for name in parameter_names(module)
            if prefix and config.targets_parameter(f"{prefix}.{name}")
        ]
        for depth, name in zip(reversed(range(len(names))), names, strict=True):
            reason = config.reason_to_train_whole(prefix)
            reason = reason or reason_parameter_gets_no_lora(module, name)
            if reason is None:
                targets[f"{prefix}.{name}"] = Target(StackedWeight(module, name, depth), LoRAStack)
            else:
                skipped.append(SkippedModule(prefix, reason))


def _looks_linear(module: nn.Module) -> bool:
    """Whether "all-linear" must either replace a module or report why not."""
    kind = type(module).__name__
    return isinstance(module, (nn.Linear, LoRALinear)) or (
        hasattr(module, "weight") and ("Linear" in kind or kind == "Conv1D")
    )


def _output_heads(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that "all-linear" leaves out, with their reasons."""
    heads: dict[nn.Module, str] = {}
    embeddings = {
        m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for module in model.modules():
        if type(module) is nn.Linear and module.weight in embeddings:
            heads[module] = (
                f'its weight is tied to {embeddings[module.weight]!r}, so "all-linear" leaves it out'
            )
        # transformers' models have this method. The model may contain one.
        if callable(find := getattr(module, "get_output_embeddings", None)):
            try:
                head = find()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                heads[head] = 'it is the output head, which "all-linear" leaves out'
    return heads


def _reason_by_position(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a matched module cannot be replaced in this model, or None. The factory knows the reasons
    in the module itself.
    """
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    path = name.split(".")
    parents = [model.get_submodule(".".join(path[:i])) for i in range(len(path))]
    if isinstance(parents[-1], LoRALinear):
        return "it is the base layer of a LoRALinear"
    if any("base_layer" in parent._modules for parent in [*parents, module]):
        return _OF_PEFT
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return None
    if isinstance(parents[-1], nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
    if is_sharded(module.weight) and any(map(is_fully_sharded, parents)):
        return "fully_shard has cut its weight, and would not cut A and B; apply LoRA before it"
    return None


_OF_PEFT = "it is part of a PEFT layer; accelerate_peft runs those"


def _nothing_matched(model: nn.Module, config: LoRAConfig, skipped: list[SkippedModule]) -> str:
    """The message of the error that no layer gets LoRA."""
    if any(module.reason == _OF_PEFT for module in skipped):
        # A list of the skipped layers and of the model's linear layers would bury that.
        return (
            f"target_modules {config.target_modules!r} matches no layer but PEFT's, which have LoRA already: "
            "slk.accelerate_peft(model) runs them on these kernels"
        )
    text = f"target_modules must match an nn.Linear of the model, got {config.target_modules!r}, which matches none"
    if config.target_parameters:
        text += (
            f"; nor does target_parameters {config.target_parameters!r} match a stack of experts"
        )
    if skipped:
        text += f"; skipped {list_some([f'{module.name} ({module.reason})' for module in skipped])}"
    elif isinstance(config.target_modules, str):
        text += "; a string is a regular expression for the whole dotted name, a list holds ends of names"
    candidates = [
        repr(name)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (type(module) is nn.Linear or is_conv1d(module))
    ]
    return text + f". Its linear layers: {list_some(candidates) or 'none'}"

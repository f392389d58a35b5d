"""Plans ``apply_lora``: which layers it replaces, which it skips, and why. Planning changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from stablelora_kernels.config import LoRAConfig, unmatched_patterns
from stablelora_kernels.model.reports import SkippedModule, count_parameters, list_some
from stablelora_kernels.nn.factory import is_conv1d, replacement_class
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.utils.dtensor import is_sharded
from stablelora_kernels.utils.text import unmatched_names
from stablelora_kernels.utils.wrappers import check_module, check_not_in_ddp


class Target(NamedTuple):
    """A layer to replace, and the class that replaces it."""

    layer: Any
    layer_class: type[LoRALinear]


@dataclass(frozen=True)
class LoRAPlan:
    """The changes that :func:`~stablelora_kernels.apply_lora` will make, by dotted name."""

    targets: dict[str, Target]
    skipped: tuple[SkippedModule, ...]
    modules_to_save: dict[str, nn.Module]
    notes: tuple[str, ...]
    # A message on names of target_modules that match no module, or an empty one.
    unmatched: str = ""


def plan_lora(model: nn.Module, config: LoRAConfig) -> LoRAPlan:
    """The first half of :func:`~stablelora_kernels.apply_lora`: match and check everything, change nothing."""
    check_module(model)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}; PEFT's LoraConfig will do, too")
    check_not_in_ddp(model)
    targets: dict[str, Target] = {}
    skipped: list[SkippedModule] = []
    names: dict[nn.Module, str] = {}
    heads = _output_heads(model) if config.all_linear else {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(module, name)
        if not name or not config.targets(name) or (config.all_linear and not _looks_linear(module)):
            continue
        if first != name:
            if not config.targets(first):
                skipped.append(SkippedModule(name, f"it is the same module as {first!r}, which is not matched"))
            continue
        reason = config.reason_to_exclude(name) or heads.get(module) or _reason_by_position(model, name, module)
        if reason is not None:
            skipped.append(SkippedModule(name, reason))
            continue
        try:
            targets[name] = Target(module, replacement_class(module))
        except (TypeError, ValueError) as error:
            skipped.append(SkippedModule(name, str(error)))
    if config.all_linear:
        skipped += _stacked_matrices(model, config)
    if not targets:
        raise ValueError(_nothing_matched(model, config, skipped))

    saved = {name: module for name, module in model.named_modules() if name and config.saves(name)}
    if config.modules_to_save and not saved:
        raise ValueError(
            f"modules_to_save must name modules of the model, got {config.modules_to_save}, which match nothing"
        )
    for name, module in saved.items():
        for key, parameter in module.named_parameters(prefix=name):
            if is_lazy(parameter):
                raise ValueError(f"modules_to_save names {name!r}, but {key!r} has no shape before its first forward")
            if not parameter.is_floating_point():
                raise ValueError(
                    f"modules_to_save names {name!r}, but {key!r} holds {parameter.dtype}, which cannot be trained"
                )

    missed = [end for end in config.modules_to_save or () if not any(name.endswith(end) for name in saved)]
    unmatched = unmatched_names(
        config.target_modules, (name for name, _ in model.named_modules(remove_duplicate=False))
    )
    notes = [unmatched] if unmatched else []
    notes += [f"modules_to_save {end!r} matches nothing" for end in missed]
    for field in ("rank_pattern", "alpha_pattern"):
        notes += [f"{field} {key!r} matches nothing" for key in unmatched_patterns(getattr(config, field), targets)]
    if config.exclude_modules and not any(module.reason.startswith("exclude_modules") for module in skipped):
        notes.append(f"exclude_modules {config.exclude_modules!r} matches nothing that target_modules does")
    transposed = [name for name, target in targets.items() if is_conv1d(target.layer)]
    if config.fan_in_fan_out and len(transposed) < len(targets):
        others = [name for name in targets if name not in transposed]
        notes.append(f"fan_in_fan_out is True, but {list_some(others)} hold [out, in], and are taken so")
    if not config.fan_in_fan_out and transposed:
        notes.append(f"fan_in_fan_out is False, but {list_some(transposed)} hold [in, out], and are taken so")
    return LoRAPlan(targets, tuple(skipped), saved, tuple(notes), unmatched)


def _looks_linear(module: nn.Module) -> bool:
    """Whether "all-linear" must either replace a module or report why not."""
    kind = type(module).__name__
    return isinstance(module, (nn.Linear, LoRALinear)) or (
        hasattr(module, "weight") and ("Linear" in kind or kind == "Conv1D")
    )


def _output_heads(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that "all-linear" leaves out, with their reasons."""
    heads: dict[nn.Module, str] = {}
    embeddings = {m.weight: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if type(module) is nn.Linear and module.weight in embeddings:
            heads[module] = f'its weight is tied to {embeddings[module.weight]!r}, so "all-linear" leaves it out'
        # transformers' models have this method. The model may contain one.
        if callable(find := getattr(module, "get_output_embeddings", None)):
            try:
                head = find()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(head, nn.Module):
                heads[head] = 'it is the output head, which "all-linear" leaves out'
    return heads


def _stacked_matrices(model: nn.Module, config: LoRAConfig) -> list[SkippedModule]:
    """The modules whose own parameters stack matrices, as transformers 5 stores experts. They hold no layer to replace."""
    stacks: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        # Convolutions' weights have as many dimensions, and position embeddings a first one of size 1.
        own = {} if isinstance(module, _ConvNd) else module._parameters
        known = {key: p for key, p in own.items() if p is not None and not is_lazy(p)}
        if sizes := {key: p.numel() for key, p in known.items() if p.dim() > 2 and min(p.shape) > 1}:
            stacks[name] = sizes
    share = sum(sum(sizes.values()) for sizes in stacks.values()) / max(count_parameters(model)[1], 1)
    reason = (
        f"as experts are stored, and has no linear layers for them: {share:.1%} of the model's weights are in such parameters "
        "and get no adapter; PEFT's target_parameters can adapt them"
    )
    return [
        SkippedModule(name, config.reason_to_exclude(name) or f"it stacks matrices in {', '.join(sizes)}, {reason}")
        for name, sizes in stacks.items()
    ]


def _reason_by_position(model: nn.Module, name: str, module: Any) -> str | None:
    """Why a matched module cannot be replaced in this model, or None. The factory knows the reasons in the module itself."""
    if isinstance(module, LoRALinear):
        return "it is a LoRALinear already"
    path = name.split(".")
    parents = [model.get_submodule(".".join(path[:i])) for i in range(len(path))]
    if isinstance(parents[-1], LoRALinear):
        return "it is the base layer of a LoRALinear"
    if any("base_layer" in parent._modules for parent in [*parents, module]):
        return "it is part of a PEFT layer; accelerate_peft runs those"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return None
    if isinstance(parents[-1], nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
    if is_sharded(module.weight) and any(map(_is_fully_sharded, parents)):
        return "fully_shard has cut its weight, and would not cut A and B; apply LoRA before it"
    return None


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has sharded ``module``."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _nothing_matched(model: nn.Module, config: LoRAConfig, skipped: list[SkippedModule]) -> str:
    text = f"target_modules must match an nn.Linear of the model, got {config.target_modules!r}, which matches none"
    if skipped:
        text += f"; skipped {list_some([f'{module.name} ({module.reason})' for module in skipped])}"
    elif isinstance(config.target_modules, str):
        text += "; a string is a regular expression for the whole dotted name, a list holds ends of names"
    named = [(repr(name), module) for name, module in model.named_modules() if name]
    candidates = [name for name, module in named if type(module) is nn.Linear or is_conv1d(module)]
    return text + f". Its linear layers: {list_some(candidates) or 'none'}"

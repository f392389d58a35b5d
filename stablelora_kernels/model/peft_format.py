"""PEFT's adapter format: the config of a file as ours, and ours, or that of a model's layers, as
PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from torch import nn

from stablelora_kernels.config import LoRAConfig, lookup_pattern
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.experts import LoRAStack
from stablelora_kernels.nn.linear import LoRAConv1D, LoRALinear
from stablelora_kernels.utils.modules import clean, without_parametrization

PREFIX = "base_model.model."
# PEFT's default for lora_alpha, which a file may omit. It differs from ours.
PEFT_ALPHA = 8

_FIELDS = {field.name for field in fields(LoRAConfig)}
# Fields of PEFT's config about an adapter's origin, initialization or training. They don't change
# what the adapter computes. Fields that are neither here nor in LoRAConfig must be empty.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# PEFT's other initializations also change the frozen weights, which the file does not hold.
_INITS_OF_AB_ONLY = ("eva", "orthogonal")


def beyond_plain_lora(content: Mapping[str, object]) -> list[str]:
    """The fields of a PEFT config, such as "use_dora=True", that plain LoRA does not have."""
    return [
        f"{key}={value!r}"
        for key, value in content.items()
        if key not in _FIELDS | _HARMLESS and value
    ]


def read_config(
    content: Mapping[str, Any], source: object, tensors: Iterable[str] = ()
) -> LoRAConfig:
    """The config in the fields of one of PEFT's. ``source``, a file for example, is named in
    errors.

    It raises ValueError or TypeError if they describe something else than plain LoRA, or if one is
    out of range.
    """
    content = dict(content)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {source} must be 'LORA', got {content.get('peft_type')!r}")
    content.setdefault("lora_alpha", PEFT_ALPHA)
    if content.pop("layers_to_transform", None) is not None:
        # The keys of the weights file name the layers.
        content.pop("layers_pattern", None)
        content["target_modules"] = sorted(
            {key.rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key}
        )
    init = content.get("init_lora_weights")
    if init is None or init in _INITS_OF_AB_ONLY:
        content["init_lora_weights"] = True
    if unknown := beyond_plain_lora(content):
        raise ValueError(
            f"{source} must use plain LoRA, got {', '.join(unknown)}, which is not supported"
        )
    try:
        return LoRAConfig(**{key: value for key, value in content.items() if key in _FIELDS})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from None


def config_from_peft(config: Any) -> LoRAConfig:
    """A ``LoraConfig`` of the ``peft`` package, in our class."""
    content = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    if content.get("layers_to_transform") is not None:
        raise ValueError(
            f"config must name its layers in target_modules, got layers_to_transform={content['layers_to_transform']!r}; "
            "write them as a regular expression"
        )
    return read_config(content, f"the {type(config).__name__}")


def config_of(model: nn.Module, layers: Mapping[str, LoRALinear]) -> LoRAConfig:
    """The config with which PEFT makes exactly these layers from the base model.

    It starts from the config that apply_lora got, if any. Layers may have been skipped, added or
    changed since.
    """
    stacks = [name for name, layer in layers.items() if isinstance(layer, LoRAStack)]
    linears = [name for name in layers if name not in stacks]
    first = next(iter(layers.values()))
    if mixed := [name for name, layer in layers.items() if layer.use_rslora != first.use_rslora]:
        raise ValueError(
            f"use_rslora must be one value for all layers, got both; {list_some(mixed)} differ from the first"
        )
    config: LoRAConfig = model.__dict__.get(CONFIG_ATTRIBUTE) or LoRAConfig(
        r=first.r, lora_alpha=first.lora_alpha, lora_dropout=first.lora_dropout, target_modules=linears,
        target_parameters=stacks,
    )  # fmt: skip
    fan_in_fan_out = any(isinstance(layer, LoRAConv1D) for layer in layers.values())
    config = replace(config, use_rslora=first.use_rslora, fan_in_fan_out=fan_in_fan_out)
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = {name: getattr(layer, field) for name, layer in layers.items()}
        patterns, default = getattr(config, pattern), getattr(config, field)
        if any(
            lookup_pattern(patterns, (name,), default) != value for name, value in values.items()
        ):
            exceptions = {
                f"^{re.escape(name)}": value for name, value in values.items() if value != default
            }
            config = replace(config, **{pattern: exceptions})  # type: ignore[arg-type]

    # Take the first list of target names that fits: other programs read a short one best. The
    # regular expression always fits.
    every_name = (clean(path) for path, _ in model.named_modules())
    names = [name for name in every_name if name and name.removesuffix(".base_layer") not in layers]
    names += linears
    config = replace(config, target_parameters=_parameters_of(config, model, stacks))
    choices: list[list[str] | str] = [] if config.all_linear else [config.target_modules or []]
    choices += [sorted({name.rpartition(".")[2] for name in linears}), linears]
    for choice in choices:
        if not choice and not stacks:
            continue
        candidate = replace(config, target_modules=choice)
        matched = {
            name
            for name in names
            if candidate.targets(name) and not candidate.reason_to_exclude(name)
        }
        if matched == {*linears}:
            return candidate
    return replace(config, target_modules="|".join(map(re.escape, linears)), exclude_modules=None)


def _parameters_of(config: LoRAConfig, model: nn.Module, stacks: list[str]) -> list[str]:
    """``target_parameters`` for these stacks: those of ``config`` if they match no other parameter."""
    names = {
        without_parametrization(clean(name).replace(".base_layer.", "."))
        for name, _ in model.named_parameters()
    }
    matched = set(filter(config.targets_parameter, names))
    return (config.target_parameters or []) if matched == set(stacks) else stacks


def file_name(name: str, layer: object) -> str:
    """The name in PEFT's files of a layer, or of what is to become one. A parameter's is a place
    among PEFT's nested modules.
    """
    depth: int | None = getattr(layer, "depth", None)
    if depth is None:
        return name
    return name.rpartition(".")[0] + ".base_layer" * depth


def content_of(config: LoRAConfig, model: nn.Module) -> dict[str, Any]:
    """The fields of PEFT's config: those of ``config``, and which model the adapter is for."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    # fully_shard makes a class of its own.
    kinds = (
        kind
        for kind in type(model).__mro__
        if kind.__module__.partition(".")[0] not in ("torch", "builtins")
    )
    kind = next(kinds, type(model))
    return asdict(config) | {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": _task_of(model) if config.task_type is None else config.task_type,
    }


def _task_of(model: nn.Module) -> str | None:
    """PEFT's name for the task of a transformers model that generates text, without which its auto
    classes find no class.
    """
    kinds = [
        kind.__name__
        for kind in type(model).__mro__
        if kind.__module__.partition(".")[0] == "transformers"
    ]
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return "CAUSAL_LM"
    is_conditional = any(kind.endswith("ForConditionalGeneration") for kind in kinds)
    config = getattr(model, "config", None)
    if is_conditional and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return None

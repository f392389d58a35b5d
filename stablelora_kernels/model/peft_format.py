"""PEFT's adapter format: which config and which tensors a file may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.reports import SkippedModule, list_some
from stablelora_kernels.utils.text import counted

PREFIX = "base_model.model."
# PEFT's default for lora_alpha, which a file may omit. It differs from ours.
PEFT_ALPHA = 8

# Fields of PEFT's config about an adapter's origin, initialization or training. They don't change what the adapter computes.
# Fields that are neither here nor in LoRAConfig must be empty.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# PEFT's other initializations also change the frozen weights, which the file does not hold.
_INITS_OF_AB_ONLY = ("eva", "orthogonal")


def beyond_plain_lora(content: Mapping[str, Any]) -> list[str]:
    """The fields of a PEFT config, such as "use_dora=True", that plain LoRA does not have."""
    known = {field.name for field in fields(LoRAConfig)} | _HARMLESS
    return [f"{key}={value!r}" for key, value in content.items() if key not in known and value]


def read_config(content: Mapping[str, Any], source: object, tensors: Iterable[str] = ()) -> LoRAConfig:
    """The config in the fields of one of PEFT's. ``source``, a file for example, is named in errors.

    Raises:
        ValueError, TypeError: the fields describe something else than plain LoRA, or one is out of range.
    """
    content = dict(content)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {source} must be 'LORA', got {content.get('peft_type')!r}")
    content.setdefault("lora_alpha", PEFT_ALPHA)
    if content.pop("layers_to_transform", None) is not None:
        # The keys of the weights file name the layers.
        content.pop("layers_pattern", None)
        content["target_modules"] = sorted({key.rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key})
    init = content.get("init_lora_weights")
    if init is None or init in _INITS_OF_AB_ONLY:
        content["init_lora_weights"] = True
    if unknown := beyond_plain_lora(content):
        raise ValueError(f"{source} must use plain LoRA, got {', '.join(unknown)}, which is not supported")
    known = {field.name for field in fields(LoRAConfig)}
    try:
        return LoRAConfig(**{key: value for key, value in content.items() if key in known})
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


def check_tensors(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]],
    skipped: Iterable[SkippedModule],
    file: Path,
) -> None:
    """Raise ValueError unless a file's tensors are those of ``targets``: of each its shape, and its dtype where one is given.

    Another dtype of the same kind will do: values are cast.
    """
    if missing := [key for key in targets if key not in tensors]:
        raise ValueError(f"{file} must hold {list_some(missing)}, got {counted(len(tensors), 'tensor')} without them")
    if unexpected := [key for key in tensors if key not in targets]:
        reasons = [
            f"; {module.name}: {module.reason}" for module in skipped if unexpected[0].startswith(f"{module.name}.")
        ]
        raise ValueError(
            f"{file} must hold what its config and the model call for, got {list_some(unexpected)} beyond that{''.join(reasons)}"
        )
    for key, (shape, dtype) in targets.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key} in {file} must be {list(shape)}, got {list(tensors[key].shape)}")
        if dtype is not None and _kind(dtype) != _kind(tensors[key].dtype):
            raise ValueError(f"{key} in {file} must be {dtype} or alike, got {tensors[key].dtype}")
        if (".lora_A." in key or ".lora_B." in key) and tensors[key].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} in {file} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensors[key].dtype}"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex or dtype.is_floating_point:
        return "complex" if dtype.is_complex else "floating point"
    return "bool" if dtype == torch.bool else "integer"


def check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold values, got {list_some(empty)} on the meta device")

"""PEFT's adapter format: find, read and check the two files of an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.reports import SkippedModule, list_some

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's default for lora_alpha, which a file may omit. It differs from ours.
PEFT_ALPHA = 8

# Fields of PEFT's config about an adapter's origin, initialization or training. They don't change what the adapter computes.
# Fields that are neither here nor in LoRAConfig must be empty.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
# PEFT's other initializations also change the frozen weights, which the file does not hold.
_INITS_OF_AB_ONLY = ("eva", "orthogonal")


def import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapters are safetensors files: pip install 'stablelora-kernels[adapters]'") from None
    return safetensors.torch


def find_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The config and the weights file in the directory ``path``; raises ValueError if one is missing."""
    directory = Path(path)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise ValueError(f"path must be a directory on this machine with {CONFIG_NAME}, got {str(path)!r} ({found})")
    config, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    if not config.is_file():
        raise ValueError(f"path must hold {CONFIG_NAME}, got {str(path)!r} without it")
    if not weights.is_file():
        if pickles := [
            file.name for file in sorted(directory.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".pkl")
        ]:
            raise ValueError(
                f"path must hold {WEIGHTS_NAME}, got {list_some(pickles)}: a pickle can run code, so it is refused"
            )
        raise ValueError(f"path must hold {WEIGHTS_NAME}, got {str(path)!r} without it")
    return config, weights


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got text that is not: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def beyond_plain_lora(content: Mapping[str, Any]) -> list[str]:
    """The fields of a PEFT config, such as "use_dora=True", that plain LoRA does not have."""
    known = {field.name for field in fields(LoRAConfig)} | _HARMLESS
    return [f"{key}={value!r}" for key, value in content.items() if key not in known and value]


def read_config(file: Path, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    content = read_json(file)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {file} must be 'LORA', got {content.get('peft_type')!r}")
    content.setdefault("lora_alpha", PEFT_ALPHA)
    if content.pop("layers_to_transform", None) is not None:
        # The keys of the weights file name the layers.
        content.pop("layers_pattern", None)
        content["target_modules"] = sorted({key.rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key})
    init = content.get("init_lora_weights")
    if init is None or init in _INITS_OF_AB_ONLY:
        content["init_lora_weights"] = True
    if unknown := beyond_plain_lora(content):
        raise ValueError(f"{file} must use plain LoRA, got {', '.join(unknown)}, which is not supported")
    known = {field.name for field in fields(LoRAConfig)}
    try:
        return LoRAConfig(**{key: value for key, value in content.items() if key in known})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from None


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], skipped: Iterable[SkippedModule], file: Path
) -> None:
    if missing := [key for key in shapes if key not in tensors]:
        raise ValueError(f"{file} must hold {list_some(missing)}, got {len(tensors)} tensors without them")
    if unexpected := [key for key in tensors if key not in shapes]:
        reasons = [
            f"; {module.name}: {module.reason}" for module in skipped if unexpected[0].startswith(f"{module.name}.")
        ]
        raise ValueError(
            f"{file} must hold what its config and the model call for, got {list_some(unexpected)} beyond that{''.join(reasons)}"
        )
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{key} in {file} must be {list(shape)}, got {list(tensors[key].shape)}")
        if (".lora_A." in key or ".lora_B." in key) and tensors[key].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} in {file} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensors[key].dtype}"
            )


def check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold values, got {list_some(empty)} on the meta device")

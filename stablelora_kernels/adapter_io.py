"""Adapters as files, in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model import CONFIG_ATTRIBUTE, LoRAReport, commit, lora_layers, report_on
from stablelora_kernels.nn import LoRALinear, sizes_of
from stablelora_kernels.nn_bases import LoRAConv1D
from stablelora_kernels.plan import SkippedModule, list_some, plan_lora

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's default for lora_alpha, which a file may leave out; ours is another.
PEFT_ALPHA = 8

# Fields of PEFT's file that say where an adapter comes from, or how it was started or trained. They don't change what it
# computes. Every field that is neither here nor LoRAConfig's is refused unless it is empty.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
# The others of PEFT's initialisations change the frozen weights, which the file does not hold.
_INITS_OF_AB_ONLY = ("eva", "orthogonal")


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's LoRA to the directory ``path``, for :func:`load_adapter` and for the ``peft`` package alike.

    Written are A and B, in their dtypes, merged or not, and what ``bias`` and ``modules_to_save`` of the model's config
    name. The same adapter gives the same bytes. Of a model with DTensors every process has to call it, and the one of rank 0
    writes. A directory that is not there yet appears whole or not at all; in one that
    is, each file is replaced whole.

    Raises:
        ValueError: the model has no LoRA layers, or some that one PEFT config cannot describe; or ``path`` is a file.
        ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
    model = _unwrap(model)
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"model must have LoRALinear layers (apply_lora makes them), got a {type(model).__name__} without any"
        )
    if "" in layers:
        raise ValueError(
            "model must be a module that contains LoRALinear layers, got a LoRALinear, which has no name in a file"
        )
    directory = Path(path).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path must be a directory, got the file {str(path)!r}")
    config = _config_of(model, layers)
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in _lora_tensors(name, layer).items()}
    tensors.update(_other_tensors(model, config, layers))
    _check_not_meta(tensors)
    _warn_of_places(model, layers)

    # Copies, since safetensors refuses tensors that share memory, as tied ones do.
    sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    tensors = {PREFIX + key: _whole(tensor).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    if sharded and torch.distributed.get_rank():
        return
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    content = asdict(config) | {
        "base_model_name_or_path": origin if isinstance(origin, str) and origin else None,
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": None,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the directory, so that moving is a rename within one file system.
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        safetensors.save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if directory.exists():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(temporary / name, directory / name)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, fuse_projections: bool = False) -> LoRAReport:
    """Load what :func:`save_adapter` or the ``peft`` package wrote to the directory ``path``.

    A model without LoRA is given it first, as :func:`~stablelora_kernels.apply_lora` does, by the config in the file; A
    and B get the file's dtype where that is float32 or the layer's own, float32 otherwise. Into a model that has LoRA the
    values are copied, in the dtypes that are there; its ranks, scalings, bias and modules_to_save have to be the file's.
    ``fuse_projections`` is handed to :func:`~stablelora_kernels.apply_lora`; a model that has LoRA stays as it is.

    Returns:
        The report on the layers that hold the adapter.

    Raises:
        ValueError, TypeError: the directory, a file in it, its config, its keys or its shapes do not fit, naming what was
            wanted and what was found; the weights are a pickle; or the model is merged. Nothing is changed.
        ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
    model = _unwrap(model)
    config_file, weights_file = find_files(path)
    try:
        tensors = safetensors.load_file(weights_file)
    except Exception as error:  # SafetensorError, which derives from Exception alone, or an OSError
        raise ValueError(f"{weights_file} must be a safetensors file, got one that cannot be read: {error}") from None
    if alien := [key for key in tensors if not key.startswith(PREFIX)]:
        raise ValueError(f"keys in {weights_file} must start with {PREFIX!r}, got {list_some(alien)}")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config = _read_config(config_file, tensors)

    layers = lora_layers(model)
    if layers:
        _check_fits(model, config, layers, config_file)
        wanted = {key: tensor for name, layer in layers.items() for key, tensor in _lora_tensors(name, layer).items()}
        shapes = {key: tensor.shape for key, tensor in wanted.items()}
        skipped: tuple[SkippedModule, ...] = ()
    else:
        plan = plan_lora(model, config)
        skipped = plan.skipped
        wanted = {f"{name}.weight": linear.weight for name, linear in plan.linears.items()}
        shapes = {}
        for name, linear in plan.linears.items():
            in_features, out_features = sizes_of(linear)
            shapes[f"{name}.lora_A.weight"] = torch.Size((config.rank_of(name), in_features))
            shapes[f"{name}.lora_B.weight"] = torch.Size((out_features, config.rank_of(name)))
    others = _other_tensors(model, config, layers or plan.linears)
    _check_not_meta(wanted | others)
    # With bias="all", PEFT's files hold the biases of its own wrappers around modules_to_save as well.
    wrapped = tuple(
        f"{name}.{part}." for name in _saved(model, config) for part in ("original_module", "modules_to_save")
    )
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(wrapped)}
    shapes.update({key: tensor.shape for key, tensor in others.items()})
    _check_tensors(tensors, shapes, skipped, weights_file)

    if layers:
        report = report_on(model, layers)
    else:
        dtypes = {}
        for name, linear in plan.linears.items():
            found = torch.promote_types(tensors[f"{name}.lora_A.weight"].dtype, tensors[f"{name}.lora_B.weight"].dtype)
            dtypes[name] = linear.weight.dtype if found == linear.weight.dtype else torch.float32
        report = commit(model, config, plan, dtypes, fuse_projections)
        layers = lora_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            for key, tensor in _lora_tensors(name, layer).items():
                _copy(tensor, tensors[key])
        # Looked up again: apply_lora unties what modules_to_save shares with others.
        for key, tensor in _other_tensors(model, config, layers).items():
            _copy(tensor, tensors[key])
    return report


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor's parts put together, anything else as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _copy(tensor: Any, value: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapters are safetensors files: pip install 'stablelora-kernels[adapters]'") from None
    return safetensors.torch


def _unwrap(model: nn.Module) -> nn.Module:
    """The module itself, out of torch.compile's and data parallelism's wrappers, which would prefix every name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _lora_tensors(name: str, layer: LoRALinear) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": layer.lora_A, f"{name}.lora_B.weight": layer.lora_B}


def _other_tensors(model: nn.Module, config: LoRAConfig, lora_names: Iterable[str]) -> dict[str, Tensor]:
    """What an adapter holds besides A and B, by PEFT's names: the trained biases, the state of modules_to_save."""
    others: dict[str, Tensor] = {}
    lora_names = set(lora_names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, kind = name.rpartition(".")
        # As a LoRABranchLinear names what it holds, and PEFT's files every layer's.
        module = module.removesuffix(".base_layer")
        if kind == "bias" and module in lora_names and config.bias != "none":
            others[f"{module}.base_layer.bias"] = parameter
        elif kind == "bias" and config.bias == "all":
            others[name] = parameter
    for prefix, saved in _saved(model, config).items():
        state = saved.state_dict(prefix=f"{prefix}.")
        others.update({key: value for key, value in state.items() if isinstance(value, Tensor)})
    return others


def _saved(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name and config.saves(name)}


def _config_of(model: nn.Module, layers: Mapping[str, LoRALinear]) -> LoRAConfig:
    """The config by which PEFT makes just these layers out of the base model: what is there, not what was asked for.

    Close to the config that apply_lora was given, if it was; layers may have been skipped, added or changed since.
    """
    first = next(iter(layers.values()))
    config = getattr(model, CONFIG_ATTRIBUTE, None)
    if mixed := [name for name, layer in layers.items() if layer.use_rslora != first.use_rslora]:
        raise ValueError(
            f"use_rslora must be one value for all layers, got both; {list_some(mixed)} differ from the first"
        )
    if config is None:
        config = LoRAConfig(
            r=first.r,
            lora_alpha=first.lora_alpha,
            lora_dropout=first.lora_dropout,
            use_rslora=first.use_rslora,
            target_modules=list(layers),
        )
    fan_in_fan_out = any(isinstance(layer, LoRAConv1D) for layer in layers.values())
    config = replace(config, use_rslora=first.use_rslora, fan_in_fan_out=fan_in_fan_out)
    if any(config.rank_of(name) != layer.r for name, layer in layers.items()):
        ranks = {f"^{re.escape(name)}": layer.r for name, layer in layers.items() if layer.r != config.r}
        config = replace(config, rank_pattern=ranks)
    if any(config.alpha_of(name) != layer.lora_alpha for name, layer in layers.items()):
        alphas = {
            f"^{re.escape(n)}": layer.lora_alpha for n, layer in layers.items() if layer.lora_alpha != config.lora_alpha
        }
        config = replace(config, alpha_pattern=alphas)

    # Other programs read a short list of names best, and PEFT can read each of these. The last one always fits.
    names = [name for name, _ in model.named_modules() if name and name.removesuffix(".base_layer") not in layers]
    names += layers
    choices: list[list[str] | str] = [] if config.all_linear else [config.target_modules or []]
    choices += [sorted({name.rpartition(".")[2] for name in layers}), list(layers)]
    for choice in choices:
        tried = replace(config, target_modules=choice)
        if {name for name in names if tried.targets(name) and not tried.reason_to_exclude(name)} == set(layers):
            return tried
    return replace(config, target_modules="|".join(map(re.escape, layers)), exclude_modules=None)


def _warn_of_places(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    for name, layer in layers.items():
        places = sum(child is layer for module in model.modules() for child in module._modules.values())
        if places > 1:
            warnings.warn(
                f"{name!r} is registered in {places} places; load_adapter adapts them all, peft only the first",
                stacklevel=3,
            )


def find_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The config and the weights in the directory ``path``, or ValueError with what is there instead."""
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
    """The object in a JSON file, or ValueError with what is wrong about it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got text that is not: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def beyond_plain_lora(content: Mapping[str, Any]) -> list[str]:
    """The fields of a PEFT config, as "use_dora=True", by which an adapter is more than A and B beside a frozen weight."""
    known = {field.name for field in fields(LoRAConfig)} | _HARMLESS
    return [f"{key}={value!r}" for key, value in content.items() if key not in known and value]


def _read_config(file: Path, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    content = read_json(file)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {file} must be 'LORA', got {content.get('peft_type')!r}")
    content.setdefault("lora_alpha", PEFT_ALPHA)
    if content.pop("layers_to_transform", None) is not None:
        # Which layers these are, the file's keys say.
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


def _check_fits(model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear], file: Path) -> None:
    """Whether an adapter's config is that of the layers that a model has."""
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must not be merged while an adapter is loaded, got {list_some(merged)} merged; unmerge_lora it"
        )
    for name, layer in layers.items():
        for field, have, found in (
            ("r", layer.r, config.rank_of(name)),
            ("lora_alpha", layer.lora_alpha, config.alpha_of(name)),
            ("use_rslora", layer.use_rslora, config.use_rslora),
        ):
            if have != found:
                raise ValueError(f"{field} of {name!r} is {have} in the model, got {found} in {file}")
    have_config = getattr(model, CONFIG_ATTRIBUTE, None)
    bias = have_config.bias if have_config else "none"
    if bias != config.bias:
        raise ValueError(f"bias is {bias!r} in the model, got {config.bias!r} in {file}")
    saved = list(_saved(model, have_config)) if have_config else []
    if saved != list(_saved(model, config)):
        raise ValueError(f"modules_to_save is {saved} in the model, got {list(_saved(model, config))} in {file}")


def _check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], skipped: Iterable[SkippedModule], file: Path
) -> None:
    if missing := [key for key in shapes if key not in tensors]:
        raise ValueError(f"{file} must hold {list_some(missing)}, got {len(tensors)} tensors without them")
    if unexpected := [key for key in tensors if key not in shapes]:
        why = [f"; {module.name}: {module.reason}" for module in skipped if unexpected[0].startswith(f"{module.name}.")]
        raise ValueError(
            f"{file} must hold what its config and the model call for, got {list_some(unexpected)} beyond that{''.join(why)}"
        )
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{key} in {file} must be {list(shape)}, got {list(tensors[key].shape)}")
        if (".lora_A." in key or ".lora_B." in key) and tensors[key].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} in {file} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensors[key].dtype}"
            )


def _check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold values, got {list_some(empty)} on the meta device")

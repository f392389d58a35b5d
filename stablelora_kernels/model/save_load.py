"""Adapters as files, in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.apply import commit
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, lora_layers
from stablelora_kernels.model.peft_format import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    check_not_meta,
    check_tensors,
    find_files,
    import_safetensors,
    read_config,
)
from stablelora_kernels.model.reports import LoRAReport, SkippedModule, list_some, report_on
from stablelora_kernels.model.targets import plan_lora
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.linear import LoRALinear, sizes_of
from stablelora_kernels.utils.dtensor import copy, is_first_rank, is_sharded, whole
from stablelora_kernels.utils.wrappers import check_not_in_ddp, clean, in_ddp, reshard, unwrap, wrapped_parts


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's LoRA to the directory ``path``, for :func:`load_adapter` and for the ``peft`` package alike.

    Written are A and B, in their dtypes, merged or not, and what ``bias`` and ``modules_to_save`` of the model's config
    name. The same adapter gives the same bytes, and names are the base model's, whatever is around the model
    (DistributedDataParallel, torch.compile, checkpoint_wrapper) or, of the latter two, around parts of it. A directory that is
    not there yet appears whole or not at all; in one that is, each file is replaced whole.

    Of a model with DTensors (``fully_shard``, tensor parallelism) every process has to call it, since all hold parts; of one in
    DistributedDataParallel all may. In both cases the process of rank 0 writes, and the others do not wait for it.

    Raises:
        ValueError: the model has no LoRA layers, or some that one PEFT config cannot describe, or is in FSDP1's
            FullyShardedDataParallel; or ``path`` is a file.
        ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
    given, model = model, unwrap(model)
    reshard(model)
    layers = _layers(model)
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
    check_not_meta(tensors)
    _warn_of_places(model, layers)

    if (in_ddp(given) or any(map(is_sharded, tensors.values()))) and not is_first_rank():
        for tensor in tensors.values():
            whole(tensor)
        return
    # Copies, since safetensors refuses tensors that share memory, as tied ones do.
    tensors = {PREFIX + key: whole(tensor).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
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
    Wrappers are seen through, as by :func:`save_adapter`, but for a model without LoRA: DistributedDataParallel and
    ``fully_shard`` would not know its A and B. Of a model with DTensors every process has to call it, and takes its parts of
    the values that rank 0 has read.

    Returns:
        The report on the layers that hold the adapter.

    Raises:
        ValueError, TypeError: the directory, a file in it, its config, its keys or its shapes do not fit, naming what was
            wanted and what was found; the weights are a pickle; or the model is merged. Nothing is changed.
        ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
    given, model = model, unwrap(model)
    reshard(model)
    config_file, weights_file = find_files(path)
    try:
        tensors = safetensors.load_file(weights_file)
    except Exception as error:  # SafetensorError, which derives from Exception alone, or an OSError
        raise ValueError(f"{weights_file} must be a safetensors file, got one that cannot be read: {error}") from None
    if alien := [key for key in tensors if not key.startswith(PREFIX)]:
        raise ValueError(f"keys in {weights_file} must start with {PREFIX!r}, got {list_some(alien)}")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config = read_config(config_file, tensors)

    layers = _layers(model)
    if layers:
        _check_fits(model, config, layers, config_file)
        wanted = {key: tensor for name, layer in layers.items() for key, tensor in _lora_tensors(name, layer).items()}
        shapes = {key: tensor.shape for key, tensor in wanted.items()}
        skipped: tuple[SkippedModule, ...] = ()
    else:
        _check_may_get_lora(given, model)
        plan = plan_lora(model, config)
        skipped = plan.skipped
        wanted = {f"{name}.weight": linear.weight for name, linear in plan.linears.items()}
        shapes = {}
        for name, linear in plan.linears.items():
            in_features, out_features = sizes_of(linear)
            shapes[f"{name}.lora_A.weight"] = torch.Size((config.rank_of(name), in_features))
            shapes[f"{name}.lora_B.weight"] = torch.Size((out_features, config.rank_of(name)))
    others = _other_tensors(model, config, layers or plan.linears)
    check_not_meta(wanted | others)
    # With bias="all", PEFT's files hold the biases of its own wrappers around modules_to_save as well.
    wrapped = tuple(
        f"{name}.{part}." for name in _saved(model, config) for part in ("original_module", "modules_to_save")
    )
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(wrapped)}
    shapes.update({key: tensor.shape for key, tensor in others.items()})
    check_tensors(tensors, shapes, skipped, weights_file)

    if layers:
        report = report_on(model, layers)
    else:
        dtypes = {}
        for name, linear in plan.linears.items():
            found = torch.promote_types(tensors[f"{name}.lora_A.weight"].dtype, tensors[f"{name}.lora_B.weight"].dtype)
            dtypes[name] = linear.weight.dtype if found == linear.weight.dtype else torch.float32
        report = commit(model, config, plan, dtypes, fuse_projections)
        layers = _layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            for key, tensor in _lora_tensors(name, layer).items():
                copy(tensor, tensors[key])
        # Looked up again: apply_lora unties what modules_to_save shares with others.
        for key, tensor in _other_tensors(model, config, layers).items():
            copy(tensor, tensors[key])
    return report


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers, by the names they have without the wrappers in between."""
    return {clean(name): layer for name, layer in lora_layers(model).items()}


def _lora_tensors(name: str, layer: LoRALinear) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": layer.lora_A, f"{name}.lora_B.weight": layer.lora_B}


def _other_tensors(model: nn.Module, config: LoRAConfig, lora_names: Iterable[str]) -> dict[str, Tensor]:
    """What an adapter holds besides A and B, by PEFT's names: the trained biases, the state of modules_to_save."""
    others: dict[str, Tensor] = {}
    lora_names = set(lora_names)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = clean(path)
        module, _, kind = name.rpartition(".")
        # As a LoRABranchLinear names what it holds, and PEFT's files every layer's.
        module = module.removesuffix(".base_layer")
        if kind == "bias" and module in lora_names and config.bias != "none":
            others[f"{module}.base_layer.bias"] = parameter
        elif kind == "bias" and config.bias == "all":
            others[name] = parameter
    for prefix, saved in _saved(model, config).items():
        state = saved.state_dict(prefix=f"{prefix}.")
        others.update({clean(key): value for key, value in state.items() if isinstance(value, Tensor)})
    return others


def _saved(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    # Of a wrapper and what it is around, which have one name, the latter comes last.
    named = ((clean(path), module) for path, module in model.named_modules())
    return {name: module for name, module in named if name and config.saves(name)}


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
    everything = (clean(path) for path, _ in model.named_modules())
    names = [name for name in everything if name and name.removesuffix(".base_layer") not in layers]
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


def _check_may_get_lora(given: nn.Module, model: nn.Module) -> None:
    """Whether ``model``, without the wrappers of ``given``, may be given LoRA as it is now."""
    check_not_in_ddp(given)
    if parts := wrapped_parts(model):
        raise ValueError(
            f"model must be given LoRA before parts of it are compiled or wrapped, got {list_some(parts)} wrapped in a model "
            "without LoRALinear layers"
        )


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

"""Save and load adapters in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.adapter_files import adapter_directory, import_safetensors, read_adapter, write_adapter
from stablelora_kernels.model.apply import apply_plan
from stablelora_kernels.model.merged_saving import save_merged_layers_plain
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, lora_layers, require_lora_layers, unchanged_on_error
from stablelora_kernels.model.peft_format import PREFIX, check_not_meta, check_tensors, read_config
from stablelora_kernels.model.reports import LoRAReport, SkippedModule, list_some, report_on
from stablelora_kernels.model.targets import plan_lora
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.linear import LoRALinear, sizes_of
from stablelora_kernels.utils.dtensor import copy, is_first_rank, is_sharded, whole
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.wrappers import check_not_in_ddp, clean, in_ddp, reshard, unwrap, wrapped_parts

# For each key of an adapter's file the shape and, unless any will do, the dtype that the model calls for.
Needed = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's LoRA to the directory ``path``, for :func:`load_adapter` and for the ``peft`` package.

    It writes A and B in their dtypes, whether merged or not, and the tensors that ``bias`` and ``modules_to_save`` of the model's
    config name. The same adapter gives the same bytes. Names are those of the base model: DistributedDataParallel,
    torch.compile and checkpoint_wrapper around the model do not change them, nor do the latter two around its parts.

    The two files are one unit. A new directory appears whole or not at all. In an existing one they are replaced together:
    wherever a save is killed, :func:`load_adapter` finds the old adapter or the new one, and PEFT finds one of them or none.
    Processes that save to one directory take turns. What a killed save left there is removed by the next one. Other files
    are not touched.

    If the model has DTensors (``fully_shard``, tensor parallelism), every process must call it, because each holds a shard. In
    DistributedDataParallel, all processes may call it. In both cases rank 0 writes, and the other processes do not wait.

    Raises:
        ValueError: the model has no LoRA layers, or layers that one PEFT config cannot describe, or it is in FSDP1's
            FullyShardedDataParallel; or ``path`` is a file. Nothing is written then.
        OSError: the files could not be written, for example because the disk is full. An adapter that was there is intact.
        ImportError: safetensors or NumPy is not installed. Nothing is written then.
    """
    import_safetensors()
    # safetensors writes PyTorch's tensors through NumPy.
    import_extra("numpy", "adapters", "save_adapter")
    given, model = model, unwrap(model)
    reshard(model)
    require_lora_layers(model)
    layers = _layers(model)
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
    _warn_of_shared_layers(model, layers)

    if (in_ddp(given) or any(map(is_sharded, tensors.values()))) and not is_first_rank():
        for tensor in tensors.values():
            whole(tensor)
        return
    # Copy: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {PREFIX + key: whole(tensor).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    content = asdict(config) | _origin(model) | {"inference_mode": True, "peft_type": "LORA"}
    if config.task_type is None:
        content["task_type"] = _task_of(model)
    write_adapter(directory, content, tensors)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
) -> LoRAReport:
    """Load an adapter that :func:`save_adapter` or the ``peft`` package wrote to the directory ``path``.

    ``path`` may also be a hub id, such as "owner/name". If there is no such path on this machine, huggingface_hub downloads
    the two files, at ``revision``. ``subfolder`` is the adapter's directory inside of ``path`` or of the hub's repository.

    A model without LoRA first gets it, as by :func:`~stablelora_kernels.apply_lora` with the file's config. A and B get the
    file's dtype if that is float32 or the layer's, and float32 otherwise. ``fuse_projections`` and ``fuse_mlp`` are passed on.

    If the model already has LoRA, the values are copied into its layers, in their dtypes; ranks, scalings, ``bias`` and
    ``modules_to_save`` must be the file's, and ``fuse_projections`` and ``fuse_mlp`` have no effect.

    Wrappers are handled as by :func:`save_adapter`, with one exception: a model without LoRA must not be in
    DistributedDataParallel or ``fully_shard``, which would not know A and B. If the model has DTensors, every process must call
    it, and takes its shards of the values that rank 0 has read.

    Returns:
        The report on the layers that hold the adapter.

    Raises:
        ValueError, TypeError: the directory, one of its files, the config, the keys or the shapes do not fit, the weights
            were saved with another config or are pickled, the model is merged, the hub did not give the adapter, or
            ``revision`` is given with a path on this machine. The message names the expected and the
            actual value. Nothing is changed then.
        OSError: a file cannot be read, for example for lack of permission. Nothing is changed then.
        ImportError: safetensors is not installed, or huggingface_hub is not and ``path`` is a hub id.
    """
    import_safetensors()
    given, model = model, unwrap(model)
    reshard(model)
    directory = adapter_directory(path, revision, subfolder)
    config_file, weights_file, content, tensors = read_adapter(directory, lambda tensor: tensor)
    if foreign := [key for key in tensors if not key.startswith(PREFIX)]:
        raise ValueError(f"keys in {weights_file} must start with {PREFIX!r}, got {list_some(foreign)}")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    config = read_config(content or {}, config_file, tensors)

    layers = _layers(model)
    had_layers = bool(layers)
    if layers:
        _check_fits(model, config, layers, config_file)
        targets = {key: tensor for name, layer in layers.items() for key, tensor in _lora_tensors(name, layer).items()}
        needed: Needed = {key: (tuple(tensor.shape), None) for key, tensor in targets.items()}
        skipped: tuple[SkippedModule, ...] = ()
    else:
        _check_may_get_lora(given, model)
        try:
            plan = plan_lora(model, config)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from None
        skipped = plan.skipped
        targets = {f"{name}.weight": target.layer.weight for name, target in plan.targets.items()}
        needed = {}
        for name, target in plan.targets.items():
            (in_features, out_features), r = sizes_of(target.layer), config.rank_of(name)
            needed[f"{name}.lora_A.weight"] = (r, in_features), None
            needed[f"{name}.lora_B.weight"] = (out_features, r), None
    others = _other_tensors(model, config, layers or plan.targets)
    check_not_meta(targets | others)
    # With bias="all", PEFT also saves the biases of its wrappers around modules_to_save.
    wrapped = tuple(
        f"{name}.{part}." for name in _saved(model, config) for part in ("original_module", "modules_to_save")
    )
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(wrapped)}
    needed.update({key: (tuple(tensor.shape), tensor.dtype) for key, tensor in others.items()})
    check_tensors(tensors, needed, skipped, weights_file)

    with unchanged_on_error(model):
        if layers:
            report = report_on(model, layers)
        else:
            dtypes = {}
            for name, target in plan.targets.items():
                a, b = (tensors[f"{name}.lora_{part}.weight"].dtype for part in "AB")
                saved = torch.promote_types(a, b)
                dtypes[name] = saved if saved == target.layer.weight.dtype else torch.float32
            report = apply_plan(model, config, plan, dtypes, fuse_projections, fuse_mlp)
            layers = _layers(model)
        targets = {key: tensor for name, layer in layers.items() for key, tensor in _lora_tensors(name, layer).items()}
        # Found again: apply_plan has untied modules_to_save.
        others = _other_tensors(model, config, layers)
        # New layers go with their values.
        _copy_all(targets | others, tensors, kept=targets | others if had_layers else others)
    save_merged_layers_plain(model)
    return report


@torch.no_grad()
def _copy_all(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], kept: Collection[str]) -> None:
    """Copy all values, or none: if one cannot be copied, those of ``kept`` that were are taken back."""
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for key, tensor in targets.items():
            if key in kept:
                done.append((tensor, tensor.detach().clone()))
            copy(tensor, values[key])
    except BaseException:
        for tensor, before in done:
            tensor.copy_(before)
        raise


def _origin(model: nn.Module) -> dict[str, object]:
    """The fields of PEFT's config that say which model the adapter is for."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    # fully_shard makes a class of its own.
    own = (kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins"))
    kind = next(own, type(model))
    return {
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
    }


def _task_of(model: nn.Module) -> str | None:
    """PEFT's name for the task of a transformers model that generates text, without which its auto classes find no class."""
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == "transformers"]
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return "CAUSAL_LM"
    if any(kind.endswith("ForConditionalGeneration") for kind in kinds):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    return None


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers, by their names without wrappers."""
    return {clean(name): layer for name, layer in lora_layers(model).items()}


def _lora_tensors(name: str, layer: LoRALinear) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": layer.lora_A, f"{name}.lora_B.weight": layer.lora_B}


def _other_tensors(model: nn.Module, config: LoRAConfig, lora_names: Iterable[str]) -> dict[str, Tensor]:
    """An adapter's tensors besides A and B, by PEFT's names: trained biases and the state of modules_to_save."""
    others: dict[str, Tensor] = {}
    lora_names = set(lora_names)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = clean(path)
        module, _, kind = name.rpartition(".")
        # A LoRABranchLinear holds its bias in base_layer, and PEFT's files name every bias so.
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
    # A wrapper and its module have the same name; the module comes last and stays.
    named = ((clean(path), module) for path, module in model.named_modules())
    return {name: module for name, module in named if name and config.saves(name)}


def _config_of(model: nn.Module, layers: Mapping[str, LoRALinear]) -> LoRAConfig:
    """The config with which PEFT makes exactly these layers from the base model.

    It starts from the config that apply_lora got, if any. Layers may have been skipped, added or changed since.
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
    for field, pattern, value_of in (
        ("r", "rank_pattern", config.rank_of),
        ("lora_alpha", "alpha_pattern", config.alpha_of),
    ):
        values = {name: getattr(layer, field) for name, layer in layers.items()}
        if any(value_of(name) != value for name, value in values.items()):
            own = {f"^{re.escape(name)}": value for name, value in values.items() if value != getattr(config, field)}
            config = replace(config, **{pattern: own})  # type: ignore[arg-type]

    # Take the first list of target names that fits: other programs read a short one best. The regular expression always fits.
    every_name = (clean(path) for path, _ in model.named_modules())
    names = [name for name in every_name if name and name.removesuffix(".base_layer") not in layers]
    names += layers
    choices: list[list[str] | str] = [] if config.all_linear else [config.target_modules or []]
    choices += [sorted({name.rpartition(".")[2] for name in layers}), list(layers)]
    for choice in choices:
        candidate = replace(config, target_modules=choice)
        if {name for name in names if candidate.targets(name) and not candidate.reason_to_exclude(name)} == set(layers):
            return candidate
    return replace(config, target_modules="|".join(map(re.escape, layers)), exclude_modules=None)


def _warn_of_shared_layers(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    counts = Counter(child for module in model.modules() for child in module._modules.values())
    for name, layer in layers.items():
        if counts[layer] > 1:
            warnings.warn(
                f"{name!r} is registered in {counts[layer]} places; load_adapter adapts them all, peft only the first",
                stacklevel=3,
            )


def _check_may_get_lora(given: nn.Module, model: nn.Module) -> None:
    """Raise ValueError if ``model``, the unwrapped ``given``, must not get LoRA in its current wrappers."""
    check_not_in_ddp(given)
    if parts := wrapped_parts(model):
        raise ValueError(
            f"model must be given LoRA before parts of it are compiled or wrapped, got {list_some(parts)} wrapped in a model "
            "without LoRALinear layers"
        )


def _check_fits(model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear], file: Path) -> None:
    """Raise ValueError if an adapter's config differs from that of the model's layers."""
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

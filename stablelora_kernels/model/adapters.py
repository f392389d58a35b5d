"""``save_adapter`` and ``load_adapter``: PEFT's two files, ``adapter_config.json`` and
``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.apply import LoRASettings, fuse, put_in
from stablelora_kernels.model.modules import check_not_pefts, lora_layers, require_lora_layers
from stablelora_kernels.model.reports import LoRAReport, list_some
from stablelora_kernels.nn.linear import LoRALinear, reason_against_lora
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.modules import check_not_in_ddp, clean, in_ddp, reshard, unwrap
from stablelora_kernels.utils.names import check_patterns, ends_of, lookup_pattern
from stablelora_kernels.utils.tensors import copy, is_first_rank, is_sharded, whole
from stablelora_kernels.utils.validation import (
    check_bool,
    check_float,
    check_int,
    check_tiles,
    shown,
)

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<name>.+)\.lora_(?P<role>[AB])\.weight")
# The entry of the weights' metadata with a copy of these fields of the config: they decide what the
# weights compute, and tell a config from weights of another save.
_METADATA = "adapter_config"
_COMPUTING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# PEFT's default for lora_alpha, which a file may omit.
_PEFT_ALPHA = 8
# Fields of PEFT's config that a LoRALinear can do without: about the adapter's origin and training,
# and about which layers have it, which the names of the weights say.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
# PEFT's other initializations also change the frozen weights, which the file does not hold.
_INITS_OF_AB_ONLY = ("gaussian", "eva", "orthogonal")


class _Pair(NamedTuple):
    """A and B of a layer, in a file."""

    lora_A: Tensor
    lora_B: Tensor
    r: int
    lora_alpha: float


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write A and B of the model's ``LoRALinear`` layers to the directory ``path``, in PEFT's format
    and in their dtypes.

    :func:`load_adapter`, the ``peft`` package and vLLM read it. Names are those of the base model,
    whatever wraps it or its parts. Each of the two files is replaced by an atomic rename, and a
    reader of this library tells if they are of two saves. Save a PEFT model by its
    ``save_pretrained``.

    If the model has DTensors (``fully_shard``), every process must call it, because each holds a
    shard. In DistributedDataParallel, all processes may call it. In both cases rank 0 writes, and
    the other processes do not wait.

    Raises:
        ValueError: the model has no LoRALinear layers, or is one, or its layers differ in
            ``use_rslora``, of which a file has one; or ``path`` is a file. Nothing is written then.
        OSError: the files could not be written.
        ImportError: safetensors or NumPy is not installed. Nothing is written then.
    """
    save_file = import_extra("safetensors.torch", "adapters", "save_adapter").save_file
    # safetensors writes PyTorch's tensors through NumPy.
    import_extra("numpy", "adapters", "save_adapter")
    wrapped = model
    model = unwrap(wrapped)
    reshard(model)
    layers = require_lora_layers(model, of_peft="model.save_pretrained(path)")
    if "" in layers:
        raise ValueError(
            "model must be a module that contains LoRALinear layers, got a LoRALinear, which has no name in a file"
        )
    _check_not_meta(layers)
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path must be a directory, got the file {str(path)!r}")
    config = _config_of(model, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for role in ("lora_A", "lora_B"):
            # Copied: safetensors refuses tensors that share memory.
            values = whole(getattr(layer, role)).to("cpu", copy=True)
            tensors[f"{_PREFIX}{name}.{role}.weight"] = values.contiguous()
    is_parallel = in_ddp(wrapped) or any(is_sharded(layer.lora_A) for layer in layers.values())
    if is_parallel and not is_first_rank():
        return
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _METADATA: _computing(config)}
    new_weights = directory / f".{_WEIGHTS}.{os.getpid()}"
    new_config = directory / f".{_CONFIG}.{os.getpid()}"
    try:
        try:
            save_file(tensors, new_weights, metadata=metadata)
        except Exception as error:
            # safetensors reports a full disk as an error of its own.
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(f"{new_weights} could not be written: {error}") from None
        new_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # safetensors gives only the owner permission to read its file.
        new_weights.chmod(new_config.stat().st_mode)
        os.replace(new_weights, directory / _WEIGHTS)
        os.replace(new_config, directory / _CONFIG)
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)


def _config_of(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, Any]:
    """The config with which PEFT makes exactly these layers from the base model."""
    first = next(iter(layers.values()))
    others = [name for name, layer in layers.items() if layer.use_rslora != first.use_rslora]
    if others:
        raise ValueError(
            f"use_rslora must be one value for all layers, got both; {list_some(others)} differ from the first"
        )
    leaves = {name.rpartition(".")[2] for name in layers}
    named = {clean(path) for path, _ in model.named_modules()}
    matched = {name for name in named if not leaves.isdisjoint(ends_of(name))}
    # Other programs read a short list best. The regular expression always fits.
    target_modules = (
        sorted(leaves) if matched == layers.keys() else "|".join(map(re.escape, layers))
    )
    base_name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": target_modules,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "rank_pattern": {
            f"^{re.escape(name)}": layer.r for name, layer in layers.items() if layer.r != first.r
        },
        "alpha_pattern": {
            f"^{re.escape(name)}": layer.lora_alpha
            for name, layer in layers.items()
            if layer.lora_alpha != first.lora_alpha
        },
    }


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
    tile_mlp: bool | int = False,
    fuse_loss: bool = False,
) -> LoRAReport:
    """Load an adapter that :func:`save_adapter` or the ``peft`` package wrote to the directory
    ``path``.

    A model without LoRA first gets ``LoRALinear`` layers where the file has pairs, as by
    :func:`~stablelora_kernels.apply_lora`; A and B get the file's dtype if that is the layer's, and
    float32 otherwise. If the model has LoRA already, the values are copied into its layers, whose
    names, ranks and scalings must be the file's. ``fuse_projections``, ``fuse_mlp``, ``tile_mlp``
    and ``fuse_loss`` are those of ``apply_lora``.

    If the model has DTensors, every process must call it, and takes its shards of the values that
    rank 0 has read.

    Returns:
        The report on the layers that hold the adapter.

    Raises:
        ValueError, TypeError: the directory, one of its files, its config, the names or the shapes
            do not fit; the adapter is more than plain LoRA, or pickled; or the model is merged. The
            message names the expected and the actual value. Nothing is changed then.
        OSError: a file cannot be read.
        ImportError: safetensors is not installed.
    """
    check_tiles("tile_mlp", tile_mlp)
    wrapped = model
    model = unwrap(wrapped)
    reshard(model)
    check_not_pefts(
        model,
        "model.load_adapter(path, adapter_name), or peft.PeftModel.from_pretrained(base_model, path),",
    )
    directory = Path(path)
    config, pairs = _read(directory)
    layers = lora_layers(model)
    notes: list[str] = []
    if layers:
        _check_fits(layers, pairs, config, directory)
    else:
        check_not_in_ddp(wrapped)
        targets = _targets_of(model, pairs, directory)
        settings: dict[str, LoRASettings] = {}
        for name, pair in pairs.items():
            dtype = targets[name].weight.dtype
            keeps_dtype = pair.lora_A.dtype == pair.lora_B.dtype == dtype and dtype in FLOAT_DTYPES
            settings[name] = LoRASettings(
                pair.r,
                pair.lora_alpha,
                config.get("lora_dropout", 0.0),
                config.get("use_rslora", False),
                dtype if keeps_dtype else torch.float32,
            )
        notes = put_in(model, targets, settings)
        layers = lora_layers(model)
    with torch.no_grad():
        for name, pair in pairs.items():
            copy(layers[name].lora_A, pair.lora_A)
            copy(layers[name].lora_B, pair.lora_B)
    return fuse(model, pairs, (), notes, fuse_projections, fuse_mlp, tile_mlp, fuse_loss)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, _Pair]]:
    """The config of an adapter, and its pairs by the layer's name."""
    safe_open = import_extra("safetensors", "adapters", "load_adapter").safe_open
    config_file = directory / _CONFIG
    weights_file = directory / _WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(
                f"path must be a directory with {_CONFIG} and {_WEIGHTS}, got {str(directory)!r} without {file.name}"
            )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_file} must be JSON, got text that is not: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object, got a {type(config).__name__}")
    try:
        with safe_open(weights_file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except Exception as error:  # SafetensorError, which derives from Exception, and what PyTorch makes of its dtypes.
        raise ValueError(
            f"{weights_file} must be a safetensors file, got one that cannot be read: {error}"
        ) from None
    _check_plain(config, config_file)
    saved_with = metadata.get(_METADATA)
    if saved_with is not None and saved_with != _computing(config):
        raise ValueError(
            f"{config_file} and {weights_file} must be of one save, got {_computing(config)} beside weights of {saved_with}"
        )
    return config, _pairs_of(config, tensors, config_file, weights_file)


def _computing(config: Mapping[str, Any]) -> str:
    """The fields of a config that decide what the weights compute, in JSON."""
    return json.dumps({key: config.get(key) for key in _COMPUTING}, sort_keys=True)


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError or TypeError unless a config describes plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {file} must be 'LORA', got {config.get('peft_type')!r}")
    check_int(f"r in {file}", config.get("r", 8), minimum=1)
    check_float(f"lora_alpha in {file}", config.get("lora_alpha", _PEFT_ALPHA))
    check_float(f"lora_dropout in {file}", config.get("lora_dropout", 0.0), low=0.0, high=1.0)
    for r in check_patterns(f"rank_pattern in {file}", config.get("rank_pattern")).values():
        check_int(f"rank_pattern in {file}", r, minimum=1)
    for alpha in check_patterns(f"alpha_pattern in {file}", config.get("alpha_pattern")).values():
        check_float(f"alpha_pattern in {file}", alpha)
    check_bool(f"use_rslora in {file}", config.get("use_rslora", False))
    beyond = [
        f"{key}={value!r}"
        for key, value in config.items()
        if value and key not in _HARMLESS and key not in (*_COMPUTING, "init_lora_weights", "bias")
    ]
    if config.get("bias") not in (None, "none"):
        beyond.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _INITS_OF_AB_ONLY):
        beyond.append(f"init_lora_weights={init!r}")
    if beyond:
        raise ValueError(
            f"{file} must describe plain LoRA, got {', '.join(beyond)}; load it with PEFT and use accelerate_peft"
        )


def _pairs_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], config_file: Path, weights_file: Path
) -> dict[str, _Pair]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"keys in {weights_file} must be {_PREFIX}NAME.lora_A.weight and lora_B, got {key!r}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} in {weights_file} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensor.dtype}"
            )
        halves.setdefault(match["name"], {})[match["role"]] = tensor
    if not halves:
        raise ValueError(f"{weights_file} must hold pairs of lora_A and lora_B, got none")
    pairs: dict[str, _Pair] = {}
    for name, half in halves.items():
        r = lookup_pattern(config.get("rank_pattern") or {}, (name,), config.get("r", 8))
        alpha = lookup_pattern(
            config.get("alpha_pattern") or {}, (name,), config.get("lora_alpha", _PEFT_ALPHA)
        )
        shapes = {role: [*tensor.shape] for role, tensor in half.items()}
        if len(half) != 2 or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(
                f"{name} in {weights_file} must have matrices lora_A and lora_B, got {shapes}"
            )
        if shapes["A"][0] != r or shapes["B"][1] != r:
            raise ValueError(
                f"{name} in {weights_file} must be of rank {shown(r)}, as {config_file} says, got {shapes}"
            )
        pairs[name] = _Pair(half["A"], half["B"], r, alpha)
    return pairs


def _targets_of(
    model: nn.Module, pairs: Mapping[str, _Pair], directory: Path
) -> dict[str, nn.Linear]:
    """The layers of a model without LoRA that an adapter is for."""
    modules = {clean(path): module for path, module in model.named_modules()}
    targets: dict[str, Any] = {}
    for name, pair in pairs.items():
        linear = modules.get(name)
        if linear is None:
            raise ValueError(
                f"model must have the layers of {directory}, got none by the name {name!r}"
            )
        reason = reason_against_lora(linear)
        if reason is not None:
            raise ValueError(
                f"{name!r} in {directory} must be a layer that can have LoRA, but it {reason}"
            )
        _check_shapes(name, pair, linear, directory)
        targets[name] = linear
    _check_not_meta(targets)
    return targets


def _check_fits(
    layers: Mapping[str, LoRALinear],
    pairs: Mapping[str, _Pair],
    config: Mapping[str, Any],
    directory: Path,
) -> None:
    """Raise ValueError unless the model's layers are those of an adapter."""
    if missing := [name for name in layers if name not in pairs]:
        raise ValueError(
            f"{directory} must hold the model's layers, got none for {list_some(missing)}"
        )
    if beyond := [name for name in pairs if name not in layers]:
        raise ValueError(
            f"{directory} must hold the model's layers alone, got {list_some(beyond)} too"
        )
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must not be merged while an adapter is loaded, got {list_some(merged)} merged; unmerge() them"
        )
    _check_not_meta(layers)
    for name, layer in layers.items():
        pair = pairs[name]
        for field, in_model, in_file in (
            ("r", layer.r, pair.r),
            ("lora_alpha", layer.lora_alpha, pair.lora_alpha),
            ("use_rslora", layer.use_rslora, config.get("use_rslora", False)),
        ):
            if in_model != in_file:
                raise ValueError(
                    f"{field} of {name!r} is {shown(in_model)} in the model, got {shown(in_file)} in {directory}"
                )
        _check_shapes(name, pair, layer, directory)


def _check_shapes(name: str, pair: _Pair, layer: Any, directory: Path) -> None:
    """Raise ValueError unless a pair has the sizes of a layer: before memory is taken for it."""
    wanted = [pair.r, layer.in_features], [layer.out_features, pair.r]
    shapes = [*pair.lora_A.shape], [*pair.lora_B.shape]
    if shapes != wanted:
        raise ValueError(
            f"A and B of {name!r} in {directory} must be {wanted[0]} and {wanted[1]}, got {shapes[0]} and {shapes[1]}"
        )


def _check_not_meta(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a layer has no values."""
    if empty := [
        name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters())
    ]:
        raise ValueError(f"model must hold values, got {list_some(empty)} on the meta device")

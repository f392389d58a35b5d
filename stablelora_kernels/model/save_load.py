"""Save and load adapters in PEFT's directory format: ``adapter_config.json`` and
``adapter_model.safetensors``.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.adapter_files import (
    adapter_directory,
    import_safetensors,
    read_adapter,
    write_adapter,
)
from stablelora_kernels.model.apply import apply_plan
from stablelora_kernels.model.merge import save_merged_layers_plain
from stablelora_kernels.model.modules import (
    CONFIG_ATTRIBUTE,
    check_not_pefts,
    lora_layers,
    registrations,
    require_lora_layers,
    saved_modules,
    unchanged_on_error,
)
from stablelora_kernels.model.peft_format import (
    PREFIX,
    config_of,
    content_of,
    file_name,
    read_config,
)
from stablelora_kernels.model.plan import LoRAPlan, plan_lora
from stablelora_kernels.model.reports import (
    LoRAReport,
    SkippedModule,
    count_parameters,
    list_some,
    rows_of,
)
from stablelora_kernels.nn.experts import StackedWeight
from stablelora_kernels.nn.linear import LoRALinear, sizes_of
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.modules import (
    check_not_in_ddp,
    clean,
    in_ddp,
    reshard,
    unwrap,
    wrapped_parts,
)
from stablelora_kernels.utils.tensors import copy, is_first_rank, is_sharded, whole
from stablelora_kernels.utils.validation import counted


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's LoRA to the directory ``path``, for :func:`load_adapter` and for the
    ``peft`` package.

    It writes A and B in their dtypes, whether merged or not, and the tensors that ``bias`` and
    ``modules_to_save`` of the model's config name. The same adapter gives the same bytes. Names are
    those of the base model: DistributedDataParallel, torch.compile and checkpoint_wrapper around
    the model do not change them, nor do the latter two around its parts.

    The two files are one unit and are replaced together: wherever a save is killed,
    :func:`load_adapter` finds the old adapter (none in a new directory) or the new one, and PEFT
    finds one of them or none. Processes that save to one directory take turns. What a killed save
    left there is removed by the next one. Other files are not touched.

    If the model has DTensors (``fully_shard``, tensor parallelism), every process must call it,
    because each holds a shard. In DistributedDataParallel, all processes may call it. In both cases
    rank 0 writes, and the other processes do not wait.

    Raises:
        ValueError: the model has no LoRA layers, or layers that one PEFT config cannot describe, or
            it is in FSDP1's FullyShardedDataParallel; or ``path`` is a file. Nothing is written
            then.
        OSError: the files could not be written, for example because the disk is full. An adapter
            that was there is intact.
        ImportError: safetensors or NumPy is not installed. Nothing is written then.
    """
    import_safetensors()
    # safetensors writes PyTorch's tensors through NumPy.
    import_extra("numpy", "adapters", "save_adapter")
    wrapped = model
    model = unwrap(wrapped)
    reshard(model)
    require_lora_layers(
        model, not_alone="has no name in a file", of_peft="model.save_pretrained(path)"
    )
    layers = _layers(model)
    directory = Path(path).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path must be a directory, got the file {str(path)!r}")
    config = config_of(model, layers)
    tensors = _tensors(model, config, layers)
    _check_not_meta(tensors)
    counts = Counter(layer for _, _, layer in registrations(model, set(layers.values())))
    for name, layer in layers.items():
        if counts[layer] > 1:
            warnings.warn(
                f"{name!r} is registered in {counts[layer]} places; load_adapter adapts them all, peft only the first",
                stacklevel=2,
            )

    if (in_ddp(wrapped) or any(map(is_sharded, tensors.values()))) and not is_first_rank():
        for tensor in tensors.values():
            whole(tensor)
        return
    # Copy: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        PREFIX + key: whole(tensor).to("cpu", copy=True).contiguous()
        for key, tensor in tensors.items()
    }
    write_adapter(directory, content_of(config, model), tensors)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    fuse_projections: bool = False,
    fuse_mlp: bool = False,
    fuse_loss: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
) -> LoRAReport:
    """Load an adapter that :func:`save_adapter` or the ``peft`` package wrote to the directory
    ``path``.

    ``path`` may also be a hub id, such as "owner/name". If there is no such path on this machine,
    huggingface_hub downloads the two files, at ``revision``. ``subfolder`` is the adapter's
    directory inside of ``path`` or of the hub's repository.

    A model without LoRA first gets it, as by :func:`~stablelora_kernels.apply_lora` with the file's
    config. A and B get the file's dtype if that is float32 or the layer's, and float32 otherwise.
    ``fuse_projections``, ``fuse_mlp`` and ``fuse_loss`` are passed on.

    If the model already has LoRA, the values are copied into its layers, in their dtypes; ranks,
    scalings, ``bias`` and ``modules_to_save`` must be the file's, and ``fuse_projections``,
    ``fuse_mlp`` and ``fuse_loss`` have no effect.

    Wrappers are handled as by :func:`save_adapter`, with one exception: a model without LoRA must
    not be in DistributedDataParallel or ``fully_shard``, which would not know A and B. If the model
    has DTensors, every process must call it, and takes its shards of the values that rank 0 has
    read.

    Returns:
        The report on the layers that hold the adapter.

    Raises:
        ValueError, TypeError: the directory, one of its files, the config, the keys or the shapes
            do not fit, the weights were saved with another config or are pickled, the model is
            merged, the hub did not give the adapter, or ``revision`` is given with a path on this
            machine. The message names the expected and the actual value. Nothing is changed then.
        OSError: a file cannot be read, for example for lack of permission. Nothing is changed then.
        ImportError: safetensors is not installed, or huggingface_hub is not and ``path`` is a hub
            id.
    """
    import_safetensors()
    wrapped = model
    model = unwrap(wrapped)
    reshard(model)
    check_not_pefts(
        model,
        "model.load_adapter(path, adapter_name), or peft.PeftModel.from_pretrained(base_model, path),",
    )
    directory = adapter_directory(path, revision, subfolder)
    adapter = read_adapter(directory, lambda tensor: tensor)
    if foreign := [key for key in adapter.tensors if not key.startswith(PREFIX)]:
        raise ValueError(
            f"keys in {adapter.weights_file} must start with {PREFIX!r}, got {list_some(foreign)}"
        )
    weights_file = adapter.weights_file
    config_file = adapter.config_file
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in adapter.tensors.items()}
    config = read_config(adapter.config or {}, config_file, tensors)

    with unchanged_on_error(model):
        if layers := _layers(model):
            _check_fits(model, config, layers, config_file)
            report = LoRAReport(rows_of(layers), (), *count_parameters(model))
        else:
            check_not_in_ddp(wrapped)
            if parts := wrapped_parts(model):
                raise ValueError(
                    f"model must be given LoRA before parts of it are compiled or wrapped, got {list_some(parts)} wrapped in a "
                    "model without LoRALinear layers"
                )
            try:
                plan = plan_lora(model, config)
            except ValueError as error:
                raise ValueError(f"{config_file}: {error}") from None
            _check_not_meta(
                {f"{name}.weight": target.base.weight for name, target in plan.targets.items()}
            )
            _check_new_layers(plan, tensors, config_file, weights_file)
            report = apply_plan(
                model, plan, _lora_dtypes(plan, tensors), fuse_projections, fuse_mlp, fuse_loss
            )
        targets = _tensors(model, config, _layers(model))
        _check_not_meta(targets)
        # With bias="all", PEFT also saves the biases of its wrappers around modules_to_save.
        inner = ("original_module", "modules_to_save")
        prefixes = tuple(
            f"{name}.{child}." for name in saved_modules(model, config) for child in inner
        )
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
        _check_tensors(tensors, targets, report.skipped, weights_file)
        _copy_all(targets, tensors)
    save_merged_layers_plain(model)
    return report


def _check_new_layers(
    plan: LoRAPlan, tensors: Mapping[str, Tensor], config_file: Path, weights_file: Path
) -> None:
    """Raise ValueError unless the file has A and B of the new layers, in the shapes that its config
    gives them.

    Called before they are allocated: a config may name a rank for which no memory is large enough.
    """
    ranks: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    for name, target in plan.targets.items():
        base = target.base
        a, b = (f"{file_name(name, base)}.lora_{role}.weight" for role in "AB")
        r = plan.config.rank_of(name)
        rows = r * base.count if isinstance(base, StackedWeight) else r
        in_features, out_features = sizes_of(base)
        ranks |= {a: r, b: r}
        shapes |= {a: [rows, in_features], b: [out_features, rows]}
    _check_present(shapes, tensors, weights_file)
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape:
            message = _wrong_shape(key, shape, tensors, weights_file)
            raise ValueError(f"{message}, where r in {config_file} is {ranks[key]}")


def _lora_dtypes(plan: LoRAPlan, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each new layer's A and B: float32, or that of its weight if the file's have it,
    too.
    """
    dtypes = {}
    for name, target in plan.targets.items():
        layer = target.base
        keys = [f"{file_name(name, layer)}.lora_{role}.weight" for role in "AB"]
        saved = {tensors[key].dtype for key in keys if key in tensors}
        is_kept = saved == {layer.weight.dtype} and layer.weight.dtype in FLOAT_DTYPES
        dtypes[name] = layer.weight.dtype if is_kept else torch.float32
    return dtypes


def _check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor of the model has no values."""
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model must hold values, got {list_some(empty)} on the meta device")


def _check_tensors(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    skipped: Iterable[SkippedModule],
    file: Path,
) -> None:
    """Raise ValueError unless a file's tensors are those of ``targets``, in shape and kind of
    dtype. Values are cast.
    """
    _check_present(targets, tensors, file)
    if unexpected := [key for key in tensors if key not in targets]:
        reasons = [
            f"; {module.name}: {module.reason}"
            for module in skipped
            if unexpected[0].startswith(f"{module.name}.")
        ]
        raise ValueError(
            f"{file} must hold what its config and the model call for, got {list_some(unexpected)} beyond that{''.join(reasons)}"
        )
    for key, target in targets.items():
        dtype = tensors[key].dtype
        if tensors[key].shape != target.shape:
            raise ValueError(_wrong_shape(key, list(target.shape), tensors, file))
        if ".lora_A." in key or ".lora_B." in key:
            if dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{key} in {file} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}"
                )
        elif _kind(dtype) != _kind(target.dtype):
            raise ValueError(f"{key} in {file} must be {target.dtype} or alike, got {dtype}")


def _check_present(keys: Iterable[str], tensors: Mapping[str, Tensor], file: Path) -> None:
    if missing := [key for key in keys if key not in tensors]:
        raise ValueError(
            f"{file} must hold {list_some(missing)}, got {counted(len(tensors), 'tensor')} without them"
        )


def _wrong_shape(key: str, shape: list[int], tensors: Mapping[str, Tensor], file: Path) -> str:
    return f"{key} in {file} must be {shape}, got {list(tensors[key].shape)}"


def _kind(dtype: torch.dtype) -> tuple[bool, ...]:
    """What a file's dtype must have in common with the model's."""
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


@torch.no_grad()
def _copy_all(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy all values, or none: if one cannot be copied, those that were are taken back."""
    before = {key: tensor.detach().clone() for key, tensor in targets.items()}
    try:
        for key, tensor in targets.items():
            copy(tensor, values[key])
    except BaseException:
        for key, tensor in targets.items():
            tensor.copy_(before[key])
        raise


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers, by their names without wrappers."""
    return {clean(name): layer for name, layer in lora_layers(model).items()}


def _tensors(
    model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear]
) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names: A and B, trained biases, and the state of
    modules_to_save.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        place = file_name(name, layer)
        tensors |= {f"{place}.lora_A.weight": layer.lora_A, f"{place}.lora_B.weight": layer.lora_B}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = clean(path)
        module, _, kind = name.rpartition(".")
        # A LoRABranchLinear holds its bias in base_layer, and PEFT's files name every bias so.
        module = module.removesuffix(".base_layer")
        if kind == "bias" and module in layers and config.bias != "none":
            tensors[f"{module}.base_layer.bias"] = parameter
        elif kind == "bias" and config.bias == "all":
            tensors[name] = parameter
    for prefix, saved in saved_modules(model, config).items():
        state = saved.state_dict(prefix=f"{prefix}.")
        tensors.update(
            {clean(key): value for key, value in state.items() if isinstance(value, Tensor)}
        )
    return tensors


def _check_fits(
    model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear], file: Path
) -> None:
    """Raise ValueError if an adapter's config differs from that of the model's layers."""
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must not be merged while an adapter is loaded, got {list_some(merged)} merged; unmerge_lora it"
        )
    for name, layer in layers.items():
        for field, in_model, in_file in (
            ("r", layer.r, config.rank_of(name)),
            ("lora_alpha", layer.lora_alpha, config.alpha_of(name)),
            ("use_rslora", layer.use_rslora, config.use_rslora),
        ):
            if in_model != in_file:
                raise ValueError(
                    f"{field} of {name!r} is {in_model} in the model, got {in_file} in {file}"
                )
    have_config = getattr(model, CONFIG_ATTRIBUTE, None)
    bias = have_config.bias if have_config else "none"
    if bias != config.bias:
        raise ValueError(f"bias is {bias!r} in the model, got {config.bias!r} in {file}")
    saved = list(saved_modules(model, have_config)) if have_config else []
    if saved != list(saved_modules(model, config)):
        raise ValueError(
            f"modules_to_save is {saved} in the model, got {list(saved_modules(model, config))} in {file}"
        )

"""``load_packed_experts``: a checkpoint whose experts are stored in MXFP4, as gpt-oss's are, into a
model whose experts stay so.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.stacks import is_packed, set_mxfp4
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.modules import check_module

_BLOCKS = "_blocks"
_SCALES = "_scales"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
# Columns that share a scale.
_GROUP = 32


class _PackedStack(NamedTuple):
    """A parameter of the model that the checkpoint stores in MXFP4."""

    experts: nn.Module
    parameter: str
    # Its name in the model.
    name: str


def load_packed_experts(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a checkpoint's stacks of experts in MXFP4 into ``model``, in place. They stay packed and
    frozen.

    Parameters on the meta device get their values, too, so that a model can be made without memory
    for its weights::

        config = AutoConfig.from_pretrained(path)
        with accelerate.init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        slk.load_packed_experts(model, path)

    All other parameters keep theirs. Afterwards PEFT puts LoRA on the experts, by their full names in
    ``target_parameters``, and :func:`~stablelora_kernels.accelerate_peft` computes it. Without an
    adapter the experts' own forward dequantizes a stack at each call.
    ``state_dict()`` has the checkpoint's names.

    Args:
        model: a model with stacks of experts, such as transformers' ``GptOssForCausalLM``.
        path: a directory with ``model.safetensors``, or with several files and their index. A stack
            is stored as ``NAME_blocks`` [E, N, K / 32, 16] and ``NAME_scales`` [E, N, K / 32].

    Returns:
        The names of the packed stacks.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``model`` is no module.
        ValueError: the directory has no such checkpoint or no stack in MXFP4, a file is damaged, its
            index names a file of another directory, a stack does not fit the model's parameter, or
            a parameter on the meta device is not in the checkpoint, or there in a dtype that is
            nothing without its scale. Nothing is changed then.
    """
    check_module(model)
    with ExitStack() as opened:
        files = _open_files(Path(path), opened)
        stacks = list(_stacks_of(model, files, path))
        values = _values_of(model, files, {stack.name for stack in stacks})
        for stack in stacks:
            blocks = files[stack.name + _BLOCKS].get_tensor(stack.name + _BLOCKS)
            scales = files[stack.name + _SCALES].get_tensor(stack.name + _SCALES)
            transposed = getattr(stack.experts, "is_transposed", False)
            set_mxfp4(stack.experts, stack.parameter, blocks, scales, transposed)
        for name, parameter in values.items():
            _set(model, parameter, files[name].get_tensor(name))
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    return [stack.name for stack in stacks]


def _open_files(directory: Path, opened: ExitStack) -> dict[str, Any]:
    """The open file of each tensor of a checkpoint, by the tensor's name."""
    safetensors = import_extra("safetensors", "adapters", "a checkpoint in MXFP4")
    index = directory / _INDEX
    places = _places_in(index) if index.is_file() else None
    names = [_WEIGHTS] if places is None else sorted({*places.values()})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"path must be a directory with {list_some(missing)}, got {str(directory)!r}"
        )
    files: dict[str, Any] = {}
    for name in names:
        try:
            file = opened.enter_context(safetensors.safe_open(directory / name, framework="pt"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"path must hold files of safetensors, got a damaged {str(directory / name)!r}: {error}"
            ) from None
        held = {*file.keys()}
        # Of a tensor that several files hold, the one of the file that the index names.
        of_file = held if places is None else {key for key in places if places[key] == name}
        if of_file - held:
            raise ValueError(
                f"{str(directory / name)!r} must hold the tensors that {_INDEX} says, got none by the name of "
                f"{list_some(sorted(of_file - held))}"
            )
        files.update(dict.fromkeys(of_file, file))
    return files


def _places_in(index: Path) -> dict[str, str]:
    """The file's name of each tensor, by an index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"path must hold an index in JSON, got a damaged {str(index)!r}: {error}"
        ) from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(
            f"'weight_map' of {str(index)!r} must map the names of tensors to those of files, got {reprlib.repr(places)}"
        )
    # A checkpoint from elsewhere must not open other files of this machine.
    outside = [name for name in sorted({*places.values()}) if Path(name).name != name]
    if outside:
        raise ValueError(
            f"{_INDEX} must name files of its own directory, got {list_some(outside)} in {str(index.parent)!r}"
        )
    return places


def _stacks_of(
    model: nn.Module, files: Mapping[str, Any], path: str | os.PathLike[str]
) -> Iterator[_PackedStack]:
    """The checkpoint's stacks in MXFP4, which fit the model's parameters."""
    names = [key.removesuffix(_BLOCKS) for key in files if key.endswith(_BLOCKS)]
    if not names:
        raise ValueError(
            f"path must hold stacks in MXFP4, NAME{_BLOCKS} and NAME{_SCALES}, got none in {str(path)!r}"
        )
    for name in names:
        if name + _SCALES not in files:
            raise ValueError(f"{name + _BLOCKS} must come with {name + _SCALES}, got none")
        prefix, _, parameter = name.rpartition(".")
        try:
            experts = model.get_submodule(prefix)
        except AttributeError:
            raise ValueError(f"model must have {prefix!r} for {name!r}, got none") from None
        if is_packed(experts, parameter):
            raise ValueError(f"{name} must not be packed yet, got one that is")
        _check_sizes(experts, parameter, name, files)
        yield _PackedStack(experts, parameter, name)


def _check_sizes(experts: nn.Module, parameter: str, name: str, files: Mapping[str, Any]) -> None:
    """Raise ValueError unless a stack of the checkpoint has the sizes of the model's parameter."""
    weight = experts._parameters.get(parameter)
    if weight is None or weight.dim() != 3:
        raise ValueError(f"{name} must be a stack [E, N, K] of the model, got {weight}")
    count, rows, columns = weight.shape
    if getattr(experts, "is_transposed", False):
        rows, columns = columns, rows
    if columns % _GROUP:
        raise ValueError(
            f"{name} must have a multiple of {_GROUP} columns, of which MXFP4 stores groups, got {columns} in "
            f"{list(weight.shape)}"
        )
    groups = [count, rows, columns // _GROUP]
    for key, sizes in ((name + _BLOCKS, [*groups, 16]), (name + _SCALES, groups)):
        stored = files[key].get_slice(key)
        if stored.get_shape() != sizes:
            raise ValueError(
                f"{key} must be {sizes} to fit {list(weight.shape)}, got {stored.get_shape()}"
            )
        if stored.get_dtype() != "U8":
            raise ValueError(f"{key} must be U8, got {stored.get_dtype()}")


def _values_of(
    model: nn.Module, files: Mapping[str, Any], packed: set[str]
) -> dict[str, nn.Parameter]:
    """The parameters on the meta device that the checkpoint has values for, by a name that it has."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"{name} must have values, which no checkpoint has, got a buffer on the meta device; make the model "
                "within accelerate.init_empty_weights(), which leaves buffers alone"
            )
    values: dict[str, nn.Parameter] = {}
    stored: set[nn.Parameter] = set()
    missing: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta or name in packed:
            continue
        if name not in files:
            missing[parameter] = name
            continue
        value = files[name].get_slice(name)
        shape = value.get_shape()
        if shape != list(parameter.shape):
            raise ValueError(f"{name} must be {list(parameter.shape)}, got {shape}")
        # A weight of 8 bits is nothing without its scale, which a cast would not apply.
        dtype = (value[:0] if shape else files[name].get_tensor(name)).dtype
        if dtype != parameter.dtype and not {dtype, parameter.dtype} <= {*FLOAT_DTYPES}:
            raise ValueError(
                f"{name} must be {parameter.dtype}, or a float of 16 to 64 bits for another one, got {dtype}"
            )
        values[name] = parameter
        stored.add(parameter)
    lacking = [name for parameter, name in missing.items() if parameter not in stored]
    if lacking:
        raise ValueError(
            f"path must hold values for the parameters on the meta device, got none for {list_some(lacking)}"
        )
    return values


def _set(model: nn.Module, parameter: nn.Parameter, value: Tensor) -> None:
    """Put ``value`` in place of a parameter without values, wherever it is tied to."""
    new = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
    for module in model.modules():
        for key, other in module._parameters.items():
            if other is parameter:
                module._parameters[key] = new

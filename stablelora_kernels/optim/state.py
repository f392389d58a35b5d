"""The optimizer's state: which tensors a parameter has, how they are checked, completed and converted,
and what of a state dict an optimizer takes over.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.optim.groups import (
    ParamGroup,
    check_shared,
    named_parameters,
    shared_options,
)
from stablelora_kernels.optim.options import LOW_PRECISION, OPTIONS, STORAGE, check_options
from stablelora_kernels.optim.rounding import NEAREST, decode8, encode8, flat, scales_shape
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.pairs import LoRAPair, split_lora_name
from stablelora_kernels.utils.modules import same_anywhere
from stablelora_kernels.utils.tensors import from_local, is_sharded, local, local_like
from stablelora_kernels.utils.validation import counted

# A parameter's state by name. Counters that a user has put in may be numbers until an engine is
# built.
Entry = dict[str, Tensor]
# Scalars of a parameter's state, of which only an A has the second; its other tensors have the
# parameter's shape.
COUNTERS = {"step": torch.float32, "latched_at": torch.int32}
MOMENTS = ("exp_avg", "exp_avg_sq")
# What torch.optim.AdamW saves of a group. The latter choose among implementations, and mean nothing
# here.
_ADAMW = {"lr", "betas", "eps", "weight_decay", "maximize", "capturable"}
_UNUSED = {"amsgrad", "foreach", "differentiable", "fused"}
# Of a saved group: its parameters' dtypes. Their moments, float32 either way, do not tell.
_DTYPES = "param_dtypes"
# A parameter group of a state dict, which is torch's: its ``params`` are keys of the state.
SavedGroup = dict[str, Any]


class Layout(NamedTuple):
    """The dtype and the shape of one tensor of a parameter's state."""

    dtype: torch.dtype
    shape: torch.Size


def layouts_of(p: Tensor, group: ParamGroup) -> dict[str, Layout]:
    """The tensors that the state of ``p`` must have in ``group``, counters aside. float64 parameters
    have float64 moments. torch.uint8 stands for 8 bits by blocks: codes in the parameter's shape,
    and float32 scales in a second tensor named with "_scale".
    """
    dtype = torch.float64 if p.dtype is torch.float64 else group["moments_dtype"]
    layouts = {name: Layout(dtype, p.shape) for name in MOMENTS}
    if dtype is torch.uint8:
        layouts |= {f"{name}_scale": Layout(torch.float32, scales_shape(p)) for name in layouts}
    if group["master_weights"] and p.dtype in LOW_PRECISION:
        layouts["master"] = Layout(torch.float32, p.shape)
    return layouts


def check_entry(entry: Mapping[str, object], name: str, p: Tensor, group: ParamGroup) -> None:
    """Check the state of the parameter ``name`` of ``group``, which may be someone else's. Missing
    tensors are made later.
    """
    for counter in COUNTERS:
        value = entry.get(counter, 0)
        is_scalar = isinstance(value, Tensor) and value.dim() == 0
        if not (is_scalar or isinstance(value, (int, float))):
            raise ValueError(
                f"the state of {name!r}: {counter!r} must be a number or a 0-d tensor, got {value!r}"
            )
    for key, (dtype, shape) in layouts_of(p, group).items():
        if key not in entry:
            continue
        value = entry[key]
        must_be = f"the state of {name!r}: {key!r} must be {dtype} {list(shape)} on {p.device}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{must_be}, got {value!r}")
        if (value.dtype, value.shape, value.device) != (dtype, shape, p.device):
            raise ValueError(f"{must_be}, got {value.dtype} {list(value.shape)} on {value.device}")
        if dtype is torch.uint8 and value.stride() != p.stride():
            raise ValueError(
                f"the state of {name!r}: {key!r} is in 8 bits, so it must have the parameter's strides {p.stride()}, got "
                f"{value.stride()}"
            )


def complete(entry: Entry, p: Tensor, group: ParamGroup) -> None:
    """Make what the state of ``p`` in ``group`` lacks: zeros in its strides, and its master. Drop a
    master that it should not have.
    """
    layouts = layouts_of(p, group)
    for key, (dtype, shape) in layouts.items():
        if key in entry:
            if shape == p.shape:
                entry[key] = with_strides_of(p, entry[key])
        elif key == "master":
            entry[key] = p.detach().float()
        else:
            is_whole = shape == p.shape
            entry[key] = (
                torch.zeros_like(p, dtype=dtype) if is_whole else p.new_zeros(shape, dtype=dtype)
            )
            # Zeros have no scale.
            entry.pop(f"{key}_scale", None)
    if "master" not in layouts:
        entry.pop("master", None)


def with_strides_of(p: Tensor, value: Tensor) -> Tensor:
    """``value`` with the strides of the dense ``p``, so that flat memory holds both in the same
    order.
    """
    if value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def as_owned(entry: Entry, p: Tensor) -> Entry:
    """The state of ``p``, over the memory of that of this process's shard of ``p``."""
    if not is_sharded(p):
        return entry
    return {key: value if key in COUNTERS else from_local(value, p) for key, value in entry.items()}


def load_moment(entry: Entry, name: str, dtype: torch.dtype) -> Tensor:
    """A copy of the moment ``name`` of a parameter's state in ``dtype``, that of its arithmetic."""
    if entry[name].dtype is torch.uint8:
        return decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
    return entry[name].to(dtype, copy=True)


def convert_moment(entry: Entry, name: str, p: Tensor, dtype: torch.dtype) -> Entry:
    """Copy the saved moment ``name`` of ``p`` in ``dtype``, rounded to nearest, with scales if it
    has any.
    """
    moment = entry[name]
    signed = name == "exp_avg"
    scale_name = f"{name}_scale"
    if moment.dtype is torch.uint8:
        _check_codes(moment, entry.get(scale_name), name, p)
        codes = moment.detach().to(p.device, copy=True)
        scales = entry[scale_name].detach().to(p.device, torch.float32, copy=True)
        if dtype is torch.uint8:
            # Without a second rounding.
            return {name: codes, scale_name: scales}
        moment = decode8(codes, scales, signed)
    if dtype is not torch.uint8:
        return {name: torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(moment)}
    value = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(moment)
    noise = torch.full((p.numel(),), NEAREST, dtype=torch.int32, device=p.device)
    codes, scales = encode8(flat(value), noise, signed)
    return {name: codes.as_strided(value.shape, value.stride()), scale_name: scales}


def _check_codes(codes: Tensor, scales: object, name: str, p: Tensor) -> None:
    """Raise ValueError unless the 8-bit moment ``name`` has the blocks of ``p``, which the strides
    define, and a scale for each.
    """
    expected = scales_shape(p)
    has_scales = isinstance(scales, Tensor) and scales.shape == expected
    if not has_scales or codes.stride() != p.stride():
        raise ValueError(
            f"state_dict's {name!r} is in 8 bits, so '{name}_scale' must be {list(expected)} and its strides {p.stride()}, "
            f"got {list(scales.shape) if isinstance(scales, Tensor) else 'none'} and {codes.stride()}"
        )


# State dicts


def load(
    state_dict: object,
    groups: Sequence[ParamGroup],
    state: MutableMapping[Tensor, Entry],
    pairs: Sequence[LoRAPair],
) -> None:
    """Load ``state_dict`` into the ``groups`` and the ``state`` of an optimizer. All is checked and
    copied first, so that a state that does not fit changes nothing.
    """
    entries, given = _check_form(state_dict)
    from_adamw = _are_adamws(given)
    _check_count(len(given), len(groups), from_adamw)
    saved = [
        _check_saved_group(i, theirs, ours, from_adamw)
        for i, (theirs, ours) in enumerate(zip(given, groups, strict=True))
    ]
    loaded_groups = [with_saved(ours, theirs) for ours, theirs in zip(groups, saved, strict=True)]
    check_shared(loaded_groups)
    halves_a = {id(pair.A) for pair in pairs}
    loaded: dict[Tensor, Entry] = {}
    for theirs, ours in zip(saved, groups, strict=True):
        for key, (name, p) in zip(theirs["params"], named_parameters(ours), strict=True):
            if key not in entries:
                continue
            entry = dict(entries[key])
            if from_adamw and "step" in entry:
                # Its step may be a number, and no pair has latched.
                entry["step"] = torch.as_tensor(entry["step"], device="cpu")
                entry["latched_at"] = torch.zeros((), dtype=torch.int32, device="cpu")
            counters = [*COUNTERS] if id(p) in halves_a else ["step"]
            loaded[p] = _load_entry(entry, name, p, counters, ours)
    warn_of_differences(saved, groups)
    for group, loaded_group in zip(groups, loaded_groups, strict=True):
        group.update(loaded_group)
    state.clear()
    state.update(loaded)


def add_dtypes(state_dict: Mapping[str, Any], groups: Sequence[ParamGroup]) -> None:
    """Add the dtypes of the parameters of ``groups`` to their state dict, in place."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        saved[_DTYPES] = [p.dtype for p in group["params"]]


def _are_adamws(saved: Sequence[SavedGroup]) -> bool:
    """Whether the groups of a state dict are those of ``torch.optim.AdamW``, which has none of
    Stable-LoRA's hyperparameters.
    """
    return bool(saved) and all(
        "shrink_ratio" not in group and set(group) >= _ADAMW | _UNUSED for group in saved
    )


def _check_count(saved: int, expected: int, from_adamw: bool) -> None:
    """Raise ValueError unless a state dict has as many groups as the optimizer."""
    if saved == expected:
        return
    if from_adamw:
        raise ValueError(
            f"state_dict is torch.optim.AdamW's with {counted(saved, 'parameter group')}, this optimizer has {expected}. "
            "Hugging Face's Trainer makes two, with weight decay and without: an optimizer by StableLoRAAdamWFactory.from_args "
            "has the same two and goes on with these moments. To begin with fresh ones, remove optimizer.pt from the checkpoint"
        )
    raise ValueError(
        f"state_dict has {counted(saved, 'parameter group')}, the optimizer {expected}"
    )


def _check_form(state_dict: object) -> tuple[dict[object, Entry], list[SavedGroup]]:
    """The entries of ``state_dict`` and its groups, which must be dicts with 'params'."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    entries = state_dict["state"]
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise ValueError(
            "state_dict must have a dict 'state' with a dict for each parameter, got something else"
        )
    saved: list[SavedGroup] = state_dict["param_groups"]
    for i, group in enumerate(saved):
        if not isinstance(group, dict) or "params" not in group:
            got = f"the keys {sorted(group)}" if isinstance(group, dict) else repr(group)
            raise ValueError(f"group {i} of state_dict must be a dict with 'params', got {got}")
    return entries, saved


def _check_saved_group(
    i: int, theirs: SavedGroup, ours: ParamGroup, from_adamw: bool
) -> SavedGroup:
    """Group ``i`` of a state dict, with the options of ``ours`` that it lacks. It must have the
    parameters of ``ours``.
    """
    decoupled = theirs.get("decoupled_weight_decay", True)
    if from_adamw and not decoupled and theirs["weight_decay"] != 0:
        raise ValueError(
            f"state_dict is torch.optim.Adam's: the weight decay of its group {i}, {theirs['weight_decay']}, is not "
            "decoupled, and StableLoRAAdamW's is"
        )
    if theirs.get("amsgrad"):
        raise ValueError(
            f"state_dict's group {i}: amsgrad must be False, got True; StableLoRAAdamW keeps no largest second moment"
        )
    missing = [key for key in OPTIONS if key not in theirs]
    if "shrink_ratio" in missing and not from_adamw:
        raise ValueError(
            f"state_dict is not StableLoRAAdamW's: its group {i} has no {', '.join(map(repr, missing))}"
        )
    our_values: Mapping[str, object] = ours
    complete = {key: our_values[key] for key in missing} | {
        key: value
        for key, value in theirs.items()
        if key not in _UNUSED and key != "decoupled_weight_decay"
    }
    if len(theirs["params"]) != len(ours["params"]):
        raise ValueError(
            f"group {i} of state_dict has {len(theirs['params'])} parameters, the optimizer's {len(ours['params'])}"
        )
    names = theirs.get("param_names", ours["param_names"])
    for their_name, our_name in zip(names, ours["param_names"], strict=True):
        if _identity(their_name) != _identity(our_name):
            raise ValueError(
                f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}"
            )
    return {**complete, **check_options(complete, f"state_dict's group {i}: ")}


def _identity(name: str) -> tuple[str, str] | str:
    """What identifies a parameter in a checkpoint, whatever wraps the model: its pair and role,
    else its name.
    """
    name = same_anywhere(name)
    return split_lora_name(name) or name


def with_saved(group: ParamGroup, saved: SavedGroup) -> ParamGroup:
    """``group`` with copies of all in ``saved`` but parameters and how state is kept; tensors on the
    device of those that they replace.
    """
    result: dict[str, object] = {**group}
    for key, value in saved.items():
        if key in ("params", "param_names", _DTYPES, *STORAGE):
            continue
        old = result.get(key)
        new = deepcopy(value)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            new = new.to(old.device)
        result[key] = new
    return cast("ParamGroup", result)


def warn_of_differences(saved: Sequence[SavedGroup], groups: Sequence[ParamGroup]) -> None:
    """Warn if loading a state with the groups ``saved`` changes what the optimizer of ``groups`` was
    asked to do, or if its parameters are of other dtypes than they were.
    """
    messages = _changed_dtypes(saved, groups)
    first = saved[0]
    asked = groups[0]["max_grad_norm"]
    if asked is not None and asked != first["max_grad_norm"]:
        messages.append(
            f"max_grad_norm was {asked} and is {first['max_grad_norm']} now, as the other hyperparameters of the loaded state; "
            "set optimizer.max_grad_norm after loading to change it"
        )
    for name, here in shared_options(groups[0]).items():
        if name in STORAGE and first[name] != here:
            messages.append(
                f"the loaded state was saved with {name}={first[name]}; it was converted, since this optimizer has {name}={here}"
            )
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=7)


def _changed_dtypes(saved: Sequence[SavedGroup], groups: Sequence[ParamGroup]) -> list[str]:
    """What to say of the parameters whose dtype is not the one of which the state was saved."""
    changed = []
    for theirs, ours in zip(saved, groups, strict=True):
        # AdamW's groups and those of earlier versions have no dtypes.
        dtypes: Sequence[torch.dtype] = theirs.get(_DTYPES, ())
        for (name, p), dtype in zip(named_parameters(ours), dtypes, strict=bool(dtypes)):
            if p.dtype != dtype:
                changed.append(f"{name!r} was {dtype} and is {p.dtype} now")
    if not changed:
        return []
    more = f", as are {counted(len(changed) - 1, 'other parameter')}" if len(changed) > 1 else ""
    return [
        f"the loaded state is that of parameters of another dtype, so the run will not repeat the saved one: {changed[0]}{more}. "
        "Convert them before the optimizer is made. PEFT's load_adapter, which transformers' Trainer resumes by, "
        "makes adapters float32 unless it is given autocast_adapter_dtype=False"
    ]


def is_state_init_step(
    groups: Sequence[ParamGroup], params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> bool:
    """Whether zero gradients and lr=0 ask for a state alone, as torch.distributed.checkpoint does:
    nothing else may change.
    """
    rates = [group["lr"] for group in groups]
    if any((isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0 for lr in rates):
        return False
    device = params[0].device
    nonzero = torch.stack([g.any().to(device) for g in grads if g is not None]).any()
    sums = ShardSums(params)
    return not bool(sums.all_reduce_max_(nonzero.int()) if sums else nonzero)


def _load_entry(
    entry: Entry,
    name: str,
    p: Tensor,
    counters: Sequence[str],
    group: ParamGroup,
) -> Entry:
    """Copies of the saved ``counters``, moments and, if it should have one, master of the
    parameter ``name``: on its device, in its strides and placements.
    """
    shard = local(p.detach())
    layouts = layouts_of(shard, group)
    has_master = "master" in layouts and "master" in entry
    of_full_shape = [*MOMENTS, "master"] if has_master else [*MOMENTS]
    for field in (*counters, *of_full_shape):
        shape = torch.Size([]) if field in counters else p.shape
        value = entry.get(field)
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict has no {field!r} tensor for {name!r}")
        if value.shape != shape:
            raise ValueError(
                f"state_dict's {field!r} of {name!r} must be {list(shape)}, got {list(value.shape)}"
            )
    entry = entry | {field: local_like(entry[field], p) for field in of_full_shape}
    copied: Entry = {}
    for field in counters:
        copied[field] = entry[field].detach().to(p.device, COUNTERS[field], copy=True)
    for field in MOMENTS:
        copied |= convert_moment(entry, field, shard, layouts[field].dtype)
    if has_master:
        copied["master"] = torch.empty_like(shard, dtype=torch.float32).copy_(entry["master"])
    return as_owned(copied, p)

"""What a state dict holds: checks of saved groups, loading a saved state, and what copies and
pickles of an optimizer keep.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from stablelora_kernels.optim.groups import ParamGroup, check_shared, named_parameters
from stablelora_kernels.optim.options import HYPER, Hyper, Storage, check_hyper
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.state import Entry, as_owned, convert_moment, moment_names
from stablelora_kernels.pairs import LoRAPair, split_lora_name
from stablelora_kernels.utils.modules import same_anywhere
from stablelora_kernels.utils.tensors import local, local_like
from stablelora_kernels.utils.validation import counted

# A state that an earlier version saved may lack these.
_LATER = ("shrink_pattern", "stop_condition", "lr_ratio_B", "amsgrad", "max_grad_norm")
# What torch.optim.AdamW saves of a group. The latter choose among implementations, and mean nothing
# here.
_ADAMW = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable"}
_UNUSED = {"foreach", "differentiable", "fused"}


# Of a saved group: its parameters' dtypes. Their moments, float32 either way, do not tell.
_DTYPES = "param_dtypes"


class SavedGroup(Hyper):
    """A parameter group of a state dict, with the keys of its parameters' entries."""

    params: list[int]


class StateDict(TypedDict):
    """What ``Optimizer.state_dict`` returns."""

    state: dict[int, Entry]
    param_groups: list[SavedGroup]


class Loaded(NamedTuple):
    """What an optimizer's groups and state become."""

    groups: list[ParamGroup]
    state: dict[Tensor, Entry]


def read(
    state_dict: object, groups: Sequence[ParamGroup], pairs: Sequence[LoRAPair], storage: Storage
) -> Loaded:
    """The groups and the state of the optimizer of ``groups`` and ``pairs`` after ``state_dict`` is
    loaded. All is checked and copied, so that a state that does not fit changes nothing.
    """
    saved = check_saved(state_dict, groups)
    loaded_groups = [with_saved(ours, theirs) for ours, theirs in zip(groups, saved, strict=True)]
    check_shared(loaded_groups, storage)
    state = load_state(cast("StateDict", state_dict), saved, groups, pairs, storage)
    warn_of_differences(saved, groups)
    return Loaded(loaded_groups, state)


def add_dtypes(state_dict: StateDict, groups: Sequence[ParamGroup]) -> None:
    """Add the dtypes of the parameters of ``groups`` to their state dict, in place."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        cast("dict[str, object]", saved)[_DTYPES] = [p.dtype for p in group["params"]]


# Saved groups


def is_adamws(saved: Sequence[Mapping[str, object]]) -> bool:
    """Whether the groups of a state dict are those of ``torch.optim.AdamW``, which has none of
    Stable-LoRA's hyperparameters.
    """
    return bool(saved) and all(
        "shrink_ratio" not in group and set(group) >= _ADAMW | _UNUSED for group in saved
    )


def check_saved(state_dict: object, groups: Sequence[ParamGroup]) -> list[SavedGroup]:
    """The groups of ``state_dict``, checked, with those hyperparameters of ``groups`` that AdamW or
    an earlier version lacks.
    """
    saved = _check_form(state_dict)
    from_adamw = is_adamws(saved)
    if from_adamw and len(saved) != len(groups):
        raise ValueError(
            f"state_dict is torch.optim.AdamW's with {counted(len(saved), 'parameter group')}, this optimizer has {len(groups)}. "
            "Hugging Face's Trainer makes two, with weight decay and without: an optimizer by StableLoRAAdamWFactory.from_args "
            "has the same two and goes on with these moments. To begin with fresh ones, remove optimizer.pt from the checkpoint"
        )
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {counted(len(saved), 'parameter group')}, the optimizer {len(groups)}"
        )
    return [
        _check_saved_group(i, theirs, ours, from_adamw)
        for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True))
    ]


def _check_form(state_dict: object) -> list[dict[str, object]]:
    """The groups of ``state_dict``, which must be dicts with 'params', beside a state of dicts."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    entries = state_dict["state"]
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise ValueError(
            "state_dict must have a dict 'state' with a dict for each parameter, got something else"
        )
    saved: list[dict[str, object]] = state_dict["param_groups"]
    for i, group in enumerate(saved):
        if not isinstance(group, dict) or "params" not in group:
            got = f"the keys {sorted(group)}" if isinstance(group, dict) else repr(group)
            raise ValueError(f"group {i} of state_dict must be a dict with 'params', got {got}")
    return saved


def _check_saved_group(
    i: int, theirs: Mapping[str, object], ours: ParamGroup, from_adamw: bool
) -> SavedGroup:
    """Group ``i`` of a state dict, with the hyperparameters of ``ours`` that it lacks. It must have
    the parameters of ``ours``.
    """
    decoupled = theirs.get("decoupled_weight_decay", True)
    if from_adamw and not decoupled and theirs["weight_decay"] != 0:
        raise ValueError(
            f"state_dict is torch.optim.Adam's: the weight decay of its group {i}, {theirs['weight_decay']}, is not "
            "decoupled, and StableLoRAAdamW's is"
        )
    our_values: Mapping[str, object] = ours
    complete = {key: our_values[key] for key in (HYPER if from_adamw else _LATER)}
    for key, value in theirs.items():
        if key not in _UNUSED and key != "decoupled_weight_decay":
            complete[key] = value
    missing = [key for key in HYPER if key not in complete]
    if missing:
        raise ValueError(
            f"state_dict is not StableLoRAAdamW's: its group {i} has no {', '.join(map(repr, missing))}"
        )
    their_params = cast("Sequence[int]", theirs["params"])
    if len(their_params) != len(ours["params"]):
        raise ValueError(
            f"group {i} of state_dict has {len(their_params)} parameters, the optimizer's {len(ours['params'])}"
        )
    names = cast("Sequence[str]", theirs.get("param_names", ours["param_names"]))
    for their_name, our_name in zip(names, ours["param_names"], strict=True):
        if _identity(their_name) != _identity(our_name):
            raise ValueError(
                f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}"
            )
    return cast("SavedGroup", {**complete, **check_hyper(complete, f"state_dict's group {i}: ")})


def _identity(name: str) -> tuple[str, str] | str:
    """What identifies a parameter in a checkpoint, whatever wraps the model: its pair and role,
    else its name.
    """
    name = same_anywhere(name)
    return split_lora_name(name) or name


def with_saved(group: ParamGroup, saved: SavedGroup) -> ParamGroup:
    """``group`` with copies of all in ``saved`` but parameters and storage; tensors on the device
    of those that they replace.
    """
    result: dict[str, object] = {**group}
    for key, value in saved.items():
        if key in ("params", "param_names", _DTYPES, *Storage._fields):
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
    for name in Storage._fields:
        here = groups[0].get(name)
        there = first.get(name, here)
        if there != here:
            messages.append(
                f"the loaded state was saved with {name}={there}; it was converted, since this optimizer has {name}={here}"
            )
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=7)


def _changed_dtypes(saved: Sequence[SavedGroup], groups: Sequence[ParamGroup]) -> list[str]:
    """What to say of the parameters whose dtype is not the one of which the state was saved."""
    changed = []
    for theirs, ours in zip(saved, groups, strict=True):
        # AdamW's groups and those of earlier versions have no dtypes.
        dtypes = cast("Sequence[torch.dtype] | None", theirs.get(_DTYPES))
        for (name, p), dtype in zip(named_parameters(ours), dtypes or (), strict=bool(dtypes)):
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


# Saved state


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


def load_state(
    state_dict: StateDict,
    saved_groups: Sequence[SavedGroup],
    groups: Sequence[ParamGroup],
    pairs: Sequence[LoRAPair],
    storage: Storage,
) -> dict[Tensor, Entry]:
    """Copies of the saved state by parameter: on its device, in its strides and placements, in the
    dtypes of ``storage``.
    """
    halves_a = {id(pair.A) for pair in pairs}
    from_adamw = is_adamws(state_dict["param_groups"])
    loaded: dict[Tensor, Entry] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, (name, p) in zip(saved["params"], named_parameters(group), strict=True):
            if key not in state_dict["state"]:
                continue
            entry = dict(state_dict["state"][key])
            if from_adamw and "step" in entry:
                # Its step may be a number, and no pair has latched.
                entry["step"] = torch.as_tensor(entry["step"], device="cpu")
                entry["latched_at"] = torch.zeros((), dtype=torch.int32, device="cpu")
            counters = {"step": torch.float32}
            if id(p) in halves_a:
                counters["latched_at"] = torch.int32
            moments = moment_names(saved["amsgrad"])
            loaded[p] = _load_entry(entry, name, p, counters, moments, storage)
    return loaded


def _load_entry(
    entry: Entry,
    name: str,
    p: Tensor,
    counters: Mapping[str, torch.dtype],
    moments: Sequence[str],
    storage: Storage,
) -> Entry:
    """Copies of the saved ``counters``, ``moments`` and, if it should have one, master of the
    parameter ``name``.
    """
    has_master = storage.has_master(p) and "master" in entry
    of_full_shape = [*moments, "master"] if has_master else [*moments]
    for field in (*counters, *of_full_shape):
        shape = torch.Size([]) if field in counters else p.shape
        value = entry.get(field)
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict has no {field!r} tensor for {name!r}")
        if value.shape != shape:
            raise ValueError(
                f"state_dict's {field!r} of {name!r} must be {list(shape)}, got {list(value.shape)}"
            )
    shard = local(p.detach())
    entry = entry | {field: local_like(entry[field], p) for field in of_full_shape}
    copied: Entry = {}
    for field, dtype in counters.items():
        copied[field] = entry[field].detach().to(p.device, dtype, copy=True)
    for field in moments:
        copied |= convert_moment(entry, field, shard, storage)
    if has_master:
        copied["master"] = torch.empty_like(shard, dtype=torch.float32).copy_(entry["master"])
    return as_owned(copied, p)


# Copies


class CopiedSchedule(NamedTuple):
    """A ``shrink_schedule`` in an optimizer's copy or pickle, which says so if the function cannot
    be pickled.
    """

    schedule: Callable[[int], float] | None

    def __deepcopy__(self, memo: dict[int, object]) -> CopiedSchedule:
        return CopiedSchedule(deepcopy(self.schedule, memo))

    def __reduce__(self) -> tuple[type[CopiedSchedule], tuple[Callable[[int], float] | None]]:
        """What pickle keeps. It finds functions by name, which lambdas and inner ones do not have."""
        if "<" in getattr(self.schedule, "__qualname__", ""):
            raise pickle.PicklingError(
                f"shrink_schedule {self.schedule!r} cannot be pickled: make it a function of a module or a callable object, or "
                "save state_dict(), which leaves it out, and give it to the new optimizer"
            )
        return CopiedSchedule, (self.schedule,)

"""Load a state dict: check it against the optimizer, and copy it into the optimizer's dtypes, strides and shards."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from stablelora_kernels.optim.param_groups import HYPER, LATER, STORAGE, check_hyper, check_one_clip
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.state import Storage, as_dtensors, convert_moment, moment_names
from stablelora_kernels.pairs import LoRAPair, split_lora_name
from stablelora_kernels.utils.dtensor import local, local_like
from stablelora_kernels.utils.text import counted
from stablelora_kernels.utils.wrappers import same_anywhere


def is_state_init_step(
    groups: Sequence[dict[str, Any]], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> bool:
    """Whether the first step has zero gradients and lr=0.

    torch.distributed.checkpoint calls step() like this to create state, and nothing else may change. Do not shrink or latch
    then.
    """
    for group in groups:
        lr = group["lr"]
        if (isinstance(lr, torch.Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    device = params[0].device
    nonzero = torch.stack([g.any().to(device) for g in grads if g is not None]).any()
    sums = ShardSums(params)
    return not bool(sums.all_reduce_max_(nonzero.int()) if sums else nonzero)


def _identity(name: str) -> Any:
    """What identifies a parameter in a checkpoint, whatever wraps the model: its pair and role, else its name."""
    name = same_anywhere(name)
    return split_lora_name(name) or name


# What torch.optim.AdamW saves of a group. The last three choose among implementations, and mean nothing here.
_ADAMW = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "foreach", "differentiable", "fused",
)  # fmt: skip


def from_adamw(state_dict: Any, groups: Sequence[dict[str, Any]]) -> Any:
    """``state_dict``; one of ``torch.optim.AdamW`` with what StableLoRAAdamW's has beyond it, from ``groups``.

    Raises:
        ValueError: it is ``torch.optim.Adam``'s, with a weight decay that is not decoupled; or it has another number of groups;
            or its state is malformed.
    """
    saved = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not (isinstance(saved, list) and saved and all(isinstance(group, dict) for group in saved)):
        return state_dict
    if any("shrink_ratio" in group or not set(_ADAMW) <= set(group) for group in saved):
        return state_dict
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict is torch.optim.AdamW's with {counted(len(saved), 'parameter group')}, this optimizer has {len(groups)}. "
            "Hugging Face's Trainer makes two, with weight decay and without: an optimizer by StableLoRAAdamWFactory.from_args "
            "has the same two and goes on with these moments. To begin with fresh ones, remove optimizer.pt from the checkpoint"
        )
    for i, group in enumerate(saved):
        if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
            raise ValueError(
                f"state_dict is torch.optim.Adam's: the weight decay of its group {i}, {group['weight_decay']}, is not "
                "decoupled, and StableLoRAAdamW's is"
            )
    dropped = {"foreach", "differentiable", "fused", "decoupled_weight_decay"}
    completed = [
        {**{key: ours[key] for key in HYPER}, **{key: value for key, value in theirs.items() if key not in dropped}}
        for theirs, ours in zip(saved, groups, strict=True)
    ]
    entries = state_dict.get("state", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("state_dict must have a dict 'state' with a dict for each parameter, got something else")
    zero = torch.zeros((), dtype=torch.int32, device="cpu")
    state = {
        key: {**entry, "step": torch.as_tensor(entry["step"], device="cpu"), "latched_at": zero}
        if "step" in entry
        else entry
        for key, entry in entries.items()
    }
    return {**state_dict, "state": state, "param_groups": completed}


def check_state_groups(state_dict: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of ``state_dict``, checked, with defaults for hyperparameters that an earlier version did not save.

    Raises:
        ValueError: the state is not this optimizer's, or its parameters differ from those of ``groups``.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"state_dict has {counted(len(saved), 'parameter group')}, the optimizer {len(groups)}")
    checked = []
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if not isinstance(theirs, dict) or "params" not in theirs:
            got = f"the keys {sorted(theirs)}" if isinstance(theirs, dict) else repr(theirs)
            raise ValueError(f"group {i} of state_dict must be a dict with 'params', got {got}")
        missing = [key for key in HYPER if key not in theirs and key not in LATER]
        if missing:
            raise ValueError(
                f"state_dict is not StableLoRAAdamW's: its group {i} has no {', '.join(map(repr, missing))}"
            )
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"group {i} of state_dict has {len(theirs['params'])} parameters, the optimizer's {len(ours['params'])}"
            )
        their_names = theirs.get("param_names", ours["param_names"])
        for their_name, our_name in zip(their_names, ours["param_names"], strict=True):
            if _identity(their_name) != _identity(our_name):
                raise ValueError(f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}")
        complete = {**{key: ours[key] for key in LATER}, **theirs}
        checked.append({**complete, **check_hyper(complete, f"state_dict's group {i}: ")})
    check_one_clip(checked)
    return checked


def warn_of_differences(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Warn if loading a state with the group ``saved`` changes what the optimizer with the group ``own`` was asked to do."""
    asked, found = own["max_grad_norm"], saved["max_grad_norm"]
    if asked is not None and asked != found:
        warnings.warn(
            f"max_grad_norm was {asked} and is {found} now, as the other hyperparameters of the loaded state; set "
            "optimizer.max_grad_norm after loading to change it",
            UserWarning,
            stacklevel=6,
        )
    for name in STORAGE:
        if saved.get(name, own[name]) != own[name]:
            warnings.warn(
                f"the loaded state was saved with {name}={saved[name]}; it was converted, since this optimizer has "
                f"{name}={own[name]}",
                UserWarning,
                stacklevel=6,
            )


def restore_groups(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Write copies of the saved hyperparameters into ``groups``; tensors stay on the device of those that they replace."""
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, value in saved.items():
            if key not in ("params", "param_names", *STORAGE):
                old, new = group.get(key), deepcopy(value)
                if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
                    new = new.to(old.device)
                group[key] = new


def load_state(
    state_dict: dict[str, Any],
    saved_groups: Sequence[dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    storage: Storage,
) -> dict[torch.Tensor, dict[str, Any]]:
    """Copies of the saved state by parameter: on its device, in its strides and placements, in the dtypes of ``storage``.

    Raises:
        ValueError: a tensor is missing or has another shape than its parameter.
    """
    owners = {id(pair.A) for pair in pairs}
    result: dict[torch.Tensor, dict[str, Any]] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, name, p in zip(saved["params"], group["param_names"], group["params"], strict=True):
            if key not in state_dict["state"]:
                continue
            entry = state_dict["state"][key]
            moments = moment_names(saved)
            masters = ("master",) if storage.has_master(p) and "master" in entry else ()
            counters = {"step": torch.float32} | ({"latched_at": torch.int32} if id(p) in owners else {})
            for field in (*counters, *moments, *masters):
                shape = torch.Size([]) if field in counters else p.shape
                value = entry.get(field)
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"state_dict has no {field!r} tensor for {name!r}")
                if value.shape != shape:
                    raise ValueError(
                        f"state_dict's {field!r} of {name!r} must be {list(shape)}, got {list(value.shape)}"
                    )
            shard = local(p.detach())
            entry = {**entry, **{field: local_like(entry[field], p) for field in (*moments, *masters)}}
            copied = {field: entry[field].detach().to(p.device, dtype, copy=True) for field, dtype in counters.items()}
            for field in moments:
                copied |= convert_moment(entry, field, shard, storage)
            for field in masters:
                copied[field] = torch.empty_like(shard, dtype=torch.float32).copy_(entry[field])
            result[p] = as_dtensors(copied, p)
    return result

"""Checks of a state dict before the optimizer loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stablelora_kernels.optim.param_groups import HYPER, LATER, check_hyper
from stablelora_kernels.optim.state import Storage, converted_moment, moment_names
from stablelora_kernels.pairs import LoRAPair, split_lora_name
from stablelora_kernels.utils.dtensor import local, part_for
from stablelora_kernels.utils.wrappers import same_anywhere


def _same_name(name: str) -> Any:
    """What identifies a parameter in a checkpoint: its pair and role, or else its name, whatever the model is wrapped in."""
    name = same_anywhere(name)
    return split_lora_name(name) or name


def check_state_groups(state_dict: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of ``state_dict``, which must have the parameters and kinds of hyper-parameters of ``groups``."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"state_dict has {len(saved)} parameter groups, the optimizer {len(groups)}")
    checked = []
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        missing = [key for key in HYPER if key not in theirs and key not in LATER]
        if missing:
            raise ValueError(
                f"state_dict is not StableLoRAAdamW's: its group {i} has no {', '.join(map(repr, missing))}"
            )
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"group {i} of state_dict has {len(theirs['params'])} parameters, the optimizer's {len(ours['params'])}"
            )
        for their_name, our_name in zip(
            theirs.get("param_names", ours["param_names"]), ours["param_names"], strict=True
        ):
            if _same_name(their_name) != _same_name(our_name):
                raise ValueError(f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}")
        whole = {**{key: ours[key] for key in LATER}, **theirs}
        checked.append({**whole, **check_hyper(whole, f"state_dict's group {i}: ")})
    return checked


def check_state(
    state_dict: dict[str, Any],
    saved_groups: Sequence[dict[str, Any]],
    groups: Sequence[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    storage: Storage,
) -> dict[torch.Tensor, dict[str, Any]]:
    """Copies of the saved state by parameter, on its device, moments in its strides, all in the dtypes of ``storage``."""
    owners = {id(pair.A) for pair in pairs}
    result: dict[torch.Tensor, dict[str, Any]] = {}
    for saved, group in zip(saved_groups, groups, strict=True):
        for key, name, p in zip(saved["params"], group["param_names"], group["params"], strict=True):
            if key not in state_dict["state"]:
                continue
            entry = state_dict["state"][key]
            names = moment_names(saved)
            masters = ("master",) if storage.has_master(p) and "master" in entry else ()
            for field in ("step", *names, *masters, *["latched_at"] * (id(p) in owners)):
                shape = p.shape if field in names or field in masters else torch.Size([])
                value = entry.get(field)
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"state_dict has no {field!r} tensor for {name!r}")
                if value.shape != shape:
                    raise ValueError(
                        f"state_dict's {field!r} of {name!r} must be {list(shape)}, got {list(value.shape)}"
                    )
            part = local(p.detach())
            moments: dict[str, torch.Tensor] = {}
            entry = {**entry, **{field: part_for(entry[field], p) for field in (*names, *masters)}}
            for field in names:
                moments |= converted_moment(entry, field, part, storage)
            counters = {"step": entry["step"].detach().to(p.device, torch.float32, copy=True)}
            if id(p) in owners:
                counters["latched_at"] = entry["latched_at"].detach().to(p.device, torch.int32, copy=True)
            if storage.has_master(p) and "master" in entry:
                moments["master"] = torch.empty_like(part, dtype=torch.float32).copy_(entry["master"])
            result[p] = {**counters, **moments}
    return result

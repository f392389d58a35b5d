"""Parameter groups and their hyperparameters, as given and as saved: checks, none of which changes
its argument.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch

from stablelora_kernels.config import check_patterns, unmatched_patterns
from stablelora_kernels.optim.sharding import check_shards
from stablelora_kernels.pairs import (
    LoRAPair,
    is_named_parameter,
    layer_name,
    lora_pairs,
    split_lora_name,
)
from stablelora_kernels.utils.modules import same_anywhere
from stablelora_kernels.utils.tensors import is_sharded
from stablelora_kernels.utils.validation import (
    check_bool,
    check_choice,
    check_float,
    check_int,
    counted,
)

# Computed in float32, and rounded at random or from a float32 master.
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)
STOP_CONDITIONS = ("norm", "never")
_NAMES_NEEDED = (
    "pairs are found by name, so give (name, parameter) tuples, as model.named_parameters() does, or LoRAPairs, or use "
    "StableLoRAAdamW.from_model(model)"
)


class Storage(NamedTuple):
    """How state is kept: the moments' dtype, and whether bfloat16 and float16 parameters have a
    float32 master.

    float64 parameters have float64 moments. torch.uint8 stands for 8 bits by blocks: codes in the
    parameter's shape, and float32 scales in a second tensor named with "_scale".
    """

    moments_dtype: torch.dtype = torch.float32
    master_weights: bool = False

    def moment_dtype(self, p: torch.Tensor) -> torch.dtype:
        return torch.float64 if p.dtype is torch.float64 else self.moments_dtype

    def has_master(self, p: torch.Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION


# A state that an earlier version saved may lack these.
_LATER = ("shrink_pattern", "stop_condition", "lr_ratio_B", "amsgrad", "max_grad_norm")
# What torch.optim.AdamW saves of a group. The latter choose among implementations, and mean nothing
# here.
_ADAMW = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable"}
_UNUSED = {"foreach", "differentiable", "fused"}


def _check_number(name: str, value: Any, high: float = math.inf) -> float | torch.Tensor:
    """A number in [0, high), or a tensor of one element. Keep the tensor, since its value may
    change; do not read it on a GPU.
    """
    if not isinstance(value, torch.Tensor):
        return check_float(name, value, low=0.0, high=high)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} as a tensor must be a 0-d floating-point one, got {list(value.shape)} of {value.dtype}"
        )
    if value.device.type == "cpu":
        check_float(name, value.item(), low=0.0, high=high)
    # A view shares later writes to the tensor.
    return value.reshape(())


def _check_betas(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    betas = []
    for i, beta in enumerate(value):
        where = f"{name}[{i}]"
        if isinstance(beta, torch.Tensor):
            if beta.numel() != 1 or not beta.is_floating_point() or beta.device.type != "cpu":
                raise ValueError(
                    f"{where} as a tensor must be a 0-d floating-point one on the CPU, got {list(beta.shape)} of "
                    f"{beta.dtype} on {beta.device}"
                )
            beta = beta.item()
        betas.append(check_float(where, beta, low=0.0, high=1.0))
    return tuple(betas)


def _check_shrink_pattern(name: str, value: Any) -> dict[str, float]:
    patterns = check_patterns(name, value)
    return {
        key: check_float(f"{name}[{key!r}]", ratio, low=0.0, high=1.0)
        for key, ratio in patterns.items()
    }


def _check_seed(name: str, value: Any) -> int:
    seed = check_int(name, value, minimum=0)
    if seed >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {seed}")
    return seed


def check_max_grad_norm(name: str, value: Any) -> float | None:
    """``value`` as a positive float, infinity included, or None."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    return check_float(name, value, low=0.0, low_open=True)


# Every hyperparameter and its check, which returns the normalized value.
HYPER: dict[str, Callable[[str, Any], Any]] = {
    "lr": _check_number,
    "betas": _check_betas,
    "eps": partial(check_float, low=0.0),
    "weight_decay": _check_number,
    "shrink_ratio": partial(_check_number, high=1.0),
    "shrink_pattern": _check_shrink_pattern,
    "stop_condition": partial(check_choice, choices=STOP_CONDITIONS),
    "lr_ratio_B": partial(check_float, low=0.0, low_open=True),
    "maximize": check_bool,
    "amsgrad": check_bool,
    "capturable": check_bool,
    "seed": _check_seed,
    "max_grad_norm": check_max_grad_norm,
}


def check_hyper(hyper: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate and normalize ``hyper``. ``where`` prefixes names in errors."""
    return {name: check(f"{where}{name}", hyper[name]) for name, check in HYPER.items()}


def check_storage(moments_dtype: Any, master_weights: Any) -> Storage:
    """The two arguments as a :class:`~stablelora_kernels.optim.state.Storage`."""
    if moments_dtype not in (torch.float32, torch.bfloat16, torch.uint8):
        raise ValueError(
            f"moments_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks), got {moments_dtype!r}"
        )
    return Storage(moments_dtype, check_bool("master_weights", master_weights))


def check_shared(groups: Sequence[dict[str, Any]], storage: Storage) -> None:
    """Raise ValueError if groups differ in what they share, or ``storage`` cannot hold the state of
    one of their parameters.
    """
    if storage.moments_dtype is not torch.float32 and any(group["amsgrad"] for group in groups):
        raise ValueError(
            f"amsgrad=True needs moments_dtype=torch.float32, got {storage.moments_dtype}"
        )
    for group in groups:
        if group["max_grad_norm"] != groups[0]["max_grad_norm"]:
            raise ValueError(
                f"max_grad_norm must be one value for all groups, got {groups[0]['max_grad_norm']} and "
                f"{group['max_grad_norm']}; set optimizer.max_grad_norm to change it in all of them"
            )
        for name, value in storage._asdict().items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"a group's {name} must be the optimizer's, {value}, got {group[name]}"
                )
        if storage.moments_dtype is torch.uint8:
            sharded = [
                name
                for name, p in zip(group["param_names"], group["params"], strict=True)
                if is_sharded(p)
            ]
            if sharded:
                raise ValueError(
                    f"parameter {sharded[0]!r} is a DTensor, whose moments cannot be in 8 bits: their blocks would depend on the "
                    "number of processes; use moments_dtype=torch.bfloat16, got torch.uint8"
                )


def check_parameter(name: str, p: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``p`` is of one of DTYPES, and dense or a DTensor of
    contiguous shards.
    """
    if p.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {p.dtype}")
    if is_sharded(p):
        check_shards(name, p)
    elif p.layout is not torch.strided or torch.empty_like(p, device="meta").stride() != p.stride():
        raise ValueError(
            f"{name} must be dense in memory, got {p.layout}, shape {list(p.shape)}, strides {p.stride()}"
        )


def as_groups(params: Any) -> list[dict[str, Any]]:
    """``params`` as a list of group dicts."""
    if isinstance(params, torch.Tensor):
        raise TypeError(f"params must be named parameters, got a single tensor; {_NAMES_NEEDED}")
    if isinstance(params, dict):
        raise TypeError(
            f"params must be an iterable or a list of group dicts, got one dict; {_NAMES_NEEDED}"
        )
    items = list(params)
    return items if items and isinstance(items[0], dict) else [{"params": items}]


def _named(items: Iterable[Any]) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of every item, a tuple of them or a LoRAPair."""
    named: list[tuple[str, torch.Tensor]] = []
    for item in items:
        if isinstance(item, LoRAPair):
            prefix = f"{item.name}." if item.name else ""
            named += [(f"{prefix}lora_A", item.A), (f"{prefix}lora_B", item.B)]
        elif is_named_parameter(item):
            named.append(item)
        elif isinstance(item, torch.Tensor):
            raise TypeError(
                f"params holds a tensor of shape {list(item.shape)} without a name; {_NAMES_NEEDED}"
            )
        else:
            raise TypeError(f"params holds a {type(item).__name__}; {_NAMES_NEEDED}")
    return named


def check_group(group: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """A new group with checked hyperparameters, those that it lacks from ``defaults``, and with
    trainable parameters alone.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
    if "params" not in group:
        raise ValueError(f"a parameter group must have 'params', got the keys {sorted(group)}")
    items = group["params"]
    if isinstance(items, (torch.Tensor, set)):
        raise TypeError(f"params of a group is a {type(items).__name__}; {_NAMES_NEEDED}")
    items = list(items)
    names = group.get("param_names")
    if names is not None and all(isinstance(item, torch.Tensor) for item in items):
        if len(names) != len(items):
            raise ValueError(f"a group has {len(items)} params and {len(names)} param_names")
        items = list(zip(names, items, strict=True))
    named = _named(items)
    trainable = [(name, p) for name, p in named if p.requires_grad]
    for name, p in trainable:
        check_parameter(f"parameter {name!r}", p)
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(
                f"parameter {name!r} must be a leaf tensor, got the result of {p.grad_fn}"
            )
    frozen = {split_lora_name(name) for name, p in named if not p.requires_grad}
    for name, p in trainable:
        if (split := split_lora_name(name)) is not None and p.dim() == 2:
            pair, half = split
            other = "B" if half == "A" else "A"
            if (pair, other) in frozen:
                remedy = "set requires_grad=True, or train the other half alone, as LoRA-FA does, with torch.optim.AdamW"
                raise ValueError(
                    f"pair {pair!r}: lora_{half} is trainable but lora_{other} is frozen (requires_grad=False), and Stable-LoRA "
                    f"needs both; {remedy}"
                )
    return {
        **group,
        **check_hyper({**defaults, **group}, "a group's " if set(HYPER) & set(group) else ""),
        "params": [p for _, p in trainable],
        "param_names": [name for name, _ in trainable],
    }


def check_groups(
    new: Sequence[Any],
    existing: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    storage: Storage,
) -> list[dict[str, Any]]:
    """The groups ``new`` as :func:`check_group` returns them, which must also fit together and to
    those ``existing``.
    """
    checked = [check_group(group, defaults) for group in new]
    find_pairs([*existing, *checked])
    check_shared([*existing, *checked], storage)
    return checked


def find_pairs(groups: Sequence[dict[str, Any]]) -> list[LoRAPair]:
    """The pairs across all groups, whose names and patterns are checked."""
    for i, group in enumerate(groups):
        if len(group["params"]) != len(group["param_names"]):
            raise ValueError(
                f"group {i} has {len(group['params'])} params and {len(group['param_names'])} param_names: what is added to or "
                "removed from one must be in the other"
            )
    named = [
        item for group in groups for item in zip(group["param_names"], group["params"], strict=True)
    ]
    names: set[str] = set()
    owners: dict[int, str] = {}
    for name, p in named:
        if name in names:
            raise ValueError(f"two parameters are named {name!r}")
        if id(p) in owners:
            raise ValueError(f"one tensor is given as {owners[id(p)]!r} and as {name!r}")
        names.add(name)
        owners[id(p)] = name
    pairs = lora_pairs(named)
    check_patterns_match(groups, pairs)
    if not pairs:
        shown = ", ".join(repr(name) for name, _ in named[:3]) or "none"
        hint = (
            ""
            if named
            else "; PeftModel.from_pretrained freezes an adapter unless is_trainable=True"
        )
        raise ValueError(
            f"no LoRA pair (lora_A with lora_B) among the {len(named)} trainable parameters ({shown}); "
            f"without one this would be plain AdamW, for which there is torch.optim.AdamW{hint}"
        )
    return pairs


class CopiedSchedule(NamedTuple):
    """A ``shrink_schedule`` in an optimizer's copy or pickle, which says so if the function cannot
    be pickled.
    """

    schedule: Callable[[int], float] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedSchedule:
        return CopiedSchedule(deepcopy(self.schedule, memo))

    def __reduce__(self) -> Any:
        # What pickle, which goes by name, cannot find again.
        if "<" in getattr(self.schedule, "__qualname__", ""):
            raise pickle.PicklingError(
                f"shrink_schedule {self.schedule!r} cannot be pickled: make it a function of a module or a callable object, or "
                "save state_dict(), which leaves it out, and give it to the new optimizer"
            )
        return CopiedSchedule, (self.schedule,)


def names_for_patterns(pair: LoRAPair, parameter: str) -> tuple[str, str]:
    """The names that a ``shrink_pattern`` may match: the pair's and its layer's."""
    return pair.name, layer_name(parameter)


def check_patterns_match(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Raise ValueError for a key of a ``shrink_pattern`` that matches no pair of the groups that
    have the key.
    """
    owners = {id(pair.A): pair for pair in pairs}
    patterns: set[str] = set()
    matched: set[str] = set()
    for group in groups:
        named = zip(group["param_names"], group["params"], strict=True)
        names = [
            each
            for name, p in named
            if id(p) in owners
            for each in names_for_patterns(owners[id(p)], name)
        ]
        patterns |= group["shrink_pattern"].keys()
        matched |= group["shrink_pattern"].keys() - unmatched_patterns(
            group["shrink_pattern"], names
        )
    for key in sorted(patterns - matched):
        shown = ", ".join(repr(pair.name) for pair in pairs[:3])
        raise ValueError(f"shrink_pattern {key!r} matches none of the {len(pairs)} pairs ({shown})")


# Saved groups


def _identity(name: str) -> Any:
    """What identifies a parameter in a checkpoint, whatever wraps the model: its pair and role,
    else its name.
    """
    name = same_anywhere(name)
    return split_lora_name(name) or name


def is_adamws(saved: Any) -> bool:
    """Whether the groups of a state dict are those of ``torch.optim.AdamW``, which has none of
    Stable-LoRA's hyperparameters.
    """
    return bool(saved) and all(
        "shrink_ratio" not in group and set(group) >= _ADAMW | _UNUSED for group in saved
    )


def check_saved(state_dict: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of ``state_dict``, checked, with those hyperparameters of ``groups`` that AdamW or
    an earlier version lacks.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with 'state' and 'param_groups'")
    entries, saved = state_dict["state"], state_dict["param_groups"]
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) for entry in entries.values()
    ):
        raise ValueError(
            "state_dict must have a dict 'state' with a dict for each parameter, got something else"
        )
    for i, theirs in enumerate(saved):
        if not isinstance(theirs, dict) or "params" not in theirs:
            got = f"the keys {sorted(theirs)}" if isinstance(theirs, dict) else repr(theirs)
            raise ValueError(f"group {i} of state_dict must be a dict with 'params', got {got}")
    adamw = is_adamws(saved)
    if adamw and len(saved) != len(groups):
        raise ValueError(
            f"state_dict is torch.optim.AdamW's with {counted(len(saved), 'parameter group')}, this optimizer has {len(groups)}. "
            "Hugging Face's Trainer makes two, with weight decay and without: an optimizer by StableLoRAAdamWFactory.from_args "
            "has the same two and goes on with these moments. To begin with fresh ones, remove optimizer.pt from the checkpoint"
        )
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {counted(len(saved), 'parameter group')}, the optimizer {len(groups)}"
        )
    checked = []
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if adamw and not theirs.get("decoupled_weight_decay", True) and theirs["weight_decay"] != 0:
            raise ValueError(
                f"state_dict is torch.optim.Adam's: the weight decay of its group {i}, {theirs['weight_decay']}, is not "
                "decoupled, and StableLoRAAdamW's is"
            )
        complete = {key: ours[key] for key in (HYPER if adamw else _LATER)}
        complete |= {
            key: value
            for key, value in theirs.items()
            if key not in _UNUSED | {"decoupled_weight_decay"}
        }
        if missing := [key for key in HYPER if key not in complete]:
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
                raise ValueError(
                    f"group {i} of state_dict has {their_name!r} where the optimizer has {our_name!r}"
                )
        checked.append({**complete, **check_hyper(complete, f"state_dict's group {i}: ")})
    return checked


def with_saved(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """``group`` with copies of all in ``saved`` but parameters and storage; tensors on the device
    of those that they replace.
    """
    result = dict(group)
    for key, value in saved.items():
        if key not in ("params", "param_names", *Storage._fields):
            old, new = group.get(key), deepcopy(value)
            if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
                new = new.to(old.device)
            result[key] = new
    return result


def warn_of_differences(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Warn if loading a state with the group ``saved`` changes what the optimizer with the group
    ``own`` was asked to do.
    """
    told = []
    asked, found = own["max_grad_norm"], saved["max_grad_norm"]
    if asked is not None and asked != found:
        told.append(
            f"max_grad_norm was {asked} and is {found} now, as the other hyperparameters of the loaded state; set "
            "optimizer.max_grad_norm after loading to change it"
        )
    told += [
        f"the loaded state was saved with {name}={saved[name]}; it was converted, since this optimizer has {name}={own[name]}"
        for name in Storage._fields
        if saved.get(name, own[name]) != own[name]
    ]
    for message in told:
        warnings.warn(message, UserWarning, stacklevel=6)

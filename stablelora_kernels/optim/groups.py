"""Parameter groups: how the arguments of the optimizer become groups of named, trainable
parameters, also one for each of a PEFT model's adapters, and what groups must have in common. No
check changes its argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from stablelora_kernels.optim.options import (
    LOW_PRECISION,
    OPTIONS,
    SHARED,
    Number,
    Options,
    check_options,
)
from stablelora_kernels.optim.sharding import check_shards
from stablelora_kernels.pairs import (
    LoRAPair,
    adapter_of,
    full_shape,
    is_named_parameter,
    layer_name,
    lora_pairs,
    other_half,
    split_lora_name,
)
from stablelora_kernels.utils.names import unmatched_patterns
from stablelora_kernels.utils.tensors import is_sharded

DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)
_NAMES_NEEDED = (
    "pairs are found by name, so give (name, parameter) tuples, as model.named_parameters() does, or LoRAPairs, or use "
    "StableLoRAAdamW.from_model(model)"
)
Named = tuple[str, Tensor]


# The key of a group that holds the name of its adapter, if it has the parameters of one alone.
ADAPTER = "adapter"
_PER_ADAPTER = tuple(name for name in OPTIONS if name not in SHARED)


class ParamGroup(Options):
    """One of the optimizer's parameter groups. It may have further keys of its owner's."""

    lr: Number
    params: list[Tensor]
    param_names: list[str]


def shared_options(group: ParamGroup) -> dict[str, object]:
    """The values in ``group`` of the options that all groups share."""
    values: Mapping[str, object] = group
    return {name: values[name] for name in SHARED}


def named_parameters(group: ParamGroup) -> Iterable[Named]:
    """(name, parameter) of every parameter of ``group``."""
    return zip(group["param_names"], group["params"], strict=True)


def as_groups(params: object) -> list[object]:
    """``params`` as a list of groups, which are not yet checked."""
    if isinstance(params, Tensor):
        raise TypeError(f"params must be named parameters, got a single tensor; {_NAMES_NEEDED}")
    if isinstance(params, dict):
        raise TypeError(
            f"params must be an iterable or a list of group dicts, got one dict; {_NAMES_NEEDED}"
        )
    items = list(cast("Iterable[object]", params))
    return items if items and isinstance(items[0], dict) else [{"params": items}]


def check_groups(
    new: Sequence[object],
    existing: Sequence[ParamGroup],
    defaults: Mapping[str, object],
) -> list[ParamGroup]:
    """The groups ``new`` as :func:`check_group` returns them, which must also fit together and to
    those ``existing``.
    """
    checked = [check_group(group, defaults) for group in new]
    find_pairs([*existing, *checked])
    check_shared([*existing, *checked])
    return checked


def check_group(group: object, defaults: Mapping[str, object]) -> ParamGroup:
    """A new group with checked hyperparameters, those that it lacks from ``defaults``, and with
    trainable parameters alone.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
    if "params" not in group:
        raise ValueError(f"a parameter group must have 'params', got the keys {sorted(group)}")
    named = _named(group["params"], group.get("param_names"))
    trainable = [(name, p) for name, p in named if p.requires_grad]
    for name, p in trainable:
        check_parameter(f"parameter {name!r}", p)
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(
                f"parameter {name!r} must be a leaf tensor, got the result of {p.grad_fn}"
            )
    check_halves_train(named)
    where = "a group's " if OPTIONS.keys() & group.keys() else ""
    checked = {
        **group,
        **check_options({**defaults, **group}, where),
        "params": [p for _, p in trainable],
        "param_names": [name for name, _ in trainable],
    }
    return cast("ParamGroup", checked)


def _named(params: object, names: Sequence[str] | None) -> list[Named]:
    """(name, parameter) of everything in a group's ``params``: tuples of these, LoRAPairs, or
    tensors, whose ``names`` are given beside them.
    """
    if isinstance(params, (Tensor, set)):
        raise TypeError(f"params of a group is a {type(params).__name__}; {_NAMES_NEEDED}")
    items = list(cast("Iterable[object]", params))
    if names is not None and all(isinstance(item, Tensor) for item in items):
        if len(names) != len(items):
            raise ValueError(f"a group has {len(items)} params and {len(names)} param_names")
        items = list(zip(names, items, strict=True))
    named: list[Named] = []
    for item in items:
        if isinstance(item, LoRAPair):
            prefix = f"{item.name}." if item.name else ""
            named += [(f"{prefix}lora_A", item.A), (f"{prefix}lora_B", item.B)]
        elif is_named_parameter(item):
            named.append(item)
        elif isinstance(item, Tensor):
            raise TypeError(
                f"params holds a tensor of shape {list(item.shape)} without a name; {_NAMES_NEEDED}"
            )
        else:
            raise TypeError(f"params holds a {type(item).__name__}; {_NAMES_NEEDED}")
    return named


def check_parameter(name: str, p: Tensor) -> None:
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


def check_halves_train(named: Sequence[Named]) -> None:
    """Raise ValueError for a pair of which one half is trainable and the other frozen."""
    frozen = {split_lora_name(name) for name, p in named if not p.requires_grad}
    for name, p in named:
        split = split_lora_name(name)
        if split is None or len(full_shape(p)) != 2 or not p.requires_grad:
            continue
        pair, half = split
        missing = other_half(half)
        if (pair, missing) in frozen:
            remedy = "set requires_grad=True, or train the other half alone, as LoRA-FA does, with torch.optim.AdamW"
            raise ValueError(
                f"pair {pair!r}: lora_{half} is trainable but lora_{missing} is frozen (requires_grad=False), and Stable-LoRA "
                f"needs both; {remedy}"
            )


def check_shared(groups: Sequence[ParamGroup]) -> None:
    """Raise ValueError if groups differ in what they share, or 8 bits cannot hold the moments of one
    of their parameters.
    """
    expected = shared_options(groups[0]) if groups else {}
    for group in groups:
        for name, value in shared_options(group).items():
            if value != expected[name]:
                raise ValueError(
                    f"{name} must be one value for all groups, got {expected[name]} and {value}; "
                    "change it in all of them"
                )
        if group["moments_dtype"] is torch.uint8:
            sharded = [name for name, p in named_parameters(group) if is_sharded(p)]
            if sharded:
                raise ValueError(
                    f"parameter {sharded[0]!r} is a DTensor, whose moments cannot be in 8 bits: their blocks would depend on the "
                    "number of processes; use moments_dtype=torch.bfloat16, got torch.uint8"
                )


def find_pairs(groups: Sequence[ParamGroup]) -> list[LoRAPair]:
    """The pairs across all groups, whose names and patterns are checked."""
    for i, group in enumerate(groups):
        params = group["params"]
        name_count = len(group["param_names"])
        if len(params) != name_count:
            remedy = "what is added to or removed from one must be in the other"
            if 0 < len(params) < name_count and all(p.dim() == 1 for p in params):
                remedy = (
                    "something put flat tensors in the parameters' place, as DeepSpeed's ZeRO does in stages 1 to 3, and no pair "
                    "can be found in them. Use StableShrink (in a Trainer StableLoRACallback) with another optimizer such as "
                    "torch.optim.AdamW; or train under DistributedDataParallel, fully_shard or ZeRO's stage 0"
                )
            raise ValueError(
                f"group {i} has {len(params)} params and {name_count} param_names: {remedy}"
            )
    named = [item for group in groups for item in named_parameters(group)]
    names: set[str] = set()
    name_of: dict[int, str] = {}
    for name, p in named:
        if name in names:
            raise ValueError(f"two parameters are named {name!r}")
        if id(p) in name_of:
            raise ValueError(f"one tensor is given as {name_of[id(p)]!r} and as {name!r}")
        names.add(name)
        name_of[id(p)] = name
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


def names_for_patterns(pair: LoRAPair, parameter: str) -> tuple[str, str]:
    """The names that a ``shrink_pattern`` may match: the pair's and its layer's."""
    return pair.name, layer_name(parameter)


def check_patterns_match(groups: Sequence[ParamGroup], pairs: Sequence[LoRAPair]) -> None:
    """Raise ValueError for a key of a ``shrink_pattern`` that matches no pair of the groups that
    have the key.
    """
    pair_of_a = {id(pair.A): pair for pair in pairs}
    patterns: set[str] = set()
    matched: set[str] = set()
    for group in groups:
        names: list[str] = []
        for name, p in named_parameters(group):
            if id(p) in pair_of_a:
                names += names_for_patterns(pair_of_a[id(p)], name)
        keys = group["shrink_pattern"].keys()
        patterns |= keys
        matched |= keys - unmatched_patterns(group["shrink_pattern"], names)
    for key in sorted(patterns - matched):
        shown = ", ".join(repr(pair.name) for pair in pairs[:3])
        raise ValueError(f"shrink_pattern {key!r} matches none of the {len(pairs)} pairs ({shown})")


# Groups by adapter


def check_adapters(adapters: object, named: Sequence[Named], options: Mapping[str, object]) -> None:
    """Raise unless ``adapters`` are names of adapters among ``named`` parameters, each with settings
    that a group may have. ``options``: the optimizer's.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(
            f"adapters must be a dict of adapters' names and their settings, got {adapters!r}"
        )
    known = {adapter for name, _ in named if (adapter := adapter_of(name)) is not None}
    for adapter, settings in adapters.items():
        if adapter not in known:
            listed = ", ".join(sorted(map(repr, known))) or "none"
            raise ValueError(f"adapters names {adapter!r}, but the model's adapters are {listed}")
        if not isinstance(settings, Mapping):
            raise TypeError(f"adapters[{adapter!r}] must be a dict of settings, got {settings!r}")
        for key in settings:
            if key not in _PER_ADAPTER:
                raise ValueError(
                    f"adapters[{adapter!r}] may have the keys {', '.join(_PER_ADAPTER)}, got {key!r}"
                )
    if options.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm must be None with adapters, got {options['max_grad_norm']}: "
            "it clips the norm of all adapters' gradients together. "
            "Call torch.nn.utils.clip_grad_norm_ for the params of each group instead"
        )


def frozen_adapters(adapters: Mapping[str, object], named: Sequence[Named]) -> list[Named]:
    """The parameters of those of ``adapters`` that are frozen as a whole, as PEFT leaves all but the
    active one.
    """
    training = {adapter_of(name) for name, p in named if p.requires_grad}
    return [
        (name, p)
        for name, p in named
        if (adapter := adapter_of(name)) in adapters and adapter not in training
    ]


def groups_by_adapter(
    adapters: Mapping[str, Mapping[str, object]], named: Sequence[Named]
) -> list[dict[str, object]]:
    """A group for each of ``adapters``, and one of all other parameters."""
    groups: list[dict[str, object]] = []
    for adapter, settings in adapters.items():
        of_adapter = [(name, p) for name, p in named if adapter_of(name) == adapter]
        groups.append({"params": of_adapter, ADAPTER: adapter, **settings})
    others = [(name, p) for name, p in named if adapter_of(name) not in adapters]
    if any(p.requires_grad for _, p in others):
        groups.append({"params": others})
    return groups


def warn_of_frozen(groups: Sequence[ParamGroup], warned: set[str]) -> None:
    """Warn of each adapter that has been frozen since the optimizer was made, as PEFT's set_adapter
    does; once, by ``warned``.
    """
    for group in groups:
        adapter = cast("str | None", group.get(ADAPTER))
        params = group["params"]
        if adapter is None or adapter in warned or not params or params[0].requires_grad:
            continue
        warned.add(adapter)
        warnings.warn(
            f"adapter {adapter!r} no longer requires gradients, so it does not train: PEFT's set_adapter freezes all others. "
            "adapters_of_rows runs any adapter without it",
            RuntimeWarning,
            stacklevel=7,
        )

"""The hyperparameters of each parameter: those of its group, except B's learning rate and some pairs' shrink ratios."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from stablelora_kernels.config import lookup_pattern, unmatched_patterns
from stablelora_kernels.optim.sharding import Shard, shard_of
from stablelora_kernels.pairs import LoRAPair, layer_name
from stablelora_kernels.utils.dtensor import local


class Member(NamedTuple):
    """One trainable parameter as an engine sees it."""

    # This process's part of ``owner``, or ``owner`` itself if it is no DTensor.
    param: torch.Tensor
    # The index of the parameter's setting.
    setting_index: int
    shard: Shard
    owner: torch.Tensor


class Setting:
    """The hyperparameters of some members, read from their group at each access."""

    def __init__(self, group: dict[str, Any], is_b: bool, own_ratio: float | None) -> None:
        self.group, self.is_b, self.own_ratio = group, is_b, own_ratio

    def __getitem__(self, name: str) -> Any:
        if name == "shrink_ratio" and self.own_ratio is not None:
            return self.own_ratio
        return self.group[name]

    @property
    def lr_ratio(self) -> float:
        """The factor of the group's learning rate."""
        return self.group["lr_ratio_B"] if self.is_b else 1.0


class CopiedSchedule:
    """A ``shrink_schedule`` in an optimizer's copy or pickle, which says so if the function cannot be pickled."""

    def __init__(self, schedule: Callable[[int], float] | None) -> None:
        self.schedule = schedule

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


_built_from = itemgetter("amsgrad", "stop_condition", "max_grad_norm", "moments_dtype", "master_weights", "seed")


def build_key(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What an engine is built from, or checked against as it is built: if one changes, the engine is rebuilt."""
    return [(*_built_from(group), group["lr_ratio_B"] != 1.0) for group in groups]


def members_and_settings(
    groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]
) -> tuple[list[Member], list[Setting]]:
    """Every parameter in order, and the distinct settings of all."""
    bs, pair_of_a = {id(pair.B) for pair in pairs}, {id(pair.A): pair for pair in pairs}
    members: list[Member] = []
    setting_indices: dict[tuple[int, bool, float | None], int] = {}
    base = 0
    for group_index, group in enumerate(groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            is_b = group["lr_ratio_B"] != 1.0 and id(p) in bs
            pair = pair_of_a.get(id(p))
            ratio = None if pair is None else lookup_pattern(group["shrink_pattern"], _names(pair, name), None)
            setting_index = setting_indices.setdefault((group_index, is_b, ratio), len(setting_indices))
            members.append(Member(local(p), setting_index, shard_of(f"parameter {name!r}", p, base), p))
            base += p.numel()
    return members, [Setting(groups[index], is_b, ratio) for index, is_b, ratio in setting_indices]


def _names(pair: LoRAPair, parameter: str) -> tuple[str, str]:
    """The names that a ``shrink_pattern`` may match: the pair's and its layer's."""
    return pair.name, layer_name(parameter)


def check_patterns_match(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Raise ValueError for a key of a ``shrink_pattern`` that matches no pair of the groups that have the key."""
    owners = {id(pair.A): pair for pair in pairs}
    patterns: set[str] = set()
    matched: set[str] = set()
    for group in groups:
        named = zip(group["param_names"], group["params"], strict=True)
        names = [each for name, p in named if id(p) in owners for each in _names(owners[id(p)], name)]
        patterns |= group["shrink_pattern"].keys()
        matched |= group["shrink_pattern"].keys() - unmatched_patterns(group["shrink_pattern"], names)
    for key in sorted(patterns - matched):
        shown = ", ".join(repr(pair.name) for pair in pairs[:3])
        raise ValueError(f"shrink_pattern {key!r} matches none of the {len(pairs)} pairs ({shown})")

"""The parameters and the gradients of one device as an engine sees them, what a step tells it, and
what the engines of all backends share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim.groups import (
    ParamGroup,
    check_parameter,
    check_shared,
    named_parameters,
    names_for_patterns,
)
from stablelora_kernels.optim.options import LiveValues
from stablelora_kernels.optim.sharding import Shard, ShardSums, shard_of
from stablelora_kernels.optim.staging import upload
from stablelora_kernels.optim.state import (
    COUNTERS,
    Entry,
    check_entry,
    complete,
    with_strides_of,
)
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.names import lookup_pattern
from stablelora_kernels.utils.tensors import local


class GradientLayout(NamedTuple):
    """How the gradients lie in memory. Equal from one step to the next if nothing was reallocated."""

    addresses: list[int]
    dtypes: list[torch.dtype]
    # Which parameters have a gradient; None: all.
    present: list[bool] | None = None


def layout_of(tensors: Sequence[Tensor | None]) -> GradientLayout | None:
    """The layout of the tensors that are not None; None if one is not contiguous or has no storage
    of its own.

    Passes over every tensor take most of a step's host time, so this makes as few as possible.
    """
    all_present: Sequence[Any] = tensors
    try:
        addresses = list(map(Tensor.data_ptr, all_present))
    except TypeError:
        # One is None.
        layout = layout_of([t for t in tensors if t is not None])
        return layout and layout._replace(present=[t is not None for t in tensors])
    except RuntimeError:
        return None
    if not all(map(Tensor.is_contiguous, all_present)):
        return None
    return GradientLayout(addresses, [t.dtype for t in all_present])


class Gradients(NamedTuple):
    """One gradient a parameter, None for none, and their layout."""

    tensors: list[Tensor | None]
    layout: GradientLayout | None

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Gradients:
        return cls(tensors, layout_of(tensors))

    def owners(self, params: list[Tensor]) -> list[Tensor]:
        """Those of ``params`` that have a gradient; ``params`` itself if all have one."""
        if self.layout is not None and self.layout.present is None:
            return params
        return [p for p, g in zip(params, self.tensors, strict=True) if g is not None]

    def any(self) -> bool:
        """Whether there is a gradient. RuntimeError if one is not dense."""
        if self.layout is not None:
            return bool(self.layout.addresses)
        for g in self.tensors:
            if g is not None and g.layout is not torch.strided:
                raise RuntimeError(f"gradients must be dense tensors, got {g.layout}")
        return True

    def converted(self, like: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients in the dtypes and strides of the dense tensors ``like``: the list
        ``tensors`` itself if none of them has to be copied.
        """
        converted: list[Tensor | None] = []
        for t, g in zip(like, self.tensors, strict=True):
            if g is None:
                converted.append(None)
            else:
                converted.append(with_strides_of(t, g if g.dtype is t.dtype else g.to(t.dtype)))
        return self.tensors if all(map(is_, converted, self.tensors)) else converted


class Change(NamedTuple):
    """What has changed since the last step."""

    # Parameters, their memory, the state or what engines are built from: build engines. Everything
    # else has changed then.
    build: bool = True
    # A hyperparameter.
    hyper: bool = True
    # Where gradients lie, or which there are.
    gradients: bool = True
    # Someone else wrote to a parameter that an engine watches.
    written: bool = True


class Setting(NamedTuple):
    """The hyperparameters that some members share: those of their group, but for two of their own."""

    group: ParamGroup
    # The factor of the learning rate.
    lr_ratio: float
    # From a ``shrink_pattern``, or None.
    pattern_ratio: float | None

    def option(self, name: str) -> object:
        """The value of one of ``OPTIONS`` in the group."""
        values: Mapping[str, object] = self.group
        return values[name]

    def live(self) -> LiveValues:
        """Learning rate, weight decay and shrink ratio, as they are now."""
        group = self.group
        ratio = group["shrink_ratio"] if self.pattern_ratio is None else self.pattern_ratio
        return LiveValues(group["lr"], group["weight_decay"], ratio)


class Member(NamedTuple):
    """One trainable parameter as an engine sees it."""

    # This process's shard of ``owner``, or ``owner`` itself if it is no DTensor.
    param: Tensor
    owner: Tensor
    name: str
    # Its position among the parameters of all devices.
    position: int
    setting: Setting
    shard: Shard
    # The state of ``param``.
    entry: Entry


def members_of(
    groups: Sequence[ParamGroup], pairs: Sequence[LoRAPair], state: Mapping[Tensor, Entry]
) -> dict[torch.device, list[Member]]:
    """The members on each device, which the halves of a pair must share. Raises ValueError if the
    state does not fit them.
    """
    check_shared(groups)
    halves_b = {id(pair.B) for pair in pairs}
    pair_of_a = {id(pair.A): pair for pair in pairs}
    by_device: dict[torch.device, list[Member]] = {}
    # Elements and parameters that come before.
    base = position = 0
    for group in groups:
        settings: dict[tuple[float, float | None], Setting] = {}
        for name, p in named_parameters(group):
            check_parameter(f"parameter {name!r}", p)
            lr_ratio = group["lr_ratio_B"] if id(p) in halves_b else 1.0
            pattern_ratio = None
            if id(p) in pair_of_a:
                names = names_for_patterns(pair_of_a[id(p)], name)
                pattern_ratio = lookup_pattern(group["shrink_pattern"], names, None)
            member = Member(
                param=local(p),
                owner=p,
                name=name,
                position=position,
                setting=settings.setdefault(
                    (lr_ratio, pattern_ratio), Setting(group, lr_ratio, pattern_ratio)
                ),
                shard=shard_of(f"parameter {name!r}", p, base),
                entry={key: local(value) for key, value in state.get(p, {}).items()},
            )
            check_entry(member.entry, name, member.param, group)
            by_device.setdefault(member.param.device, []).append(member)
            base += p.numel()
            position += 1
    if len(by_device) > 1 and groups[0]["max_grad_norm"] is not None:
        raise ValueError(
            f"max_grad_norm needs all parameters on one device, got {', '.join(map(str, by_device))}; "
            "clip with torch.nn.utils.clip_grad_norm_ instead"
        )
    for pair in pairs:
        if pair.A.device != pair.B.device:
            raise ValueError(
                f"pair {pair.name!r}: A is on {pair.A.device} and B on {pair.B.device}; they must share one"
            )
    return by_device


class PairIndices(NamedTuple):
    """Where a pair's A and B are among an engine's members."""

    a: int
    b: int


class Engine:
    """What the step of all parameters on one device needs on any backend.

    Counters of one kind share a tensor; the optimizer's state holds 0-d views of it.

    Args:
        members: the parameters. Their state is completed, and their counters become views.
        pairs: the pairs of all devices.
        counts: how many equal counters each member has.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[LoRAPair],
        counts: Sequence[int],
    ) -> None:
        self.members = members
        self.params = [member.param for member in members]
        self.device = self.params[0].device
        self.max_grad_norm = members[0].setting.group["max_grad_norm"]
        for member in members:
            complete(member.entry, member.param, member.setting.group)
        index_of = {id(member.owner): i for i, member in enumerate(members)}
        self.pairs = [
            PairIndices(index_of[id(pair.A)], index_of[id(pair.B)])
            for pair in pairs
            if id(pair.A) in index_of
        ]
        # The indices of all A's, then of all B's.
        self.halves = [pair.a for pair in self.pairs] + [pair.b for pair in self.pairs]
        # The indices of members with a master, whose versions tell that someone else wrote to the
        # parameter.
        self.watched = [i for i, member in enumerate(members) if "master" in member.entry]
        self.masters = [members[i].entry["master"] for i in self.watched]
        # By another tensor, so that the copies of a step leave the parameters' versions alone.
        self.mastered = [self.params[i].data for i in self.watched]
        # What the arithmetic goes by.
        self.work = [member.entry.get("master", member.param) for member in members]
        self.pair_sums = ShardSums([members[i].owner for i in self.halves])
        self.grad_sums = ShardSums([member.owner for member in members])
        # Whether the step reads all gradients without a copy.
        self.direct = False
        # The index of each member's first counter.
        self.firsts = list(accumulate(counts, initial=0))[:-1]
        self.steps = self._counters("step", counts, range(len(members)))
        self.latched = self._counters("latched_at", counts, [pair.a for pair in self.pairs])

    def _counters(self, name: str, counts: Sequence[int], owners: Iterable[int]) -> Tensor:
        """The counter ``name`` of every member, repeated as often as ``counts`` says, as one new
        tensor; zero where a member has none. The host reads nothing.

        The entries of the members at ``owners`` become views of their first.
        """
        dtype = COUNTERS[name]
        zero = torch.zeros((), dtype=dtype, device=self.device)
        values = []
        for member in self.members:
            value = member.entry.get(name, zero)
            values.append(torch.as_tensor(value, dtype=dtype, device=self.device))
        repeats = upload(counts, torch.int64, self.device)
        counters = torch.repeat_interleave(torch.stack(values), repeats, output_size=sum(counts))
        for i in owners:
            self.members[i].entry[name] = counters[self.firsts[i]]
        return counters

    def refresh_masters(self) -> None:
        """Set a master to its parameter wherever the parameter is not its rounding: someone else
        has written to it.
        """
        for master, p in zip(self.masters, self.mastered, strict=True):
            torch.where(master.to(p.dtype) == p, master, p.float(), out=master)

"""Parameters of which every process holds a part (DTensor): the part, its place in the whole, and sums over the processes.

Nothing here imports ``torch.distributed`` unless there is such a parameter, whose makers have imported it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim import graph_capture as staging
from stablelora_kernels.optim.stochastic_rounding import upload
from stablelora_kernels.utils.dtensor import _extent, is_sharded, local


class Place(NamedTuple):
    """Which elements of the whole a part holds: its i-th in memory is ``base + i // columns * pitch + i % columns``.

    Without ``columns`` it is ``base + i``: whole parameters, and rows of them.
    """

    base: int
    columns: int = 0
    pitch: int = 0

    def numbers(self, count: int, device: torch.device) -> torch.Tensor:
        """The numbers of the first ``count`` elements, int64."""
        own = torch.arange(count, device=device)
        if self.columns:
            own = own // self.columns * self.pitch + own % self.columns
        return own + self.base


def check_shards(name: str, p: Any) -> None:
    """TypeError or ValueError for a DTensor that the optimizer cannot update part by part."""
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{name} must be sharded or replicated, got the placements {p.placements}")
    if not local(p).is_contiguous():
        raise ValueError(f"{name} is sharded, so its parts must be contiguous, got the strides {local(p).stride()}")
    place_of(name, p, 0)


def place_of(name: str, p: Any, base: int) -> Place:
    """Where this process's part of ``p`` lies in all parameters, if the first element of ``p`` is number ``base`` of them.

    Raises:
        ValueError: it is cut along two dimensions that are not the first.
    """
    if not is_sharded(p):
        return Place(base)
    sizes, offsets = _extent(p)
    pitches = [math.prod(p.shape[dim + 1 :]) for dim in range(p.dim())]
    base += sum(offset * pitch for offset, pitch in zip(offsets, pitches, strict=True))
    cut = [dim for dim in range(1, p.dim()) if sizes[dim] != p.shape[dim]]
    if not cut or 0 in sizes:
        return Place(base)
    if len(cut) > 1:
        raise ValueError(f"{name} may be sharded along its first dimension and one more, got {p.placements}")
    (dim,) = cut
    return Place(base, math.prod(sizes[dim:]), math.prod(p.shape[dim:]))


def shard_groups(p: Any) -> dict[str, Any]:
    """The process groups that share ``p`` out among them, by name; those that hold copies of it do not count."""
    if not is_sharded(p):
        return {}
    groups = [
        p.device_mesh.get_group(dim)
        for dim, placement in enumerate(p.placements)
        if not placement.is_replicate() and p.device_mesh.size(dim) > 1
    ]
    return {group.group_name: group for group in groups}


class ShardSums:
    """Adds up, over the processes, values of which each process has those of its parts.

    Every group of processes makes one collective, whatever the number of values. All see the same sums, since a reduction
    hands out one result.
    """

    def __init__(self, owners: Sequence[torch.Tensor]) -> None:
        """``owners``: for each value the parameter over which it is a sum."""
        device = owners[0].device if owners else torch.device("cpu")
        groups: dict[str, Any] = {}
        at: dict[str, list[int]] = {}
        for i, owner in enumerate(owners):
            for name, group in shard_groups(owner).items():
                groups[name] = group
                at.setdefault(name, []).append(i)
        self.parts = [
            (groups[name], None if len(places) == len(owners) else upload(places, torch.int64, device))
            for name, places in at.items()
        ]

    def __bool__(self) -> bool:
        return bool(self.parts)

    def add_up_(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, one for each owner, made the sums over all processes."""
        for group, at in self.parts:
            mine = values if at is None else values[at]
            torch.distributed.all_reduce(mine, group=group)
            if at is not None:
                values[at] = mine
        return values

    def agree_(self, verdict: torch.Tensor) -> torch.Tensor:
        """The largest ``verdict`` of all processes."""
        for group, _ in self.parts:
            torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MAX, group=group)
        return verdict


class Unlatched:
    """Whether some pair may still shrink, as far as the host knows without waiting for the device.

    Processes that share pairs out must make the same collectives, so all must stop at the same step: each looks at what the
    device said ``LAG`` steps before, when that has long been there.
    """

    LAG = 4

    def __init__(self, latched: torch.Tensor, places: Sequence[int]) -> None:
        """``latched``: counters of which those at ``places`` belong to the pairs."""
        self.latched, self.places = latched, upload(list(places), torch.int64, latched.device)
        self.known = bool(places)
        self.said: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def __bool__(self) -> bool:
        if self.known and len(self.said) >= self.LAG and not staging.capturing():
            count, event = self.said.pop(0)
            event.synchronize()
            self.known = bool(count.item())
        return self.known

    def look(self) -> None:
        """To be called after every step, but for those that a CUDA graph captures: it would repeat its collectives anyway."""
        if not self.known or staging.capturing():
            return
        shrinking = (self.latched[self.places] == 0).sum()
        if self.latched.device.type != "cuda":
            self.known = bool(shrinking)
            return
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_(shrinking, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.latched.device))
        self.said.append((count, event))

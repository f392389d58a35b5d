"""DTensor parameters: the elements of this process's shard, sums over all processes, and when those
may stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim import snapshot
from stablelora_kernels.optim.snapshot import upload
from stablelora_kernels.utils.tensors import is_sharded, local, shard_extent


class Shard(NamedTuple):
    """Which elements a shard holds: its i-th in memory has the index ``base + i // columns * pitch
    + i % columns``.

    Indices count the elements of all parameters; they key the random rounding. If ``columns`` is 0
    the index is ``base + i``: so it is for whole parameters and for shards of whole rows.
    """

    base: int
    columns: int = 0
    pitch: int = 0

    def element_indices(self, count: int, device: torch.device) -> torch.Tensor:
        """int32 [count]: the indices of the shard's first ``count`` elements, modulo 2^32."""
        own = torch.arange(count, dtype=torch.int64, device=device)
        if self.columns:
            own = own // self.columns * self.pitch + own % self.columns
        return (own + self.base).to(torch.int32)


def check_shards(name: str, p: Any) -> None:
    """Raise TypeError or ValueError for a DTensor that the optimizer cannot update shard by shard."""
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{name} must be sharded or replicated, got the placements {p.placements}")
    if not local(p).is_contiguous():
        raise ValueError(
            f"{name} is sharded, so its shards must be contiguous, got the strides {local(p).stride()}"
        )
    shard_of(name, p, 0)


def shard_of(name: str, p: Any, base: int) -> Shard:
    """This process's shard of ``p``, whose first element has the index ``base``."""
    if not is_sharded(p):
        return Shard(base)
    sizes, offsets = shard_extent(p)
    pitches = [math.prod(p.shape[dim + 1 :]) for dim in range(p.dim())]
    base += sum(offset * pitch for offset, pitch in zip(offsets, pitches, strict=True))
    cut = [dim for dim in range(1, p.dim()) if sizes[dim] != p.shape[dim]]
    if not cut or 0 in sizes:
        return Shard(base)
    if len(cut) > 1:
        raise ValueError(
            f"{name} may be sharded along its first dimension and one more, got {p.placements}"
        )
    (dim,) = cut
    return Shard(base, math.prod(sizes[dim:]), math.prod(p.shape[dim:]))


class ShardSums:
    """All-reduces values, one a parameter, over the processes that share the parameter: one
    collective a process group.

    All ranks get the same sums, since a reduction hands out one result. False if no parameter is
    sharded.
    """

    def __init__(self, owners: Sequence[Any]) -> None:
        """``owners``: the parameter that each value is a sum over."""
        device = owners[0].device if owners else torch.device("cpu")
        groups: dict[str, Any] = {}
        indices: dict[str, list[int]] = {}
        for i, owner in enumerate(owners):
            for dim, placement in enumerate(owner.placements if is_sharded(owner) else ()):
                # Groups that hold replicas do not count.
                if not placement.is_replicate() and owner.device_mesh.size(dim) > 1:
                    group = owner.device_mesh.get_group(dim)
                    groups[group.group_name] = group
                    indices.setdefault(group.group_name, []).append(i)
        self.parts = [
            (
                groups[name],
                None if len(index) == len(owners) else upload(index, torch.int64, device),
            )
            for name, index in indices.items()
        ]

    def __bool__(self) -> bool:
        return bool(self.parts)

    def all_reduce_sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Make ``values``, one an owner, the sums over all processes, in place."""
        for group, index in self.parts:
            mine = values if index is None else values[index]
            torch.distributed.all_reduce(mine, group=group)
            if index is not None:
                values[index] = mine
        return values

    def all_reduce_max_(self, value: torch.Tensor) -> torch.Tensor:
        """Make ``value`` the largest of all processes, in place."""
        for group, _ in self.parts:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=group)
        return value


class LatchMonitor:
    """Tells the host whether some pair may still shrink, without waiting for the device.

    Processes that share pairs must make the same collectives, so all must stop at the same step.
    Each reads the count that the device recorded ``LAG`` steps before, which has long arrived.
    """

    LAG = 4

    def __init__(self, latched: torch.Tensor, indices: Sequence[int]) -> None:
        """``latched``: int32 counters; those at ``indices`` belong to the pairs."""
        self.latched, self.indices = latched, upload(list(indices), torch.int64, latched.device)
        self.unlatched = bool(indices)
        self.pending: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def any_unlatched(self) -> bool:
        """Whether some pair had not latched in the last record that has to be known by now."""
        if self.unlatched and len(self.pending) >= self.LAG and not snapshot.capturing():
            count, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            self.unlatched = bool(count.item())
        return self.unlatched

    def record(self) -> None:
        """Record the count after a step. A step that a CUDA graph captures records nothing: it
        repeats its collectives.
        """
        if not self.unlatched or snapshot.capturing():
            return
        count, event = (self.latched[self.indices] == 0).sum(), None
        if count.device.type == "cuda":
            host, event = (
                torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True),
                torch.cuda.Event(),
            )
            count = host.copy_(count, non_blocking=True)
            event.record(torch.cuda.current_stream(self.latched.device))
        self.pending.append((count, event))

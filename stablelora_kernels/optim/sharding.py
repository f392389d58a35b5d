"""DTensor parameters: the elements of this process's shard, sums over all processes, and when those
may stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim import staging
from stablelora_kernels.optim.staging import upload
from stablelora_kernels.utils.tensors import is_sharded, local, shard_extent

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """Which elements a shard holds: its i-th in memory has the index ``base + i // columns * pitch
    + i % columns``.

    Indices count the elements of all parameters; they key the random rounding. If ``columns`` is 0
    the index is ``base + i``: so it is for whole parameters and for shards of whole rows.
    """

    base: int
    columns: int = 0
    pitch: int = 0

    def element_indices(self, count: int, device: torch.device) -> Tensor:
        """int32 [count]: the indices of the shard's first ``count`` elements, modulo 2^32."""
        indices = torch.arange(count, dtype=torch.int64, device=device)
        if self.columns:
            indices = indices // self.columns * self.pitch + indices % self.columns
        return (indices + self.base).to(torch.int32)


def check_shards(name: str, p: DTensor) -> None:
    """Raise TypeError or ValueError for a DTensor that the optimizer cannot update shard by shard."""
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{name} must be sharded or replicated, got the placements {p.placements}")
    if not local(p).is_contiguous():
        raise ValueError(
            f"{name} is sharded, so its shards must be contiguous, got the strides {local(p).stride()}"
        )
    shard_of(name, p, 0)


def shard_of(name: str, p: Tensor, base: int) -> Shard:
    """This process's shard of ``p``, whose first element has the index ``base``."""
    if not is_sharded(p):
        return Shard(base)
    sizes, offsets = shard_extent(p)
    for dim, offset in enumerate(offsets):
        base += offset * math.prod(p.shape[dim + 1 :])
    # Beyond the first dimension, which takes whole rows.
    cut = [dim for dim in range(1, p.dim()) if sizes[dim] != p.shape[dim]]
    if not cut or 0 in sizes:
        return Shard(base)
    if len(cut) > 1:
        raise ValueError(
            f"{name} may be sharded along its first dimension and one more, got {p.placements}"
        )
    (dim,) = cut
    return Shard(base, math.prod(sizes[dim:]), math.prod(p.shape[dim:]))


class ProcessSum(NamedTuple):
    """One collective: which values the processes of ``group`` add up."""

    group: torch.distributed.ProcessGroup
    # On the device; None for all.
    indices: Tensor | None


class ShardSums:
    """All-reduces values, one a parameter, over the processes that share the parameter: one
    collective a process group.

    All ranks get the same sums, since a reduction hands out one result. False if no parameter is
    sharded.
    """

    def __init__(
        self,
        owners: Sequence[Tensor],
        groups_of: Callable[[Tensor], Iterable[torch.distributed.ProcessGroup]] | None = None,
    ) -> None:
        """``owners``: the parameter that each value is a sum over. ``groups_of``: the processes that
        share one; default: those of a DTensor's mesh.
        """
        groups: dict[str, torch.distributed.ProcessGroup] = {}
        indices_of: dict[str, list[int]] = {}
        for i, owner in enumerate(owners):
            for group in (groups_of or _mesh_groups)(owner):
                groups[group.group_name] = group
                indices_of.setdefault(group.group_name, []).append(i)
        self.sums: list[ProcessSum] = []
        for name, indices in indices_of.items():
            is_of_all = len(indices) == len(owners)
            on_device = None if is_of_all else upload(indices, torch.int64, owners[0].device)
            self.sums.append(ProcessSum(groups[name], on_device))

    def __bool__(self) -> bool:
        return bool(self.sums)

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Make ``values``, one an owner, the sums over all processes, in place."""
        for group, indices in self.sums:
            shared = values if indices is None else values[indices]
            torch.distributed.all_reduce(shared, group=group)
            if indices is not None:
                values[indices] = shared
        return values

    def all_reduce_max_(self, value: Tensor) -> Tensor:
        """Make ``value`` the largest of all processes, in place."""
        for reduction in self.sums:
            torch.distributed.all_reduce(
                value, torch.distributed.ReduceOp.MAX, group=reduction.group
            )
        return value


def _mesh_groups(owner: Tensor) -> Iterator[torch.distributed.ProcessGroup]:
    """The processes among which a DTensor is sharded: a group for each such dimension of the mesh."""
    if not is_sharded(owner):
        return
    for dim, placement in enumerate(owner.placements):
        # Groups that hold replicas do not count.
        if not placement.is_replicate() and owner.device_mesh.size(dim) > 1:
            yield owner.device_mesh.get_group(dim)


class Recorded(NamedTuple):
    """A number of unlatched pairs on its way to the host, and the event that says it has arrived."""

    unlatched: Tensor
    arrival: torch.cuda.Event | None


class LatchMonitor:
    """Tells the host whether some pair may still shrink, without waiting for the device.

    Processes that share pairs must make the same collectives, so all must stop at the same step.
    Each reads the count that the device recorded ``LAG`` steps before, which has long arrived.
    """

    LAG = 4

    def __init__(self, latched: Tensor, indices: Sequence[int]) -> None:
        """``latched``: int32 counters; those at ``indices`` belong to the pairs."""
        self.latched = latched
        self.indices = upload(list(indices), torch.int64, latched.device)
        self.pending: list[Recorded] = []
        self.restart()

    def restart(self) -> None:
        """Forget the records: the counters have been replaced."""
        self.unlatched = self.indices.numel() > 0
        self.pending = []

    def any_unlatched(self) -> bool:
        """Whether some pair had not latched in the last record that has to be known by now."""
        if self.unlatched and len(self.pending) >= self.LAG and not staging.capturing():
            count, arrival = self.pending.pop(0)
            if arrival is not None:
                arrival.synchronize()
            self.unlatched = bool(count.item())
        return self.unlatched

    def record(self) -> None:
        """Record the count after a step. A step that a CUDA graph captures records nothing: it
        repeats its collectives.
        """
        if not self.unlatched or staging.capturing():
            return
        count = (self.latched[self.indices] == 0).sum()
        if count.device.type != "cuda":
            self.pending.append(Recorded(count, None))
            return
        host = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(count, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(self.latched.device))
        self.pending.append(Recorded(host, arrival))

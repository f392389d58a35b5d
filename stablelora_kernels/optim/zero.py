"""Where the A and B of a shrinkage's pairs are under DeepSpeed's ZeRO, stages 1 to 3: float32
partitions, of which each rank owns one. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.optim.sharding import Shard, ShardSums
from stablelora_kernels.optim.shrink import Parts
from stablelora_kernels.pairs import LoRAPair, full_shape


class _Names(NamedTuple):
    """What a class of DeepSpeed's optimizers calls its lists, which have an entry for each group of
    parameters, or each part of one.
    """

    # This rank's float32 partitions.
    partitions: str
    parameters: str
    # The memory of all ranks' parameters; "" where each parameter is cut by itself.
    flat: str


_CLASSES = (
    # Stages 1 and 2; stage 1 in bfloat16; stage 3.
    _Names("single_partition_of_fp32_groups", "bit16_groups", "bit16_groups_flat"),
    _Names("fp32_groups_flat_partition", "bf16_groups", "bf16_groups_flat"),
    _Names("fp32_partitioned_groups_flat", "fp16_groups", ""),
)


class _Fragment(NamedTuple):
    """The elements of a parameter that a rank owns."""

    # The number of the partition, and where they are in it.
    partition: int
    start: int
    numel: int
    # The first one's index in the parameter.
    first: int
    # The ranks among which the parameter is cut.
    processes: torch.distributed.ProcessGroup


def zero_optimizer(optimizer: object) -> Any:
    """The optimizer of DeepSpeed's ZeRO, which is around the one that updates partitions: this one,
    or the one inside accelerate's wrapper. None if there is none.

    Raises:
        ValueError: it is DeepSpeed's optimizer of stage 0 in 16 bits.
    """
    inner: Any = optimizer
    while _names_of(inner) is None:
        if hasattr(inner, "_optimizer_step_pre_hooks") or not hasattr(inner, "optimizer"):
            return None
        if hasattr(inner, "fp16_groups"):
            raise ValueError(
                f"{type(inner).__name__} is DeepSpeed's optimizer of bfloat16 and float16 without ZeRO, whose float32 copies "
                "StableShrink cannot find: use ZeRO's stage 1, 2 or 3, or float32"
            )
        inner = inner.optimizer
    return inner


def _names_of(optimizer: object) -> _Names | None:
    return next((names for names in _CLASSES if hasattr(optimizer, names.partitions)), None)


class _ZeroSums(ShardSums):
    """Sums over the ranks that share a parameter, on the device that they communicate on: partitions
    may be in the host's memory.
    """

    def __init__(self, owners: Sequence[Tensor], fragments: dict[Tensor, _Fragment]) -> None:
        super().__init__(owners, lambda p: _shared_by(fragments[p]))
        self.device = owners[0].device

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        if values.device == self.device:
            return super().all_reduce_sum_(values)
        return values.copy_(super().all_reduce_sum_(values.to(self.device)))


class ZeroPlacement:
    """The partitions of DeepSpeed's ZeRO; methods as of
    :class:`~stablelora_kernels.optim.placement.Placement`.

    DeepSpeed lets the optimizer take a step for each group of parameters, or each part of one, with
    the group's partition as the only parameter. The pairs shrink before the first of them, and their
    counters and ratio are in the first group.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer
        # A part of stage 3's optimizer may be on the host, and another one updates the rest.
        others = [getattr(zero, "backup_optimizer", None)]
        self.hooked = [self.optimizer, *[other for other in others if other is not None]]
        groups = self.optimizer.param_groups
        if any("train_mode" in group for group in groups):
            raise ValueError(
                "StableShrink has no schedule-free optimizer under DeepSpeed's ZeRO, got "
                f"{type(self.optimizer).__name__}; use another optimizer, or DDP or FSDP2"
            )
        if own := [i for i, group in enumerate(groups) if i and "shrink_ratio" in group]:
            raise ValueError(
                f"under DeepSpeed's ZeRO the shrink_ratio of group 0 is that of all pairs, but group {own[0]} has one too"
            )
        if getattr(zero, "elastic_checkpoint", False):
            raise ValueError(
                "DeepSpeed's elastic_checkpoint saves no parameter groups, in which StableShrink keeps latches: set it to false"
            )
        self._count = len(groups)
        self._all_groups: list[dict[str, Any]] = groups
        self._names = cast("_Names", _names_of(zero))
        self._fragments = dict(self._find_fragments())

    def _find_fragments(self) -> Iterator[tuple[Tensor, _Fragment]]:
        """The fragment of each parameter of the optimizer in this rank's partitions."""
        for number, parameters in enumerate(getattr(self.zero, self._names.parameters)):
            start = 0
            for p in parameters:
                if self._names.flat:
                    yield p, self._fragment_of_flat(number, p)
                    continue
                # The last ranks' partitions end in memory that belongs to no element.
                processes = p.ds_process_group
                size: int = p.partition_numel()
                first = min(size * torch.distributed.get_rank(processes), p.ds_numel)
                numel = min(size, p.ds_numel - first)
                yield p, _Fragment(number, start, numel, first, processes)
                start += size

    def _fragment_of_flat(self, number: int, p: Tensor) -> _Fragment:
        """The fragment of a parameter in the flat memory of a group, which ranks own equal parts of.

        Where the parameter is in this memory tells its address: DeepSpeed's own mapping
        (``_hp_mapping``) is wrong with ``round_robin_gradients``.
        """
        processes = self.zero.real_dp_process_group[number]
        flat = getattr(self.zero, self._names.flat)[number]
        begin = (p.data_ptr() - flat.data_ptr()) // p.element_size()
        size = self._partitions[number].numel()
        own = size * torch.distributed.get_rank(processes)
        first, end = (min(max(at, own), own + size) for at in (begin, begin + p.numel()))
        return _Fragment(number, first - own, end - first, first - begin, processes)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups. While it steps on one of several, ``param_groups`` has that alone."""
        groups = self.optimizer.param_groups
        if len(groups) == self._count or self._steps_on(self._partitions[0]):
            self._all_groups = groups
        return self._all_groups

    def group_of(self, pair: LoRAPair) -> int:
        """The first group. ValueError if ZeRO has no A or no B."""
        for half, p in (("A", pair.A), ("B", pair.B)):
            if p not in self._fragments:
                raise ValueError(
                    f"pair {pair.name!r}: {half} {list(full_shape(p))} is not among the {len(self._fragments)} parameters of "
                    "DeepSpeed's optimizer; give the model that deepspeed.initialize was given"
                )
        return 0

    def parts(self, pair: LoRAPair) -> Parts:
        """The fragments of A and B in this rank's partitions; empty where it owns none."""
        return Parts(self._part(pair.A), self._part(pair.B))

    def _part(self, p: Tensor) -> Tensor:
        fragment = self._fragments[p]
        partition = self._partitions[fragment.partition].detach()
        if partition.numel() == 0:
            raise ValueError(
                "DeepSpeed has moved a partition out of memory, and StableShrink shrinks only what is in a GPU's or the host's: "
                "set offload_optimizer's device to 'cpu', not to 'nvme'"
            )
        return partition.narrow(0, fragment.start, fragment.numel)

    @property
    def _partitions(self) -> list[Tensor]:
        return cast("list[Tensor]", getattr(self.zero, self._names.partitions))

    def shard_of(self, pair: LoRAPair, base: int) -> Shard:
        """The elements of A that this rank owns; A's first has the index ``base``."""
        return Shard(base + self._fragments[pair.A].first)

    def sums(self, owners: Sequence[Tensor]) -> ShardSums:
        """Sums over the ranks that share the parameters ``owners``."""
        return _ZeroSums(owners, self._fragments)

    def takes_step(self, pairs: Sequence[LoRAPair]) -> bool:
        """Whether the optimizer steps on the first partition: a step begins."""
        return self._steps_on(self._partitions[0])

    def ends_step(self) -> bool:
        """Whether the optimizer has stepped on the last partition."""
        return self._steps_on(self._partitions[-1])

    def _steps_on(self, partition: Tensor) -> bool:
        return any(
            partition is p
            for optimizer in self.hooked
            for group in optimizer.param_groups
            for p in group["params"]
        )

    def has_gradient(self, pair: LoRAPair) -> bool:
        """ZeRO has a gradient of every parameter: zeros where backward made none."""
        return True

    def found_inf(self) -> None:
        """ZeRO skips a step before the optimizer's begins."""
        return


def _shared_by(fragment: _Fragment) -> Iterator[torch.distributed.ProcessGroup]:
    """The ranks to sum over, unless there is only one."""
    if torch.distributed.get_world_size(fragment.processes) > 1:
        yield fragment.processes

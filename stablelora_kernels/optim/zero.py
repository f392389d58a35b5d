"""Where the A and B of a shrinkage's pairs are under DeepSpeed's ZeRO, stages 1 to 3: float32
partitions, of which each rank owns one. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.optim.sharding import Shard, ShardSums
from stablelora_kernels.optim.shrink import Parts
from stablelora_kernels.pairs import LoRAPair

# By the class of DeepSpeed's optimizer, the attribute with its float32 partitions: stages 1 and 2,
# stage 3, and stage 1 with bfloat16.
_PARTITIONS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


def is_zero(optimizer: object) -> bool:
    """Whether this is an optimizer of DeepSpeed's ZeRO, around the one that updates partitions."""
    return any(hasattr(optimizer, name) for name in _PARTITIONS)


class _ZeroSums(ShardSums):
    """Sums over the ranks that share a parameter, on the device that they communicate on: partitions
    may be in the host's memory.
    """

    def __init__(self, owners: Sequence[Tensor], zero: Any) -> None:
        super().__init__(owners, lambda p: _groups_of(zero, p))
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
    counters are in the first group.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer
        # A part of stage 3's optimizer may be on the host, and another one updates the rest.
        others = [getattr(zero, "backup_optimizer", None)]
        self.hooked = [self.optimizer, *[other for other in others if other is not None]]
        if any("train_mode" in group for group in self.optimizer.param_groups):
            raise ValueError(
                f"under DeepSpeed's ZeRO StableShrink has no schedule-free optimizer, got {type(self.optimizer).__name__}"
            )

    def group_of(self, pair: LoRAPair) -> int:
        """The first group. ValueError if ZeRO has no A."""
        if not hasattr(pair.A, "ds_id") and not hasattr(pair.A, "_hp_mapping"):
            raise ValueError(
                f"pair {pair.name!r}: DeepSpeed's optimizer does not know its A {list(pair.A.shape)}; give the model that "
                "was given to deepspeed.initialize"
            )
        return 0

    def parts(self, pair: LoRAPair) -> Parts:
        """The fragments of A and B in this rank's partitions; empty where it owns none."""
        return Parts(self._fragment(pair.A), self._fragment(pair.B))

    def _fragment(self, p: Any) -> Tensor:
        if hasattr(p, "ds_id"):
            group, offset, count = self.zero.grad_position[self.zero.get_param_id(p)]
            partition: Tensor = self._partitions[group]
            if partition.numel() == 0:
                raise ValueError(
                    "DeepSpeed has swapped a partition out of memory; StableShrink needs them in memory, on a GPU or a host: use "
                    "offload_optimizer's device cpu"
                )
            return partition.detach().narrow(0, offset, count)
        if p._hp_mapping is None:
            return self._partitions[0].detach()[:0]
        fragment: Tensor = p._hp_mapping.get_hp_fragment()
        return fragment.detach()

    @property
    def _partitions(self) -> list[Tensor]:
        found = [getattr(self.zero, name) for name in _PARTITIONS if hasattr(self.zero, name)]
        return list(found[0])

    def shard_of(self, pair: LoRAPair, base: int) -> Shard:
        """Partitions are float32, so that nothing is rounded at random, whatever the elements."""
        return Shard(base)

    def sums(self, owners: Sequence[Tensor]) -> ShardSums:
        """Sums over the ranks that share the parameters ``owners``."""
        return _ZeroSums(owners, self.zero)

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


def _groups_of(zero: Any, p: Any) -> Iterator[torch.distributed.ProcessGroup]:
    """The ranks among which ``p`` is cut."""
    if hasattr(p, "ds_id"):
        group = p.ds_process_group
    else:
        groups = zero.real_dp_process_group
        index = next(i for i, params in enumerate(zero.bit16_groups) if any(p is q for q in params))
        group = groups[index]
    if torch.distributed.get_world_size(group) > 1:
        yield group

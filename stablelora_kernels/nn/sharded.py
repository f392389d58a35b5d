"""``LoRAShardedLinear``: LoRA on a tensor-parallel linear layer. Each process runs the op on its
shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from stablelora_kernels.functional import lora_linear
from stablelora_kernels.nn.factory import BaseLayer
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.utils.tensors import from_local


def shard_pair(
    weight: DTensor, lora_A: Tensor, lora_B: Tensor, **source: int | None
) -> tuple[DTensor, DTensor]:
    """Shard A [r, K] like the columns of the weight [N, K], and B [N, r] like its rows.

    The values are those of the mesh's first process, or of ``src_data_rank`` if ``source`` gives it
    to ``distribute_tensor``.
    """
    placement = weight.placements[0]

    def shard_along(whole: Tensor, dim: int) -> DTensor:
        """Shard ``whole`` along ``dim`` if the weight is, otherwise replicate it."""
        placements = [placement if placement.is_shard(dim) else Replicate()]
        return distribute_tensor(whole.detach(), weight.device_mesh, placements, **source)

    return shard_along(lora_A, 1), shard_along(lora_B, 0)


class LoRAShardedLinear(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over a DTensor weight, as ``ColwiseParallel`` and
    ``RowwiseParallel`` make it.

    ``y = x W^T + bias + scaling · D(x) A^T B^T``, in DTensors of one mesh. B [N, r] is sharded like
    the rows of the weight [N, K], A [r, K] like its columns. Each process computes the base product
    and the branch of its shard in one op. If the weight's columns are sharded, both are summed over
    the processes together. So the layer communicates no more than the frozen one, except for the
    gradients of replicated tensors (A if rows are sharded, B if columns are).

    ``LoRALinear.from_linear`` and ``apply_lora`` make it from a sharded layer;
    :class:`~stablelora_kernels.tensor_parallel.LoRAColwiseParallel` and
    :class:`~stablelora_kernels.tensor_parallel.LoRARowwiseParallel` make it from a LoRALinear. The
    mesh's first process initializes A and B.

    Processes that hold the same x draw the same dropout mask if torch is seeded alike on them.
    Processes that hold different parts of x draw independent masks; their seeds come from torch's
    CPU generator.
    """

    @staticmethod
    def check_base(base: BaseLayer) -> None:
        weight = cast(DTensor, base.weight)
        placement = weight.placements[0]
        if weight.device_mesh.ndim != 1 or not (
            placement.is_replicate() or type(placement) is Shard
        ):
            raise ValueError(
                "linear's weight must be replicated or cut along one of its sides, on a mesh of one dimension, got placements "
                f"{weight.placements} on {weight.device_mesh.ndim} dimensions"
            )

    @property
    def _placement(self) -> Placement:
        """The placement of the weight."""
        return cast(DTensor, self.weight).placements[0]

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialize the whole A and B again, then shard them; ``init_lora_weights`` is as in the
        constructor.
        """
        old_A = self.lora_A
        old_B = self.lora_B
        device = torch.device(cast(DTensor, self.weight).device_mesh.device_type)
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)) for p in (old_A, old_B)
        )
        super().reset_lora_parameters(init_lora_weights)
        new_A, new_B = shard_pair(cast(DTensor, self.weight), self.lora_A, self.lora_B)
        if isinstance(old_A, DTensor):
            self.lora_A, self.lora_B = old_A, old_B
            self.lora_A.copy_(new_A)
            self.lora_B.copy_(new_B)
        else:
            self.lora_A, self.lora_B = nn.Parameter(new_A), nn.Parameter(new_B)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features]. Both are DTensors; the layer's own
        hooks make them.

        Raises:
            TypeError: ``x`` is not a DTensor.
        """
        if not isinstance(x, DTensor):
            raise TypeError(
                f"x must be a DTensor beside a sharded weight, got a {type(x).__name__}; hooks that make it one must be this "
                "layer's, where apply_lora moves them"
            )
        if self._disabled or self.merged:
            return super().forward(x)
        rows_sharded = self._placement.is_shard(0)
        columns_sharded = self._placement.is_shard(1)
        features = Shard(x.ndim - 1)
        in_placement: Placement = Replicate()
        out_placement: Placement = Replicate()
        if columns_sharded:
            in_placement = features
            out_placement = Partial()
        elif rows_sharded:
            out_placement = features
        elif x.placements[0].is_shard() and not x.placements[0].is_shard(features.dim):
            # Each process has some rows of x.
            in_placement = out_placement = x.placements[0]
        x = x.redistribute(placements=[in_placement])
        # Each process computes a part of a replicated tensor's gradient if it holds only some rows
        # of x, or computes only some columns of the result.
        batch_sharded = in_placement.is_shard() and not columns_sharded
        weight, lora_A, lora_B = (cast(DTensor, p) for p in (self.weight, self.lora_A, self.lora_B))
        mesh = weight.device_mesh
        partial = [Partial()]
        operands = (
            x.to_local(grad_placements=partial if rows_sharded else [in_placement]),
            weight.to_local(),
            self._local_bias(batch_sharded),
            lora_A.to_local(
                grad_placements=partial if batch_sharded or rows_sharded else lora_A.placements
            ),
            lora_B.to_local(
                grad_placements=partial if batch_sharded or columns_sharded else lora_B.placements
            ),
        )
        drops = self.training and self.lora_dropout > 0
        with _seeded_by_process(mesh.get_local_rank(), x.device, drops and in_placement.is_shard()):
            y = lora_linear(*operands, self.scaling, self.lora_dropout, self.training)
        shape = torch.Size((*x.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            y, mesh, [out_placement], run_check=False, shape=shape, stride=stride
        )

    def _local_bias(self, batch_sharded: bool) -> Tensor | None:
        """This process's part of the bias. If results are summed over processes, only the first
        process adds it.
        """
        bias = self.bias
        if bias is None:
            return None
        placement = self._placement
        if not isinstance(bias, DTensor):
            raise TypeError(
                f"bias must be a DTensor beside a sharded weight, got a {type(bias).__name__}"
            )
        placed = bias.redistribute(placements=[Shard(0) if placement.is_shard(0) else Replicate()])
        if not placement.is_shard(1):
            return placed.to_local(
                grad_placements=[Partial()] if batch_sharded else placed.placements
            )
        is_first = placed.device_mesh.get_local_rank() == 0
        if not placed.requires_grad:
            return placed.to_local() if is_first else None
        # Every process must take part in the all-reduce of the bias's gradient.
        return placed.to_local(grad_placements=[Partial()]) * float(is_first)

    # Merging adds each shard of B A to the same shard of the weight; errors are maxima over all
    # shards.

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` [out_features, in_features] in float32 (float64 for a float64 layer),
        sharded like the weight.
        """
        weight, lora_A, lora_B = (cast(DTensor, p) for p in (self.weight, self.lora_A, self.lora_B))
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.scaling * (lora_B.to_local().to(dtype) @ lora_A.to_local().to(dtype))
        return from_local(delta, weight)

    def _merge_rows(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return super()._merge_rows(
            *(m.to_local() if isinstance(m, DTensor) else m for m in matrices)
        )

    def _all_finite(self, matrix: Tensor) -> bool:
        finite = torch.isfinite(cast(DTensor, matrix).to_local()).all()
        return not self._largest((~finite).float())

    def _merge_error(self, delta: Tensor) -> MergeError:
        local = cast(DTensor, delta).to_local()
        # A process whose shard is empty must still take part in the all-reduce.
        errors = self._merge_error_of(local) if local.numel() else local.new_zeros(2)
        return MergeError(*(self._largest(value) for value in errors))

    def _largest(self, value: Tensor) -> float:
        """The maximum over all processes."""
        value = value.clone()
        dist.all_reduce(
            value, dist.ReduceOp.MAX, group=cast(DTensor, self.weight).device_mesh.get_group()
        )
        return value.item()


@contextmanager
def _seeded_by_process(process: int, device: torch.device, enabled: bool) -> Iterator[None]:
    """Seed torch's generators differently on each process. Afterwards the CPU generator has
    advanced by one draw.
    """
    if not enabled:
        yield
        return
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed + process)
        yield

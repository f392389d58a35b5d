"""``LoRAShardedLinear``: LoRA on a linear layer that tensor parallelism has cut, each process running the op on its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from stablelora_kernels.functional import lora_linear
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError


def check_shards(weight: Any) -> None:
    """Raise ValueError unless ``weight`` is sharded as :class:`LoRAShardedLinear` can follow."""
    kind = weight.placements[0]
    if weight.device_mesh.ndim != 1 or not (kind.is_replicate() or type(kind) is Shard):
        raise ValueError(
            f"linear's weight must be replicated or cut along one of its sides, on a mesh of one dimension, got placements "
            f"{weight.placements} on {weight.device_mesh.ndim} dimensions"
        )


def follow(weight: DTensor, lora_A: Tensor, lora_B: Tensor, **source: Any) -> tuple[DTensor, DTensor]:
    """A [r, K] cut as the columns of the weight [N, K] are, and B [N, r] as its rows.

    The values are those of the mesh's first process, or as ``distribute_tensor``'s ``src_data_rank`` in ``source`` has it.
    """
    cut = weight.placements[0]

    def cut_along(whole: Tensor, side: int) -> DTensor:
        placements = [cut if cut.is_shard(side) else Replicate()]
        return distribute_tensor(whole.detach(), weight.device_mesh, placements, **source)

    return cut_along(lora_A, 1), cut_along(lora_B, 0)


class LoRAShardedLinear(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over a DTensor, as ``ColwiseParallel`` and ``RowwiseParallel`` make it.

    ``y = x W^T + bias + scaling · D(x) A^T B^T``, in DTensors of one mesh: B [N, r] is cut as the rows of the weight [N, K] are,
    A [r, K] as its columns. Each process computes base product and branch of its part in one op. Of columns that are cut the
    product is a sum over processes, and so is the branch, so that neither direction communicates more than the frozen layer
    does, but for the gradients of what all processes hold (A beside cut rows, B beside cut columns).

    ``LoRALinear.from_linear`` and ``apply_lora`` make it of a layer that is cut;
    :class:`~stablelora_kernels.tensor_parallel.LoRAColwiseParallel` and
    :class:`~stablelora_kernels.tensor_parallel.LoRARowwiseParallel` of a LoRALinear. A and B are drawn by the mesh's first
    process.

    Where processes hold one x, they draw one dropout mask as long as they seed torch alike; where each holds a part of x, the
    masks of the parts are independent all the same. The seed of the latter comes from torch's generator of the CPU.
    """

    @property
    def _cut(self) -> Placement:
        """How the weight is cut."""
        return cast(DTensor, self.weight).placements[0]

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw A and B anew, as a whole; ``init_lora_weights`` as in the constructor."""
        mine = self.lora_A, self.lora_B
        device = torch.device(cast(DTensor, self.weight).device_mesh.device_type)
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)) for p in mine)
        super().reset_lora_parameters(init_lora_weights)
        drawn = follow(cast(DTensor, self.weight), self.lora_A, self.lora_B)
        if isinstance(mine[0], DTensor):
            self.lora_A, self.lora_B = mine
            self.lora_A.copy_(drawn[0])
            self.lora_B.copy_(drawn[1])
        else:
            self.lora_A, self.lora_B = map(nn.Parameter, drawn)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] to [..., out_features], both DTensors, as the layer's own hooks make them.

        Raises:
            TypeError: ``x`` is none.
        """
        if not isinstance(x, DTensor):
            raise TypeError(
                f"x must be a DTensor beside a sharded weight, got a {type(x).__name__}; hooks that make it one must be this "
                "layer's, where apply_lora moves them"
            )
        if self.merged:
            return super().forward(x)
        last, cut = x.ndim - 1, self._cut
        split: Placement = Shard(last)
        # Of x and the result: what a process has of each. All have one x where the rows of W are cut; where its columns are, the
        # result is a sum over processes.
        if cut.is_shard():
            has, gives = (split, Partial()) if cut.is_shard(1) else (Replicate(), split)
        else:
            has = gives = (
                x.placements[0] if x.placements[0].is_shard() and not x.placements[0].is_shard(last) else Replicate()
            )
        x = x.redistribute(placements=[has])
        # Where a process holds a part of the rows of x, of what all hold it computes a part of the gradient; likewise where it
        # computes columns of the result of the x that all hold.
        rows = has.is_shard() and not cut.is_shard()
        weight, lora_A, lora_B = (cast(DTensor, p) for p in (self.weight, self.lora_A, self.lora_B))
        mesh = weight.device_mesh
        partial = [Partial()]
        operands = (
            x.to_local(grad_placements=partial if cut.is_shard(0) else [has]),
            weight.to_local(),
            self._local_bias(rows),
            lora_A.to_local(grad_placements=partial if rows or cut.is_shard(0) else lora_A.placements),
            lora_B.to_local(grad_placements=partial if rows or cut.is_shard(1) else lora_B.placements),
        )
        drops = self.training and self.lora_dropout > 0
        with _own_masks(mesh.get_local_rank(), x.device, drops and has.is_shard()):
            y = lora_linear(*operands, self.scaling, self.lora_dropout, self.training)
        shape = torch.Size((*x.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, mesh, [gives], run_check=False, shape=shape, stride=stride)

    def _local_bias(self, rows: bool) -> Tensor | None:
        """This process's part of the bias; where results are summed over processes, the first one adds it for all."""
        if (bias := self.bias) is None:
            return None
        cut = self._cut
        if not isinstance(bias, DTensor):
            raise TypeError(f"bias must be a DTensor beside a sharded weight, got a {type(bias).__name__}")
        part = bias.redistribute(placements=[Shard(0) if cut.is_shard(0) else Replicate()])
        if not cut.is_shard(1):
            return part.to_local(grad_placements=[Partial()] if rows else part.placements)
        first = part.device_mesh.get_local_rank() == 0
        if not part.requires_grad:
            return part.to_local() if first else None
        # Every process takes part in the gradient's sum.
        return part.to_local(grad_placements=[Partial()]) * float(first)

    # Merging: of each part the same part of B A is to be added, and the errors are the largest of all parts'.

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` [out_features, in_features] in float32 (float64 for a float64 layer), cut as the weight is."""
        weight, lora_A, lora_B = (cast(DTensor, p) for p in (self.weight, self.lora_A, self.lora_B))
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.scaling * (lora_B.to_local().to(dtype) @ lora_A.to_local().to(dtype))
        return _like(weight, delta)

    def _merge_rows(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return super()._merge_rows(*(m.to_local() if isinstance(m, DTensor) else m for m in matrices))

    def _all_finite(self, matrix: Tensor) -> bool:
        finite = torch.isfinite(cast(DTensor, matrix).to_local()).all()
        return not self._largest((~finite).float())

    def _merge_error(self, delta: Tensor) -> MergeError:
        mine = cast(DTensor, delta).to_local()
        # Processes without a part of a small weight take part in the collective.
        found = self._merge_error_of(mine) if mine.numel() else mine.new_zeros(2)
        return MergeError(*(self._largest(value) for value in found))

    def _largest(self, value: Tensor) -> float:
        """The largest of the processes' values."""
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX, group=cast(DTensor, self.weight).device_mesh.get_group())
        return value.item()


def _like(weight: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


@contextmanager
def _own_masks(process: int, device: torch.device, wanted: bool) -> Iterator[None]:
    """Torch's generators seeded for this process while the context lasts; as if one number had been drawn afterwards."""
    if not wanted:
        yield
        return
    seed = int(torch.randint(1 << 62, ()))
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed + process)
        yield

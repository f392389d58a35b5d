"""``LoRAShardedLinear``: LoRA on a frozen layer whose weight is a DTensor, as tensor parallelism makes it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from stablelora_kernels.functional import lora_branch
from stablelora_kernels.nn_bases import LoRABranchLinear


def check_shards(weight: Any) -> None:
    """Raise ValueError unless ``weight`` is sharded as :class:`LoRAShardedLinear` can follow."""
    kind = weight.placements[0]
    if weight.device_mesh.ndim != 1 or not (kind.is_replicate() or type(kind) is Shard):
        raise ValueError(
            f"linear's weight must be replicated or cut along one of its sides, on a mesh of one dimension, got placements "
            f"{weight.placements} on {weight.device_mesh.ndim} dimensions"
        )


class LoRAShardedLinear(LoRABranchLinear):
    """A :class:`~stablelora_kernels.nn_bases.LoRABranchLinear` over a DTensor.

    Each process adds its part of the branch to its part of the product.

    ``y = base_layer(x) + scaling · D(x) A^T B^T``, in DTensors of one mesh: B [N, r] is cut as the rows of the weight [N, K] are,
    A [r, K] as its columns. Of columns that are cut the product is a sum over processes, and so is the branch: neither
    direction communicates for it, but that a gradient of what all hold is summed where it is used.

    A and B are drawn by the mesh's first process. Dropout's mask is each process's own.
    """

    @property
    def _cut(self) -> Placement:
        """How the weight is cut."""
        return cast(DTensor, self.weight).placements[0]

    def _distribute(self, whole: Tensor, side: int) -> DTensor:
        """``whole``, cut along ``side`` if the weight is."""
        placement = self._cut if self._cut.is_shard(side) else Replicate()
        return distribute_tensor(whole.detach(), cast(DTensor, self.weight).device_mesh, [placement])

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Draw A and B anew, as a whole; ``init_lora_weights`` as in the constructor."""
        mine = self.lora_A, self.lora_B
        device = torch.device(cast(DTensor, self.weight).device_mesh.device_type)
        self.lora_A, self.lora_B = (nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)) for p in mine)
        super().reset_lora_parameters(init_lora_weights)
        drawn = self._distribute(self.lora_A, 1), self._distribute(self.lora_B, 0)
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
        base_out = cast(DTensor, self.base_layer(x)).redistribute(placements=[gives])
        # Where a process holds a part of the rows, of what all hold it computes a part of the gradient; likewise where it
        # computes columns of the result of the x that all hold.
        rows = has.is_shard() and not cut.is_shard()
        lora_A, lora_B = cast(DTensor, self.lora_A), cast(DTensor, self.lora_B)
        y = lora_branch(
            base_out.to_local(grad_placements=[Replicate() if gives.is_partial() else gives]),
            x.to_local(grad_placements=[Partial() if cut.is_shard(0) else has]),
            lora_A.to_local(grad_placements=[Partial() if rows or cut.is_shard(0) else lora_A.placements[0]]),
            lora_B.to_local(grad_placements=[Partial() if rows or cut.is_shard(1) else lora_B.placements[0]]),
            self.scaling,
            self.lora_dropout,
            self.training,
        )
        return DTensor.from_local(
            y, base_out.device_mesh, [gives], run_check=False, shape=base_out.shape, stride=base_out.stride()
        )

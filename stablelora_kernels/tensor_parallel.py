"""Column- and row-wise tensor parallelism for ``LoRALinear``: styles for torch's
``parallelize_module``.

    from torch.distributed.tensor.parallel import parallelize_module
    from stablelora_kernels.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel

    parallelize_module(block, mesh, {"q_proj": LoRAColwiseParallel(), "o_proj":
    LoRARowwiseParallel()})

They take the arguments of torch's ``ColwiseParallel`` and ``RowwiseParallel`` and treat any other
module as these do. So one plan serves a model in which only some linear layers have LoRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.projection_group import ATTRIBUTE, remove_projection_groups
from stablelora_kernels.nn.sharded import LoRAShardedLinear, shard_pair

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]


class LoRAColwiseParallel(ColwiseParallel):
    """torch's ``ColwiseParallel``, extended to :class:`~stablelora_kernels.LoRALinear`.

    It shards the rows of W [N, K], bias [N] and B [N, r] and replicates A [r, K], whose gradient is
    summed over the mesh. The layer becomes a
    :class:`~stablelora_kernels.nn.sharded.LoRAShardedLinear` in place and keeps its name in the
    model.

    Raises:
        NotImplementedError: the LoRA layer's weight is not a plain one, or is already sharded.
        ValueError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _parallelize(self, super()._apply, module, device_mesh)


class LoRARowwiseParallel(RowwiseParallel):
    """torch's ``RowwiseParallel``, extended to :class:`~stablelora_kernels.LoRALinear`.

    It shards the columns of W [N, K] and A [r, K] and replicates B [N, r], whose gradient is summed
    over the mesh, and the bias. The base product and the branch are summed over the mesh together,
    once.

    Raises:
        NotImplementedError, ValueError: as :class:`LoRAColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _parallelize(self, super()._apply, module, device_mesh)


def _parallelize(
    style: ColwiseParallel | RowwiseParallel,
    apply: Callable[[nn.Module, DeviceMesh], nn.Module],
    module: nn.Module,
    mesh: DeviceMesh,
) -> nn.Module:
    """Shard ``module`` as torch's style does by ``apply``; a LoRALinear with its A and B."""
    if not isinstance(module, LoRALinear):
        return apply(module, mesh)
    style_name = type(style).__name__
    if type(module) is not LoRALinear:
        raise NotImplementedError(
            f"{style_name} cuts a LoRALinear over a plain weight, got a {type(module).__name__}"
        )
    if module.merged:
        raise ValueError(
            f"{style_name} cuts a LoRALinear that is not merged, got a merged one; unmerge() first"
        )
    if ATTRIBUTE in module.__dict__:
        remove_projection_groups([module])
        warnings.warn(
            "fuse_projections does not reach layers that tensor parallelism has cut; they are computed one by one",
            RuntimeWarning,
            stacklevel=2,
        )
    # torch shards the weight and bias of an nn.Linear and adds its hooks. Move all of these to the
    # LoRA layer.
    linear = module.to_linear()
    apply(linear, mesh)
    rank: int | None = getattr(style, "src_data_rank", 0)
    # Older torch knows no src_data_rank.
    source = {} if rank == 0 else {"src_data_rank": rank}
    pair = shard_pair(cast(DTensor, linear.weight), module.lora_A, module.lora_B, **source)
    module.weight = cast(nn.Parameter, linear.weight)
    module.register_parameter("bias", cast("nn.Parameter | None", linear.bias))
    for name, sharded in zip(("lora_A", "lora_B"), pair, strict=True):
        module.register_parameter(
            name, nn.Parameter(sharded, requires_grad=getattr(module, name).requires_grad)
        )
    module._forward_pre_hooks.update(linear._forward_pre_hooks)
    module._forward_hooks.update(linear._forward_hooks)
    module.__class__ = LoRAShardedLinear
    return module

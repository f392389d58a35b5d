"""Column- and row-wise tensor parallelism for ``LoRALinear``: styles for torch's ``parallelize_module``.

    from torch.distributed.tensor.parallel import parallelize_module
    from stablelora_kernels.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel

    parallelize_module(block, mesh, {"q_proj": LoRAColwiseParallel(), "o_proj": LoRARowwiseParallel()})

They take the arguments of torch's ``ColwiseParallel`` and ``RowwiseParallel`` and do to any other module what these do, so that
one plan serves a model whose LoRA layers are some of its linear layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.projection_group import ATTRIBUTE
from stablelora_kernels.nn.sharded import LoRAShardedLinear, shard_pair

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]


class LoRAColwiseParallel(ColwiseParallel):
    """torch's ``ColwiseParallel``, for a :class:`~stablelora_kernels.LoRALinear` too.

    W [N, K], bias and B [N, r] are cut by rows. A [r, K] is whole in every process; its gradient is summed over the mesh.
    The layer becomes a :class:`~stablelora_kernels.nn.sharded.LoRAShardedLinear` in place, under its name in the model.

    Raises:
        NotImplementedError: a LoRA layer over another weight than a plain one, or cut already.
        ValueError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _parallelize(self, super()._apply, module, device_mesh)


class LoRARowwiseParallel(RowwiseParallel):
    """torch's ``RowwiseParallel``, for a :class:`~stablelora_kernels.LoRALinear` too.

    W [N, K] and A [r, K] are cut by columns. B [N, r] and the bias are whole in every process; B's gradient is summed over the
    mesh. The output is summed once, base product and branch together.

    Raises:
        NotImplementedError, ValueError: as :class:`LoRAColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _parallelize(self, super()._apply, module, device_mesh)


def _parallelize(
    style: Any, apply: Callable[[nn.Module, DeviceMesh], nn.Module], module: nn.Module, mesh: DeviceMesh
) -> nn.Module:
    if not isinstance(module, LoRALinear):
        return apply(module, mesh)
    name = type(style).__name__
    if type(module) is not LoRALinear:
        raise NotImplementedError(f"{name} cuts a LoRALinear over a plain weight, got a {type(module).__name__}")
    if module.merged:
        raise ValueError(f"{name} cuts a LoRALinear that is not merged, got a merged one; unmerge() first")
    if module.__dict__.pop(ATTRIBUTE, None) is not None:
        warnings.warn(
            "fuse_projections does not reach layers that tensor parallelism has cut; they are computed one by one",
            RuntimeWarning,
            stacklevel=2,
        )
    # torch cuts weight and bias, on a layer of its own kind; from there they and the hooks that it has put there are moved.
    linear = module.to_linear()
    apply(linear, mesh)
    source = {} if (rank := getattr(style, "src_data_rank", 0)) == 0 else {"src_data_rank": rank}
    pair = shard_pair(cast(DTensor, linear.weight), module.lora_A, module.lora_B, **source)
    module.weight = cast(nn.Parameter, linear.weight)
    module.register_parameter("bias", cast("nn.Parameter | None", linear.bias))
    for half, cut in zip(("lora_A", "lora_B"), pair, strict=True):
        module.register_parameter(half, nn.Parameter(cut, requires_grad=getattr(module, half).requires_grad))
    module._forward_pre_hooks.update(linear._forward_pre_hooks)
    module._forward_hooks.update(linear._forward_hooks)
    module.__class__ = LoRAShardedLinear
    return module

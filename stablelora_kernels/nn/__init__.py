"""The LoRA layers. The factory decides which of them goes over a layer, in the order in which they
are registered here.

``LoRAShardedLinear`` is imported at first use, because ``torch.distributed.tensor`` takes long to
import.
"""

from __future__ import annotations

from typing import Any

from stablelora_kernels.nn.experts import LoRAExperts, LoRAStack
from stablelora_kernels.nn.factory import is_conv1d, register
from stablelora_kernels.nn.linear import (
    LoRABranchLinear,
    LoRAConv1D,
    LoRALinear,
    has_plain_parameters,
)
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear, is_kernel_format
from stablelora_kernels.utils.tensors import is_sharded

__all__ = [
    "LoRABranchLinear",
    "LoRAConv1D",
    "LoRAExperts",
    "LoRALinear",
    "LoRAQuantizedLinear",
    "LoRAShardedLinear",
    "LoRAStack",
    "MergeError",
]


def _load_sharded() -> type[LoRALinear]:
    from stablelora_kernels.nn.sharded import LoRAShardedLinear

    return LoRAShardedLinear


def __getattr__(name: str) -> Any:
    if name == "LoRAShardedLinear":
        return _load_sharded()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register(is_conv1d, lambda: LoRAConv1D)
register(lambda base: is_sharded(base.weight), _load_sharded)
register(lambda base: is_kernel_format(base.weight), lambda: LoRAQuantizedLinear)
register(has_plain_parameters, lambda: LoRALinear)
# Any other layer computes its own product.
register(lambda base: True, lambda: LoRABranchLinear)

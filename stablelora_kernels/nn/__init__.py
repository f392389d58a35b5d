"""The layers, and the factory that chooses one for a module.

``LoRAShardedLinear`` is imported at first use: ``torch.distributed.tensor`` takes long to import.
"""

from __future__ import annotations

from typing import Any

from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.nn.merging import MergeError
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear

__all__ = [
    "LoRABranchLinear",
    "LoRAConv1D",
    "LoRALinear",
    "LoRAQuantisedLinear",
    "LoRAQuantizedLinear",
    "LoRAShardedLinear",
    "MergeError",
]

# The British spelling, by which it was known first.
LoRAQuantisedLinear = LoRAQuantizedLinear


def __getattr__(name: str) -> Any:
    if name == "LoRAShardedLinear":
        from stablelora_kernels.nn.sharded import LoRAShardedLinear

        return LoRAShardedLinear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

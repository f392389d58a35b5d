"""``LoRALinear``, and what spans layers: projection groups, gated MLPs, the loss, experts."""

from stablelora_kernels.nn.linear import LoRALinear

__all__ = ["LoRALinear"]

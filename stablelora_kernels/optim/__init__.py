"""The optimizer, its shrinkage as a hook of others, and the log of its pairs' stability."""

from stablelora_kernels.optim.stability import PairStability, StabilityLogger
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.stable_shrink import StableShrink

__all__ = ["PairStability", "StabilityLogger", "StableLoRAAdamW", "StableShrink"]

"""The optimizer, and the log of its pairs' stability."""

from stablelora_kernels.optim.stability import PairStability, StabilityLogger
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW

__all__ = ["PairStability", "StabilityLogger", "StableLoRAAdamW"]

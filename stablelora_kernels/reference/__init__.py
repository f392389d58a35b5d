"""The mathematics in plain PyTorch, written for reading: the oracle of every test.

Everything computes in the dtype of its arguments; tests pass float64. ``lora`` has the layer,
``optimizer`` has Algorithm 1, AdamW and stochastic rounding.
"""

from stablelora_kernels.reference.lora import (
    dropout_keep_ref,
    fp4_ref,
    fp8_ref,
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_experts_ref,
    lora_linear_cross_entropy_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    nf4_ref,
    philox_ref,
    unpack_mask,
)
from stablelora_kernels.reference.optimizer import (
    StableAdamWRef,
    adamw_ref,
    shrink_ref,
    stochastic_round_ref,
)

__all__ = [
    "StableAdamWRef",
    "adamw_ref",
    "dropout_keep_ref",
    "fp4_ref",
    "fp8_ref",
    "lora_branch_grads_ref",
    "lora_branch_ref",
    "lora_experts_ref",
    "lora_linear_cross_entropy_ref",
    "lora_linear_grads_ref",
    "lora_linear_ref",
    "nf4_ref",
    "philox_ref",
    "shrink_ref",
    "stochastic_round_ref",
    "unpack_mask",
]

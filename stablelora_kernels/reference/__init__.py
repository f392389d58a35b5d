"""The mathematics in plain PyTorch, written to be read: the oracle of every test, and not for speed.

Everything computes in the dtype it is given. Tests give float64. The layer is in ``lora``; the optimizer (Algorithm 1, AdamW,
stochastic rounding) is in ``optimizer``.
"""

from stablelora_kernels.reference.lora import (
    dropout_keep_ref,
    fp8_ref,
    lora_branch_grads_ref,
    lora_branch_ref,
    lora_linear_grads_ref,
    lora_linear_ref,
    nf4_ref,
    philox_ref,
)
from stablelora_kernels.reference.optimizer import StableAdamWRef, adamw_ref, shrink_ref, stochastic_round_ref

__all__ = [
    "StableAdamWRef",
    "adamw_ref",
    "dropout_keep_ref",
    "fp8_ref",
    "lora_branch_grads_ref",
    "lora_branch_ref",
    "lora_linear_grads_ref",
    "lora_linear_ref",
    "nf4_ref",
    "philox_ref",
    "shrink_ref",
    "stochastic_round_ref",
]

"""``lora_mlp``'s two calls on each backend."""

from __future__ import annotations

from stablelora_kernels.ops.lora_mlp.call import MLPBackwardCall, MLPForwardCall
from stablelora_kernels.ops.lora_mlp.torch import mlp_backward_torch, mlp_forward_torch
from stablelora_kernels.ops.lora_mlp.triton import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.ops.plans import Backend, on_torch

BACKENDS = {
    "triton": Backend(lora_mlp_fwd, lora_mlp_bwd),
    "torch": Backend(
        on_torch(MLPForwardCall.of, mlp_forward_torch),
        on_torch(MLPBackwardCall.of, mlp_backward_torch),
    ),
}

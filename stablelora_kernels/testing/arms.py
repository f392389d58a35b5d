"""What benchmarks time: eager LoRA and the layer of this library over one frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablelora_kernels.nn.linear import LoRALinear


class EagerLoRA(nn.Module):
    """LoRA written by hand: every product and sum is an operator of its own."""

    def __init__(
        self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.lora_A.t() @ self.lora_B.t() * self.scaling


def layer_arms(
    k: int, n: int, r: int, dropout: float, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Linear, EagerLoRA, LoRALinear]:
    """The frozen layer, eager LoRA and our layer over one frozen weight, with equal A and non-zero
    B, all in ``dtype``.
    """
    torch.manual_seed(0)
    frozen = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    ours = LoRALinear.from_linear(
        frozen, r=r, lora_alpha=2 * r, lora_dropout=dropout, lora_dtype=dtype
    )
    with torch.no_grad():
        ours.lora_B.normal_(std=0.02)
    eager = EagerLoRA(frozen, ours.lora_A.detach(), ours.lora_B.detach(), ours.scaling, dropout)
    return frozen, eager, ours

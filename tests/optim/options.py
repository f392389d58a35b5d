"""One table of StableLoRAAdamW's options: what the constructor gets, and what the float64 reference
is given for it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import make_pairs

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
COMMON: dict[str, Any] = {"lr": 5e-2, "shrink_ratio": 0.01, "weight_decay": 0.1}


@dataclass
class Row:
    """Options of the optimizer. ``meant`` has the reference's where they differ; moments and
    masters are not its own.
    """

    options: dict[str, Any] = field(default_factory=dict)
    meant: dict[str, Any] | None = None
    # The first is the one that a test of every row takes.
    dtypes: tuple[torch.dtype, ...] = (FP32, FP64, BF16, FP16)

    @property
    def moments(self) -> torch.dtype:
        return self.options.get("moments_dtype", FP32)

    @property
    def masters(self) -> bool:
        return self.options.get("master_weights", False)

    def pairs(self, dtype: torch.dtype | None = None, seed: int = 0) -> list[LoRAPair]:
        return make_pairs(dtype=dtype or self.dtypes[0], seed=seed)

    def optimizer(self, params: Any = None, **change: Any) -> StableLoRAAdamW:
        params = self.pairs() if params is None else params
        return StableLoRAAdamW(
            params, **{"seed": 5, **COMMON, **copy.deepcopy(self.options), **change}
        )

    def reference(self, pairs: list[LoRAPair], lone: list[torch.Tensor]) -> StableAdamWRef:
        own = {
            key: value
            for key, value in self.options.items()
            if key not in ("moments_dtype", "master_weights")
        }
        return StableAdamWRef(
            pairs, lone, **{**COMMON, **(own if self.meant is None else self.meant)}
        )


LOW, WHOLE = (BF16, FP16), (FP32, FP64)
OPTIONS = {
    "plain": Row(),
    "adamw": Row({"shrink_ratio": 0.0, "betas": (0.8, 0.95), "eps": 1e-6}),
    "maximize": Row({"maximize": True}),
    "clipped": Row({"max_grad_norm": 0.1}),
    "lora-plus": Row({"lr_ratio_B": 16.0}),
    "tensors": Row(
        {"lr": torch.tensor(2.0**-7), "weight_decay": torch.tensor(0.25), "shrink_ratio": torch.tensor(2.0**-6)},
        {"lr": 2.0**-7, "weight_decay": 0.25, "shrink_ratio": 2.0**-6},
    ),
    "a-beta-as-a-tensor": Row({"betas": (0.75, torch.tensor(0.96875))}, {"betas": (0.75, 0.96875)}),
    "pattern": Row(
        {"shrink_pattern": {"layer[02]": 0.03, "layer0": 0.9, "layer1": 0.0}},
        {"shrink_ratios": {"layer0": 0.03, "layer2": 0.03, "layer1": 0.0}},
    ),
    "never": Row({"stop_condition": "never"}),
    "masters": Row({"master_weights": True}, dtypes=LOW),
    "masters-clipped": Row({"master_weights": True, "max_grad_norm": 0.1}, dtypes=LOW),
    "bf16-moments": Row({"moments_dtype": BF16}, dtypes=(BF16, FP32)),
    "8-bit-moments": Row({"moments_dtype": torch.uint8}, dtypes=(FP32, BF16)),
    "masters-bf16-moments": Row({"master_weights": True, "moments_dtype": BF16}, dtypes=LOW),
    "masters-8-bit-moments-clipped": Row(
        {"master_weights": True, "moments_dtype": torch.uint8, "max_grad_norm": 0.1}, dtypes=LOW
    ),
    "all": Row(
        {"lr_ratio_B": 8.0, "shrink_pattern": {"layer1": 0.1}, "stop_condition": "never", "maximize": True},
        {"lr_ratio_B": 8.0, "shrink_ratios": {"layer1": 0.1}, "stop_condition": "never", "maximize": True},
    ),
}  # fmt: skip
# Of these, every kind of state: what a test takes that is about the state alone.
STORED = (
    "plain",
    "clipped",
    "tensors",
    "masters",
    "bf16-moments",
    "8-bit-moments",
    "masters-8-bit-moments-clipped",
)

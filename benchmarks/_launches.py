"""Every launch that dispatch can pick, made on the meta device: nothing is allocated and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from stablelora_kernels.dispatch import Choice, Device
from stablelora_kernels.ops.lora_linear import backward_launches, forward_launches

# One of each kind that the tables tell apart, in M, (N, K) and r.
ROWS = (8, 64, 512, 16384)
SIZES = ((4096, 4096), (512, 4096))
RANKS = (16, 32, 64, 128, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The default dtypes at every rank, with and without dropout, and the kernels that only force brings on; others at one.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str, tuple[int, ...]]] = {
    "bf16/fp32": (BF16, FP32, "highest", RANKS),
    "bf16": (BF16, BF16, "highest", (16, 128)),
    "fp16": (FP16, FP16, "highest", (16,)),
    "fp32": (FP32, FP32, "highest", (16,)),
    "tf32": (FP32, FP32, "high", (16,)),
}


def call_launches(
    device: Device, m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float,
    choice: Choice | None = None,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """The forward's and the backward's launches for a call with a bias, by the kernel that dispatch chooses or ``choice``."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x, w, bias, y, s = empty(m, k), empty(n, k), empty(n), empty(m, n), empty(m, r)
    a, b = empty(r, k, of=lora_dtype), empty(n, r, of=lora_dtype)
    seed = empty(1, of=torch.int64) if dropout_p else None
    forward = forward_launches(device, x, w, bias, a, b, s, y, seed, 1.5, dropout_p, choice)
    backward = backward_launches(
        device, x, y, w, a, b, s, seed, x, a, b, scaling=1.5, dropout_p=dropout_p, choice=choice
    )
    return forward, backward


def lora_linear_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for every kernel and config, some of them more than once."""
    before = torch.get_float32_matmul_precision()
    for name, (dtype, lora, precision, ranks) in DTYPES.items():
        torch.set_float32_matmul_precision(precision)
        try:
            for m, (n, k), r, p in product(ROWS, SIZES, ranks, (0.0, 0.1)):
                choices = [None, Choice("vendor", "")] if m == ROWS[-1] else [None]
                for choice in choices:
                    for launches in call_launches(device, m, n, k, r, dtype, lora, p, choice):
                        yield from ((name, launch) for launch in launches if hasattr(launch, "kernel"))
        finally:
            torch.set_float32_matmul_precision(before)

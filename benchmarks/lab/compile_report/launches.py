"""Every launch that dispatch can pick, made on the meta device: nothing is allocated and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from stablelora_kernels.dispatch.problem import MAX_FUSED_R, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.dry_run import branch_launches, call_launches, group_launches, quantized_launches
from stablelora_kernels.launch.lora_linear import forward_launches

# One of each kind that the tables tell apart, in M, (N, K) and r.
ROWS = (8, 64, 512, 16384)
SIZES = ((4096, 4096), (512, 4096))
RANKS = (16, 32, 64, 128, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The default dtypes at every rank, others at the one that is most used.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str, tuple[int, ...]]] = {
    "bf16/fp32": (BF16, FP32, "highest", RANKS),
    "bf16": (BF16, BF16, "highest", (16, 128)),
    "fp16": (FP16, FP16, "highest", (16,)),
    "fp32": (FP32, FP32, "highest", (16,)),
    "tf32": (FP32, FP32, "high", (16,)),
}


def lora_linear_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for every kernel and config, some of them more than once."""
    before = torch.get_float32_matmul_precision()
    for name, (dtype, lora, precision, ranks) in DTYPES.items():
        torch.set_float32_matmul_precision(precision)
        try:
            for m, (n, k), r, p in product(ROWS, SIZES, ranks, (0.0, 0.1)):
                # The table's choice; for many rows also the kernels that only force or autotuning selects.
                pairs: list[tuple[Choice | None, Choice | None]] = [(None, None)]
                if m == ROWS[-1]:
                    pairs.append((Choice("vendor", ""), Choice("vendor", "")))
                    if r <= MAX_FUSED_R and dtype != FP32:
                        pairs.append((None if p else Choice("fused", ""), Choice("fused", "")))
                for forward, backward in pairs:
                    for launches in call_launches(device, m, n, k, r, dtype, lora, p, forward, backward):
                        for launch in launches:
                            if hasattr(launch, "kernel"):
                                # Some products stay exact where TensorFloat-32 is allowed.
                                exact = dtype == FP32 and launch.constants["INPUT_PRECISION"] == "ieee"
                                yield "fp32" if exact else name, launch
            for m, r, p in product((64, ROWS[-1]), ranks, (0.0, 0.1)):
                for launches in branch_launches(device, m, 4096, 4096, r, dtype, lora, p):
                    yield from ((name, launch) for launch in launches)
            if dtype != FP32:
                yield from ((name, launch) for launch in _broadcast(device, dtype, lora))
        finally:
            torch.set_float32_matmul_precision(before)


def quantized_lora_linear_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for the kernels that read a quantized weight; the others of such a call are above."""
    calls = [("bf16/fp32", m, 4096, r, kind) for m, r, kind in product((8, 64, 256, 4096), (16, 64), ("nf4", "fp8"))]
    calls += [("fp32", 8, 4096, 16, kind) for kind in ("nf4", "fp8")]
    # Bytes and blocks that lie across rows.
    calls += [("bf16/fp32", 64, 4113, 16, kind) for kind in ("nf4", "fp8")]
    for (name, m, k, r, kind), p in product(calls, (0.0, 0.1)):
        dtype, lora = DTYPES[name][:2]
        for launches in quantized_launches(device, m, 4096, k, r, dtype, lora, p, kind):
            yield from (
                (name, launch) for launch in launches if hasattr(launch, "kernel") and "NF4" in launch.constants
            )


def lora_linear_group_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for projections that share X: the launches that single projections lack."""
    before = torch.get_float32_matmul_precision()
    for name, (dtype, lora, precision, ranks) in DTYPES.items():
        torch.set_float32_matmul_precision(precision)
        try:
            for m, ns, r, p in product((64, 512, ROWS[-1]), ((4096, 1024, 1024), (14336, 14336)), ranks, (0.0, 0.1)):
                for launches in group_launches(device, m, ns, 4096, r, dtype, lora, p):
                    for launch in launches:
                        if not hasattr(launch, "kernel"):
                            continue
                        if "MEMBERS" in launch.constants or launch.constants.get("ADD"):
                            exact = dtype == FP32 and launch.constants["INPUT_PRECISION"] == "ieee"
                            yield "fp32" if exact else name, launch
        finally:
            torch.set_float32_matmul_precision(before)


def _broadcast(device: Device, dtype: torch.dtype, lora_dtype: torch.dtype) -> Iterator[Any]:
    """Forwards of one row repeated by expand(), which no descriptor can hold: what the pointers' kernel is for on Hopper."""
    m, n, k = 4096, 4096, 4096

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    for r, kernel in ((16, "fused"), (16, "split"), (64, "split")):
        a, b = empty(r, k, of=lora_dtype), empty(n, r, of=lora_dtype)
        x, w, y = empty(1, k).expand(m, k), empty(n, k), empty(m, n)
        launches = forward_launches(device, x, w, None, a, b, None, y, None, 1.0, 0.0, Choice(kernel, ""))
        if device.tma:
            yield launches[-1]._replace(variant=f"{launches[-1].variant} broadcast")

"""One launch of a kernel: what it needs, and how it is run and counted."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from stablelora_kernels.dispatch.problem import Device


class Launch(NamedTuple):
    """A kernel and all that its launch needs, not launched yet."""

    kernel: Any
    # The kernel's variant, in words, and the reason for its tile.
    variant: str
    reason: str
    grid: tuple[int, ...]
    # Arguments in the kernel's order, then those that are compile-time constants, then Triton's options.
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        launch(self.kernel, self.grid, device, *self.args, **self.constants, **self.options)


# Launches since the process started, by kernel; tests and benchmarks take differences.
launch_counts: Counter[str] = Counter()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` once on ``device``'s current stream."""
    launch_counts[kernel.__name__] += 1
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        # Said outright: Triton 3.10 changes the default, which would change results.
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def input_precision(device: Device, dtype: torch.dtype, transposed: bool = False) -> str:
    """What float32 products are computed in: as PyTorch's own, exact unless TensorFloat-32 was allowed and is there.

    ``transposed``: the operand is contiguous across the sum. TensorFloat-32's instructions want it along the sum, for which it
    would be loaded 4 bytes at a time; products that are bound by loading stay exact instead.
    """
    if dtype != torch.float32 or transposed or not device.tf32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"

"""One launch of a kernel: everything it needs, and how it runs and is counted."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from stablelora_kernels.dispatch.tiles import Tile


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Any
    # The kernel's variant in words, and the reason for its tile.
    variant: str
    reason: str
    grid: tuple[int, ...]
    # Arguments in the kernel's order, its compile-time constants, Triton's options.
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
    with on_device(device):
        # Explicit, because Triton 3.10 changes the default, which would change results.
        kernel[grid](*args, enable_fp_fusion=True, **meta)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one. Triton compiles, loads and launches for that, whatever the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tile_options(tile: Tile) -> dict[str, Any]:
    """Triton's options for a launch with ``tile``."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def tile_blocks(tile: Tile) -> dict[str, int]:
    """The constants BLOCK_M, BLOCK_N and BLOCK_K."""
    return {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}


def flag_words(**flags: bool) -> str:
    """The names of the flags that are on, each behind a space."""
    return "".join(f" {name}" for name, on in flags.items() if on)

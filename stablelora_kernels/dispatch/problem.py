"""A GPU and a call of an op as plain sizes, and the rows of the tables that ask about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """The properties of a GPU that the tables ask about."""

    # "sm_90", "gfx942"
    arch: str
    # Streaming multiprocessors, or compute units.
    processors: int
    # Bytes of shared memory that one program may use.
    shared_limit: int

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def generation(self) -> int:
        """NVIDIA's compute capability times ten, 0 for other makers."""
        return _generation(self.arch)

    @property
    def tma(self) -> bool:
        """True on GPUs whose MMA reads shared memory while TMA fills it (Hopper and later): use the
        TMA kernel.
        """
        return self.shared_limit >= 200_000 and self.generation >= 90

    @property
    def tf32(self) -> bool:
        """Whether the GPU has TensorFloat-32 products."""
        return self.generation >= 80 or self.arch == "gfx942"


@cache
def _generation(arch: str) -> int:
    # Cached: a call asks ten times.
    return int(arch[3:]) if arch.startswith("sm_") else 0


# One of each kind that the kernels are compiled for, with the processors of the model named.
DEVICES = {
    d.arch: d
    for d in (
        Device("sm_80", 108, 166_912),  # A100
        Device("sm_86", 84, 101_376),  # A40
        Device("sm_89", 142, 101_376),  # L40S
        Device("sm_90", 132, 232_448),  # H100
        Device("sm_100", 148, 232_448),  # B200
        Device("sm_120", 170, 101_376),  # RTX 5090
        Device("gfx90a", 104, 65_536),  # MI250X, one of its two dies
        Device("gfx942", 304, 65_536),  # MI300X
    )
}


# The GPUs that are named after each kind, in words for messages.
GPU_NAMES = {
    "sm_80": "A100", "sm_86": "A40, RTX 3090", "sm_89": "L4, L40S, RTX 4090", "sm_90": "H100, H200", "sm_100": "B200",
    "sm_120": "RTX 5090", "gfx90a": "MI250X", "gfx942": "MI300X",
}  # fmt: skip


@cache
def device_of(device: torch.device) -> Device:
    """The GPU behind ``device``; an H100 where the interpreter stands in for one."""
    if device.type != "cuda":
        return DEVICES["sm_90"]
    import triton

    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    return Device(arch_of(properties), properties.multi_processor_count, limits["max_shared_mem"])


def arch_of(properties: Any) -> str:
    """``"sm_90"`` or ``"gfx942"``, from the answer of ``torch.cuda.get_device_properties``."""
    return (
        properties.gcnArchName.split(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}"
    )


class Call(NamedTuple):
    """A product with its LoRA branch: the forward's, [M, K] by [N, K]^T, or dX's, with K and N
    swapped.
    """

    # "forward" or "backward".
    direction: str
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    dropout: bool
    # Whether the kernel adds to Y's earlier values: dX of the second and third projection of one X.
    add: bool = False
    # Whether Y is dH of a gated MLP, whose tiles turn into dG's and dU's.
    gated: bool = False

    @property
    def masked(self) -> bool:
        """Whether dropout masks the branch's result (backward) rather than X (forward)."""
        return self.dropout and self.direction == "backward"


# Up to so many rows, reading W bounds a product, with or without S.
SMALL_M = 64
# Most projections that share one read of X: q, k and v.
MAX_GROUP = 3
# Largest block of ranks beside a product's accumulator: the largest rank where programs compute S
# themselves, and of projections that share a launch for S.
MAX_BLOCK_R = 64
# Up to so many rows, a product's own loop dequantizes W.
IN_LOOP_M = 128
# Largest rank of a chained launch, whose programs of S have the product's registers: one block of
# ranks, read once.
MAX_CHAINED_R = 128


class Rule(NamedTuple):
    """A row of a table."""

    # Takes a device, a call and whatever else the table asks about.
    applies: Callable[..., bool]
    choice: Any
    reason: str


def first(rules: Iterable[Rule], *asked: Any) -> tuple[Any, str]:
    """The choice and the reason of the first row that applies."""
    return next((rule.choice, rule.reason) for rule in rules if rule.applies(*asked))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's cdiv takes 5 times as long, and a call needs a dozen."""
    return -(-a // b)

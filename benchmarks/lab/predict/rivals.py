"""The launches of rivals, forward and backward, as bytes and operations, read from their published
source code in November 2026.

An activation pass is a read or a write of one [M, K] or [M, N] matrix in 16 bits. The counts of
passes beyond the frozen layer are 21 for PEFT with dropout, 10 for Unsloth, 9 for Axolotl, 6 for
LoRAFusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.lab.predict.launch_time import Work

BF16 = torch.bfloat16
# Bytes of an element of an activation.
E = BF16.itemsize
# The launches of forward and of backward.
Ways = tuple[list[Any], list[Any]]


class Shape(NamedTuple):
    """A layer: [m, k] to [m, n] at rank r."""

    m: int
    n: int
    k: int
    r: int
    dropout: bool
    # Of A and B, whose activations are in 16 bits: float32, as in PEFT, or 16 bits too.
    wide_adapters: bool = True

    @property
    def p(self) -> float:
        """Dropout's probability."""
        return 0.1 if self.dropout else 0.0

    @property
    def lora_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide_adapters else BF16

    def thin(self, columns: int, *names: str) -> list[Work]:
        """Products of the vendor's library between matrices of [m, columns], [m, r] and [columns,
        r], each moved once.
        """
        moved = self.m * columns + (self.m + columns) * self.r
        return [Work(name, E * moved, 2.0 * self.m * columns * self.r) for name in names]

    def added(self, columns: int, name: str) -> list[Work]:
        """[m, r] by [r, columns], added to its output in one launch."""
        return [
            work._replace(bytes=work.bytes + E * self.m * columns)
            for work in self.thin(columns, name)
        ]


def passes(name: str, elements: int, *counts: float) -> list[Work]:
    """Elementwise launches, each of which reads or writes ``elements`` elements so many times."""
    return [Work(name, E * elements * count) for count in counts]


def frozen(s: Shape) -> Ways:
    moved, flops = E * (s.m * s.k + s.k * s.n + s.m * s.n), 2.0 * s.m * s.n * s.k
    # The time of a product with a frozen weight depends on how its tiles fill the GPU.
    return [Work("Y", moved, flops, (s.m, s.n, s.k))], [Work("dX", moved, flops, (s.m, s.k, s.n))]


def dropout(s: Shape) -> list[Work]:
    """PyTorch's. The mask is a byte an element, half a pass."""
    return passes("dropout", s.m * s.k, 2.5) if s.dropout else []


def eager(s: Shape) -> Ways:
    """PEFT's operators in 16 bits, one launch each."""
    (forward, backward), x, y = frozen(s), s.m * s.k, s.m * s.n
    # T = S B^T; T *= s; Y += T.
    forward += dropout(s) + s.thin(s.k, "S") + s.thin(s.n, "T") + passes("T", y, 2, 3)
    # dT = s dY; dD = dS A; dX += dD.
    backward += (
        passes("dT", y, 2)
        + s.thin(s.n, "dB", "dS")
        + s.thin(s.k, "dA", "dD")
        + dropout(s)
        + passes("dX", x, 3)
    )
    return forward, backward


def unsloth(s: Shape) -> Ways:
    """Products into products (addmm), X A^T again and dY B twice."""
    forward, backward = frozen(s)
    forward += s.thin(s.k, "S") + s.added(s.n, "Y")
    backward += (
        s.thin(s.n, "dY B", "dB", "dY B again") + s.thin(s.k, "dA", "S") + s.added(s.k, "dX")
    )
    return forward, backward


def axolotl(s: Shape) -> Ways:
    """As Unsloth, with dY B kept."""
    forward, backward = unsloth(s)
    return forward + dropout(s), [work for work in backward if work.name != "dY B again"] + dropout(
        s
    )


# Rows and columns of a tile of LoRAFusion's products, by architecture: lorafusion/ops/triton_ops/
# config.py at commit 561bce5 has an H100's, an A100's and an RTX 3090's, and knows no other GPU.
# Consumer GPUs get the RTX 3090's here, a B200 the H100's. They are the same for any number of
# rows.
LORAFUSION_TILES = {
    "sm_80": (128, 128),
    "sm_89": (64, 128),
    "sm_90": (128, 256),
    "sm_100": (128, 256),
    "sm_120": (64, 128),
}


def lorafusion(s: Shape, arch: str = "sm_90") -> Ways:
    """Dropout's kernel, the vendor's S, the product with its epilogue; backward in three kernels
    and two zero-fills.
    """
    m, n, k, r = s.m, s.n, s.k, s.r

    def with_epilogue(base: Work, columns: int, mask: float = 0.0) -> Work:
        return base._replace(
            bytes=base.bytes + E * r * (m + columns) + mask,
            flops=base.flops + 2.0 * m * columns * r,
            tile=LORAFUSION_TILES[arch],
        )

    (y,), (dx,) = frozen(s)
    drop = passes("dropout", m * k, 2) if s.dropout else []
    backward = [
        Work("zero-fills", 4.0 * r * (k + n)),
        Work("dS and dB", E * m * n + 8.0 * n * r, 4.0 * m * n * r),
        Work("dA", E * m * k + 8.0 * k * r, 2.0 * m * k * r),
        # The mask comes from memory again, a byte an element, and the masked branch's gradient
        # passes through half a pass.
        with_epilogue(dx, k, E * m * k if s.dropout else 0.0),
    ]
    return [*drop, *s.thin(k, "S"), with_epilogue(y, n)], backward


class Gain(NamedTuple):
    """How many times faster than eager LoRA a rival's authors measured its layers to be."""

    mean: float
    best: float


def published_ratio(arch: str, case: Shape | MLP) -> Gain | None:
    """LoRAFusion's gain over eager LoRA on an H100 with dropout, rank 16, square layers of 4,096 to
    8,192 features and 2,048 to 8,192 rows: arXiv 2510.00206, abstract and figure of kernels.

    It is taken for all layers of 2,048 rows and more with dropout. The least gain is in a figure
    alone, so the mean stands for it.
    """
    known = arch == "sm_90" and isinstance(case, Shape) and case.dropout and case.m >= 2048
    return Gain(mean=1.27, best=1.39) if known else None


FROZEN, PEFT, UNSLOTH, LORAFUSION = "frozen", "eager (PEFT)", "Unsloth", "LoRAFusion"
# Unsloth has no dropout.
RIVALS: dict[str, Callable[[Shape], Ways]] = {
    FROZEN: frozen, PEFT: eager, UNSLOTH: unsloth, "Axolotl": axolotl, LORAFUSION: lorafusion,
}  # fmt: skip


class MLP(NamedTuple):
    """A gated MLP: [m, k] to [m, k] by f features."""

    m: int
    k: int
    f: int
    r: int
    dropout: bool = False

    def layers(self) -> tuple[Shape, Shape, Shape]:
        """Gate, up and down."""
        wide = Shape(self.m, self.f, self.k, self.r, self.dropout)
        return wide, wide, wide._replace(n=self.k, k=self.f)


# Passes over [M, F] of the activation's launches, forward and backward. PEFT runs it by PyTorch's
# operators: silu and a product forward, three products backward. Unsloth has a kernel each way: G
# and U to H, and dH, G and U to H, dG and dU.
ACTIVATION = {FROZEN: ((3,), (5,)), PEFT: ((2, 3), (3, 3, 3)), UNSLOTH: ((3,), (6,))}


def join(mlp: MLP, layers: Sequence[Ways], activation: str) -> Ways:
    """The launches of three layers, of a rival's activation between them, and of the addition of
    both dX.
    """
    forward, backward = (
        [launch for way in ways for launch in way] for ways in zip(*layers, strict=True)
    )
    for way, counts in zip((forward, backward), ACTIVATION[activation], strict=True):
        way += passes("activation", mlp.m * mlp.f, *counts)
    return forward, backward + passes("both dX", mlp.m * mlp.k, 3)


def rival(name: str, case: Shape | MLP, arch: str) -> Ways:
    """The launches of a layer or of a gated MLP on a GPU of this architecture."""
    if isinstance(case, Shape):
        return lorafusion(case, arch) if name == LORAFUSION else RIVALS[name](case)
    return join(case, [RIVALS[name](shape) for shape in case.layers()], name)

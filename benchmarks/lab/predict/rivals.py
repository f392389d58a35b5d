"""The launches of rivals, forward and backward, as bytes and operations. Facts are from shared/peers.md.

An activation pass is a read or a write of one [M, K] or [M, N] matrix in 16 bits. The counts of passes beyond the frozen
layer are peers.md's: 21 for PEFT with dropout, 10 for Unsloth, 9 for Axolotl, 6 for LoRAFusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.lab.predict.launch_time import Work

BF16 = torch.bfloat16
# Bytes of an element of an activation.
E = BF16.itemsize


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


def product(name: str, m: int, n: int, k: int, wide: bool = False) -> Work:
    """[m, k] by [k, n] by the vendor's library, each operand read once.

    The time of a ``wide`` one, where none of the sizes is a rank, depends on how its tiles fill the GPU.
    """
    return Work(name, E * (m * k + k * n + m * n), 2.0 * m * n * k, (m, n, k) if wide else None)


def added(name: str, m: int, n: int, r: int) -> Work:
    """[m, r] by [r, n], added to its output in one launch."""
    return Work(name, E * (2 * m * n + m * r + n * r), 2.0 * m * n * r)


def passes(name: str, elements: int, count: float) -> Work:
    """An elementwise launch that reads or writes ``elements`` elements ``count`` times."""
    return Work(name, E * elements * count)


# The launches of forward and of backward.
Ways = tuple[list[Work], list[Work]]


def frozen(s: Shape) -> Ways:
    return [product("Y = X W^T", s.m, s.n, s.k, wide=True)], [product("dX = dY W", s.m, s.k, s.n, wide=True)]


def eager(s: Shape) -> Ways:
    """PEFT's operators in 16 bits, one launch each; without dropout it has three launches fewer."""
    m, n, k, r = s.m, s.n, s.k, s.r
    base_forward, base_backward = frozen(s)
    # The mask is a byte an element, half a pass.
    drop = [passes("dropout", m * k, 2.5)] if s.dropout else []
    undrop = [passes("dropout backward", m * k, 2.5)] if s.dropout else []
    forward = [
        *base_forward,
        *drop,
        product("S = D(X) A^T", m, r, k),
        product("T = S B^T", m, n, r),
        passes("T *= s", m * n, 2),
        passes("Y += T", m * n, 3),
    ]
    backward = [
        *base_backward,
        passes("dT = s dY", m * n, 2),
        product("dB = dT^T S", n, r, m),
        product("dS = dT B", m, r, n),
        product("dA = dS^T D(X)", r, k, m),
        product("dD = dS A", m, k, r),
        *undrop,
        passes("dX += dD", m * k, 3),
    ]
    return forward, backward


def unsloth(s: Shape) -> Ways:
    """Products into products (addmm), dY B twice; it has no dropout."""
    m, n, k, r = s.m, s.n, s.k, s.r
    base_forward, base_backward = frozen(s)
    forward = [*base_forward, product("S = X A^T", m, r, k), added("Y += s S B^T", m, n, r)]
    backward = [
        product("dY B", m, r, n),
        product("dA", r, k, m),
        product("X A^T", m, r, k),
        product("dB", n, r, m),
        *base_backward,
        product("dY B again", m, r, n),
        added("dX += (dY B) A", m, k, r),
    ]
    return forward, backward


def axolotl(s: Shape) -> Ways:
    """As Unsloth, with dY B kept; with dropout, PyTorch's."""
    forward, backward = unsloth(s)
    backward = [work for work in backward if work.name != "dY B again"]
    if s.dropout:
        forward.insert(1, passes("dropout", s.m * s.k, 2.5))
        backward.append(passes("dropout backward", s.m * s.k, 2.5))
    return forward, backward


def lorafusion(s: Shape) -> Ways:
    """Dropout's kernel, the vendor's S, the product with its epilogue; backward in three kernels and two zero-fills."""
    m, n, k, r = s.m, s.n, s.k, s.r

    def with_epilogue(base: Work, columns: int, mask: float = 0.0) -> Work:
        return base._replace(bytes=base.bytes + E * r * (m + columns) + mask, flops=base.flops + 2.0 * m * columns * r)

    (base_forward,), (base_backward,) = frozen(s)
    drop = [passes("dropout", m * k, 2)] if s.dropout else []
    forward = [*drop, product("S = D(X) A^T", m, r, k), with_epilogue(base_forward, n)]
    backward = [
        Work("zero-fills", 4.0 * r * (k + n)),
        Work("dS and dB", E * m * n + 8.0 * n * r, 4.0 * m * n * r),
        Work("dA", E * m * k + 8.0 * k * r, 2.0 * m * k * r),
        # The mask comes from memory again, a byte an element, and the masked branch's gradient passes through half a pass.
        with_epilogue(base_backward, k, E * m * k if s.dropout else 0.0),
    ]
    return forward, backward


FROZEN, PEFT, UNSLOTH, LORAFUSION = "frozen", "eager (PEFT)", "Unsloth", "LoRAFusion"
RIVALS: dict[str, Callable[[Shape], Ways]] = {
    FROZEN: frozen,
    PEFT: eager,
    # It has no dropout.
    UNSLOTH: unsloth,
    "Axolotl": axolotl,
    LORAFUSION: lorafusion,
}


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


# Passes over [M, F] of the activation's launches, forward and backward. PEFT runs it by PyTorch's operators: silu and a product
# forward, three products backward. Unsloth has a kernel each way: G and U to H, and dH, G and U to H, dG and dU.
ACTIVATION = {FROZEN: ((3,), (5,)), PEFT: ((2, 3), (3, 3, 3)), UNSLOTH: ((3,), (6,))}


def join(mlp: MLP, layers: Sequence[tuple[list[Any], list[Any]]], activation: str) -> tuple[list[Any], list[Any]]:
    """The launches of three layers, of a rival's activation between them, and of the addition of both dX."""
    forward, backward = ([launch for way in ways for launch in way] for ways in zip(*layers, strict=True))
    for way, counts in zip((forward, backward), ACTIVATION[activation], strict=True):
        way += [passes("activation", mlp.m * mlp.f, count) for count in counts]
    return forward, [*backward, passes("both dX", mlp.m * mlp.k, 3)]


def rival(name: str, case: Shape | MLP) -> Ways:
    """The launches of a layer or of a gated MLP."""
    if isinstance(case, Shape):
        return RIVALS[name](case)
    return join(case, [RIVALS[name](shape) for shape in case.layers()], name)

"""Each rival's launches for one LoRA layer, forward and backward, as bytes and operations. Facts are from shared/peers.md.

An activation pass is a read or a write of one [M, K] or [M, N] matrix in 16 bits. The counts of passes beyond the frozen
layer are peers.md's: 21 for PEFT with dropout, 10 for Unsloth, 9 for Axolotl, 6 for LoRAFusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Work(NamedTuple):
    """One launch: bytes from and to memory, matrix operations, and for a wide product [m, k] by [k, n] its sizes (m, n, k)."""

    name: str
    bytes: float
    flops: float = 0.0
    sizes: tuple[int, int, int] | None = None


class Shape(NamedTuple):
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


E = 2
"""Bytes of an element of an activation."""


def product(name: str, m: int, n: int, k: int) -> Work:
    """[m, k] by [k, n] by the vendor's library, each operand read once, where one of the sizes is a rank."""
    return Work(name, E * (m * k + k * n + m * n), 2.0 * m * n * k)


def wide(name: str, m: int, n: int, k: int) -> Work:
    """[m, k] by [k, n] with a frozen weight, whose time depends on how its tiles fill the GPU."""
    return product(name, m, n, k)._replace(sizes=(m, n, k))


def passes(name: str, elements: float, count: float) -> Work:
    """An elementwise launch that reads or writes ``elements`` elements ``count`` times."""
    return Work(name, E * elements * count)


def frozen(s: Shape) -> tuple[list[Work], list[Work]]:
    return [wide("Y = X W^T", s.m, s.n, s.k)], [wide("dX = dY W", s.m, s.k, s.n)]


def eager(s: Shape) -> tuple[list[Work], list[Work]]:
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


def unsloth(s: Shape) -> tuple[list[Work], list[Work]]:
    """Products into products (addmm), dY B twice; it has no dropout."""
    m, n, k, r = s.m, s.n, s.k, s.r
    base_forward, base_backward = frozen(s)
    forward = [
        *base_forward,
        product("S = X A^T", m, r, k),
        Work("Y += s S B^T", E * (2 * m * n + m * r + n * r), 2.0 * m * n * r),
    ]
    backward = [
        product("dY B", m, r, n),
        product("dA", r, k, m),
        product("X A^T", m, r, k),
        product("dB", n, r, m),
        *base_backward,
        product("dY B again", m, r, n),
        Work("dX += (dY B) A", E * (2 * m * k + m * r + k * r), 2.0 * m * k * r),
    ]
    return forward, backward


def axolotl(s: Shape) -> tuple[list[Work], list[Work]]:
    """As Unsloth, with dY B kept; with dropout, PyTorch's."""
    forward, backward = unsloth(s)
    backward = [work for work in backward if work.name != "dY B again"]
    if s.dropout:
        forward.insert(1, passes("dropout", s.m * s.k, 2.5))
        backward.append(passes("dropout backward", s.m * s.k, 2.5))
    return forward, backward


def lorafusion(s: Shape) -> tuple[list[Work], list[Work]]:
    """Dropout's kernel, the vendor's S, the product with its epilogue; backward in three kernels and two zero-fills."""
    m, n, k, r = s.m, s.n, s.k, s.r
    base_forward, base_backward = frozen(s)
    fused_forward = Work(
        "Y with epilogue", base_forward[0].bytes + E * r * (m + n), base_forward[0].flops + 2.0 * m * n * r, (m, n, k)
    )
    fused_backward = Work(
        "dX with epilogue",
        base_backward[0].bytes + E * r * (m + k),
        base_backward[0].flops + 2.0 * m * k * r,
        (m, k, n),
    )
    forward = [
        *([passes("dropout", m * k, 2)] if s.dropout else []),
        product("S = D(X) A^T", m, r, k),
        fused_forward,
    ]
    backward = [
        Work("zero-fills", 4.0 * r * (k + n)),
        Work("dS and dB", E * m * n + 8.0 * n * r, 4.0 * m * n * r),
        Work("dA", E * m * k + 8.0 * k * r, 2.0 * m * k * r),
        # The mask comes from memory again, a byte an element, and the masked branch's gradient passes through half a pass.
        fused_backward._replace(bytes=fused_backward.bytes + (E * m * k if s.dropout else 0.0)),
    ]
    return forward, backward


RIVALS: dict[str, Callable[[Shape], tuple[list[Work], list[Work]]]] = {
    "frozen": frozen,
    "eager (PEFT)": eager,
    "Unsloth": unsloth,
    "Axolotl": axolotl,
    "LoRAFusion": lorafusion,
}
# Rivals that have no dropout.
WITHOUT_DROPOUT = ("Unsloth",)

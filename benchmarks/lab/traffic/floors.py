"""The least bytes of each operation, and what an optimizer step moves, by formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.lab.traffic.formula import Traffic, total
from stablelora_kernels.dispatch.problem import cdiv
from stablelora_kernels.optim.state import Pair
from stablelora_kernels.optim.triton_engine import TritonStep

# Floors: every operand is read once, every result written once.


def _floor(read: int, written: int) -> Traffic:
    return Traffic(read, written, read, written)


def floor_frozen_forward(
    m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True, weight: int | None = None
) -> Traffic:
    """Y = X W^T + bias: X, W and bias read, Y written. ``weight``: bytes of W, where it is quantized."""
    weight = n * k * dtype.itemsize if weight is None else weight
    return _floor((m * k + n * bias) * dtype.itemsize + weight, m * n * dtype.itemsize)


def floor_frozen_backward(m: int, n: int, k: int, dtype: torch.dtype, weight: int | None = None) -> Traffic:
    """dX = dY W: dY and W read, dX written."""
    weight = n * k * dtype.itemsize if weight is None else weight
    return _floor(m * n * dtype.itemsize + weight, m * k * dtype.itemsize)


def floor_lora(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    dropout: bool = False,
    bias: bool = True,
    weight: int | None = None,
) -> tuple[Traffic, Traffic]:
    """A LoRA layer's forward and backward, the latter for dX, dA and dB.

    As the frozen layer's, with A, B and dropout's seed read in both, X read in backward, dA and dB written. Not S: it could be
    computed again from X and A, which backward reads anyway.
    """
    adapters, seed = r * (n + k) * lora_dtype.itemsize, 8 * dropout
    forward = floor_frozen_forward(m, n, k, dtype, bias, weight)
    backward = floor_frozen_backward(m, n, k, dtype, weight)
    return (
        total((forward, _floor(adapters + seed, 0))),
        total((backward, _floor(m * k * dtype.itemsize + adapters + seed, adapters))),
    )


def floor_optimizer(numels: Sequence[int], itemsizes: Sequence[int]) -> Traffic:
    """p, g, m and v read; p, m and v written; the moments are float32."""
    elements, bytes_of_p = sum(numels), sum(numel * size for numel, size in zip(numels, itemsizes, strict=True))
    return _floor(2 * bytes_of_p + 8 * elements, bytes_of_p + 8 * elements)


def optimizer_formula(numels: Sequence[int], itemsizes: Sequence[int], pairs: Sequence[Pair], latched: bool) -> Traffic:
    """One step of one group, every parameter with a gradient, none clipped, unscaled; the pairs all shrink or have latched."""
    chunks = [max(1, cdiv(numel, TritonStep.CHUNK)) for numel in numels]
    every, n = sum(chunks), len(chunks)
    a_chunks = sum(chunks[a] for a, _ in pairs)
    shrinking = 0 if latched else a_chunks
    # Each program: its chunk's tensor 4, addresses 16, turn 1, step 4, eight columns of its tensor 64, ten hyper-parameters 40,
    # a word and an address 16. One of an A: whether it latched 4; while it shrinks, six columns more 48, the ratio 4, the sums.
    sums = 0 if latched else 4 * sum(chunks[a] * (chunks[a] + chunks[b]) for a, b in pairs)
    spans = 0 if latched else 4 * sum(chunks[a] + chunks[b] for a, b in pairs)
    floor = floor_optimizer(numels, itemsizes)
    return Traffic(
        floor.read_issued + 145 * every + 4 * a_chunks + 52 * shrinking + sums,
        floor.written_issued + 9 * every,
        floor.read_unique + 9 * every + 80 * n + 56 + 4 * a_chunks + (48 * len(pairs) + 4) * bool(shrinking) + spans,
        floor.written_unique + 9 * every,
    )

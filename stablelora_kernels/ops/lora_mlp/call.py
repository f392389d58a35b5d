"""The records of ``lora_mlp``'s forward and backward: their arguments and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.projection import OPERANDS, Projection, scale_count_of, split

# For gate, up and down.
OfThree = tuple[bool, bool, bool]


class MLPForwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_fwd`` that are no tensors."""

    layouts: tuple[int, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    save: bool
    # Whether gate's, up's and down's mask is stored.
    stores_mask: OfThree


class MLPForwardCall(NamedTuple):
    """The arguments of ``lora_mlp_fwd``."""

    x: Tensor
    # ``projection.operands_of`` and ``scales_of`` of gate, up and down.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: MLPForwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPForwardSettings) -> MLPForwardCall:
        """The call of its tensors, one after another."""
        x, *others = tensors
        lengths = (3 * OPERANDS, scale_count_of(settings.layouts), 3)
        operands, scales, seeds = split(others, lengths)
        return MLPForwardCall(x, operands, scales, seeds, settings)


class MLPForwardResults(NamedTuple):
    """Y [..., N], and what backward needs of it, which is empty if nothing is saved."""

    y: Tensor
    # [..., F].
    g: Tensor
    u: Tensor
    # Gate's and up's side by side.
    s: Tensor
    s_down: Tensor
    # Those that are stored.
    masks: Sequence[Tensor]


class MLPBackwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_bwd`` that are no tensors."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    need_x: bool
    need_a: OfThree
    need_b: OfThree


class MLPBackwardCall(NamedTuple):
    """The arguments of ``lora_mlp_bwd``: dY [..., N] and what forward has saved. None is what no
    needed gradient reads.
    """

    grad: Tensor
    x: Tensor | None
    g: Tensor
    u: Tensor
    s: Tensor | None
    s_down: Tensor | None
    # Biases are None.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    settings: MLPBackwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPBackwardSettings) -> MLPBackwardCall:
        """The call of its tensors, one after another."""
        lengths = (6, 3 * OPERANDS, scale_count_of(settings.layouts), 3)
        singles, *lists = split(tensors, lengths)
        arguments: Any = (*singles, *lists, settings)
        return MLPBackwardCall(*arguments)


class MLPBackwardResults(NamedTuple):
    """dX [..., K], and the dA and dB of gate, up and down. What is not needed is empty."""

    dx: Tensor
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


def with_branches(projections: Sequence[Projection], like: Tensor) -> list[Projection]:
    """``projections`` with an A and a B of rank 0 where there is no branch, on the device of
    ``like``.
    """
    dtypes = [p.lora_A.dtype for p in projections if p.lora_A is not None]
    dtype = dtypes[0] if dtypes else like.dtype
    return [p if p.lora_A is not None else _of_rank_0(p, like, dtype) for p in projections]


def _of_rank_0(p: Projection, like: Tensor, dtype: torch.dtype) -> Projection:
    # These sizes are never read where the weight is not read.
    n, k = (0, 0) if p.weight is None else p.weight.shape
    return p._replace(
        lora_A=torch.empty((0, k), dtype=dtype, device=like.device),
        lora_B=torch.empty((n, 0), dtype=dtype, device=like.device),
    )


def each_mask(masks: Sequence[Tensor], is_stored: Sequence[bool]) -> list[Tensor | None]:
    """Gate's, up's and down's mask, of those that are stored."""
    stored = iter(masks)
    return [next(stored) if is_there else None for is_there in is_stored]

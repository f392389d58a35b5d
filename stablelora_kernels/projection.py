"""A projection: a frozen weight with its LoRA branch. The operands that functional, ops and launch
hand on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor

from stablelora_kernels.quantized import FP8Weight, Layout, NF4Weight, Stored

# In place of a layout, for a weight that is not quantized.
_PLAIN = Layout(0, 0, 0, 0, 0)


class Projection(NamedTuple):
    """A projection of :func:`~stablelora_kernels.functional.lora_mlp`; the fields are those
    arguments of :func:`~stablelora_kernels.functional.lora_linear`.

    ``lora_A`` and ``lora_B`` are both None for a projection without a LoRA branch.
    """

    # Inside the ops a quantized weight is Stored, and None is a weight that nothing reads: that of
    # a branch alone, for one.
    weight: Tensor | Stored | NF4Weight | FP8Weight | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        """r, 0 without a branch."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


# Where each kind of tensor is among the operands that :func:`flat` makes of projections.
WEIGHTS, BIASES, LORA_AS, LORA_BS = (slice(first, None, 4) for first in range(4))


def flat(projections: Sequence[Projection]) -> list[Any]:
    """The operands of ``projections``, as ops and autograd functions take them: of each its data,
    bias, A and B.

    A weight's data is the weight itself, or a quantized weight's bytes, whose scales are no
    operands: see :func:`scales_of`.
    """
    operands: list[Any] = []
    for p in projections:
        operands += p[:4]
        if isinstance(p.weight, Stored):
            operands[-4] = p.weight.data
    return operands


def scales_of(projections: Sequence[Projection], layouts: Sequence[int]) -> Sequence[Tensor]:
    """The scales of all quantized weights. Without ``layouts`` there is none."""
    if not layouts:
        return ()
    return [scale for p in projections if isinstance(p.weight, Stored) for scale in p.weight.scales]


def in_fours(operands: Sequence[Any]) -> list[Sequence[Any]]:
    """The operands of each projection."""
    return [operands[at : at + 4] for at in range(0, len(operands), 4)]


def projections_of(
    operands: Sequence[Any],
    scales: Iterable[Tensor],
    layouts: Sequence[int],
    scalings: Sequence[float],
) -> list[Projection]:
    """The projections that :func:`flat`, :func:`scales_of` and :func:`layouts_of` have taken apart."""
    left, projections = iter(scales), []
    for i, (of_one, scaling) in enumerate(zip(in_fours(operands), scalings, strict=True)):
        p = Projection(*of_one, scaling)  # type: ignore[call-arg]
        layout = Layout(*layouts[5 * i : 5 * i + 5]) if layouts else _PLAIN
        if layout != _PLAIN:
            scales_of_it = tuple(islice(left, layout.scale_count))
            # A weight that nothing reads has no data.
            data: Any = p.weight
            p = p._replace(weight=None if data is None else Stored(data, scales_of_it, layout))
        projections.append(p)
    return projections


def layouts_of(projections: Iterable[Projection]) -> tuple[int, ...]:
    """The weights' layouts, one after another: zeros for a plain weight, and none at all if no
    weight is quantized.
    """
    layouts = [p.weight.layout if isinstance(p.weight, Stored) else _PLAIN for p in projections]
    return (
        tuple(chain.from_iterable(layouts)) if any(layout != _PLAIN for layout in layouts) else ()
    )


def projections_in(call: Any) -> list[Projection]:
    """The projections among an op's arguments."""
    return projections_of(call.operands, call.scales, call.layouts, call.scalings)


def split(tensors: Iterable[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """``tensors`` as lists of these ``lengths``."""
    left = iter(tensors)
    return [[*islice(left, length)] for length in lengths]

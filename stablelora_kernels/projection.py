"""A projection: a frozen weight with its LoRA branch. The operands that functional, ops and launch
hand on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.formats import Layout, Stored
from stablelora_kernels.quantized import QuantizedWeight

# In place of a layout, for a weight that is not quantized.
_PLAIN = Layout(0, 0, 0, 0)


class Projection(NamedTuple):
    """A projection of :func:`~stablelora_kernels.functional.lora_mlp`; the fields are those
    arguments of :func:`~stablelora_kernels.functional.lora_linear`.

    ``lora_A`` and ``lora_B`` are both None for a projection without a LoRA branch.
    """

    # Inside the ops a quantized weight is Stored, and None is a weight that nothing reads: that of
    # a branch alone, for one.
    weight: Tensor | Stored | QuantizedWeight | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        """r, 0 without a branch."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def stored(self) -> Projection:
        """Itself as the ops take it, a quantized weight in its stored parts."""
        weight = self.weight
        return self._replace(weight=weight.stored) if isinstance(weight, QuantizedWeight) else self


def s_unit(dtype: torch.dtype, scaling: float) -> float:
    """What a stored 1 of S = ``scaling`` X A^T means: the power of two that keeps S no larger than
    X A^T in float16.
    """
    if dtype != torch.float16 or not 1 < abs(scaling) < math.inf:
        return 1.0
    fraction, exponent = math.frexp(scaling)
    # Far from float32's limits, where the kernels scale sums by it.
    return 2.0 ** min(exponent - (abs(fraction) == 0.5), 64)


class Operands(NamedTuple):
    """What ops and autograd functions take of a projection; or its gradients."""

    # The weight itself, or a quantized weight's bytes.
    data: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None


# Of a projection.
OPERANDS = len(Operands._fields)
# Where each kind of tensor is in the list that :func:`operands_of` makes of projections.
WEIGHTS = slice(0, None, 4)
BIASES = slice(1, None, 4)
LORA_AS = slice(2, None, 4)
LORA_BS = slice(3, None, 4)


def operands_of(projections: Sequence[Projection]) -> list[Tensor | None]:
    """The :class:`Operands` of the projections, one after another.

    A quantized weight's scales are not among them: see :func:`scales_of`.
    """
    operands: list[Tensor | None] = []
    for p in projections:
        weight: Any = p.weight
        data = weight.data if isinstance(weight, Stored) else weight
        operands += (data, p.bias, p.lora_A, p.lora_B)
    return operands


def scales_of(projections: Sequence[Projection], layouts: Sequence[int]) -> Sequence[Tensor]:
    """The scales of all quantized weights. Without ``layouts`` there is none."""
    if not layouts:
        return ()
    return [scale for p in projections if isinstance(p.weight, Stored) for scale in p.weight.scales]


def by_projection(values: Iterable[Any]) -> list[Operands]:
    """The values of each projection, of those for all :func:`operands_of` projections."""
    return [Operands(*four) for four in in_groups(values, OPERANDS)]


def in_groups(values: Iterable[Any], size: int) -> Iterable[Any]:
    """``values`` in groups of ``size``, in order."""
    return zip(*[iter(values)] * size, strict=True)


def layouts_of(projections: Iterable[Projection]) -> tuple[int, ...]:
    """The weights' layouts, one after another: zeros for a plain weight, and none at all if no
    weight is quantized.
    """
    layouts = [p.weight.layout if isinstance(p.weight, Stored) else _PLAIN for p in projections]
    if all(layout == _PLAIN for layout in layouts):
        return ()
    return tuple(chain.from_iterable(layouts))


def projections_of(
    operands: Sequence[Tensor | None],
    scales: Iterable[Tensor],
    layouts: Sequence[int],
    scalings: Sequence[float],
) -> list[Projection]:
    """The projections that :func:`operands_of`, :func:`scales_of` and :func:`layouts_of` have taken
    apart.
    """
    each = iter(operands)
    # Four operands of each projection, one after another, and its scaling.
    fields = zip(each, each, each, each, scalings, strict=True)
    plain = [Projection(*of_projection) for of_projection in fields]
    return with_stored(plain, scales, layouts) if layouts else plain


def with_stored(
    projections: Sequence[Projection], scales: Iterable[Tensor], layouts: Sequence[int]
) -> list[Projection]:
    """``projections`` with quantized weights in place of their bytes."""
    each_layout = [Layout(*fields) for fields in in_groups(layouts, len(Layout._fields))]
    remaining = iter(scales)
    stored = []
    for p, layout in zip(projections, each_layout, strict=True):
        if layout != _PLAIN:
            stored_scales = tuple(islice(remaining, layout.scale_count))
            # A weight that nothing reads has no data.
            if isinstance(p.weight, Tensor):
                p = p._replace(weight=Stored(p.weight, stored_scales, layout))
        stored.append(p)
    return stored


def scale_count_of(layouts: Sequence[int]) -> int:
    """How many scales :func:`scales_of` has found for these layouts."""
    if not layouts:
        return 0
    each_layout = [Layout(*fields) for fields in in_groups(layouts, len(Layout._fields))]
    return sum(layout.scale_count for layout in each_layout if layout != _PLAIN)


def split(tensors: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    """``tensors`` as sequences of these ``lengths``."""
    parts = []
    start = 0
    for length in lengths:
        end = start + length
        parts.append(tensors[start:end])
        start = end
    return parts

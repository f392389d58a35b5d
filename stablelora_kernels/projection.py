"""A projection: a frozen weight with its LoRA branch. The operands that functional, ops and launch hand on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor

from stablelora_kernels.quantized import FP8Weight, Layout, NF4Weight, Stored

# In place of a layout, for a weight that is not quantized.
_PLAIN = Layout(0, 0, 0, 0, 0)


class Projection(NamedTuple):
    """A projection of :func:`~stablelora_kernels.functional.lora_mlp`; the fields are those arguments of
    :func:`~stablelora_kernels.functional.lora_linear`.

    ``lora_A`` and ``lora_B`` are both None for a projection without a LoRA branch.
    """

    # Inside the ops a quantized weight is Stored, and None is a weight that nothing reads: that of a branch alone, for one.
    weight: Tensor | Stored | NF4Weight | FP8Weight | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        """r, 0 without a branch."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


def flatten(projections: Sequence[Projection]) -> Sequence[Any]:
    """The tensors of ``projections`` in the order in which ops take them: datas, all scales, biases, A's and B's.

    A weight's data is the weight itself, or a quantized weight's bytes.
    """
    if len(projections) == 1:
        weight, bias, lora_A, lora_B, _ = projections[0]
        return (weight.data, *weight.scales, bias, lora_A, lora_B) if isinstance(weight, Stored) else projections[0][:4]
    weights, biases, lora_As, lora_Bs, _ = zip(*projections, strict=True)
    if Stored not in map(type, weights):
        return (*weights, *biases, *lora_As, *lora_Bs)
    datas = [weight.data if isinstance(weight, Stored) else weight for weight in weights]
    scales = [scale for weight in weights if isinstance(weight, Stored) for scale in weight.scales]
    return (*datas, *scales, *biases, *lora_As, *lora_Bs)


def layouts_of(projections: Iterable[Projection]) -> tuple[int, ...]:
    """The weights' layouts, one after another: zeros for a plain weight, and none at all if no weight is quantized."""
    layouts = [p.weight.layout if isinstance(p.weight, Stored) else _PLAIN for p in projections]
    return tuple(chain.from_iterable(layouts)) if any(layout != _PLAIN for layout in layouts) else ()


def scale_count(layouts: Sequence[int]) -> int:
    """The number of scales of weights with these ``layouts``."""
    each = (Layout(*layouts[at : at + 5]) for at in range(0, len(layouts), 5))
    return sum(layout.scale_count for layout in each if layout != _PLAIN)


def unflatten(
    tensors: Sequence[Any], lengths: Sequence[int], layouts: Sequence[int], scalings: Sequence[float]
) -> list[Projection]:
    """The projections of flattened ``tensors``; ``lengths`` are those of datas, scales, biases, A's and B's."""
    if len(scalings) == 1 and not layouts:
        return [Projection(*tensors, scalings[0])]  # type: ignore[call-arg]
    return projections_of(*split(tensors, lengths), layouts, scalings)  # type: ignore[call-arg, misc]


def projections_of(
    datas: Sequence[Any], scales: Iterable[Tensor], biases: Sequence[Any], lora_As: Sequence[Any], lora_Bs: Sequence[Any],
    layouts: Sequence[int], scalings: Sequence[float],
) -> list[Projection]:  # fmt: skip
    """The projections of lists of each kind of tensor. No datas, or no biases, stand for as many times None."""
    left, projections = iter(scales), []
    for i, scaling in enumerate(scalings):
        weight: Any = datas[i] if datas else None
        layout = Layout(*layouts[5 * i : 5 * i + 5]) if layouts else _PLAIN
        if layout != _PLAIN:
            scales_of_it = tuple(islice(left, layout.scale_count))
            # A weight that nothing reads has no data.
            weight = None if weight is None else Stored(weight, scales_of_it, layout)
        projections.append(Projection(weight, biases[i] if biases else None, lora_As[i], lora_Bs[i], scaling))
    return projections


def projections_in(call: Any) -> list[Projection]:
    """The projections among an op's arguments; those of a backward have no biases."""
    lists = (call.datas, call.scales, getattr(call, "biases", ()), call.lora_As, call.lora_Bs)
    return projections_of(*lists, call.layouts, call.scalings)


def split(tensors: Iterable[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """``tensors`` as lists of these ``lengths``."""
    left = iter(tensors)
    return [[*islice(left, length)] for length in lengths]

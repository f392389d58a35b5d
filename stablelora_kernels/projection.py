"""A projection: a frozen weight with its LoRA branch. The operands that functional, ops and launch hand on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
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


# Of several projections: datas, scales, biases, A's and B's; layouts; scalings.
Lists = tuple[
    tuple[Sequence[Any], Sequence[Tensor], Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[int], Sequence[float]
]


def flatten(projections: Iterable[Projection]) -> Lists:
    """``projections`` as ops take them: the tensors of each kind, the weights' layouts and the scalings.

    A weight's data is the weight itself, or a quantized weight's bytes. Without a quantized weight there are no layouts; beside
    one, a plain weight's is of zeros.
    """
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    if Stored not in map(type, weights):
        return (weights, (), biases, lora_As, lora_Bs), (), scalings
    datas = [weight.data if isinstance(weight, Stored) else weight for weight in weights]
    scales = [scale for weight in weights if isinstance(weight, Stored) for scale in weight.scales]
    layouts = [number for weight in weights for number in (weight.layout if isinstance(weight, Stored) else _PLAIN)]
    return (datas, scales, biases, lora_As, lora_Bs), layouts, scalings


def unflatten(tensors: Sequence[Sequence[Any]], layouts: Sequence[int], scalings: Sequence[float]) -> list[Projection]:
    """The projections that :func:`flatten` took apart. An empty list stands for as many times None."""
    datas, scales, biases, lora_As, lora_Bs = tensors
    left, projections = iter(scales), []
    for i, scaling in enumerate(scalings):
        weight: Any = datas[i] if datas else None
        layout = Layout(*layouts[5 * i : 5 * i + 5]) if layouts else _PLAIN
        if layout != _PLAIN:
            weight = Stored(weight, tuple(islice(left, layout.scale_count)), layout)
        projections.append(Projection(weight, biases[i] if biases else None, lora_As[i], lora_Bs[i], scaling))
    return projections

"""What the results of a :class:`Case` must be: by the reference in float64, by hand as a user
computes them, and by the analysis of their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import draw_from, draw_keep, draw_seeds, masked
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing.bounds import Deviation, assert_no_worse, deviations
from stablelora_kernels.testing.cases import (
    BF16,
    FP32,
    FP64,
    Case,
    Dropout,
    Mask,
    Operands,
    Results,
    leaves,
    results,
)
from stablelora_kernels.testing.ops.lora_linear import plain
from stablelora_kernels.utils.tensors import drop_share

# Of a result with more elements, eager's own error is no luck, and the analysis takes long.
MOST_ROUNDINGS = 2**21


class Expected(NamedTuple):
    """What one result must be, by the arguments of ``assert_no_worse``."""

    ref: Tensor
    baseline: Tensor
    # That of the arithmetic.
    dtype: torch.dtype
    rounding: Rounded | None
    slope: float | None

    def deviations(self, out: Tensor, name: str) -> list[Deviation]:
        return deviations(out, name=name, **self._asdict())

    def check(self, out: Tensor, name: str) -> list[Deviation]:
        """Raise AssertionError as :func:`assert_no_worse` does; return what was compared."""
        return assert_no_worse(out, name=name, **self._asdict())


def expectations(
    case: Case,
    operands: Operands,
    keep: Tensor | None = None,
    contiguous: bool = False,
    baseline: Results | None = None,
) -> dict[str, Expected]:
    """What each part of the results of a call with these ``operands`` must be, by its name: "Y0",
    and of each gradient its operand's, "x", "lora_A0" and "lora_B0".

    ``keep``: the dropout mask, if it is not that of a run of the case. ``contiguous``: eager
    PyTorch gets its operands so. ``baseline``: the results of another's code, which the call may
    not be worse than, in place of eager PyTorch's.
    """
    computed = as_computed(case, operands)
    drawn = masks(case, operands) if keep is None else [Mask(keep, case.p)]
    refs = by_parts(case, oracle(case, computed, drawn))
    if baseline is None:
        eagers = changed(computed, lambda name, t: t.contiguous()) if contiguous else computed
        baseline = eager(case, eagers, drawn)
    elements = max(t.numel() for t in baseline.values())
    op = case.description
    allowed = op.roundings(case, computed, drawn) if elements <= MOST_ROUNDINGS else {}
    expected = {}
    for name, value in by_parts(case, baseline).items():
        dtype = op.dtype_of(case, name, value)
        slope = None if op.slopes is None else op.slopes[dtype]
        expected[name] = Expected(refs[name], value, dtype, allowed.get(name), slope)
    return expected


def by_parts(case: Case, results: Results) -> Results:
    """The parts of ``results`` that have a bound of their own, as :func:`expectations` names them."""
    parts: Results = {}
    for name, value in results.items():
        parts |= case.description.parts(case, name, value)
    return parts


def next_keep(rows: int, width: int, p: float, backend: str, device: str) -> tuple[Tensor, float]:
    """The mask [rows, width] that a call draws next from torch's generator, and the probability
    that it is drawn with.
    """
    (mask,) = _drawn([Dropout((rows, width), p)], torch.device(device), backend == "triton")
    assert mask.keep is not None
    return mask.keep, mask.p


def masks(case: Case, operands: Operands) -> list[Mask]:
    """The dropout masks that a call must draw behind its seed, in their order."""
    op = case.description
    torch.manual_seed(case.seed)
    on_triton = op.has_kernels and case.backend == "triton"
    dropouts = op.dropouts(case, operands)
    if mask_tiles := op.mask_tiles(case, operands):
        return _drawn_in_tiles(dropouts, mask_tiles, torch.device(case.device), on_triton)
    return _drawn(dropouts, torch.device(case.device), on_triton)


def _drawn_in_tiles(
    dropouts: Sequence[Dropout], tiles: Sequence[int], device: torch.device, on_triton: bool
) -> list[Mask]:
    """Masks of which each of the ``tiles``, of so many rows, has a seed of its own."""
    if not any(p for _, p in dropouts):
        return [Mask() for _ in dropouts]
    where = device if on_triton else "cpu"
    seeds = torch.randint(2**63 - 1, (len(tiles), len(dropouts), 2), device=where)
    drawn = []
    for i, (shape, p) in enumerate(dropouts):
        parts = []
        for rows, seed in zip(tiles, seeds[:, i], strict=True):
            if on_triton:
                parts.append(dropout_keep_ref(rows, shape[-1], p, int(seed[0])).to(device))
            elif p:
                x = torch.ones(rows, shape[-1], device=device)
                parts.append(masked(x, draw_from(x, p, seed).mask) != 0)
        drawn.append(Mask(torch.cat(parts).view(shape), drop_share(p)) if p else Mask())
    return drawn


def _drawn(dropouts: Sequence[Dropout], device: torch.device, on_triton: bool) -> list[Mask]:
    drawn = []
    # A call draws the seeds of all its masks at once.
    seeds = draw_seeds(device, [p for _, p in dropouts]) if on_triton else [None] * len(dropouts)
    for (shape, p), seed in zip(dropouts, seeds, strict=True):
        if not p:
            drawn.append(Mask())
        elif seed is None:
            drawn.append(Mask(*draw_keep(torch.empty(shape, device=device), p)))
        else:
            keep = dropout_keep_ref(math.prod(shape[:-1]), shape[-1], p, int(seed[0]))
            drawn.append(Mask(keep.view(shape).to(device), drop_share(p)))
    return drawn


def changed(operands: Operands, change: Callable[[str, Tensor], Tensor]) -> Operands:
    """``operands`` with ``change(name, t)`` for each tensor."""
    return {name: change(name, t) if isinstance(t, Tensor) else t for name, t in operands.items()}


def as_computed(case: Case, operands: Operands) -> Operands:
    """The values that the op computes with: under autocast, float32 A and B are cast on the fly,
    and base_out is left alone.
    """

    def cast(name: str, t: Tensor) -> Tensor:
        is_float32_adapter = name.startswith("lora_") and t.dtype == FP32
        unchanged = name.startswith(("base_out", "grad")) or is_float32_adapter or is_index(t)
        return t if unchanged else t.to(BF16)

    return changed(operands, cast) if case.autocast else operands


def eager(case: Case, operands: Operands, masks: Sequence[Mask]) -> Results:
    """The results by hand, in x's dtype."""
    return called(case, operands, lambda leaf: case.description.by_hand(case, leaf, masks))


def oracle(case: Case, operands: Operands, masks: Sequence[Mask]) -> Results:
    """The results in float64, from the values of ``operands``."""
    wide = {name: t if t is None or is_index(t) else plain(t, FP64) for name, t in operands.items()}
    return called(case, wide, lambda leaf: case.description.by_reference(case, leaf, masks))


def is_index(t: Any) -> bool:
    """Whether ``t`` holds places, such as labels."""
    return isinstance(t, Tensor) and not t.is_floating_point()


def called(case: Case, operands: Operands, call: Callable[[Operands], Sequence[Tensor]]) -> Results:
    """The results of ``call`` with leaves of ``operands``, without what a case does to the op's
    own.
    """
    leaf = leaves(case, operands)
    return results(case.but(in_place=False, backward_in_autocast=False), call(leaf), leaf)

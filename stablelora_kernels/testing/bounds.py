"""The bound on errors: twice eager PyTorch's own error, or what an error analysis allows, and a
bound on the scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.reference.rounding import Rounded

#: One unit in the last place of 1.0, by dtype.
EPS = {d: torch.finfo(d).eps for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
#: How many standard deviations of its rounding a result may be off by. A normal deviate is farther off six times in 10⁷ draws.
DEVIATIONS = 5.0
#: By which share of itself a result of a linear layer may be too large or too small as a whole, by dtype.
SLOPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
#: The same for a gated MLP, where errors of G and U multiply.
MLP_SLOPES = {dtype: 5 * slope for dtype, slope in SLOPES.items()}


class Deviation(NamedTuple):
    """How far a result is off and how far it may be, by its elements or by its scale."""

    error: float
    bound: float
    of: str

    @property
    def share(self) -> float:
        """The error as a share of the bound; infinite if a result that must be exact is not."""
        if self.bound:
            return self.error / self.bound
        return math.inf if self.error else 0.0


def farthest_element(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    dtype: torch.dtype,
    rounding: Rounded | None = None,
    name: str = "result",
) -> Deviation:
    """The element of ``out`` whose error is the largest share of its bound; see
    :func:`assert_no_worse`.
    """
    if not out.numel():
        return Deviation(0.0, 0.0, name)
    ref = ref.double()
    errors = (out.double() - ref).abs().nan_to_num(nan=math.inf)
    atol = EPS[dtype] * ref.abs().max().item()
    bounds = torch.full_like(errors, 2 * (baseline.double() - ref).abs().max().item() + atol)
    if rounding is not None:
        # In float64 the oracle rounds as much, independently.
        oracles = math.sqrt(2) if dtype == torch.float64 else 1.0
        bounds = bounds.maximum(DEVIATIONS * oracles * rounding.deviation.view(ref.shape))
    # Where both are zero, the share is NaN.
    place = (errors / bounds).nan_to_num(nan=0.0, posinf=math.inf).argmax()
    return Deviation(errors.flatten()[place].item(), bounds.flatten()[place].item(), name)


def scale_of(
    out: Tensor, ref: Tensor, slope: float, rounding: Rounded | None = None, name: str = "result"
) -> Deviation:
    """The share by which ``out`` as a whole is too large or too small: how far ``<out, ref> / <ref,
    ref>`` is from 1.

    It may be ``slope``. Where few numbers are rounded on the way, chance may make it larger:
    DEVIATIONS standard deviations of all roundings together are allowed. They fall with the root of
    how many numbers are rounded.
    """
    of, ref = f"the scale of {name}", ref.double()
    square = ref.square().sum().item()
    if not square:
        return Deviation(0.0, slope, of)
    error = abs((out.double() * ref).sum().item() / square - 1)
    chance = 0.0 if rounding is None else DEVIATIONS * rounding.projected(ref) / square
    return Deviation(math.inf if math.isnan(error) else error, max(slope, chance), of)


def deviations(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounded | None = None,
    slope: float | None = None,
    name: str = "result",
) -> list[Deviation]:
    """What :func:`assert_no_worse` compares: the farthest element, and the scale if ``rounding`` or
    ``slope`` is given.
    """
    dtype = dtype or out.dtype
    measured = [farthest_element(out, ref, baseline, dtype, rounding, name)]
    if slope is None and rounding is not None:
        slope = SLOPES[dtype]
    if slope is not None and out.numel():
        measured.append(scale_of(out, ref, slope, rounding, name))
    return measured


def assert_no_worse(
    out: Tensor,
    ref: Tensor,
    baseline: Tensor,
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounded | None = None,
    slope: float | None = None,
    name: str = "result",
) -> list[Deviation]:
    """Raise AssertionError unless ``out`` is finite and as near to ``ref`` as plain PyTorch's
    result, or as rounding allows.

    ``ref`` is the float64 oracle and ``baseline`` is plain PyTorch's result. Each element may be
    off by ``2 max|baseline - ref| + atol``, twice the error that a user already has. ``atol``
    covers a baseline that happens to be exact: one unit in the last place of ref's largest element
    in ``dtype``, the dtype of the arithmetic, which is out's unless given.

    ``rounding`` is this result's by the analysis of ``reference/rounding.py``.
    With it an element may instead be off by DEVIATIONS standard deviations of its rounding, if that
    is more. With ``rounding`` or ``slope``, the scale of all elements together is bounded too: by
    ``slope``, which is that of SLOPES unless given, or by DEVIATIONS standard deviations. Return
    what was compared.
    """
    assert out.shape == ref.shape, (
        f"{name} has shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    )
    if not out.numel():
        return []
    assert bool(torch.isfinite(out).all()), f"{name} holds values that are not finite"
    compared = deviations(
        out, ref, baseline, dtype=dtype, rounding=rounding, slope=slope, name=name
    )
    for error, bound, of in compared:
        assert error <= bound, f"{of} is off by {error:.3e}, allowed {bound:.3e}"
    return compared

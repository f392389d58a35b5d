"""Random sequences of calls, each with prepared launches and without: equal launches, and results
equal bit by bit.

Calls of a sequence differ in a few settings, so that one may take the other's launches by mistake;
one of PyTorch's switches of precision is thrown before each. Every call comes three times with its
operands elsewhere each time: remembered, prepared, found.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import Case, Results
from tests.helpers.case_checks import calls, run_recorded
from tests.helpers.launches import without_plans
from tests.helpers.precision import SWITCHES, switched

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]
TIMES = 3
# What the second and third call of a sequence may take from another call. An op has sizes of its
# own.
SETTINGS = [
    "shape", "dtype", "lora_dtype", "p", "strategy", "layouts", "wanted", "autocast", "in_place", "broken", "seed",
]  # fmt: skip


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[Case, str]]:
    """Up to three calls with a switch each."""
    first, switch = draw(calls(backends=["triton"])), st.sampled_from([*SWITCHES])
    found = [(first, draw(switch))]
    for other in draw(st.lists(calls(backends=["triton"]), max_size=2)):
        taken = draw(st.sets(st.sampled_from(SETTINGS), max_size=3))
        case = first.but(**{name: getattr(other, name) for name in taken})
        if "shape" in taken:
            case = case.but(shape=(*other.shape[:-1], first.shape[-1]))
        found.append((case, draw(switch)))
    return found


def run_once(case: Case, switch: str) -> tuple[list[Any], Results]:
    with switched(switch):
        return run_recorded(case)


def _bits(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy(force=True).tobytes()


@settings(max_examples=settings.default.max_examples // 2)
@given(sequences())
def test_prepared_launches_are_the_first_ones(sequence: list[tuple[Case, str]]) -> None:
    plans.clear()
    with without_plans():
        expected = [run_once(*call) for call in sequence]
    for _ in range(TIMES):
        for call, (launches, results) in zip(sequence, expected, strict=True):
            found, values = run_once(*call)
            assert found == launches
            assert values.keys() == results.keys()
            for name, value in values.items():
                assert _bits(value) == _bits(results[name]), (name, call)

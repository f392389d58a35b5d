"""Random sequences of calls, each with prepared launches and without: equal launches, and results equal bit by bit.

Calls of a sequence differ in a few settings, so that one may take the other's launches by mistake; one of PyTorch's switches of
precision is thrown before each. Every call comes three times with its operands elsewhere each time: remembered, prepared, found.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.ops import plans
from tests.helpers.launches import recorded_launches, without_plans
from tests.helpers.layer_calls import calls, compute, inputs_of
from tests.helpers.precision import SWITCHES, switched

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]
TIMES = 3


@st.composite
def calls_on_triton(draw: st.DrawFn) -> dict[str, Any]:
    return draw(calls().filter(lambda c: c["backend"] == "triton")) | {"switch": draw(st.sampled_from([*SWITCHES]))}


@st.composite
def sequences(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to three calls. The second and the third take some settings from other calls, and the rest from the first one."""
    first = draw(calls_on_triton())
    # Not the op, which has sizes of its own.
    names = st.just({"switch"}) | st.sets(st.sampled_from(sorted(first.keys() - {"op", "k"})), max_size=3)
    others = draw(st.lists(st.tuples(calls_on_triton(), names), max_size=2))
    return [first, *(first | {name: other[name] for name in own} for other, own in others)]


def run(c: dict[str, Any]) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """The call's launches and results."""
    members = [inputs_of(c, i) for i in range(c["members"] if c["op"] == "group" else 1)]
    named = {
        t.data_ptr(): f"{name}{i}"
        for i, inputs in enumerate(members)
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.numel() and name != "grad"
    }
    torch.manual_seed(c["seed"])
    with (
        switched(c["switch"]),
        slk.use_backend("triton"),
        slk.use_kernel(c["kernel"]),
        recorded_launches(named) as launches,
    ):
        results = compute(c, members)
    return launches, results


def _bits(t: Tensor | None) -> bytes | None:
    return None if t is None else t.contiguous().view(-1).view(torch.uint8).numpy(force=True).tobytes()


@settings(max_examples=settings.default.max_examples // 2)
@given(sequences())
def test_prepared_launches_are_the_first_ones(sequence: list[dict[str, Any]]) -> None:
    plans.clear()
    with without_plans():
        expected = [run(c) for c in sequence]
    for _ in range(TIMES):
        for c, (launches, results) in zip(sequence, expected, strict=True):
            found, values = run(c)
            assert found == launches
            for mine, theirs in zip(values, results, strict=True):
                assert mine.keys() == theirs.keys()
                for name, value in mine.items():
                    assert _bits(value) == _bits(theirs[name]), (name, c)

"""Random sequences of calls, each with prepared launches and without: equal launches, and results equal bit by bit.

Every call comes three times with its operands elsewhere each time: remembered, prepared, found.
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

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]
TIMES = 3


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
    with slk.use_backend("triton"), slk.use_kernel(c["kernel"]), recorded_launches(named) as launches:
        results = compute(c, members)
    return launches, results


def _bits(t: Tensor | None) -> bytes | None:
    return None if t is None else t.contiguous().view(-1).view(torch.uint8).numpy(force=True).tobytes()


@settings(max_examples=settings.default.max_examples // 2)
@given(st.lists(calls().filter(lambda c: c["backend"] == "triton"), min_size=1, max_size=3))
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

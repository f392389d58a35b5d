"""Prepared launches on a GPU: a call's third time, on several streams at once, and on a second GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stablelora_kernels.ops import plans
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.expectations import changed
from tests.helpers import gpu_checks
from tests.helpers.case_checks import assert_close
from tests.helpers.gpu_checks import DEVICE, SMALL, linear, make

pytestmark = pytest.mark.gpu

# Few rows share sums by counters, many wait for flags.
SIZES = (
    ((9, 48, 40, 16),)
    if SMALL
    else ((16, 4096, 4096, 16), (200, 4096, 4096, 16), (4096, 4096, 4096, 16))
)


@pytest.mark.parametrize("p", (0.0, 0.1))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_third_call_is_prepared(size, p):
    """The first plans its launches, the second prepares them. Each call has tensors of its own."""
    case = linear(*size, p)
    given = make(case)
    first, second, third = (cases.run(case, given) for _ in range(3))
    assert_close(first, second)
    assert_close(first, third)
    gpu_checks.check(case, given, third)
    assert any(entry.prepared for entry in plans._young.values())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_streams_share_a_plan_and_not_its_counters(size):
    case = linear(*size)
    given = make(case)
    first = cases.run(case, given)
    if not SMALL:
        torch.cuda.synchronize()
    streams = (
        [nullcontext()] * 2 if SMALL else [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    )
    found = []
    for _ in range(4):
        for stream in streams:
            with stream:
                found.append(cases.run(case, given))
    if not SMALL:
        torch.cuda.synchronize()
    for results in found:
        assert_close(first, results)


@pytest.mark.skipif(not SMALL and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_has_launches_of_its_own():
    """The current device stays the first."""
    other = DEVICE if SMALL else torch.device("cuda", 1)
    case = linear(*SIZES[0])
    given = make(case)
    for _ in range(3):
        first = cases.run(case, given)
    there = changed(given, lambda name, t: t.to(other))
    for _ in range(3):
        assert_close(first, changed(cases.run(case, there), lambda name, t: t.to(DEVICE)))

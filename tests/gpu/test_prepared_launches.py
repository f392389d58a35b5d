"""Prepared launches on a GPU: on several streams at once, after a parameter has moved, and on a second GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from stablelora_kernels.ops import plans
from tests.helpers.gpu_checks import DEVICE, SMALL, Case, assert_equal_bits, run

pytestmark = pytest.mark.gpu

# Few rows share sums by counters, many wait for flags.
SIZES = ((9, 48, 40, 16),) if SMALL else ((16, 4096, 4096, 16), (200, 4096, 4096, 16), (4096, 4096, 4096, 16))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_streams_share_a_plan_and_not_its_counters(size):
    case = Case(*size, 0.0)
    inputs = case.inputs()
    plans.clear()
    first, _ = run(case, inputs)
    if not SMALL:
        torch.cuda.synchronize()
    streams = [nullcontext()] * 2 if SMALL else [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
    found = []
    for _ in range(4):
        for stream in streams:
            with stream:
                found.append(run(case, inputs)[0])
    if not SMALL:
        torch.cuda.synchronize()
    for results in found:
        assert_equal_bits(first, results)


def test_operands_that_moved_are_read_where_they_are():
    case = Case(*SIZES[0], 0.0)
    inputs = case.inputs()
    plans.clear()
    first, _ = run(case, inputs)
    for _ in range(3):
        inputs = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
        assert_equal_bits(first, run(case, inputs)[0])


@pytest.mark.skipif(not SMALL and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_has_launches_of_its_own():
    """The current device stays the first."""
    other = DEVICE if SMALL else torch.device("cuda", 1)
    case = Case(*SIZES[0], 0.0)
    inputs = case.inputs()
    plans.clear()
    for _ in range(3):
        first, _ = run(case, inputs)
    there = {name: t.to(other) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    for _ in range(3):
        results, _ = run(case, there)
        assert_equal_bits(first, {name: t.to(DEVICE) for name, t in results.items()})

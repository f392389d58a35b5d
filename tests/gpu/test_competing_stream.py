"""Thousands of chained launches beside another stream's work, which takes processors from them: the same bits each time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.helpers.gpu_checks import BF16, DEVICE, SMALL, Case, run
from tests.helpers.launches import count_launches

pytestmark = pytest.mark.gpu

# Of all tests here together. A call makes one launch forward and one backward.
LAUNCHES = 24 if SMALL else 10_000
SIZES = [(9, 48, 40, 8), (70, 48, 40, 8)] if SMALL else [(m, 1024, 1024, 16) for m in (65, 200, 512, 1024, 2048, 4096)]
DROPOUT = (0.0, 0.1)
CALLS = -(-LAUNCHES // (2 * len(SIZES) * len(DROPOUT)))


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_launches_beside_other_work(size, p, record_property):
    case = Case(*size, p)
    inputs = case.inputs()
    torch.manual_seed(5)
    first, _ = run(case, inputs, "chained")
    # From a few programs to more than the GPU holds.
    work = [torch.randn(n, n, dtype=BF16, device=DEVICE) for n in ((16,) if SMALL else (128, 512, 1024, 2048))]
    other = nullcontext() if SMALL else torch.cuda.stream(torch.cuda.Stream())
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    if not SMALL:
        torch.cuda.synchronize()
    with count_launches() as made:
        for turn in range(CALLS):
            with other:
                torch.mm(work[turn % len(work)], work[turn % len(work)])
            torch.manual_seed(5)
            results, _ = run(case, inputs, "chained")
            for name, value in results.items():
                differing += (value != first[name]).sum()
    assert int(differing) == 0, f"{int(differing)} elements differ from the first call's in {CALLS} calls"
    assert made.total() == 2 * CALLS, f"expected two launches a call, got {dict(made)} in {CALLS} calls"
    record_property("figure", made.total())

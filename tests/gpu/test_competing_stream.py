"""Thousands of chained launches beside another stream's work, which takes processors from them: the same bits each time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from tests.helpers.gpu_checks import BF16, DEVICE, SMALL, Case, Inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import DIFFERENTIATED, call, leaves

pytestmark = pytest.mark.gpu

# Of all tests here together. A call makes one launch forward and one backward.
LAUNCHES = 16 if SMALL else 10_000
SIZES = [(9, 48, 40, 8), (70, 48, 40, 8)] if SMALL else [(m, 1024, 1024, 16) for m in (65, 200, 512, 1024, 2048, 4096)]
DROPOUT = (0.0, 0.1)
CALLS = -(-LAUNCHES // (2 * len(SIZES) * len(DROPOUT)))


def run(inputs: Inputs, p: float) -> list[Tensor]:
    """Return Y, dX, dA and dB. The host waits for nothing, so that launches queue up."""
    torch.manual_seed(5)
    given = leaves(inputs)
    with slk.use_kernel("chained"):
        y = call(given, p)
        return [y.detach(), *torch.autograd.grad(y, [given[name] for name in DIFFERENTIATED], inputs["grad"])]


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_launches_beside_other_work(size, p, record_property):
    inputs = Case(*size, p).inputs()
    first = run(inputs, p)
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
            for one, value in zip(first, run(inputs, p), strict=True):
                differing += (value != one).sum()
    assert int(differing) == 0, f"{int(differing)} elements differ from the first call's in {CALLS} calls"
    assert made.total() == 2 * CALLS, f"expected two launches a call, got {dict(made)} in {CALLS} calls"
    record_property("figure", made.total())

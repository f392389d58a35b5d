"""Thousands of chained launches beside another stream's work, which takes processors from them: the
same bits each time.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.cases import BF16, Case, Operands
from tests.helpers.gpu_checks import DEVICE, SMALL, linear, make
from tests.helpers.launches import count_launches

pytestmark = pytest.mark.gpu

# Of all tests here together. A call makes one launch forward and one backward. Of the most rows there
# are more tiles than processors, so that programs draw tiles by ticket.
LAUNCHES = 16 if SMALL else 10_000
SIZES = (
    [(9, 48, 40, 8), (70, 48, 40, 8)]
    if SMALL
    else [(m, 1024, 1024, 16) for m in (65, 200, 512, 1024, 2048, 4096, 8192)]
)
DROPOUT = (0.0, 0.1)
CALLS = -(-LAUNCHES // (2 * len(SIZES) * len(DROPOUT)))


def run(case: Case, given: Operands) -> list[Tensor]:
    """Return Y, dX, dA and dB. The host waits for nothing, so that launches queue up."""
    torch.manual_seed(5)
    leaf = cases.leaves(case, given)
    (y,) = cases.ours(case, leaf)
    return [
        y.detach(),
        *torch.autograd.grad(y, [leaf[name] for name in case.wanted_names], given["grad0"]),
    ]


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chained_launches_beside_other_work(size, p, record_property):
    case = linear(*size, p)
    given = make(case)
    # From a few programs to more than the GPU holds.
    work = [
        torch.randn(n, n, dtype=BF16, device=DEVICE)
        for n in ((16,) if SMALL else (128, 512, 1024, 2048))
    ]
    other = nullcontext() if SMALL else torch.cuda.stream(torch.cuda.Stream())
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with slk.settings(strategy="one_launch"):
        first = run(case, given)
        if not SMALL:
            torch.cuda.synchronize()
        with count_launches() as made:
            for turn in range(CALLS):
                with other:
                    torch.mm(work[turn % len(work)], work[turn % len(work)])
                for one, value in zip(first, run(case, given), strict=True):
                    differing += (value != one).sum()
    assert int(differing) == 0, (
        f"{int(differing)} elements differ from the first call's in {CALLS} calls"
    )
    assert made.total() == 2 * CALLS, (
        f"expected two launches a call, got {dict(made)} in {CALLS} calls"
    )
    record_property("figure", made.total())

"""Offsets beyond 2^31 elements in real tensors. Rows and columns far apart, of every operand: tests/kernels."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch.rules import KERNELS
from tests.helpers import cases
from tests.helpers.cases import BF16
from tests.helpers.gpu_checks import DEVICE, SMALL, by_kernel, check, keep_rows, linear, make, record

# One process of pytest-xdist runs all of these, one after the other, because each takes much of the GPU's memory.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large_offsets")]

# The last row's offset must exceed this.
SPAN = 2**14 if SMALL else 2**31
by_every_kernel = pytest.mark.parametrize("kernel", ("auto",) if SMALL else KERNELS[1:])


def skip_if_short_of_memory(elements: int) -> None:
    """Skip unless ``elements`` in bfloat16 fit, and as much again."""
    if SMALL:
        return
    torch.cuda.empty_cache()
    needed, free = 4 * elements, torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free")


@by_every_kernel
@pytest.mark.parametrize("p", (0.1,) if SMALL else (0.0, 0.1))
@pytest.mark.parametrize("large", ("Y and dY", "X and dX"))
def test_large_matrices(large, p, kernel, record_property):
    """Contiguous matrices of more than SPAN elements.

    The incoming gradient is zero except in the first rows, the last, and those around element SPAN. So dA and dB are sums over
    these rows alone, and the oracle needs no others.
    """
    width = 64 if SMALL else 16384
    m, middle = SPAN // width + 24, SPAN // width
    n, k = (width, 64) if large == "Y and dY" else (64, width)
    case = by_kernel(linear(m, n, k, 16, p, BF16, BF16), kernel)
    skip_if_short_of_memory(2 * m * width)
    some = torch.tensor(sorted({*range(8), *range(middle - 8, middle + 8), *range(m - 8, m)}), device=DEVICE)
    small = make(case.but(shape=(len(some), k)))
    inputs = dict(small)
    torch.manual_seed(9)
    inputs["x"] = torch.empty(m, k, dtype=BF16, device=DEVICE).normal_()
    inputs["x"][some] = small["x"]
    inputs["grad0"] = torch.zeros(m, n, dtype=BF16, device=DEVICE)
    inputs["grad0"][some] = small["grad0"]
    found = cases.run(case, inputs)
    keep = keep_rows(case, some) if p else None
    record(record_property, check(case, small, found | {name: found[name][some] for name in ("Y0", "x")}, keep))

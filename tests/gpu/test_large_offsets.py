"""Offsets beyond 2^31 elements in real tensors: rows spread over one large allocation, and matrices of that size.

NaN lies between the spread rows, so an offset that overflows shows in the result.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stablelora_kernels.dispatch.rules import KERNELS
from tests.helpers import cases
from tests.helpers.case_checks import assert_close
from tests.helpers.cases import BF16, Operands
from tests.helpers.gpu_checks import DEVICE, SMALL, by_kernel, check, keep_rows, linear, make, record

# One process of pytest-xdist runs all of these, one after the other, because each takes much of the GPU's memory.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large_offsets")]

# The last row's offset must exceed this.
SPAN = 2**14 if SMALL else 2**31
MATRICES = ("x", "weight0", "lora_A0", "lora_B0", "grad0")
by_every_kernel = pytest.mark.parametrize("kernel", ("auto",) if SMALL else KERNELS[1:])


def skip_if_short_of_memory(elements: int) -> None:
    """Skip unless ``elements`` in bfloat16 fit, and as much again."""
    if SMALL:
        return
    torch.cuda.empty_cache()
    needed, free = 4 * elements, torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free")


def spread(inputs: Operands) -> tuple[Operands, Tensor]:
    """Return ``inputs`` with the first and last row of each matrix more than SPAN elements apart, and their memory."""
    # A stride of a multiple of 64 elements keeps the alignment, and so the kernel that is chosen.
    stride = max(((SPAN + SPAN // 16) // (inputs[name].shape[0] - 1) // 64 + 1) * 64 for name in MATRICES)
    room = -(-max(inputs[name].shape[1] for name in MATRICES) // 64) * 64
    assert room * len(MATRICES) <= stride, f"rows of {room} elements do not fit into a stride of {stride}"
    elements = stride * max(inputs[name].shape[0] for name in MATRICES)
    memory = torch.full((elements,), float("nan"), dtype=BF16, device=DEVICE)
    wide = dict(inputs)
    for number, name in enumerate(MATRICES):
        rows, columns = inputs[name].shape
        wide[name] = memory.as_strided((rows, columns), (stride, 1), number * room)
        wide[name].copy_(inputs[name])
        assert (rows - 1) * stride > SPAN, f"{rows} rows of stride {stride} stay within {SPAN}"
    return wide, memory


@by_every_kernel
@pytest.mark.parametrize("rows", (40,) if SMALL else (40, 72))
def test_spread_rows(rows, kernel):
    """x, the weight, A, B and dY with rows far apart give the same bits as with rows close together."""
    r = 24
    case = by_kernel(linear(rows, 40, 48, r, 0.0, BF16, BF16), kernel)
    # A has the fewest rows and so sets the stride.
    skip_if_short_of_memory((SPAN + SPAN // 8) * rows // (r - 1))
    inputs = make(case)
    close = cases.run(case, inputs)
    wide, _memory = spread(inputs)
    check(case, inputs, close)
    assert_close(close, cases.run(case, wide))


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

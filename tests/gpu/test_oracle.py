"""Forward and backward of every kernel: against float64, bounded by eager PyTorch's own error, and the same bits in every run.

Dropout's mask is the one that the reference draws.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch.rules import KERNELS
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.reference import dropout_keep_ref
from tests.helpers import case_checks, cases, oracle
from tests.helpers.gpu_checks import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    SMALL,
    Case,
    assert_equal_bits,
    directions,
    keep_rows,
    run,
    seed_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

# A race shows by chance, so repeat often.
REPEATS = 1 if SMALL else 8
DTYPES = ((BF16, FP32), (FP16, FP16), (FP32, FP32))
# Few rows; sizes that tensor descriptors take (rows of multiples of 16 bytes); sizes that they do not take.
CORE = ((9, 264, 200, 3), (257, 520, 1032, 16), (131, 71, 67, 20))
UGLY = (
    (1, 1, 1, 1), (1, 4096, 4096, 16), (64, 512, 256, 1), (65, 509, 251, 3), (1031, 264, 520, 128), (97, 89, 83, 64),
    (600, 1024, 1024, 64), (67, 40, 48, 200),
)  # fmt: skip
# The shapes and dtypes that benchmarks.lab.gpu times later. Checking them also fills Triton's cache on disk.
TIMED = [
    Case(m, 4096, 4096, r, p, BF16, BF16) for r, p, m in product((16, 64, 128, 8), (0.1, 0.0), (8192, 64, 2048, 16))
]
if SMALL:
    DTYPES, CORE, UGLY = DTYPES[:1], ((9, 40, 24, 3), (70, 48, 40, 16)), ((1, 1, 1, 1), (67, 40, 33, 128))
    TIMED = [Case(16, 64, 32, 8, 0.1, BF16, BF16)]


def by_kernel(cases: list[Case]) -> list[object]:
    """Return each case with each kernel that can compute one of its directions."""
    return [
        pytest.param(case, kernel, id=f"{kernel}-{case}")
        for case, kernel in product(cases, KERNELS)
        if directions(case, kernel)
    ]


def check(case: Case, kernel: str, record_property: Callable[[str, object], None]) -> None:
    inputs = case.inputs()
    out, seed = run(case, inputs, kernel)
    keep = None if seed is None else keep_rows(torch.arange(case.m, device=DEVICE), case.k, case.p, seed)
    worst, which = oracle.check(inputs, out, keep, case.p)
    record_property("figure", worst)
    record_property("bound", 1.0)
    by_this_kernel = " and ".join(directions(case, kernel))
    record_property("note", f"largest error over its bound, of {which}; {by_this_kernel} by this kernel")
    # As users run it, whose memory is not filled before each launch.
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(5)
    first, _ = run(case, inputs, kernel)
    for _ in range(REPEATS):
        torch.manual_seed(5)
        assert_equal_bits(first, run(case, inputs, kernel)[0])


CORE_CASES = [Case(*shape, p, *dtypes) for shape, dtypes, p in product(CORE, DTYPES, (0.0, 0.1))]


@pytest.mark.parametrize(("case", "kernel"), by_kernel(CORE_CASES))
def test_every_kernel_matches_float64(case, kernel, record_property):
    check(case, kernel, record_property)


@pytest.mark.parametrize("case", [Case(*shape, p) for shape, p in product(UGLY, (0.0, 0.1))], ids=str)
def test_ugly_shapes_match_float64(case, record_property):
    check(case, "auto", record_property)


@pytest.mark.parametrize(("case", "kernel"), by_kernel(TIMED))
def test_timed_shapes_match_float64(case, kernel, record_property):
    check(case, kernel, record_property)


@pytest.mark.parametrize("kernel", ("split",) if SMALL else ("chained", "split", "vendor"))
@pytest.mark.parametrize(("rows", "columns"), ((9, 32), (70, 16)) if SMALL else ((9, 64), (1031, 128), (200, 67)))
def test_kernels_draw_the_reference_mask(rows, columns, kernel):
    """Read the masks from the results: Y with W = 0, X = 1 and A = B = I is the mask times a constant.

    So is dX with A, B and dY all ones.
    """
    p, make = 0.3, {"device": DEVICE, "dtype": BF16}
    x = torch.ones(rows, columns, **make).requires_grad_()
    weight, grad = torch.zeros(columns, columns, **make), torch.ones(rows, columns, **make)
    identity, ones = torch.eye(columns, **make).requires_grad_(), torch.ones(8, columns, **make).requires_grad_()
    with slk.use_kernel(kernel):
        y = lora_linear(x, weight, None, identity, identity, 1.0, p)
        forward, forward_seed = y.detach() != 0, int(seed_of(y))
        y = lora_linear(x, weight, None, ones, ones.t(), 1.0, p)
        backward_seed = int(seed_of(y))
        (dx,) = torch.autograd.grad(y, x, grad)
    for drawn, seed in ((forward, forward_seed), (dx != 0, backward_seed)):
        keep = dropout_keep_ref(rows, columns, p, seed)
        assert 0 < int(keep.sum()) < rows * columns, "the reference's mask is trivial"
        differing = int((drawn.cpu() != keep).sum())
        assert differing == 0, f"{differing} of {rows * columns} elements of the mask differ from dropout_keep_ref"


# x's shape, F and N, ranks: gate and up by descriptors, by pointers, and one by one; a projection without a branch.
MLPS = (
    ((2048, 1024), (2816, 2816, 1024), (16, 8, 20)), ((4096, 999), (2001, 2001, 500), (3, 16, 100)),
    ((33, 256), (512, 512, 256), (None, 8, 3)),
)  # fmt: skip
if SMALL:
    MLPS = (((70, 48), (40, 40, 24), (16, 8, None)),)


@pytest.mark.parametrize(("mlp", "activation"), list(product(MLPS, cases.ACTIVATIONS)), ids=str)
@pytest.mark.parametrize("kernel", ["auto", "split"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_an_mlp_matches_float64(mlp, activation, kernel, p):
    case = cases.Case("mlp", *mlp, BF16, FP32, p=p, kernel=kernel, activation=activation)
    case_checks.check(case, cases.run(case))

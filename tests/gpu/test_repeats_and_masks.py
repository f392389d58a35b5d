"""The same bits in every run, and the dropout mask that the reference draws."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch.rules import KERNELS
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.reference import dropout_keep_ref
from tests.helpers.gpu_checks import BF16, DEVICE, SMALL, Case, assert_equal_bits, directions, run, seed_of

pytestmark = pytest.mark.gpu

# A race shows by chance, so repeat often.
REPEATS = 2 if SMALL else 8
SIZES = ((9, 48, 40, 16),) if SMALL else ((16, 4096, 4096, 16), (257, 520, 1032, 40), (4096, 4096, 4096, 16))
CASES = [
    pytest.param(case, kernel, id=f"{kernel}-{case}")
    for case, kernel in product([Case(*shape, p) for shape, p in product(SIZES, (0.0, 0.1))], KERNELS)
    if len(directions(case, kernel)) == 2 and not (SMALL and kernel != "auto")
]


@pytest.mark.parametrize(("case", "kernel"), CASES)
def test_repeated_runs_give_the_same_bits(case, kernel):
    inputs = case.inputs()
    torch.manual_seed(5)
    first, _ = run(case, inputs, kernel)
    for _ in range(REPEATS):
        torch.manual_seed(5)
        assert_equal_bits(first, run(case, inputs, kernel)[0])


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

"""The vendor's product adds to the branch: in which launches, and how that rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import Launch, VendorProduct
from stablelora_kernels.ops.meta_calls import linear_launches
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    Case,
    Mask,
    Operands,
    make,
    run,
)
from stablelora_kernels.testing.expectations import eager, expectations, oracle
from tests.helpers.case_checks import check
from tests.helpers.launches import count_launches

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
FIRST = Choice("branch_first", "")


def ways(rows=70, n=48, k=64, r=16, p=0.0):
    """The launches of forward and of backward, with a bias."""
    return linear_launches(DEVICES["sm_90"], rows, n, k, r, (BF16, FP32), p, choices=(FIRST, FIRST))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "r", "count"), [(70, 16, 2), (70, 200, 3), (600, 40, 2)])
def test_the_branch_comes_first_and_has_the_bias(rows, r, count, p):
    """As many launches as with the branch last. The product reads no bias, and adds."""
    for launches in ways(rows, r=r, p=p):
        *ahead, branch, product = launches
        assert len(launches) == count
        assert all(isinstance(launch, Launch) for launch in (*ahead, branch))
        assert isinstance(product, VendorProduct) and product.add and product.bias is None
        named = branch.named
        assert named["w.ptr"] is None and named["base"] is None
        assert named["y.ptr"].data_ptr() == product.y.data_ptr()
    forward, _ = ways(rows, r=r, p=p)
    assert forward[-2].named["bias"] is not None


def test_a_second_projections_branch_adds_to_the_first_ones_gradient():
    """dX of both: two products and two branches, all but the first branch onto what is stored."""
    _, backward = linear_launches(
        DEVICES["sm_90"], 70, (48, 32), 64, 16, (BF16, FP32), 0.1, choices=(None, FIRST)
    )
    branches = [
        launch for launch in backward if isinstance(launch, Launch) and "alone" in launch.variant
    ]
    assert [launch.named["base"] is not None for launch in branches] == [False, True]
    products = [launch for launch in backward if isinstance(launch, VendorProduct)]
    assert [product.add for product in products] == [True, True]


CASES = [
    *(
        Case("linear", (rows, k), (n,), (r,), dtype, lora, p=p, strategy="branch_first", bias=(bias,))
        for (rows, k, n, r), (dtype, lora), (p, bias) in zip(
            [(1, 24, 20, 1), (17, 67, 71, 3), (130, 160, 96, 20), (70, 64, 48, 130), (513, 40, 24, 48), (0, 24, 20, 6)],
            itertools.cycle([(BF16, FP32), (FP16, FP16), (FP32, FP32)]),
            itertools.cycle([(0.0, True), (0.3, True), (0.3, False), (0.0, False), (0.75, True)]),
            strict=False,
        )
    ),
    *(
        Case("linear", (70, 64), (48,), (6,), BF16, FP32, p=0.3, strategy="branch_first", layouts={name: layout})
        for name, layout in (("x", "transposed"), ("grad", "expanded"), ("lora_B", "wider"), ("weight", "transposed"))
    ),
    # dX of all projections adds up; each has a mask of its own.
    *(
        Case("group", (70, 64), (48, 25, 8), (6, 3, 20), dtype, FP32, p=0.3, strategy="branch_first")
        for dtype in (BF16, FP32)
    ),
    # A gated MLP's backward needs all of dH, so there the branch comes last.
    Case("mlp", (70, 64), (48, 48, 24), (6, 3, 20), BF16, FP32, p=0.3, strategy="branch_first"),
    Case("mlp", (70, 64), (48, 48, 24), (None, 3, None), BF16, FP32, strategy="branch_first"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_formula(case):
    check(case, run(case))


def canceling(dtype: torch.dtype, bias: float) -> tuple[Case, Operands]:
    """A layer whose product is about -``bias`` in every element, and adapters of the same dtype."""
    case = Case(
        "linear", (70, 64), (48,), (6,), dtype, dtype, strategy="branch_first", scalings=(1.0,)
    )
    operands = make(case)
    operands["x"][:, 0] = 8.0
    operands["weight0"][:, 0] = -bias / 8.0
    operands["bias0"].fill_(bias)
    return case, operands


def errors(case: Case, operands: Operands) -> tuple[float, float]:
    """The root mean square error of Y, ours and eager PyTorch's."""
    exact = oracle(case, operands, [Mask()])["Y0"]

    def error(y: Tensor) -> float:
        return (y.double() - exact).square().mean().sqrt().item()

    by_hand = eager(case, operands, [Mask()])
    return error(run(case, operands)["Y0"]), error(by_hand["Y0"])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_y_is_no_farther_off_than_eagers(dtype):
    """The branch is rounded with the bias, the product is not rounded by itself: eager PyTorch
    rounds both, and their sum.
    """
    for seed in range(3):
        case = Case(
            "linear", (130, 160), (96,), (16,), dtype, dtype, strategy="branch_first", seed=seed,
            scalings=(1.0,),
        )  # fmt: skip
        ours, by_hand = errors(case, make(case))
        assert ours <= by_hand, seed


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_bias_that_cancels_the_product_is_within_the_analysis(dtype):
    """The price of the order: the branch is rounded with the bias' digits. Eager PyTorch rounds the
    product and the bias together, which are small.
    """
    case, operands = canceling(dtype, 64.0)
    ours, by_hand = errors(case, operands)
    assert ours > 2 * by_hand
    unit = torch.finfo(dtype).eps / 2
    # A bias of 2^6 and less than that of a branch: numbers below 2^7, rounded once.
    assert ours <= 2 * by_hand + unit * 2**6
    expectations(case, operands)["Y0"].check(run(case, operands)["Y0"], "Y0")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_prepared_call_launches_the_same(p):
    """The second and the third call of one kind run prepared launches, which add to a new Y."""
    case = Case("linear", (70, 64), (48,), (6,), BF16, FP32, p=p, strategy="branch_first")
    operands = make(case)
    first = run(case, operands)
    for _ in range(2):
        with count_launches() as counts:
            again = run(case, operands)
        assert counts["vendor"] == 2 and counts.total() == 4
        for name, expected in first.items():
            assert torch.equal(again[name], expected), name

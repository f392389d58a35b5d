"""The bound on errors: its standard deviations are those of real roundings, and it notices a result
of another scale.
"""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels import testing
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    RoundedLayer,
    deviation_of_rounding,
    operand,
)
from stablelora_kernels.testing import DEVIATIONS, assert_no_worse, deviations
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64, make
from stablelora_kernels.testing.expectations import as_computed, masks, oracle
from tests.helpers.case_checks import check
from tests.ops.test_ops_oracle import TABLE

# By which factor each dtype's results may not be off.
FACTORS = {BF16: 1.002, FP16: 1.002, FP32: 1 + 1e-5}


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=FP64).float()


def root_mean_square(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()


# The analysis.


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_one_rounding_has_its_deviation(dtype):
    exact = normal(200, 200).double() * torch.pi
    errors = exact.to(dtype).double() - exact
    assert root_mean_square(errors / deviation_of_rounding(exact, dtype)) == pytest.approx(
        1, abs=0.02
    )


def test_small_float16_numbers_keep_their_spacing():
    """Below the smallest normal number, 2^-14, neighbors are 2^-24 apart."""
    exact = torch.linspace(2.0**-20, 2.0**-15, 10_001, dtype=FP64)
    errors = exact.half().double() - exact
    assert root_mean_square(errors / deviation_of_rounding(exact, FP16)) == pytest.approx(
        1, abs=0.02
    )


@pytest.mark.parametrize("agree", [False, True])
@pytest.mark.parametrize("n", [1, 3, 30, 1000])
def test_sums_round_less_than_their_deviation(n, agree):
    """One after the other, without fused multiply-add, sums round the most: between half their
    deviation and all of it.
    """
    a, b = normal(50, n), normal(n, 60, seed=1)
    if agree:
        a, b = a.abs(), b.abs()
    running = torch.zeros(50, 60)
    for i in range(n):
        running = running + a[:, i, None] * b[i]
    product = Arithmetic(FP32).product(operand(a, FP32), operand(b, FP32))
    assert 0.5 < root_mean_square((running - product.exact) / product.deviation) < 1.05


def test_rounded_operands_pass_through_products():
    """Of normal numbers, the sum of n roundings has the deviation of one times the root of n."""
    a, b = normal(300, 64).double(), normal(64, 200, seed=1).double()
    product = Arithmetic(BF16).product(operand(a, BF16), operand(b, BF16))
    errors = a.bfloat16().double() @ b.bfloat16().double() - a @ b
    assert root_mean_square(errors / product.deviation) == pytest.approx(1, abs=0.05)


def test_equal_rows_are_rounded_alike():
    """Behind an expanded operand, the errors of a sum over rows add up like the rows; they do not
    cancel.
    """
    row, ones = normal(1, 400).double(), torch.ones(1, 64, dtype=BF16)
    rows = operand(row.expand(64, 400), BF16)
    total = Arithmetic(BF16).product(operand(ones, BF16), rows)
    errors = 64 * (row.bfloat16().double() - row)
    assert root_mean_square(errors) == pytest.approx(root_mean_square(total.deviation), rel=0.1)


def test_the_scale_varies_as_its_deviation_says():
    """Over many draws of a layer whose S and Y are rounded: ``projected`` is the standard deviation
    of <Y, ref>.
    """
    shares = []
    for seed in range(60):
        x, weight, a, b = (
            normal(*size, seed=seed) for size in ((9, 40), (16, 40), (3, 40), (16, 3))
        )
        x, weight, a, b = (t.bfloat16() for t in (x, weight, a, b))
        layer = RoundedLayer(
            Arithmetic(BF16), operand(weight, BF16), None, operand(a, BF16), operand(b, BF16), 1.0
        )
        y = layer.forward(operand(x, BF16))
        s = (x.float() @ a.float().T).bfloat16().float()
        base, branch = (x.float() @ weight.float().T).bfloat16(), (s @ b.float().T).bfloat16()
        found = (base.float() + branch.float()).bfloat16().double()
        shares.append(((found - y.exact) * y.exact).sum().item() / y.projected(y.exact))
    assert root_mean_square(torch.tensor(shares)) == pytest.approx(1, abs=0.25)


# The rule.


def rounding_of(ref: torch.Tensor, deviation: float) -> Rounded:
    return Rounded(ref, torch.full_like(ref, deviation))


def test_an_element_may_be_off_by_twice_eagers_error_or_by_its_deviations():
    ref = torch.tensor([1.0, 1.0, 1.0], dtype=FP64)
    rounding = Rounded(ref, torch.tensor([0.0, 0.01, 0.1], dtype=FP64))
    baseline, atol = ref + 0.02, testing.EPS[FP32]
    for place, most in enumerate((0.04 + atol, DEVIATIONS * 0.01, DEVIATIONS * 0.1)):
        off = torch.zeros(3, dtype=FP64)
        off[place] = most
        for share in (0.99, 1.01):
            element = deviations(ref + share * off, ref, baseline, dtype=FP32, rounding=rounding)[0]
            assert (element.error <= element.bound) == (share < 1)
            assert element.share == pytest.approx(share)


def test_without_a_rounding_only_elements_are_bounded():
    ref = normal(100, 100).double()
    assert [each.of for each in deviations(ref * 1.5, ref, ref * 1.5)] == ["result"]
    assert_no_worse(ref * 1.5, ref, ref * 1.5)
    with pytest.raises(
        AssertionError, match=r"the scale of result is off by 5\.000e-01, allowed 1\.000e-03"
    ):
        assert_no_worse(ref * 1.5, ref, ref * 1.5, slope=1e-3)
    with pytest.raises(
        AssertionError, match=r"the scale of result is off by 5\.000e-01, allowed 1\.000e-06"
    ):
        assert_no_worse(ref * 1.5, ref, ref * 1.5, dtype=FP32, rounding=rounding_of(ref, 0.0))


def test_a_result_of_few_numbers_may_have_another_scale_by_chance():
    ref = torch.tensor([[1.3]], dtype=FP64)
    stored = Rounded(ref, torch.zeros_like(ref)).stored(BF16)
    chance = DEVIATIONS * deviation_of_rounding(ref, BF16).item()
    scale = deviations(ref + 0.9 * chance, ref, ref + 1, dtype=BF16, rounding=stored)[1]
    assert scale.error <= scale.bound == pytest.approx(chance / 1.3)


def test_zeros_and_nan_and_nothing():
    zeros = torch.zeros(3, 2, dtype=FP64)
    assert_no_worse(zeros, zeros, zeros, rounding=rounding_of(zeros, 0.0))
    assert_no_worse(zeros[:0], zeros[:0], zeros[:0])
    off = zeros.clone()
    off[1, 1] = 1e-30
    with pytest.raises(AssertionError, match=r"off by 1\.000e-30, allowed 0"):
        assert_no_worse(off, zeros, zeros)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(off * torch.nan, zeros, zeros)
    assert deviations(off * torch.nan, zeros, zeros)[0].share == torch.inf


# A bias, over the oracle's cases.


def is_large(shape: tuple[int, ...]) -> bool:
    """The chance part of a scale falls with the number of elements. From here on it is below
    FACTORS.
    """
    return torch.Size(shape).numel() >= 1000


BIASED = [
    parameter
    for parameter in TABLE
    for case in parameter.values
    # An expanded x has one row, of which few numbers are independent. A gated MLP of 16 bits may be
    # off by 0.5 %.
    if case.backend == "torch" and case.dtype in FACTORS and "expanded" not in case.layouts.values()
    if (case.op != "mlp" or case.dtype == FP32)
    and case.base_dtype in (None, case.dtype)
    and is_large(case.shape)
]


@pytest.mark.parametrize("case", BIASED, ids=str)
def test_a_bias_is_noticed(case):
    """Right results pass once they are rounded. With any large one scaled before it is rounded,
    they fail.
    """
    given = make(case)
    low = as_computed(case, given)
    exact = oracle(case, low, masks(case, given))
    like = given | {f"Y{i}": given["x"] for i in case.outputs()} | {"Y0": given["x"]}
    right = {name: value.to(like[name].dtype) for name, value in exact.items()}
    check(case, right, given)
    large = [name for name, value in exact.items() if is_large(value.shape) and name != "base_out"]
    assert large
    for name in large:
        scaled = (exact[name] * FACTORS[case.dtype]).to(right[name].dtype)
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            check(case, right | {name: scaled}, given)

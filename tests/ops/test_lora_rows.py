"""``lora_rows`` against float64: each branch on rows of its own, on both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64, Case, leaves, make, ours, run
from stablelora_kernels.testing.ops.lora_rows import Rows, Span
from tests.helpers.case_checks import check, launches
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = {
    "float64": (FP64, FP64),
    "float32": (FP32, FP32),
    "bfloat16": (BF16, BF16),
    "bfloat16 with float32 adapters": (BF16, FP32),
    "float16 with float32 adapters": (FP16, FP32),
}
# x's shape, the columns of Y, and the branches' rows and ranks.
SHAPES = {
    "sequences": ((7, 11, 40), 48, (Span(0, 22), Span(22, 33, 0.25), Span(44, 77, 0.75)), (3, 20, 1)),
    "primes": ((53, 37), 41, (Span(1, 2, 0.25), Span(2, 19), Span(40, 53)), (3, 8, 20)),
    "all rows of one": ((2, 35, 64), 24, (Span(0, 70, 0.5),), (16,)),
    "one row": ((1, 24), 20, (Span(0, 1),), (2,)),
    "many rows": ((3, 200, 40), 24, (Span(0, 200, 0.25), Span(200, 600)), (8, 3)),
    "no tokens": ((3, 0, 8), 4, (Span(0, 0),), (2,)),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, str]] = {
    "contiguous": {},
    # Columns are far apart.
    "transposed": dict.fromkeys(
        ("x", "weight", "lora_A", "lora_B", "base_out", "grad"), "transposed"
    ),
    # The gradient of stride 0 that sum() sends back.
    "expanded": {"grad": "expanded"},
}


def of_rows(
    shape: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    with_base: bool = False,
    layout: str = "contiguous",
    **options: Any,
) -> Case:
    """A call of one of SHAPES."""
    x, n, spans, ranks = SHAPES[shape]
    return Case(
        Rows(spans, with_base),
        x,
        (n,),
        ranks,
        *dtypes,
        scalings=(0.5, 1.5, 2.5),
        layouts=LAYOUTS[layout],
        **options,
    )


@pytest.mark.covering
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64(dtypes, shape, with_base, layout, backend):
    if backend == "triton" and dtypes == "float64":
        # The kernels do not compute in it.
        dtypes = "float32"
    case = of_rows(shape, DTYPES[dtypes], with_base, layout, backend=backend)
    given = make(case)
    found = run(case, given)
    for name, t in make(case).items():
        assert t is None or torch.equal(given[name], t), f"{name} is the caller's"
    check(case, found, given)


@pytest.mark.parametrize("first", [BF16, FP32], ids=str)
def test_gradients_are_in_the_dtypes_of_their_adapters(first, backend):
    """PEFT leaves an adapter that is added later in float32 beside others in the base's dtype."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 16).to(BF16), torch.randn(24, 16).to(BF16)
    dtypes = (first, FP32 if first is BF16 else BF16)
    branches = [
        RowsBranch(
            20 * i,
            20 * i + 20,
            torch.randn(3, 16).to(dtype).requires_grad_(),
            torch.randn(24, 3).to(dtype).requires_grad_(),
            1.5,
            0.0,
        )
        for i, dtype in enumerate(dtypes)
    ]
    lora_rows(x, w, None, None, branches).backward(torch.randn(40, 24).to(BF16))
    for branch in branches:
        for p in (branch.lora_A, branch.lora_B):
            # Not only autograd's cast of a rounded one.
            is_rounded = torch.equal(p.grad, p.grad.to(BF16).to(p.dtype))
            assert p.grad.dtype == p.dtype and is_rounded == (p.dtype == BF16)


def test_rows_without_a_branch_are_the_base_alone(backend):
    case = of_rows("sequences", with_base=True, backend=backend)
    given = make(case)
    found = run(case, given)
    assert torch.equal(found["Y0"][3], given["base_out"][3])
    assert not found["x"][3].any() and found["x"][0].any()


@pytest.mark.parametrize("wanted", [("x",), ("lora_A1", "lora_B1"), ()])
def test_only_what_is_wanted_is_kept_and_computed(wanted, backend):
    case = of_rows("sequences", backend=backend, wanted=wanted)
    expected, found = run(case.but(wanted=None)), run(case)
    assert found.keys() == {"Y0", *wanted}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    leaf = leaves(case, make(case))
    with slk.settings(backend=backend):
        (y,) = ours(case, leaf)
    assert y.requires_grad == bool(wanted)
    if wanted:
        assert (leaf["x"] in {*y.grad_fn.saved_tensors}) == ("x" not in wanted)


def test_each_branch_is_one_launch_each_way():
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    case = of_rows("many rows", (BF16, FP32))
    # The third call runs prepared launches.
    for _ in range(3):
        forward, backward = launches(case)
    assert sum(forward.values()) == len(case.ranks) == sum(backward.values())


def test_autocast_computes_in_its_dtype(backend):
    case = of_rows("sequences", backend=backend)
    given = make(case)
    low = given | {name: given[name].to(BF16) for name in ("x", "weight0", "bias0", "grad0")}
    found, expected = run(case.but(autocast=True), given), run(case, low)
    assert found["Y0"].dtype == BF16 and found["lora_A0"].dtype == FP32
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.filterwarnings("ignore")
def test_ops_declare_what_they_write():
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    with Operators() as operators:
        run(of_rows("primes"))
    calls = [call for call in operators.calls if call[0].namespace == "stablelora_kernels"]
    assert [call[0]._opname for call in calls] == ["lora_rows_fwd", "lora_rows_bwd"]
    for operator, arguments, _ in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_explain_counts_the_launches():
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    ranks = [16, 3, 64]
    explanation = slk.explain([256, 1, 40], 512, 1024, ranks, dropout_p=0.1, device="sm_90")
    for steps, words in (
        (explanation.forward, explanation.forward_strategy),
        (explanation.backward, explanation.backward_strategy),
    ):
        assert words == "by rows: vendor, one_launch, one_launch, one_launch"
        assert [step.kernel for step in steps] == ["vendor", *["lora_linear"] * 3]
        assert all(" add " in step.variant for step in steps[1:])
    alone = slk.explain([8] * 4, 512, 1024, 16, device="sm_80", branch_only=True)
    assert len(alone.forward) == len(alone.backward) == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"M": []}, "M must be one number of rows, or one for each adapter, got none"),
        ({"N": [8, 8]}, r"N must be one size for several M, which are not fused, got \[8, 8\]"),
        ({"quantized": "nf4"}, "quantized must be None for several M, got 'nf4'"),
        ({"r": [4]}, r"r must be one rank, or one for each of several M, got \[4\] for M \[3, 2\]"),
        ({"M": 3, "r": [4]}, r"got \[4\] for M 3"),
        ({"M": [3, -1]}, "M must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_explain_of_rows_that_do_not_fit(changes, match):
    with pytest.raises(ValueError, match=match):
        slk.explain(**{"M": [3, 2], "N": 8, "K": 8, "r": 4} | changes)

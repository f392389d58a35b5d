"""``lora_experts`` against its float64 reference, by the loop and by PyTorch's grouped product,
which here runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from stablelora_kernels.functional import lora_experts, lora_linear
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.ops.lora_experts import autograd as op
from stablelora_kernels.ops.lora_experts import loop
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.expectations import by_parts, eager, expectations, masks, oracle
from stablelora_kernels.testing.ops import Experts
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
LEAVES = ("x", "lora_A0", "lora_B0")
K, N = 16, 24


def experts(
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype = FP32,
    ends: tuple[int, ...] = (10, 10, 33, 38),
    rows: int = 40,
    r: int | None = 3,
    p: float = 0.0,
    bias: bool = False,
    packed: bool = False,
    transposed: bool = False,
    layouts: Mapping[str, str] = MappingProxyType({}),
    wanted: tuple[str, ...] = LEAVES,
) -> Case:
    """A call. With ``packed``, B lies as PEFT packs it and the offsets are int64."""
    offsets_dtype = torch.int64 if packed else torch.int32
    return Case(
        Experts(ends, offsets_dtype, transposed, packed),
        (rows, K),
        (N,),
        (r,),
        dtype,
        lora_dtype,
        p=p,
        bias=(bias,),
        layouts=layouts,
        wanted=wanted,
        backend="torch",
        device="cpu",
    )


# Every second column of x and of A, and a dY of stride 0.
STRIDED = {"x": "every second", "lora_A": "every second", "grad": "expanded"}
# The grouped product takes rows that begin at multiples of 16 bytes.
STRIDED_GROUPED = {"grad": "expanded"}
CASES = [
    experts(FP64, FP64, bias=True, packed=True),
    experts(FP64, FP64, p=0.3, transposed=True),
    experts(bias=True, p=0.3),
    experts(layouts=STRIDED, packed=True, transposed=True),
    experts(BF16, BF16, packed=True, bias=True),
    experts(BF16, FP32, p=0.3, transposed=True, layouts=STRIDED),
    experts(FP16, FP32, bias=True, layouts=STRIDED),
    experts(FP16, FP16, p=0.3, packed=True),
    experts(r=1, wanted=("x",)),
    experts(r=20, wanted=("lora_A0",)),
    experts(BF16, FP32, r=20, wanted=("lora_B0",), p=0.3),
    experts(r=None, bias=True, wanted=("x",)),
    experts(ends=(0, 40, 40, 40), packed=True),
    experts(ends=(0, 0, 0, 0)),
    experts(ends=(0, 0, 1, 1), rows=1, transposed=True),
    experts(ends=(0, 0, 0, 0), rows=0),
    experts(ends=(7, 8, 20, 37), rows=37, bias=True),
]
# By the product that runs on GPUs. A CPU's add_ rounds alpha to bfloat16, a GPU's does not: 1.75 has
# few digits.
GROUPED = [
    case.but(scalings=(1.75,))
    for case in (
        experts(BF16, BF16, packed=True, bias=True),
        experts(BF16, transposed=True, p=0.3),
        experts(BF16, r=1, wanted=("x", "lora_B0")),
        experts(BF16, BF16, r=None, wanted=("x",), bias=True),
        experts(BF16, BF16, r=20, ends=(0, 40, 40, 40), wanted=("lora_A0",)),
        experts(BF16, BF16, ends=(0, 0, 0, 0), layouts=STRIDED_GROUPED),
        experts(packed=True, bias=True, p=0.3, layouts=STRIDED_GROUPED),
    )
]


@pytest.mark.parametrize(
    ("case", "grouped"),
    [
        *(pytest.param(case, False, id=str(case)) for case in CASES),
        *(pytest.param(case, True, id=f"grouped {case}") for case in GROUPED),
    ],
)
def test_matches_the_oracle(case, grouped, monkeypatch):
    monkeypatch.setattr(op, "can_group", lambda x, stack: grouped)
    given = make(case)
    found = run(case, given)
    exact, usual = (results(case, given, masks(case, given)) for results in (oracle, eager))
    assert found.keys() == {"Y0", *case.wanted}
    for name, value in found.items():
        assert value.dtype == (case.lora_dtype if "lora" in name else case.dtype), name
        if case.dtype == FP64:
            torch.testing.assert_close(value, exact[name], rtol=1e-13, atol=1e-13)
        else:
            assert_no_worse(value, exact[name], usual[name], dtype=case.dtype, name=name)
    # Each expert, and the rows of none, which are zeros.
    parts = by_parts(case, found)
    for name, expected in expectations(case, given).items():
        expected.check(parts[name], name)


def on_a_gpu(dtype, shape, strides=None, address=0):
    """What can_group asks of a tensor."""
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    return SimpleNamespace(
        is_cuda=True, device="cuda", dtype=dtype, shape=shape, element_size=lambda: dtype.itemsize,
        stride=strides.__getitem__, is_contiguous=lambda: True, data_ptr=lambda: address,
    )  # fmt: skip


X, WEIGHT = on_a_gpu(BF16, (8, 64)), on_a_gpu(BF16, (4, 64, 64))
GROUPED = {
    "as it is": (X, WEIGHT, True),
    "float32": (on_a_gpu(FP32, (8, 64)), WEIGHT, False),
    "x off by 8 bytes": (on_a_gpu(BF16, (8, 64), address=8), WEIGHT, False),
    "the weight off by 2 bytes": (X, on_a_gpu(BF16, (4, 64, 64), address=2), False),
    "every second column": (on_a_gpu(BF16, (8, 64), (128, 2)), WEIGHT, False),
    "rows of 136 bytes": (on_a_gpu(BF16, (8, 64), (68, 1)), WEIGHT, False),
    "60 outputs": (X, on_a_gpu(BF16, (4, 60, 64)), False),
}


@pytest.mark.parametrize(("x", "weight", "grouped"), GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_what_pytorch_groups(x, weight, grouped, capability, monkeypatch):
    """It raises, or reads wrongly, at addresses that are no multiple of 16."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    count, n, k = weight.shape
    stack = ExpertStack(weight, None, torch.empty(count, 3, k), torch.empty(count, n, 3), 1.0)
    assert op.can_group(x, stack) == (grouped and capability >= (8, 0))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_any_number_of_experts_is_copied_in_a_few_runs(count, monkeypatch):
    """Each B takes more bytes than a run has: then there are four runs at most."""
    monkeypatch.setattr(loop, "_BYTES_OF_A_RUN", 1)
    copied, by_expert = [], loop._by_expert
    monkeypatch.setattr(
        loop, "_by_expert", lambda b, dtype: copied.append(len(b)) or by_expert(b, dtype)
    )
    stack = ExpertStack(
        torch.randn(count, N, K), None, torch.randn(count, 3, K), torch.randn(count, N, 3), 2.0
    )
    experts = loop.ExpertByExpert(stack, FP32)
    x = torch.randn(4, K)
    for place in range(count):
        y, s = experts.project(loop.ExpertRows(place, 0, 4), x)
        torch.testing.assert_close(s, x @ stack.lora_A[place].t())
        torch.testing.assert_close(
            y, x @ stack.weight[place].t() + 2 * s @ stack.lora_B[place].t(), rtol=1e-5, atol=1e-4
        )
    assert sum(copied) == count and len(copied) <= 4


@pytest.mark.parametrize("multiplied", [True, False])
def test_each_expert_is_a_lora_linear_to_the_bit(multiplied, monkeypatch):
    monkeypatch.setattr(
        cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
    )
    # For float32 adapters, few rows would be cast in place of A and B. Fewer than FLOAT32_ROWS of
    # lora_linear are not computed in float32 where the processor does not multiply bfloat16.
    case = experts(BF16, BF16, bias=True, ends=(10, 10, 32, 40))
    given, start = make(case), 0
    found = run(case, given)["Y0"]
    for e, end in enumerate((10, 10, 32, 40)):
        layer = [given[name][e] for name in ("weight0", "bias0", "lora_A0", "lora_B0")]
        leaf = [t.requires_grad_(i > 1) for i, t in enumerate(layer)]
        y = lora_linear(given["x"][start:end], *leaf, case.scalings[0])
        assert torch.equal(found[start:end], y)
        start = end


def test_it_keeps_x_and_s_and_no_stack():
    case = experts(rows=40, p=0.3)
    given, kept = leaves(case, make(case)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(case, given)
    own = {given[name].data_ptr() for name in ("x", "weight0", "lora_A0", "lora_B0", "offsets")}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == [40 * 3, 40 * K]
    assert {t.dtype for t in kept if t.numel() == 40 * K and t.data_ptr() not in own} == {
        torch.bool
    }


@pytest.mark.parametrize("wanted", [("x",), ("lora_A", "lora_B")])
def test_a_stack_that_no_gradient_reads_is_not_kept(wanted):
    case = experts(wanted=wanted)
    given, kept = leaves(case, make(case)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(case, given)
    is_kept = given["weight0"].data_ptr() in [t.data_ptr() for t in kept]
    assert is_kept == ("x" in wanted)


def test_no_mask_outside_training():
    case = experts(p=0.5).but(training=False)
    given = make(case)
    state = torch.get_rng_state()
    (y,), (without,) = ours(case, given), ours(case.but(p=0.0), given)
    assert torch.equal(y, without) and torch.equal(state, torch.get_rng_state())


def test_autocast_casts_all_but_float32_adapters():
    case = experts(bias=True)
    given = make(case)
    low = given | {name: given[name].to(BF16) for name in ("x", "weight0", "bias0")}
    found = run(case.but(autocast=True), given)
    for name, value in run(case, low).items():
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_and_torch_compile_without_a_break(p):
    case = experts(bias=True, p=p)
    given = make(case)
    with Operators() as operators:
        expected = run(case, given)
    calls = [call for call in operators.calls if call[0].namespace == "stablelora_kernels"]
    assert [call[0]._opname for call in calls] == ["lora_experts_fwd", "lora_experts_bwd"]
    for operator, arguments, _ in calls:
        torch.library.opcheck(
            operator, [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found = run(case, given, compiled)
    if not p:
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.ones(40, 15)},
            ValueError,
            r"x must be \[T, 16\] to fit weight \[4, 24, 16\], got \[40, 15\]",
        ),
        ({"x": torch.ones(2, 20, 16)}, ValueError, r"x must be \[T, 16\] .* got \[2, 20, 16\]"),
        (
            {"x": torch.ones(40, 16, dtype=torch.int64)},
            TypeError,
            "x must be bfloat16.* got torch.int64",
        ),
        ({"weight": torch.ones(24, 16)}, ValueError, r"weight must be \[E, N, K\], got \[24, 16\]"),
        (
            {"weight": torch.ones(4, 24, 16, dtype=FP64)},
            TypeError,
            "weight must have x's dtype torch.float32, got torch.float64",
        ),
        (
            {"weight": torch.ones(4, 24, 16, requires_grad=True)},
            ValueError,
            "weight must be frozen",
        ),
        (
            {"bias": torch.ones(24)},
            ValueError,
            r"bias must be \[4, 24\] to fit weight \[4, 24, 16\], got \[24\]",
        ),
        ({"bias": torch.ones(4, 24, requires_grad=True)}, ValueError, "bias must be frozen"),
        (
            {"lora_A": torch.ones(3, 3, 16)},
            ValueError,
            r"lora_A must be \[4, r, 16\] to fit .* got \[3, 3, 16\]",
        ),
        (
            {"lora_A": torch.ones(12, 16)},
            ValueError,
            r"lora_A must be \[4, r, 16\] to fit .* got \[12, 16\]",
        ),
        (
            {"lora_B": torch.ones(4, 24, 5)},
            ValueError,
            r"lora_B must be \[4, 24, 3\] to fit .* got \[4, 24, 5\]",
        ),
        (
            {"lora_B": torch.ones(4, 24, 3, dtype=FP64)},
            TypeError,
            "one dtype, got torch.float32 and torch.float64",
        ),
        (
            {"lora_B": torch.ones(4, 24, 3, device="meta")},
            ValueError,
            "lora_B must be on x's device cpu, got meta",
        ),
        (
            {"offsets": torch.tensor([1, 2, 3])},
            ValueError,
            r"offsets must be \[4\], each expert's end, got \[3\]",
        ),
        (
            {"offsets": torch.ones(4)},
            TypeError,
            "offsets must be int32 or int64, got torch.float32",
        ),
        (
            {"offsets": torch.ones(4, dtype=torch.int32, device="meta")},
            ValueError,
            "offsets must be on x's device cpu, got meta",
        ),
        (
            {"offsets": torch.tensor([5, 9, 8, 40])},
            ValueError,
            "must not descend from 0 on, got 8 of expert 2 behind 9",
        ),
        (
            {"offsets": torch.tensor([-1, 9, 9, 40])},
            ValueError,
            "must not descend from 0 on, got -1 of expert 0 behind 0",
        ),
        (
            {"offsets": torch.tensor([5, 9, 9, 41])},
            ValueError,
            "offsets must end within the 40 rows of x, got 41",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be .* got 1.0"),
        ({"scaling": torch.tensor(1.7)}, TypeError, "scaling must be a number, got a Tensor"),
    ],
)
def test_errors(changes, error, message):
    given = make(experts())
    good: dict[str, Any] = {
        "x": given["x"],
        "weight": given["weight0"],
        "bias": given["bias0"],
        "lora_A": given["lora_A0"],
        "lora_B": given["lora_B0"],
        "offsets": given["offsets"],
        "scaling": 1.7,
        "dropout_p": 0.3,
    }
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora_experts(**(good | changes))
    assert torch.equal(state, torch.get_rng_state())

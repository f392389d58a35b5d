"""``lora_experts`` against its float64 reference, by the loop and by PyTorch's grouped product,
which here runs on the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from stablelora_kernels.functional import lora_experts, lora_linear
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.ops.dropout import draw_keep
from stablelora_kernels.ops.lora_experts import autograd as op
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.reference import lora_experts_ref
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
LEAVES = ("x", "lora_A", "lora_B")
E, K, N = 4, 16, 24


class Experts(NamedTuple):
    dtype: torch.dtype = FP32
    lora_dtype: torch.dtype = FP32
    ends: tuple[int, ...] = (10, 10, 33, 38)
    rows: int = 40
    r: int = 3
    p: float = 0.0
    transposed: bool = False
    # B as PEFT packs it, with the expert fastest.
    packed: bool = False
    bias: bool = False
    # The product that runs on GPUs.
    grouped: bool = False
    # Every second column of x and of A, and a dY of stride 0.
    strided: bool = False
    wanted: tuple[str, ...] = LEAVES

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        )


CASES = [
    Experts(FP64, FP64, bias=True, packed=True),
    Experts(FP64, FP64, p=0.3, transposed=True),
    Experts(bias=True, p=0.3),
    Experts(strided=True, packed=True, transposed=True),
    Experts(BF16, BF16, packed=True, bias=True),
    Experts(BF16, FP32, p=0.3, transposed=True, strided=True),
    Experts(FP16, FP32, bias=True, strided=True),
    Experts(FP16, FP16, p=0.3, packed=True),
    Experts(r=1, wanted=("x",)),
    Experts(r=20, wanted=("lora_A",)),
    Experts(BF16, FP32, r=20, wanted=("lora_B",), p=0.3),
    Experts(r=0, bias=True, wanted=("x",)),
    Experts(ends=(0, 40, 40, 40), packed=True),
    Experts(ends=(0, 0, 0, 0)),
    Experts(ends=(0, 0, 1, 1), rows=1, transposed=True),
    Experts(ends=(0, 0, 0, 0), rows=0),
    Experts(ends=(7, 8, 20, 37), rows=37, bias=True),
    *(
        Experts(dtype, lora_dtype, grouped=True, **options)  # type: ignore[arg-type]
        for dtype, lora_dtype, options in (
            (BF16, BF16, {"packed": True, "bias": True}),
            (BF16, FP32, {"transposed": True, "p": 0.3}),
            (BF16, FP32, {"r": 1, "wanted": ("x", "lora_B")}),
            (BF16, BF16, {"r": 0, "wanted": ("x",), "bias": True}),
            (BF16, BF16, {"r": 20, "ends": (0, 40, 40, 40), "wanted": ("lora_A",)}),
            (BF16, BF16, {"ends": (0, 0, 0, 0), "strided": True}),
            (FP32, FP32, {"packed": True, "bias": True, "p": 0.3, "strided": True}),
        )
    ),
]


def make(case: Experts) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)

    # The grouped product takes rows that begin at multiples of 16 bytes.
    gap = 2 if case.strided and not case.grouped else 1
    x, lora_A = draw(case.rows, K * gap), draw(E, case.r, K * gap, dtype=case.lora_dtype)
    lora_B = draw(N, case.r, E, dtype=case.lora_dtype).permute(2, 0, 1)
    given = {
        "x": x[:, ::gap],
        "weight": draw(E, K, N) if case.transposed else draw(E, N, K),
        "bias": draw(E, N) if case.bias else None,
        "lora_A": lora_A[..., ::gap],
        "lora_B": lora_B if case.packed else lora_B.contiguous(),
        "grad": draw(1, N).expand(case.rows, N) if case.strided else draw(case.rows, N),
        "offsets": torch.tensor(case.ends, dtype=torch.int64 if case.packed else torch.int32),
    }
    for name in case.wanted:
        given[name].requires_grad_()
    return given


def run(case: Experts, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    operands = [given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = lora_experts(*operands, 1.7, given["offsets"], transposed=case.transposed, dropout_p=case.p)
    y.backward(given["grad"])
    return {"Y": y.detach()} | {
        f"d{name}": given[name].grad for name in LEAVES if given[name].grad is not None
    }


def expected(case: Experts, given: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The results by the reference in ``dtype``, with the mask that a run draws."""
    torch.manual_seed(5)
    keep, p = draw_keep(given["x"], case.p) if case.p and case.r else (None, 0.0)
    t = {
        name: value if value is None else value.detach().to(dtype) for name, value in given.items()
    }
    for name in LEAVES:
        t[name].requires_grad_()
    weight = t["weight"].transpose(1, 2) if case.transposed else t["weight"]
    y = lora_experts_ref(
        t["x"], weight, t["bias"], t["lora_A"], t["lora_B"], 1.7, given["offsets"], keep, p
    )
    grads = torch.autograd.grad(
        y, [t[name] for name in LEAVES], t["grad"], allow_unused=True, materialize_grads=True
    )
    return {"Y": y.detach()} | {f"d{name}": grad for name, grad in zip(LEAVES, grads, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, monkeypatch):
    monkeypatch.setattr(op, "can_group", lambda x, stack: case.grouped)
    given = make(case)
    found = run(case, given)
    exact = expected(case, given, FP64)
    eager = expected(case, given, case.dtype)
    assert found.keys() == {"Y", *(f"d{name}" for name in case.wanted)}
    for name, value in found.items():
        assert value.dtype == (case.lora_dtype if "lora" in name else case.dtype), name
        if case.dtype == FP64:
            torch.testing.assert_close(value, exact[name], rtol=1e-13, atol=1e-13)
        else:
            assert_no_worse(value, exact[name], eager[name], dtype=case.dtype, name=name)
    unused = slice(case.ends[-1], None)
    assert not found["Y"][unused].any() and not found.get("dx", found["Y"])[unused].any()


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


@pytest.mark.parametrize("multiplied", [True, False])
def test_each_expert_is_a_lora_linear_to_the_bit(multiplied, monkeypatch):
    monkeypatch.setattr(
        cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
    )
    # For float32 adapters, few rows would be cast in place of A and B. Fewer than FLOAT32_ROWS of
    # lora_linear are not computed in float32 where the processor does not multiply bfloat16.
    case = Experts(BF16, BF16, bias=True, ends=(10, 10, 32, 40))
    given = make(case)
    found, start = run(case, given), 0
    for e, end in enumerate(case.ends):
        parts = [given[name].detach()[e] for name in ("weight", "bias", "lora_A", "lora_B")]
        y = lora_linear(
            given["x"][start:end], *(t.requires_grad_(i > 1) for i, t in enumerate(parts)), 1.7
        )
        assert torch.equal(found["Y"][start:end], y)
        start = end


def test_it_keeps_x_and_s_and_no_stack():
    case = Experts(rows=40, p=0.3)
    given, kept = make(case), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_experts(
            *(given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")),
            1.7,
            given["offsets"],
            dropout_p=0.3,
        )
    own = {given[name].data_ptr() for name in ("x", "weight", "lora_A", "lora_B", "offsets")}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == [40 * 3, 40 * K]
    assert {t.dtype for t in kept if t.numel() == 40 * K and t.data_ptr() not in own} == {
        torch.bool
    }


@pytest.mark.parametrize("wanted", [("x",), ("lora_A", "lora_B")])
def test_a_stack_that_no_gradient_reads_is_not_kept(wanted):
    made, kept = make(Experts(wanted=wanted)), []
    operands = [made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_experts(*operands, 1.7, made["offsets"])
    is_kept = made["weight"].data_ptr() in [t.data_ptr() for t in kept]
    assert is_kept == ("x" in wanted)


def test_no_mask_outside_training():
    given = make(Experts(p=0.5))
    operands = [given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    state = torch.get_rng_state()
    y = lora_experts(*operands, 1.7, given["offsets"], dropout_p=0.5, training=False)
    assert torch.equal(y, lora_experts(*operands, 1.7, given["offsets"])) and torch.equal(
        state, torch.get_rng_state()
    )


def test_autocast_casts_all_but_float32_adapters():
    case = Experts(bias=True)
    given = make(case)
    low = given | {
        name: given[name].detach().to(BF16).requires_grad_(name == "x")
        for name in ("x", "weight", "bias")
    }
    with torch.autocast("cpu", BF16):
        found = run(case, given)
    for name, value in run(case, low).items():
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_and_torch_compile_without_a_break(p):
    case = Experts(bias=True, p=p)
    given = make(case)
    with Operators() as operators:
        run(case, given)
    calls = [call for call in operators.calls if call[0].namespace == "stablelora_kernels"]
    assert [call[0]._opname for call in calls] == ["lora_experts_fwd", "lora_experts_bwd"]
    for operator, arguments, _ in calls:
        torch.library.opcheck(
            operator, [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        )

    def function(x, lora_A, lora_B):
        return lora_experts(
            x, given["weight"], given["bias"], lora_A, lora_B, 1.7, given["offsets"], dropout_p=p
        )

    leaves = [given[name].detach().requires_grad_() for name in LEAVES]
    torch.manual_seed(5)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    y.backward(given["grad"])
    if not p:
        for name, leaf in zip(LEAVES, leaves, strict=True):
            assert torch.equal(leaf.grad, given[name].grad), name


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
    given = make(Experts())
    names = ("x", "weight", "bias", "lora_A", "lora_B", "offsets")
    good: dict[str, Any] = {name: given[name] for name in names} | {
        "scaling": 1.7,
        "dropout_p": 0.3,
    }
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora_experts(**(good | changes))
    assert torch.equal(state, torch.get_rng_state())

"""``lora_rows`` against float64: each branch on rows of its own, on both backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.ops.dropout import Drawn
from stablelora_kernels.ops.lora_rows import autograd as module
from stablelora_kernels.ops.lora_rows import torch as rows_torch
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.reference.lora import lora_branch_ref
from stablelora_kernels.reference.rounding import Arithmetic, Rounded, RoundedLayer
from stablelora_kernels.testing import EPS, as_rows, assert_no_worse, rounded_operand
from stablelora_kernels.testing.cases import BF16, DEVICE, FP16, FP32, FP64
from stablelora_kernels.utils.tensors import drop_share
from tests.helpers.launches import count_launches

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = {
    "float64": (FP64, FP64),
    "float32": (FP32, FP32),
    "bfloat16": (BF16, BF16),
    "bfloat16 with float32 adapters": (BF16, FP32),
    "float16 with float32 adapters": (FP16, FP32),
}
# Leading sizes, K, N; and of each branch its first row, its last, its rank and its dropout.
SHAPES = {
    "sequences": ((7, 11), 40, 48, [(0, 22, 3, 0.0), (22, 33, 20, 0.25), (44, 77, 1, 0.75)]),
    "primes": ((53,), 37, 41, [(1, 2, 3, 0.25), (2, 19, 8, 0.0), (40, 53, 20, 0.0)]),
    "all rows of one": ((2, 35), 64, 24, [(0, 70, 16, 0.5)]),
    "one row": ((1,), 24, 20, [(0, 1, 2, 0.0)]),
    "many rows": ((3, 200), 40, 24, [(0, 200, 8, 0.25), (200, 600, 3, 0.0)]),
}


class Operands(NamedTuple):
    """A call's leaves."""

    x: Tensor
    # W and a bias, or the output of another layer.
    weight: Tensor
    bias: Tensor
    base: Tensor
    branches: list[RowsBranch]
    grad: Tensor

    def differentiable(self, with_base: bool) -> dict[str, Tensor]:
        named = {"x": self.x} | ({"base": self.base} if with_base else {})
        for i, branch in enumerate(self.branches):
            named |= {f"lora_A{i}": branch.lora_A, f"lora_B{i}": branch.lora_B}
        return named

    def to(self, dtype: torch.dtype) -> Operands:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_()

        branches = [b._replace(lora_A=leaf(b.lora_A), lora_B=leaf(b.lora_B)) for b in self.branches]
        plain = [t.detach().to(dtype) for t in (self.weight, self.bias)]
        return Operands(leaf(self.x), *plain, leaf(self.base), branches, self.grad.to(dtype))


def make(shape: str, dtypes: tuple[torch.dtype, torch.dtype], strided: bool = False) -> Operands:
    dtype, lora_dtype = dtypes
    leading, k, n, spans = SHAPES[shape]
    torch.manual_seed(3)

    def leaf(*size: int, of: torch.dtype = dtype) -> Tensor:
        t = torch.randn(*size, device=DEVICE).to(of)
        if strided and t.dim() > 1:
            # Columns are far apart.
            t = t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t.detach().requires_grad_()

    branches = [
        RowsBranch(start, end, leaf(r, k, of=lora_dtype), leaf(n, r, of=lora_dtype), 0.5 + i, p)
        for i, (start, end, r, p) in enumerate(spans)
    ]
    weight, bias = leaf(n, k).detach(), leaf(n).detach()
    return Operands(leaf(*leading, k), weight, bias, leaf(*leading, n), branches, leaf(*leading, n))


def keep_of(branch: RowsBranch, k: int) -> Tensor:
    """The mask of a branch, by a seed that its rows decide."""
    return dropout_keep_ref(branch.end - branch.start, k, branch.dropout_p, 100 + branch.start).to(
        DEVICE
    )


def composed(given: Operands, with_base: bool) -> Tensor:
    """The same by PyTorch's own operators, in the operands' dtype."""
    x = given.x.reshape(-1, given.x.shape[-1])
    base = given.base if with_base else given.x @ given.weight.T + given.bias
    y = base.reshape(-1, base.shape[-1])
    parts, done = [], 0
    for branch in given.branches:
        rows = slice(branch.start, branch.end)
        keep = keep_of(branch, x.shape[1]) if branch.dropout_p else None
        pair = (branch.lora_A.to(x.dtype), branch.lora_B.to(x.dtype))
        share = drop_share(branch.dropout_p)
        of_rows = lora_branch_ref(y[rows], x[rows], *pair, branch.scaling, keep, share)
        parts += [y[done : branch.start], of_rows]
        done = branch.end
    return torch.cat([*parts, y[done:]]).view(base.shape)


def by_op(given: Operands, with_base: bool) -> Tensor:
    """The op, with known masks."""
    keeps = iter(given.branches)

    def seeds(device: torch.device, dropout_ps: Sequence[float]) -> list[Tensor | None]:
        assert [*dropout_ps] == [branch.dropout_p for branch in given.branches]
        return [
            torch.tensor([100 + branch.start], device=device) if branch.dropout_p else None
            for branch in given.branches
        ]

    def draw(x: Tensor, dropout_p: float) -> Drawn:
        branch = next(keeps)
        if not dropout_p:
            return Drawn(None, None, 1.0)
        mask = keep_of(branch, x.shape[1])
        return Drawn(mask, mask, 1 / (1 - drop_share(dropout_p)))

    weight, bias = (None, None) if with_base else (given.weight, given.bias)
    with (
        mock.patch.object(module, "draw_seeds", seeds),
        mock.patch.object(rows_torch, "draw_to_keep", draw),
    ):
        return lora_rows(given.x, weight, bias, given.base if with_base else None, given.branches)


def results(given: Operands, y: Tensor, with_base: bool) -> dict[str, Tensor]:
    named = given.differentiable(with_base)
    grads = torch.autograd.grad(y, list(named.values()), given.grad)
    return {"Y": y.detach(), **dict(zip(named, grads, strict=True))}


def stacked(parts: list[Rounded]) -> Rounded:
    """Rows below one another."""
    return Rounded(
        torch.cat([part.value for part in parts]),
        torch.cat([part.deviation for part in parts]),
        frozenset().union(*(part.errors for part in parts)),
    )


def roundings(given: Operands, with_base: bool) -> dict[str, Rounded]:
    """How far rounding may take each result, by the analysis of ``reference/rounding.py``: a layer
    of its own for each range of rows, those without a branch included.
    """
    dtype = given.x.dtype
    x, base, grad = (t.detach().flatten(0, -2) for t in (given.x, given.base, given.grad))
    weight = None if with_base else rounded_operand(given.weight, dtype)
    bias = None if with_base else rounded_operand(given.bias, dtype)
    named: dict[str, Rounded] = {}
    of_y: list[Rounded] = []
    of_dx: list[Rounded] = []

    def add(start: int, end: int, branch: RowsBranch | None) -> dict[str, Rounded]:
        rows = slice(start, end)
        pair = (None, None)
        keep = None
        if branch is not None:
            pair = (
                rounded_operand(branch.lora_A, dtype),
                rounded_operand(branch.lora_B, dtype),
            )
            keep = keep_of(branch, x.shape[1]) if branch.dropout_p else None
        scaling, p = (1.0, 0.0) if branch is None else (branch.scaling, branch.dropout_p)
        layer = RoundedLayer(Arithmetic(dtype), weight, bias, *pair, scaling, keep, drop_share(p))
        of_rows = as_rows(x[rows], dtype)
        of_y.append(layer.forward(of_rows, as_rows(base[rows], dtype) if with_base else None))
        gradients = layer.backward(as_rows(grad[rows], dtype))
        of_dx.append(gradients.get("x", as_rows(torch.zeros_like(x[rows]), dtype)))
        return gradients

    done = 0
    for i, branch in enumerate(given.branches):
        if done < branch.start:
            add(done, branch.start, None)
        gradients = add(branch.start, branch.end, branch)
        named[f"lora_A{i}"] = gradients["lora_A"]
        named[f"lora_B{i}"] = gradients["lora_B"]
        done = branch.end
    if done < x.shape[0]:
        add(done, x.shape[0], None)
    named["Y"] = stacked(of_y)
    named["x"] = stacked(of_dx)
    if with_base:
        named["base"] = as_rows(given.grad, dtype)
    return named


@pytest.mark.covering
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64(dtypes, shape, with_base, strided, backend):
    if backend == "triton" and dtypes == "float64":
        # The kernels do not compute in it.
        dtypes = "float32"
    given = make(shape, DTYPES[dtypes], strided)
    base = given.base.detach().clone()
    found = results(given, by_op(given, with_base), with_base)
    exact = given.to(FP64)
    expected = results(exact, composed(exact, with_base), with_base)
    # Eager's products of x's dtype, where adapters are in float32.
    eager = given.to(given.x.dtype)
    baseline = results(eager, composed(eager, with_base), with_base)
    allowed = {} if given.x.dtype == FP64 else roundings(given, with_base)
    for name, value in found.items():
        like = given.differentiable(with_base).get(name, given.x)
        assert value.dtype == like.dtype, name
        if value.dtype == FP64:
            # The oracle rounds as often: sums of at most 120 products, each off by 120 units in the
            # last place of the sum of magnitudes, which is less than 30 times the largest element.
            atol = 120 * 30 * EPS[FP64] * expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)
            continue
        assert_no_worse(
            value,
            expected[name],
            baseline[name],
            dtype=given.x.dtype,
            rounding=allowed[name],
            name=name,
        )
    assert torch.equal(given.base, base), "base is another layer's"


def test_rows_without_a_branch_are_the_base_alone(backend):
    given = make("sequences", (FP32, FP32))
    y = by_op(given, with_base=True)
    assert torch.equal(y[3], given.base[3])
    (dx,) = torch.autograd.grad(y, given.x, given.grad)
    assert not dx[3].any() and dx[0].any()


@pytest.mark.parametrize("trained", ["x", "one pair", "nothing"])
def test_only_what_is_wanted_is_kept_and_computed(trained, backend):
    given = make("sequences", (FP32, FP32))
    expected = results(given, by_op(given, False), False)
    for name, leaf in given.differentiable(False).items():
        leaf.requires_grad_(
            name in {"x": ["x"], "one pair": ["lora_A1", "lora_B1"], "nothing": []}[trained]
        )
    y = by_op(given, False)
    torch.testing.assert_close(y, expected["Y"])
    wanted = {
        name: leaf for name, leaf in given.differentiable(False).items() if leaf.requires_grad
    }
    assert y.requires_grad == bool(wanted)
    for name, leaf in wanted.items():
        (grad,) = torch.autograd.grad(y, leaf, given.grad, retain_graph=True)
        torch.testing.assert_close(grad, expected[name])
    if wanted:
        kept = [t for t in y.grad_fn.saved_tensors if t is not None]
        assert (given.x in {t for t in kept}) == (trained == "one pair")


def test_no_rows_and_no_tokens(backend):
    x = torch.randn(3, 0, 8, device=DEVICE, requires_grad=True)
    pair = torch.randn(2, 8, device=DEVICE).requires_grad_(), torch.randn(4, 2, device=DEVICE)
    y = lora_rows(
        x, torch.randn(4, 8, device=DEVICE), None, None, [RowsBranch(0, 0, *pair, 1.0, 0.0)]
    )
    y.sum().backward()
    assert y.shape == (3, 0, 4) and x.grad.shape == x.shape and not pair[0].grad.any()


def test_each_branch_is_one_launch_each_way():
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    given = make("many rows", (BF16, FP32))
    with slk.settings(backend="triton"):
        # The third call runs prepared launches.
        for _ in range(3):
            with count_launches() as forward:
                y = by_op(given, False)
            with count_launches() as backward:
                y.backward(given.grad)
    assert sum(forward.values()) == len(given.branches) == sum(backward.values())


def test_autocast_computes_in_its_dtype(backend):
    given = make("sequences", (FP32, FP32))
    low = given._replace(
        x=given.x.detach().to(BF16).requires_grad_(), weight=given.weight.to(BF16),
        bias=given.bias.to(BF16), grad=given.grad.to(BF16),
    )  # fmt: skip
    with torch.autocast(DEVICE, BF16):
        found = by_op(given, False)
    expected = by_op(low, False)
    assert found.dtype == BF16 and torch.equal(found, expected)
    (grad,) = torch.autograd.grad(found, given.branches[0].lora_A, low.grad)
    (other,) = torch.autograd.grad(expected, given.branches[0].lora_A, low.grad)
    assert grad.dtype == FP32 and torch.equal(grad, other)


@pytest.mark.filterwarnings("ignore")
def test_ops_declare_what_they_write():
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    given = make("primes", (FP32, FP32))
    settings = module.RowsSettings(
        (1, 2, 40), (2, 19, 53), (1.0, 1.5, 2.0), (0.0, 0.0, 0.25), True, True
    )
    lora_As, lora_Bs = (
        [getattr(b, name).detach() for b in given.branches] for name in ("lora_A", "lora_B")
    )
    seeds = [None, None, torch.tensor([7], device=DEVICE)]
    x, grad = given.x.detach(), given.grad.detach()
    forward = (x, given.base.detach().clone(), lora_As, lora_Bs, seeds, *settings)
    op = torch.ops.stablelora_kernels
    torch.library.opcheck(op.lora_rows_fwd, forward, test_utils=("test_schema", "test_faketensor"))
    s, masks = op.lora_rows_fwd(*forward)
    backward = (grad, x, torch.zeros_like(x), lora_As, lora_Bs, s, masks, *settings)
    torch.library.opcheck(op.lora_rows_bwd, backward, test_utils=("test_schema", "test_faketensor"))


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

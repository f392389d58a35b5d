"""Forward-mode differentiation of every op: a call either has the right tangent or raises. PyTorch
takes the outputs of an op without a forward derivative for constants, whose tangents are zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.functional import (
    LoRAWeights,
    lora_branch,
    lora_experts,
    lora_linear,
    lora_linear_cross_entropy,
    lora_linear_group,
    lora_mlp,
)
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.ops.lora_rows.autograd import RowsBranch, lora_rows
from stablelora_kernels.testing.cases import DEVICE, FP32, FP64

FEW_ROWS, MANY_ROWS = 5, 600
SIZE = 24


def calls(rows: int, trains: bool, dtype: torch.dtype = FP64) -> dict[str, Callable[..., Tensor]]:
    """Each op as a function of x [rows, SIZE]. ``trains``: whether A and B require gradients."""
    generator = torch.Generator().manual_seed(0)

    def matrix(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator, dtype=FP64).div(4).to(dtype)

    layers = [
        LoRAWeights(
            matrix(SIZE, SIZE),
            None,
            matrix(3, SIZE).requires_grad_(trains),
            matrix(SIZE, 3).requires_grad_(trains),
            1.5,
        )
        for _ in range(3)
    ]
    weights, _, lora_As, lora_Bs, scalings = zip(*layers, strict=True)
    first = layers[0]
    stacks = [torch.stack(operands) for operands in (weights, lora_As, lora_Bs)]
    ends = torch.tensor([rows // 3, rows // 2, rows])
    labels = torch.arange(rows) % SIZE
    branch = RowsBranch(0, rows, first.lora_A, first.lora_B, 1.5, 0.0)
    return {
        "linear": lambda x: lora_linear(x, *first),
        "branch": lambda x: lora_branch(2 * x, x, *first[2:]),
        "group": lambda x: torch.cat(
            lora_linear_group(x, weights, [None] * 3, lora_As, lora_Bs, scalings), dim=1
        ),
        "mlp": lambda x: lora_mlp(x, *layers, "silu"),
        "rows": lambda x: lora_rows(x, first.weight, None, None, [branch]),
        "experts": lambda x: lora_experts(x, stacks[0], None, *stacks[1:], 1.5, ends),
        "loss": lambda x: lora_linear_cross_entropy(
            x,
            first.weight,
            labels,
            bias=None,
            lora_A=first.lora_A,
            lora_B=first.lora_B,
            scaling=1.5,
        ),
    }


@pytest.fixture(autouse=True)
def no_level_is_left() -> Iterator[None]:
    """torch 2.15 leaves the level of forward mode when it fails to compile a graph of it."""
    yield
    with contextlib.suppress(RuntimeError):
        torch._C._exit_dual_level(level=0)


def by_transform(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    return torch.func.jvp(call, (x,), (direction,))[1]


def by_dual_numbers(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(y).tangent
    return torch.zeros_like(y) if tangent is None else tangent


def by_jacobian(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    return torch.func.jacfwd(call)(x).flatten(-2) @ direction.flatten()


def inside_a_compiled_graph(
    call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor
) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(by_transform, backend="aot_eager")(call, x, direction)


def around_a_compiled_graph(
    call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor
) -> Tensor:
    torch._dynamo.reset()
    return by_transform(torch.compile(call, backend="aot_eager"), x, direction)


FORMS = (
    by_transform,
    by_dual_numbers,
    by_jacobian,
    inside_a_compiled_graph,
    around_a_compiled_graph,
)


def operands_of(rows: int) -> tuple[Tensor, Tensor]:
    """x and the direction of its change."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, rows, SIZE, generator=generator, dtype=FP64))


@torch.no_grad()
def differences(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """The tangent by central differences, exact to about nine digits in float64."""
    step = 1e-6
    return (call(x + step * direction) - call(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", ["experts", "loss", "rows"])
@pytest.mark.parametrize("trains", [False, True])
def test_ops_of_the_library_refuse(op, form, trains):
    call = calls(FEW_ROWS, trains)[op]
    call(operands_of(FEW_ROWS)[0])
    with pytest.raises(RuntimeError, match=r"forward-mode differentiation|jvp|functorch"):
        form(call, *operands_of(FEW_ROWS))


def test_a_refusal_names_the_op_and_what_to_do():
    call = calls(FEW_ROWS, trains=False)["experts"]
    message = (
        r"lora_experts_fwd must be called outside of forward-mode .* got level 0.* backward\(\)"
    )
    with pytest.raises(NotImplementedError, match=message):
        by_transform(call, *operands_of(FEW_ROWS))
    # Outside it goes on.
    assert call(operands_of(FEW_ROWS)[0]).isfinite().all()


@pytest.mark.covering
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
@pytest.mark.parametrize("rows", [FEW_ROWS, MANY_ROWS])
def test_pytorchs_operators_have_the_right_tangent(op, rows, form):
    if form is by_jacobian and rows == MANY_ROWS:
        # It has the square of x's elements.
        rows = 30
    call = calls(rows, trains=False)[op]
    exact = differences(call, *operands_of(rows))
    torch.testing.assert_close(form(call, *operands_of(rows)), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [by_transform, by_dual_numbers], ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_autograds_functions_refuse(op, form):
    with pytest.raises(RuntimeError, match=r"jvp|functorch"):
        form(calls(MANY_ROWS, trains=True)[op], *operands_of(MANY_ROWS))


@pytest.mark.parametrize("form", [by_transform, by_dual_numbers], ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp", "rows"])
@pytest.mark.parametrize("trains", [False, True])
def test_kernels_refuse(op, trains, form):
    """On Triton, where no call runs plain operators."""
    if DEVICE != "cpu":
        pytest.skip("runs on a CPU, in Triton's interpreter: its operands are there")
    call = calls(FEW_ROWS, trains, FP32)[op]
    x, direction = (t.float() for t in operands_of(FEW_ROWS))
    with settings(backend="triton"):
        call(x)
        with pytest.raises(RuntimeError, match=r"forward-mode differentiation|jvp|functorch"):
            form(call, x, direction)


@pytest.mark.parametrize("form", [by_transform, by_dual_numbers], ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", ["linear", "group", "mlp"])
def test_onednns_products_do_not_lose_the_tangent(op, form, monkeypatch):
    """In float32 on AMD's processors, forced here: oneDNN's operator has no forward derivative."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("runs with builds of PyTorch that have oneDNN: PyPI's for x86")
    for constant, value in {"ONEDNN_HELPS": True, "ONEDNN_FROM": 1, "FUNCTION_FROM": 1}.items():
        monkeypatch.setattr(cpu_products, constant, value)
    x, direction = operands_of(MANY_ROWS)
    exact = by_transform(calls(MANY_ROWS, trains=False)[op], x, direction)
    tangent = form(calls(MANY_ROWS, False, FP32)[op], x.float(), direction.float())
    torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-4)

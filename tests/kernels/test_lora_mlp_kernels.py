"""An MLP's launches: how many there are for the gradients that are wanted, and which may begin
early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from triton.runtime import interpreter

from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.launch import lora_mlp, quantized, thin_products
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.fill_jobs import forward_product
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import FP8, Layout, Stored
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case
from tests.helpers.case_checks import launches
from tests.helpers.cases import far, small

another_gpu = pytest.mark.skipif(
    DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"
)


@another_gpu
@pytest.mark.parametrize(
    ("processors", "arch", "forward"), [(1, "sm_90", 3), (1, "sm_80", 3), (132, "sm_90", 5)]
)
def test_launches_of_a_call(processors, arch, forward):
    """S of gate and up, both with the gate, and down. Where processors are idle, gate, up and the
    gate are three launches.
    """
    case = Case(
        "mlp", (130, 64), (48, 48, 24), (6, 3, 4), BF16, BF16, arch=arch, processors=processors
    )
    assert [made.total() for made in launches(case)] == [forward, 4]


@another_gpu
@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (["x"], 3),
        (None, 4),
        # dG and dU without dX.
        (["lora_A0", "lora_A1"], 4),
        (["lora_B0", "lora_B1"], 3),
        (["lora_A0", "lora_A1", "lora_B0", "lora_B1"], 4),
        # Nothing of gate and up.
        (["lora_A2", "lora_B2"], 1),
        (["lora_A2"], 1),
        (["lora_B2"], 1),
    ],
    ids=str,
)
def test_backward_launches_what_is_asked_for(wanted, count):
    """A product's launch may have dS, dA and dB as well."""
    case = small("mlp", dtype=BF16, lora_dtype=BF16, p=0.3, arch="sm_80", wanted=wanted)
    assert launches(case)[1].total() == count


@pytest.mark.parametrize(
    "kinds", [("nf4", "fp8", "nf4 nested"), (None, None, "nf4 nested")], ids=str
)
def test_many_rows_dequantize_each_weight_once_in_each_direction(kinds):
    """Backward only those weights that its gradients need."""
    case = small(
        "mlp", shape=(260, 64), sizes=(48, 48, 128), dtype=BF16, lora_dtype=FP32, quantized=kinds
    )
    count = sum(kind is not None for kind in kinds)
    for wanted, again in (
        (None, count),
        (["lora_A0", "lora_B0", "lora_A1", "lora_B1"], 1),
        (["lora_A2", "lora_B2"], 0),
    ):
        assert [made["dequantize"] for made in launches(case.but(wanted=wanted))] == [
            count,
            again,
        ], wanted


# Offsets beyond 32 bits: of each kernel the last program alone, in memory of which little is touched.


def lazily(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros, contiguous, of more than 2^31 elements, behind as many more: an offset that wraps around
    gives wrong values, not a crash.
    """
    size = math.prod(shape)
    strides = torch.empty(shape, device="meta").stride()
    return far(torch.zeros(3, 1, dtype=dtype), size).as_strided(shape, strides, size)


@pytest.fixture
def run_last(monkeypatch) -> Callable[[Launch], None]:
    builder = interpreter.interpreter_builder
    set_grid, set_place = builder.set_grid_dim, builder.set_grid_idx

    def run(launch: Launch) -> None:
        (programs,) = launch.grid
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_grid(programs, 1, 1))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: set_place(programs - 1, 0, 0))
        launch._replace(grid=(1,)).run(torch.device("cpu"))

    return run


def some(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(BF16)


@another_gpu
def test_an_activation_beyond_2_to_the_31(run_last):
    g, u, h = (lazily(2**31 + 100) for _ in range(3))
    g[-9:], u[-9:] = some(2, 9)
    gate, up = SimpleNamespace(y=g), SimpleNamespace(y=u)
    run_last(lora_mlp._activation([gate, up], h, "silu", ""))
    assert_low(h[-9:], silu(g[-9:].float()) * u[-9:].float())


@another_gpu
def test_gate_and_up_beyond_2_to_the_31(run_last):
    m, n, k = 2**15 + 40, 2**16, 16
    x, wg, wu = some(m, k), some(n, k), some(n, k).flip(0)
    g, u, h = (lazily(m, n) for _ in range(3))
    nothing = {"s": None, "seed": None, "mask": None, "dropout_p": 0.0}
    pair = torch.empty(0, k), torch.empty(n, 0)
    members = [
        forward_product(x, Projection(w, None, *pair, 1.0), y, **nothing)
        for w, y in ((wg, g), (wu, u))
    ]
    run_last(lora_mlp._gate_up_by_pointers(DEVICES["sm_80"], members, h, "silu", keep=True))
    last = (slice(-9, None), slice(-9, None))
    assert_low(g[last], x[-9:].float() @ wg[-9:].float().t())
    assert_low(u[last], x[-9:].float() @ wu[-9:].float().t())
    assert_low(h[last], silu(g[last].float()) * u[last].float())


@another_gpu
def test_a_dequantized_weight_beyond_2_to_the_31(run_last):
    n, k = 2**11 + 8, 2**20
    data, w = lazily(n, k, dtype=torch.uint8), lazily(n, k)
    values = some(8, 8).to(torch.float8_e4m3fn)
    data[-8:, -8:] = values.view(torch.uint8)
    scale = torch.full((n,), 2.0)
    layout = Layout(FP8, n, k, k)
    run_last(quantized.dequantize(w, Stored(data, (scale,), layout)))
    assert_low(w[-8:, -8:], 2 * values.float())


@another_gpu
def test_a_mask_beyond_2_to_the_31(run_last):
    m, k = 2**24 + 64, 1024
    x = some(1, k).expand(m, k)
    s, mask = lazily(m, 128), lazily(m, k // 32, dtype=torch.int32)
    assert mask.nbytes > 2**31
    pair = some(16, k), some(8, 16)
    product = forward_product(
        x,
        Projection(None, None, *pair, 1.0),
        x,
        s=s[:, :16],
        seed=torch.tensor([3, 5]),
        mask=mask,
        dropout_p=0.5,
    )
    run_last(thin_products.lora_down(DEVICES["sm_90"], [product]))
    assert mask[-9:].ne(0).all() and s[-9:, :16].any(1).all()


def assert_low(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)

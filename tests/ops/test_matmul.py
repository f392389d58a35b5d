"""The CPU's libraries, forced: float32 by oneDNN, which only AMD's processors choose, and low
precision by float32.
"""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64, Case, make, run
from stablelora_kernels.testing.ops.lora_linear import plain
from tests.helpers.case_checks import assert_close, check
from tests.helpers.cases import small
from tests.helpers.operators import Operators
from tests.ops.test_ops_contract import far_reaching, with_tiny_gradients

ONEDNN = {"mkldnn._linear_pointwise.default"}
MKL = {"aten.mm.default", "aten.addmm.default"}


@pytest.fixture
def onednn(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("runs with builds of PyTorch that have oneDNN: PyPI's for x86")
    monkeypatch.setattr(cpu_products, "ONEDNN_HELPS", True)
    monkeypatch.setattr(cpu_products, "ONEDNN_FROM", 1)
    monkeypatch.setattr(cpu_products, "FUNCTION_FROM", 1)
    with torch.backends.mkldnn.flags(enabled=True):
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 5, 3), (2, 16, 16), (7, 33, 20), (1, 64, 1), (130, 1, 31)], ids=str
)
def test_any_strides_are_no_worse_than_mkls(size, bias, onednn):
    m, k, n = size
    a, b = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(m))
        for shape in ((m, k), (k, n))
    )
    added = torch.linspace(-1, 1, n) if bias else None
    as_columns = [a.t().contiguous().t(), torch.stack((a, a), -1)[..., 0]]
    for left in (a, *as_columns):
        for right in (
            b,
            b.t().contiguous().t(),
            torch.stack((b, b), 1)[:, 0],
            torch.stack((b, b), -1)[..., 0],
        ):
            expected = a.double() @ b.double() + (0 if added is None else added.double())
            baseline = a @ b + (0 if added is None else added)
            assert_no_worse(cpu_products.wide_product(left, right, added), expected, baseline)
    to = torch.ones(m, n)
    found = cpu_products.add_wide_product(to, a, b)
    assert found is to
    assert_no_worse(found, a.double() @ b.double() + 1, a @ b + 1)


@pytest.mark.parametrize(
    "case", [Case("linear", (37,), (5,), (3,)), small("linear", p=0.3), small("group")], ids=str
)
def test_layers_match_the_oracle(case, onednn):
    case = case.but(backend="torch")
    check(case, run(case))


def products_of(case):
    """The names of the products that run."""
    with Operators() as operators:
        run(case)
    return {str(func) for func, *_ in operators.calls} & (ONEDNN | MKL)


def test_which_library(onednn, monkeypatch):
    case, few = small("linear", backend="torch"), small("linear", 5, backend="torch")
    assert products_of(case) == products_of(few) == ONEDNN
    with torch.backends.mkldnn.flags(enabled=False):
        assert products_of(case) == MKL
    for dtype, multiplied, products in (
        (FP64, True, MKL),
        (BF16, True, MKL),
        (BF16, False, ONEDNN),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
            )
            assert products_of(case.but(dtype=dtype, lora_dtype=dtype)) == products
    with monkeypatch.context() as patch:
        patch.setattr(cpu_products, "ONEDNN_HELPS", False)
        with Operators() as operators:
            run(case)
        # Under autograd's own functions, nothing is added in place.
        assert "aten::addmm_" not in {func.name() for func, *_ in operators.calls}
    # Few rows take it where it saves more than a function of autograd's costs.
    for name, value, one in (
        ("FUNCTION_FROM", 5 * 24 * 20 + 1, few),
        ("ONEDNN_FROM", 70 * 24 * 20 + 1, case),
        ("ONEDNN_HELPS", False, case),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_products, name, value)
            assert products_of(one) == MKL


def test_compiled_layers_take_it_and_exported_ones_do_not(onednn):
    layer = slk.LoRALinear(24, 20, r=6)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(70, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(x)
        with torch.profiler.profile() as profile:
            y = compiled(x)
        torch.testing.assert_close(y, layer(x))
    # Dynamo of torch 2.11 says of each graph that it is exported.
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 12):
        assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    for strict in (False, True):
        exported = torch.export.export(layer.eval(), (x,), strict=strict)
        graphs = [
            part
            for part in exported.graph_module.modules()
            if isinstance(part, torch.fx.GraphModule)
        ]
        called = [str(node.target) for part in graphs for node in part.graph.nodes]
        assert any("aten" in name for name in called)
        assert not [name for name in called if "stablelora" in name or "mkldnn" in name]
        torch.testing.assert_close(exported.module()(x), layer(x))
    torch._dynamo.reset()


def test_the_op_passes_opcheck(onednn):
    a, b, bias = torch.randn(7, 5), torch.randn(5, 3), torch.randn(3)
    for added in (None, bias):
        torch.library.opcheck(torch.ops.stablelora_kernels.wide_product.default, (a, b, added))


@pytest.fixture
def without_instructions(monkeypatch):
    """As on a processor that multiplies neither bfloat16 nor float16."""
    monkeypatch.setattr(cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, False))


def multiplied_dtypes(case):
    """The dtypes of the operands of all products of matrices."""
    with Operators() as operators:
        found = run(case)
    products = [
        args
        for func, args, _ in operators.calls
        if func.name().split("::")[1].startswith(("mm", "addmm"))
    ]
    assert len(products) > 2
    # The base of a lone branch is made in float64.
    return found, {t.dtype for args in products for t in args if isinstance(t, torch.Tensor)} - {
        FP64
    }


@pytest.mark.parametrize("op", ["linear", "branch", "group", "nf4", "mlp"])
def test_low_precision_without_instructions_runs_in_float32(op, without_instructions):
    for dtype in (BF16, torch.float16):
        for changes in ({}, {"p": 0.3}, {"bias": (True,)}, {"lora_dtype": dtype}):
            case = small(op, dtype=dtype, backend="torch").but(**changes)
            if op == "branch" and "bias" in changes:
                continue
            found, dtypes = multiplied_dtypes(case)
            assert dtypes == {FP32}
            check(case, found)
    # Autocast does not cast the copies back.
    for inside in (False, True):
        case = small(op, backend="torch", autocast=True, backward_in_autocast=inside)
        assert multiplied_dtypes(case)[1] == {FP32}
    # One W at a time is copied: few rows would take longer so.
    for rows, expected in ((7, {BF16}), (8, {FP32})):
        if op in ("linear", "branch"):
            assert multiplied_dtypes(small(op, rows, dtype=BF16, backend="torch"))[1] == expected


@pytest.mark.parametrize("op", ["linear", "mlp"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_quantized_weight_is_rounded_before_it_is_multiplied_in_float32(
    kind, op, without_instructions
):
    """The results are those of the same weight in x's dtype, as everywhere, and as the base layer
    computes them.
    """
    for dtype in (BF16, FP16):
        case = small(op, dtype=dtype, quantized=(kind,), backend="torch", shape=(70, 64))
        case = case.but(sizes=(64, 64, 64)[: len(case.sizes)])
        operands = make(case)
        dequantized = {
            name: plain(t, dtype) if name.startswith("weight") else t
            for name, t in operands.items()
        }
        assert_close(run(case, operands), run(case, dequantized))


# What PyTorch's query says that oneDNN multiplies on a processor.
ANSWERS = {"neither": (), "bf16": (BF16,), "fp16": (FP16,), "both": (BF16, FP16)}


@pytest.fixture(
    params=[(answer, onednn) for answer in ANSWERS for onednn in ("on", "off")], ids="-".join
)
def processor(request, monkeypatch):
    """Each answer of the query in turn, with oneDNN on and off."""
    answer, onednn = request.param
    multiplied = {dtype: dtype in ANSWERS[answer] for dtype in cpu_products.MULTIPLIED}
    monkeypatch.setattr(cpu_products, "MULTIPLIED", multiplied)
    with torch.backends.mkldnn.flags(enabled=onednn == "on"):
        yield


# On both sides of the limit where the processor does not multiply the dtype, and of that where it
# does.
@pytest.mark.covering
@pytest.mark.parametrize("rows", [7, 8, 70])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_processor_matches_the_oracle(dtype, rows, processor):
    for op in ("linear", "branch", "group", "nf4", "mlp"):
        for changes in ({}, {"p": 0.3}, {"lora_dtype": dtype}):
            case = small(op, rows, dtype=dtype, backend="torch").but(**changes)
            check(case, run(case))


@pytest.mark.parametrize("rows", [5, 8, 70])
def test_every_processor_keeps_the_ends_of_float16(rows, processor):
    cases = [
        far_reaching(op, sign, rows, "torch")
        for op in ("linear", "branch", "group", "mlp")
        for sign in (1, -1)
    ]
    for case, given in [*cases, with_tiny_gradients(rows, "torch")]:
        check(case, run(case, given), given)


def test_who_decides_on_float32(monkeypatch):
    x = torch.zeros(1, dtype=BF16)
    assert not cpu_products._is_multiplied("a dtype that no PyTorch knows")
    for multiplied in (True, False):
        monkeypatch.setattr(cpu_products, "MULTIPLIED", {BF16: multiplied})
        with torch.backends.mkldnn.flags(enabled=True):
            assert cpu_products.by_float32(x) == (not multiplied)
        assert not cpu_products.by_float32(x.to("meta")) and not cpu_products.by_float32(x.float())
        with torch.backends.mkldnn.flags(enabled=False):
            assert cpu_products.by_float32(x)


def test_compiled_layers_run_in_float32_too(without_instructions):
    layer = slk.LoRALinear(24, 20, r=6, dtype=BF16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(70, 24, dtype=BF16)
    torch._dynamo.reset()
    with torch.autocast("cpu", BF16):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x))
    torch._dynamo.reset()

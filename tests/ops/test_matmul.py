"""Float32 products by oneDNN, which only AMD's processors with AVX-512 choose: forced here, at every size and any strides."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.ops import torch_path
from stablelora_kernels.testing import assert_no_worse
from tests.helpers.case_checks import check
from tests.helpers.cases import BF16, FP64, Case, run, small
from tests.helpers.operators import Operators

ONEDNN = {"mkldnn._linear_pointwise.default"}
MKL = {"aten.mm.default", "aten.addmm.default"}


@pytest.fixture
def onednn(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(torch_path, "ONEDNN_HELPS", True)
    monkeypatch.setattr(torch_path, "ONEDNN_FROM", 1)
    monkeypatch.setattr(torch_path, "FUNCTION_FROM", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 5, 3), (2, 16, 16), (7, 33, 20), (1, 64, 1), (130, 1, 31)], ids=str)
def test_any_strides_are_no_worse_than_mkls(size, bias, onednn):
    m, k, n = size
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(m)) for shape in ((m, k), (k, n)))
    added = torch.linspace(-1, 1, n) if bias else None
    as_columns = [a.t().contiguous().t(), torch.stack((a, a), -1)[..., 0]]
    for left in (a, *as_columns):
        for right in (b, b.t().contiguous().t(), torch.stack((b, b), 1)[:, 0], torch.stack((b, b), -1)[..., 0]):
            expected = a.double() @ b.double() + (0 if added is None else added.double())
            baseline = a @ b + (0 if added is None else added)
            assert_no_worse(torch_path.wide_product(left, right, added), expected, baseline)
    to = torch.ones(m, n)
    found = torch_path.add_wide_product(to, a, b)
    assert found is to
    assert_no_worse(found, a.double() @ b.double() + 1, a @ b + 1)


@pytest.mark.parametrize("case", [Case("linear", (37,), (5,), (3,)), small("linear", p=0.3), small("group")], ids=str)
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
    for dtype in (FP64, BF16):
        assert products_of(case.but(dtype=dtype, lora_dtype=dtype)) == MKL
    # Few rows take it where it saves more than a function of autograd's costs.
    for name, value, one in (
        ("FUNCTION_FROM", 5 * 24 * 20 + 1, few),
        ("ONEDNN_FROM", 70 * 24 * 20 + 1, case),
        ("ONEDNN_HELPS", False, case),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch_path, name, value)
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
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    for strict in (False, True):
        exported = torch.export.export(layer.eval(), (x,), strict=strict)
        graphs = [part for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
        called = [str(node.target) for part in graphs for node in part.graph.nodes]
        assert any("aten" in name for name in called)
        assert not [name for name in called if "stablelora" in name or "mkldnn" in name]
        torch.testing.assert_close(exported.module()(x), layer(x))
    torch._dynamo.reset()


def test_the_op_passes_opcheck(onednn):
    a, b, bias = torch.randn(7, 5), torch.randn(5, 3), torch.randn(3)
    for added in (None, bias):
        torch.library.opcheck(torch.ops.stablelora_kernels.wide_product.default, (a, b, added))

"""Float32 products by oneDNN, which only AMD's processors with AVX-512 choose: forced here, at every size and any strides."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.ops import matmul
from stablelora_kernels.testing import assert_no_worse, make_inputs
from tests.helpers.inputs import SCALING, SHAPES
from tests.helpers.oracle import check, run, run_dropped

ONEDNN = {"mkldnn._linear_pointwise.default"}
MKL = {"aten.mm.default", "aten.addmm.default"}


class Seen(TorchDispatchMode):
    """The names of the products that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names |= {str(func)} & (ONEDNN | MKL)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "ONEDNN_HELPS", True)
    monkeypatch.setattr(matmul, "ONEDNN_FROM", 1)
    monkeypatch.setattr(matmul, "FUNCTION_FROM", 1)


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
            assert_no_worse(matmul.wide_product(left, right, added), expected, baseline)
    to = torch.ones(m, n)
    found = matmul.add_wide_product(to, a, b)
    assert found is to
    assert_no_worse(found, a.double() @ b.double() + 1, a @ b + 1)


@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
def test_layers_match_the_oracle(shape, n, r, onednn):
    inputs = make_inputs(shape, n, r, bias=r != 3)
    check(inputs, run(inputs, "torch"))


def test_dropout(onednn):
    inputs = make_inputs((70, 24), 20, 6)
    check(inputs, *run_dropped(inputs, "torch", 0.3))


def test_projections_of_one_input(onednn):
    inputs = make_inputs((70, 24), 20, 6)
    other = make_inputs((70, 24), 12, 3, seed=1)
    x = inputs["x"].requires_grad_()
    with Seen() as seen:
        ys = functional.lora_linear_group(
            x,
            *([part[name] for part in (inputs, other)] for name in ("weight", "bias", "lora_A", "lora_B")),
            [SCALING] * 2,
        )
        (dx,) = torch.autograd.grad(ys, x, [inputs["grad"], other["grad"]])
    assert seen.names == ONEDNN
    alone = [run({**part, "x": inputs["x"].detach()}, "torch") for part in (inputs, other)]
    for y, part in zip(ys, alone, strict=True):
        torch.testing.assert_close(y, part["Y"])
    torch.testing.assert_close(dx, alone[0]["dX"] + alone[1]["dX"])


def products_of(inputs):
    with Seen() as seen:
        run(inputs)
    return seen.names


def test_which_library(onednn, monkeypatch):
    inputs = make_inputs((70, 24), 20, 6)
    assert products_of(inputs) == ONEDNN
    with torch.backends.mkldnn.flags(enabled=False):
        assert products_of(inputs) == MKL
    assert products_of(make_inputs((70, 24), 20, 6, dtype=torch.float64)) == MKL
    assert products_of(make_inputs((70, 24), 20, 6, dtype=torch.bfloat16)) == MKL
    monkeypatch.setattr(matmul, "ONEDNN_FROM", 70 * 24 * 20 + 1)
    assert products_of(inputs) == MKL
    monkeypatch.setattr(matmul, "ONEDNN_HELPS", False)
    monkeypatch.setattr(matmul, "ONEDNN_FROM", 1)
    assert products_of(inputs) == MKL


def test_few_rows_take_it_where_it_saves_more_than_a_function_costs(onednn, monkeypatch):
    inputs = make_inputs((5, 24), 20, 6)
    assert products_of(inputs) == ONEDNN
    monkeypatch.setattr(matmul, "FUNCTION_FROM", 5 * 24 * 20 + 1)
    assert products_of(inputs) == MKL


def modules(graph_module):
    """The graph and those that it calls."""
    return [part for part in graph_module.modules() if isinstance(part, torch.fx.GraphModule)]


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
        called = [str(node.target) for part in modules(exported.graph_module) for node in part.graph.nodes]
        assert any("aten" in name for name in called)
        assert not [name for name in called if "stablelora" in name or "mkldnn" in name]
        torch.testing.assert_close(exported.module()(x), layer(x))
    torch._dynamo.reset()


def test_the_op_passes_opcheck(onednn):
    a, b, bias = torch.randn(7, 5), torch.randn(5, 3), torch.randn(3)
    for added in (None, bias):
        torch.library.opcheck(torch.ops.stablelora_kernels.wide_product.default, (a, b, added))

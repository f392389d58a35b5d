"""torch.compile, torch.export and torch.library: ops, layers and models of changing shapes, without
a graph break.
"""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import stablelora_kernels as slk
from stablelora_kernels.ops import dropout as masks
from stablelora_kernels.testing.cases import BF16, make, ours, run
from tests.helpers.case_checks import check_compiled
from tests.helpers.cases import EVERY_OP, small
from tests.helpers.operators import Operators
from tests.helpers.small_models import fill_b, llama


def lora_llama(fuse_projections):
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    slk.apply_lora(model, "all-linear", r=4, fuse_projections=fuse_projections)
    fill_b(model)
    return model


def layer(dropout=0.0, bias=True):
    torch.manual_seed(0)
    made = slk.LoRALinear(24, 20, bias, r=6, lora_dropout=dropout)
    nn.init.normal_(made.lora_B)
    return made


def results(call, module, x, training):
    """The output, and in training the gradients of x, if it has any, and of what trains."""
    module.train(training)
    torch.manual_seed(3)
    if not training:
        with torch.no_grad():
            return [call(x)]
    x = x.clone().requires_grad_(x.is_floating_point())
    y = call(x)
    wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]


def assert_close(found, expected, tolerance=1e-4):
    for out, other in zip(found, expected, strict=True):
        torch.testing.assert_close(out, other, rtol=tolerance, atol=tolerance / 10)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(rows):
    return torch.randint(32, (2, rows), generator=torch.Generator().manual_seed(rows))


VECTORS = torch.randn(2, 90, 24, generator=torch.Generator().manual_seed(0))
# A layer with dropout and without, and a model with fused projections and without.
MODULES = {
    "layer": (layer, VECTORS),
    "dropout": (lambda: layer(0.3), VECTORS),
    "fused model": (lambda: lora_llama(True), tokens(90)),
    "model": (lambda: lora_llama(False), tokens(90)),
}
DAY = (("layer", "torch"), ("dropout", "triton"))
KINDS = [
    pytest.param(*each, marks=() if each in DAY else pytest.mark.nightly)
    for each in product(MODULES, ("torch", "triton"))
]


@pytest.fixture
def masks_of_compiled_code(monkeypatch):
    """Compiled code does not look at a mask's size: uncompiled code draws as it does."""
    monkeypatch.setattr(masks, "BERNOULLI_UP_TO", 0)


@pytest.mark.usefixtures("masks_of_compiled_code")
@pytest.mark.parametrize(("kind", "backend"), KINDS, indirect=["backend"])
def test_changing_shapes(kind, backend):
    """Below and above the rows up to which calls are made of plain operators, in training and in
    inference.
    """
    make, inputs = MODULES[kind]
    module = make()
    call = (lambda x: module(x).logits) if "model" in kind else module
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (70, 33, 3, 90, 5):
        x = inputs[:, :rows].contiguous()
        for training in (True, False):
            assert_close(results(compiled, module, x, training), results(call, module, x, training))
    # Training and inference; not one for each number of rows.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="runs where g++ is installed, which compiles inductor's code for CPUs",
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inductor(dropout, backend):
    """It draws random numbers of its own. For a given mask Y is linear in x, so that <x, dX> = <dY,
    Y> tells.
    """
    module = layer(dropout, bias=False).train()
    compiled = torch.compile(module, fullgraph=True)
    x, grad = torch.randn(70, 24, requires_grad=True), torch.randn(70, 20)
    y = compiled(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close((x * dx).sum(), (grad * y).sum(), rtol=1e-4, atol=1e-3)
    # Drawn anew at each call.
    assert torch.equal(compiled(x), y) == (dropout == 0)
    for training in (True, False) if dropout == 0 else (False,):
        assert_close(
            results(compiled, module, x.detach(), training),
            results(module, module, x.detach(), training),
        )


def test_sizes_that_are_symbols(backend):
    """Batch and length of a [batch, length, K] input stay free, however it is traced; an exported
    graph calls the op.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    module = layer().eval()
    x, other = torch.randn(3, 5, 24), torch.randn(4, 40, 24)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,), strict=False)
    traced = [
        exported.module(),
        make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
    ]
    if backend == "torch":
        traced.append(torch.jit.trace(module, x))
    for function in traced:
        torch.testing.assert_close(function(other), module(other), rtol=1e-4, atol=1e-5)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert ("stablelora_kernels.lora_linear_fwd.default" in names) == (backend == "triton")


@pytest.mark.usefixtures("poisoned_outputs")
def test_inductors_float16(backend):
    """Inductor multiplies what addmm adds to by beta, even if that is 0."""
    module, x = layer().half(), torch.randn(1, 24).half()
    assert_close(
        *(results(call, module, x, True) for call in (torch.compile(module), module)),
        tolerance=1e-2,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_export_of_a_model(fused, backend):
    model = lora_llama(fused).eval()
    exported = torch.export.export(model, (), {"input_ids": tokens(40), "use_cache": False})
    with torch.no_grad():
        expected = model(input_ids=tokens(40), use_cache=False).logits
        torch.testing.assert_close(
            exported.module()(input_ids=tokens(40), use_cache=False).logits, expected
        )


# Every op


@pytest.mark.usefixtures("poisoned_outputs", "masks_of_compiled_code")
@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (70, 0.3)])
@pytest.mark.parametrize("op", [*EVERY_OP, "shared"])
def test_torch_compile_has_no_graph_break(op, rows, p, backend):
    case = (
        small("mlp", rows, p=p, ranks=(6, 6, 4), shared=True)
        if op == "shared"
        else small(op, rows, p=p)
    )
    given, names = make(case), case.wanted_names

    def function(*tensors):
        return ours(case, given | dict(zip(names, tensors, strict=True)))

    check_compiled(
        function, [given[name] for name in names], [given[f"grad{i}"] for i in case.outputs()]
    )


MIXED = small(
    "mlp", shape=(260, 64), sizes=(16, 16, 8), dtype=BF16, quantized=("nf4 nested", "fp8", None)
)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.covering(1)
@pytest.mark.parametrize(("p", "wanted"), [(0.0, None), (0.3, ["x", "lora_B"]), (0.3, ["lora_A"])])
@pytest.mark.parametrize("case", [*(small(op, 9) for op in EVERY_OP), MIXED], ids=str)
def test_every_operator_passes_opcheck(case, p, wanted):
    with Operators() as operators:
        run(case.but(p=p, wanted=wanted))
    calls = [call for call in operators.calls if call[0].namespace == "stablelora_kernels"]
    assert len(calls) == 2
    for operator, arguments, _ in calls:
        # Of a tensor that an operator has made, opcheck expects what only the leaf of a graph gives.
        leaf = tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), arguments
        )
        torch.library.opcheck(operator, leaf)


@pytest.mark.parametrize("op", ["linear", "group", "mlp"])
def test_a_traced_function_does_not_write_to_its_output(op):
    """Under torch 2.11 its gradients would be zeros. The kernels are ops, which write to nothing."""
    case = small(op, 70, p=0.0)
    given, names = make(case), case.wanted_names
    called = []

    def read_graph(graph, example_inputs):
        for name, module in graph.named_children():
            if name.startswith("fwd"):
                called.extend(node.target for node in module.graph.nodes)
        return graph.forward

    def function(*tensors):
        return ours(case, given | dict(zip(names, tensors, strict=True)))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=read_graph, fullgraph=True)
    with slk.settings(backend="torch"):
        compiled(*[given[name].clone().requires_grad_() for name in names])
    assert torch.addmm in called and "addmm_" not in called

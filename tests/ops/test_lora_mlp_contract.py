"""What autograd and its users may expect of ``lora_mlp``: strides, consumers, autocast, torch.compile, NaN, empty sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors

import stablelora_kernels as slk
from stablelora_kernels import testing
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32
from tests.helpers.mlps import ACTIVATIONS, MLP, assert_close, changed, check
from tests.helpers.oracle import check_compiled

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
few_and_many_rows = pytest.mark.parametrize("rows", [5, 70])


def small(rows=70, **options):
    return MLP((rows, 24), 40, 20, (6, 3, 4), **options)


def turned(t):
    """``t`` with the strides of its transpose."""
    return t.t().contiguous().t()


def apart(t):
    """``t`` with NaN between its columns."""
    wide = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


@pytest.mark.covering(1)
@pytest.mark.parametrize("kernel", ["auto", "chained", "split", "vendor"])
@pytest.mark.parametrize("change", [turned, apart])
@pytest.mark.parametrize("p", [0.0, 0.3])
@few_and_many_rows
def test_any_strides(rows, p, change, kernel, backend):
    mlp = small(rows, dtype=BF16, lora_dtype=FP32)
    for name in ("weights", "lora_As", "lora_Bs"):
        setattr(mlp, name, [change(t) for t in getattr(mlp, name)])
    mlp.x, mlp.grad = change(mlp.x), change(mlp.grad)
    mlp.biases = [None if bias is None else apart(bias) for bias in mlp.biases]
    assert not any(t.is_contiguous() for t in (*mlp.tensors(), *mlp.weights, mlp.grad, mlp.biases[0]))
    with slk.use_kernel(kernel):
        check(mlp, mlp.run(p=p), p)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_saved_tensors_may_be_mutated_where_autograd_allows_it(activation, backend):
    """A dispatch mode that knows no output but ``out``."""
    mlp = small(activation=activation)
    expected = mlp.run(p=0.3)
    with allow_mutation_on_saved_tensors():
        assert_close(mlp.run(p=0.3), expected, 0)


@few_and_many_rows
def test_negated_views_mean_their_values(rows, backend):
    mlp = small(rows)
    assert_close(changed(mlp, lambda name, t: torch._neg_view(-t)).run(), mlp.run(), 0)


@few_and_many_rows
def test_broadcast_input_and_gradient(rows, backend):
    """A row repeated by expand(), and the stride-0 gradient that sum() sends back."""
    mlp = small(rows)
    mlp.x, mlp.grad = mlp.x[:1].expand(rows, 24), torch.ones((), device=DEVICE).expand(rows, 20)
    leaves = mlp.leaves()
    y = mlp.call(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    check(mlp, {"Y": y.detach(), **dict(zip(mlp.wanted, grads, strict=True))})


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 11, 24)], ids=str)
def test_leading_sizes_that_cannot_be_flattened(shape, backend):
    mlp = MLP(shape, 40, 20, (6, 3, 4))
    mlp.x, mlp.grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (mlp.x, mlp.grad))
    check(mlp, mlp.run())


@pytest.mark.covering(1)
@pytest.mark.parametrize("leading", [(), (5,), (70,), (2, 35), (0,)], ids=str)
@pytest.mark.parametrize(
    "change", [torch.relu_, lambda y: y.add_(1), lambda y: y[..., 1:3].zero_()], ids=["relu_", "add_", "slice"]
)
def test_the_output_may_be_changed_in_place(change, leading, backend):
    mlp = MLP((*leading, 24), 40, 20, (6, 3, 4))

    def results(prepare):
        leaves = mlp.leaves()
        y = prepare(mlp.call(*leaves))
        change(y)
        return {"Y": y.detach()} | dict(
            zip(mlp.wanted, torch.autograd.grad(y, leaves, mlp.grad, retain_graph=True), strict=True)
        )

    assert_close(results(lambda y: y), results(torch.clone), 0)


@few_and_many_rows
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
def test_autocast_casts_as_linear_does(lora_dtype, rows, backend):
    mlp = small(rows)
    low = small(rows)
    low.x, low.grad = mlp.x.to(BF16), mlp.grad.to(BF16)
    low.weights = [w.to(BF16) for w in mlp.weights]
    low.biases = [None if bias is None else bias.to(BF16) for bias in mlp.biases]
    if lora_dtype == BF16:
        for each in (mlp, low):
            each.lora_As, each.lora_Bs = ([t.to(BF16) for t in ts] for ts in (each.lora_As, each.lora_Bs))
    leaves = mlp.leaves()
    with torch.autocast(DEVICE, BF16):
        y = mlp.call(*leaves)
    found = mlp.results(y, leaves)
    assert y.dtype == BF16 and torch.equal(y, low.call(*low.tensors()))
    assert found["dX"].dtype == FP32
    check(low, found | {"dX": found["dX"].to(BF16)})


@pytest.mark.covering(1)
@few_and_many_rows
@pytest.mark.parametrize("forward", [False, True])
def test_backward_inside_autocast_is_the_forwards(forward, rows, backend):
    """Autocast would make some products bfloat16 of a float32 forward, where separate layers have nodes of their own."""
    found = []
    for inside in (False, True):
        mlp = small(rows)
        leaves = mlp.leaves()
        with torch.autocast(DEVICE, BF16, enabled=forward):
            y = mlp.call(*leaves)
        with torch.autocast(DEVICE, BF16, enabled=inside and (forward or rows > 64)):
            found.append(mlp.results(y, leaves))
    assert_close(*found, 0)


def test_autocast_in_other_dtypes(backend):
    """float16 as well; float64 and a disabled autocast change nothing."""
    mlp = small()
    with torch.autocast(DEVICE, FP16):
        assert mlp.call(*mlp.tensors()).dtype == FP16
        with torch.autocast(DEVICE, enabled=False):
            assert mlp.call(*mlp.tensors()).dtype == FP32
    if backend == "torch":
        with torch.autocast(DEVICE, BF16):
            assert small(dtype=torch.float64).run()["Y"].dtype == torch.float64


@pytest.mark.covering(1)
@pytest.mark.parametrize("broken", ["x", "weight", "lora_A", "lora_B", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@few_and_many_rows
def test_nan_and_infinity_go_where_eagers_go(rows, value, broken, backend):
    mlp = small(rows)
    for t in {"x": [mlp.x], "weight": mlp.weights[1:2], "lora_A": mlp.lora_As[:1], "lora_B": mlp.lora_Bs[2:],
              "grad": [mlp.grad]}[broken]:  # fmt: skip
        t[2, 1] = value
    found, expected = mlp.run(), mlp.eager()
    assert any(not t.isfinite().all() for t in expected.values())
    for name, t in found.items():
        # Which of NaN and infinity comes out depends on the order of a sum.
        assert torch.equal(t.isfinite(), expected[name].isfinite()), name
        torch.testing.assert_close(t[t.isfinite()], expected[name][t.isfinite()], rtol=1e-4, atol=1e-4)


@few_and_many_rows
def test_float16_reaches_as_far_as_by_hand(rows, backend):
    """S of some thousands and a scaling of 64: their product is no float16, G, Y and all gradients are."""
    mlp = MLP((rows, 32), 40, 24, (4, 3, 5), FP16)
    for i, (of_a, of_b) in enumerate(((1000, 1e-4), (1000, 1e-4), (10, 1e-3))):
        mlp.lora_As[i], mlp.lora_Bs[i] = mlp.lora_As[i] * of_a, mlp.lora_Bs[i] * of_b
    mlp.grad = mlp.grad * 1e-4
    mlp.scalings = [64.0, -64.0, 64.0]
    assert (mlp.x.double() @ mlp.lora_As[0].double().T).abs().max() * 64 > torch.finfo(FP16).max
    check(mlp, mlp.run())


@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
@pytest.mark.parametrize("shared", [False, True])
def test_torch_compile_has_no_graph_break(shared, rows, p, backend):
    mlp = MLP((rows, 24), 40, 20, (6, 6, 4), shared=shared)
    check_compiled(partial(mlp.call, p=p), mlp.tensors(), mlp.grad)


def test_ops_pass_opcheck():
    mlp = MLP((66, 24), 40, 16, (6, 3, 4))
    plain = slk.quantized.apart(mlp.weights)
    stored = [testing.nf4_weight(40, 24, 64, True).stored, testing.fp8_weight(40, 24).stored, mlp.weights[2]]
    library = torch.ops.stablelora_kernels
    seeds = [torch.tensor([i], device=DEVICE) for i in range(3)]
    g, u, s, s_down = (torch.randn(66, width, device=DEVICE) for width in (40, 40, 9, 4))
    pairs = (mlp.lora_As, mlp.lora_Bs)
    for weights, p, random, save, need in (
        (plain, 0.0, [None] * 3, True, (True, [True] * 3, [True] * 3)),
        (slk.quantized.apart(stored), 0.3, seeds, False, (False, [True, True, False], [False] * 3)),
    ):
        rest = (random, mlp.scalings, p, "gelu")
        torch.library.opcheck(library.lora_mlp_fwd.default, (mlp.x, *weights, mlp.biases, *pairs, *rest, save))
        datas, scales, layouts = weights
        read = [data if need[0] or i == 2 else None for i, data in enumerate(datas)]
        args = (mlp.x, mlp.grad, g, u, read, scales, layouts, *pairs, s, s_down, *rest, *need)
        torch.library.opcheck(library.lora_mlp_bwd.default, args)


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(2, 1, 2), (None, 2, None)], ids=str)
def test_gradcheck_in_float64(ranks, activation, p):
    mlp = MLP((66, 3), 4, 2, ranks, torch.float64, activation=activation)

    def function(*leaves):
        torch.manual_seed(0)
        return mlp.call(*leaves, p=p)

    assert torch.autograd.gradcheck(function, mlp.leaves(), fast_mode=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("k", "f", "n"), [(0, 40, 20), (24, 0, 20), (24, 40, 0), (0, 0, 0)])
@pytest.mark.parametrize("ranks", [(6, 3, 4), (None, 3, None), (None, None, None)], ids=str)
@few_and_many_rows
def test_no_columns(rows, ranks, k, f, n, backend):
    """Eager PyTorch's results, from sums over nothing."""
    mlp = MLP((rows, max(k, 1)), max(f, 1), n, ranks)
    mlp.x = mlp.x[:, :k]
    mlp.weights = [mlp.weights[0][:f, :k], mlp.weights[1][:f, :k], mlp.weights[2][:, :f]]
    mlp.biases = [mlp.biases[0][:f], None, mlp.biases[2]]
    for i, width in enumerate((k, k, f)):
        if mlp.lora_As[i] is not None:
            mlp.lora_As[i] = mlp.lora_As[i][:, :width]
            mlp.lora_Bs[i] = mlp.lora_Bs[i][: n if i == 2 else f]
    assert_close(mlp.run(), mlp.eager(), 1e-4)


@pytest.mark.covering(1)
@few_and_many_rows
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_defaults_of_device_and_dtype_do_not_matter(p, rows, backend):
    mlp = MLP((rows, 24), 40, 20, (6, None, 4))
    expected, before = mlp.run(p=p), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = mlp.run(p=p)
    finally:
        torch.set_default_dtype(before)
    assert_close(found, expected, 0)


@few_and_many_rows
def test_the_meta_device_gives_shapes(rows, backend):
    mlp = small(rows)
    for name in ("weights", "biases", "lora_As", "lora_Bs"):
        setattr(mlp, name, [None if t is None else t.to("meta") for t in getattr(mlp, name)])
    mlp.x, mlp.grad = mlp.x.to("meta"), mlp.grad.to("meta")
    found = mlp.run(p=0.3)
    assert found["Y"].device.type == "meta" and found["Y"].shape == (rows, 20)
    assert [found[name].shape for name in mlp.wanted] == [t.shape for t in mlp.tensors()]


def test_two_runs_are_equal_bit_for_bit(backend):
    mlp = MLP((70, 35), 40, 17, (8, 3, 5), BF16, FP32)
    assert_close(mlp.run(p=0.2), mlp.run(p=0.2), 0)

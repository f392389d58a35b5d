"""What ``nn.functional.linear`` allows, every op allows: in-place consumers, any default device, empty sizes, autocast, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_branch, lora_linear
from tests.helpers.case_checks import assert_close, changed, check, eager, oracle
from tests.helpers.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    OPS,
    Case,
    leaves,
    make,
    ours,
    projections,
    run,
    small,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# Below and above the number of rows from which the PyTorch path has its own autograd function; one row without a row index.
LEADING = [(), (5,), (70,), (2, 35), (0,)]
every_op = pytest.mark.parametrize("op", OPS)
few_and_many_rows = pytest.mark.parametrize("rows", [5, 70])


# Consumers.


def add_a_row(y: Tensor) -> Tensor:
    y += torch.arange(y.shape[-1], device=y.device)
    return y


def zero_a_slice(y: Tensor) -> Tensor:
    y[..., 1:3] = 0
    return y


IN_PLACE = {
    "relu_": (torch.relu_, torch.relu),
    "ReLU(inplace=True)": (nn.ReLU(inplace=True), nn.ReLU()),
    "+=": (add_a_row, lambda y: y + torch.arange(y.shape[-1], device=y.device)),
    "slice": (zero_a_slice, lambda y: torch.cat((y[..., :1], y[..., 1:3] * 0, y[..., 3:]), -1)),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("consumer", IN_PLACE)
@pytest.mark.parametrize("leading", LEADING, ids=str)
@every_op
def test_outputs_may_be_changed_in_place(op, leading, consumer, backend):
    case = small(op, leading, backend=backend)
    given = make(case)
    in_place, apart = (
        run(case, given, lambda case, leaf, change=change: [change(y) for y in ours(case, leaf)])
        for change in IN_PLACE[consumer]
    )
    assert_close(in_place, apart)


def test_a_layers_output_may_be_dropped_in_place(backend):
    layer = slk.LoRALinear(24, 20, r=6, lora_dropout=0.3, device=DEVICE).train()
    for shape in ((70, 24), (5, 24), (2, 40, 24)):
        torch.manual_seed(0)
        y = torch.nn.functional.dropout(layer(torch.ones(shape, device=DEVICE)), 0.5, inplace=True)
        y.sum().backward()
        assert 0.2 < (y == 0).float().mean() < 0.8


@few_and_many_rows
def test_base_out_is_left_alone_and_may_be_needed_by_another_backward(rows, backend):
    case = small("branch", rows, backend=backend)
    given = make(case)
    pre = given["base_out"].clone().requires_grad_()
    base = pre.exp()
    before = base.detach().clone()
    (y,) = ours(case, given | {"base_out": base})
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()
    # exp's backward reads its own output.
    (grad,) = torch.autograd.grad(y, pre, given["grad0"])
    torch.testing.assert_close(grad, given["grad0"] * before)


def test_branches_add_up_to_lora_linear(backend):
    """The base layer and one branch, or two, against the fused op of the same."""
    given = make(small("linear"))
    x, a, b = (given[name] for name in ("x", "lora_A0", "lora_B0"))
    layer = x, given["weight0"], given["bias0"]
    once = lora_branch(nn.functional.linear(*layer), x, a, b, 1.7)
    torch.testing.assert_close(once, lora_linear(*layer, a, b, 1.7))
    torch.testing.assert_close(lora_branch(once, x, a, b, 1.7), lora_linear(*layer, a, 2 * b, 1.7))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@every_op
def test_saved_tensors_may_be_mutated_where_autograd_allows_it(op, activation, backend):
    """A dispatch mode that knows no output but ``out``."""
    case = small(op, p=0.3, activation=activation, backend=backend)
    expected = run(case)
    with allow_mutation_on_saved_tensors():
        assert_close(run(case), expected)


# Operands.


@pytest.mark.parametrize("layout", ["expanded", "every second"])
@pytest.mark.parametrize("kernel", ["auto", "fused", "chained", "split", "vendor"])
@pytest.mark.parametrize("op", ["linear", "group"])
def test_a_bias_of_any_stride(op, kernel, layout, backend):
    """NaN between its elements: a kernel that ignores the stride reads them."""
    case = small(op, kernel=kernel, layouts={"bias": layout}, bias=(True,), backend=backend)
    given = make(case)
    if layout == "expanded":
        values = torch.full((20, 2), torch.nan, device=DEVICE)
        values[:, 0] = 3.0
        given |= {f"bias{i}": values[0, 0].expand(n) for i, n in enumerate(case.sizes)}
    check(case, run(case, given), given)


@every_op
def test_negated_views_mean_their_values(op, backend):
    """Their memory holds them times -1, as in the imaginary part of a conjugate."""
    case = small(op, backend=backend)
    given = make(case)
    assert_close(run(case, changed(given, lambda name, t: torch._neg_view(-t))), run(case, given))


@pytest.mark.parametrize("leading", [(3, 5), (7, 11)], ids=str)
@every_op
def test_leading_sizes_that_cannot_be_flattened(op, leading, backend):
    case = small(op, leading, backend=backend)
    given = make(case)
    turned = changed(given, lambda name, t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t)
    check(case, run(case, turned), turned)


@pytest.mark.covering
@pytest.mark.parametrize("sizes", [(0, 20), (24, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_no_columns(op, leading, sizes, backend):
    """Eager PyTorch's results, from sums over nothing: the bias, or nothing, and gradients of zeros."""
    k, n = sizes
    case = small(op, leading, backend=backend)
    columns = {"mlp": (n, n, 20), "group": (n, n // 2, 4)}.get(op, (n,))
    case = case.but(shape=(*leading, k), sizes=columns)
    given = make(case)
    assert_close(run(case, given), eager(case, given, [None] * 3, 0.0), 1e-4)


@pytest.mark.covering(1)
@pytest.mark.parametrize("k", [0, 24])
@pytest.mark.parametrize("ranks", [(None, 3, None), (None, None, None)], ids=str)
@few_and_many_rows
def test_no_columns_and_no_branch(rows, ranks, k, backend):
    case = small("mlp", rows, ranks=ranks, shape=(rows, k), sizes=(0, 0, 20), backend=backend)
    assert_close(run(case), eager(case, make(case), [None] * 3, 0.0), 1e-4)


@pytest.mark.parametrize("p", [0.9999924, 1 - 2**-53])
@few_and_many_rows
@every_op
def test_dropout_may_be_close_to_one(op, rows, p, backend):
    """On a CPU the mask has 16 bits an element, of which not all values may drop."""
    assert all(t.isfinite().all() for t in run(small(op, rows, p=p, backend=backend)).values())


@few_and_many_rows
@every_op
def test_dropout_only_in_training_and_only_on_the_branch(op, rows, backend):
    case = small(op, rows, backend=backend)
    given = make(case)
    still, dropped = run(case, given), run(case.but(p=0.5), given)
    assert not torch.equal(still["Y0"], dropped["Y0"])
    if op in ("linear", "nf4"):
        args = given["x"], *projections(case, given)[0]
        assert torch.equal(lora_linear(*args, 0.5, training=False), still["Y0"])
    if op == "mlp":
        parts = projections(case, given)
        assert torch.equal(slk.functional.lora_mlp(given["x"], *parts, "silu", 0.5, training=False), still["Y0"])
    without = given | {name: torch.zeros_like(given[name]) for name in case.of_branches("lora_B")}
    torch.testing.assert_close(run(case.but(p=0.5), without)["Y0"], run(case, without)["Y0"], rtol=1e-5, atol=1e-5)


# NaN, infinity and the ends of float16.


@pytest.mark.covering(1)
@pytest.mark.parametrize("broken", ["x", "weight1", "lora_A0", "lora_B2", "grad0"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("scaling", [1.7, 0.0])
@few_and_many_rows
@every_op
def test_nan_and_infinity_go_where_eagers_go(op, rows, scaling, value, broken, backend):
    """Also through a branch whose scaling is 0, since 0 times NaN is NaN."""
    case = small(op, rows, scalings=(scaling,), backend=backend)
    given = make(case)
    # An op with fewer projections has its first one's operand.
    name = next(name for name in (broken, f"{broken[:-1]}0", "grad2", "x") if isinstance(given.get(name), Tensor))
    given[name][(1,) * given[name].dim()] = value
    found, expected = run(case, given), eager(case, given, [None] * 3, 0.0)
    assert any(not t.isfinite().all() for t in expected.values())
    for name, t in found.items():
        # Which of NaN and infinity comes out depends on the order of a sum.
        assert torch.equal(t.isfinite(), expected[name].isfinite()), name
        torch.testing.assert_close(t[t.isfinite()], expected[name][t.isfinite()], rtol=1e-4, atol=1e-4)


@few_and_many_rows
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_float16_reaches_as_far_as_by_hand(op, sign, rows, backend):
    """S of about 1300 and a scaling of 64: their product is no float16, G, Y and all gradients are."""
    case = small(op, rows, dtype=FP16, lora_dtype=FP16, scalings=(sign * 64.0, -64.0, 64.0), backend=backend)
    given = make(case)
    for name in given:
        # The input of down is small.
        down = op == "mlp" and name[-1] == "2"
        by = {"lora_A": 10 if down else 1000, "lora_B": 1e-3 if down else 1e-4 if op == "mlp" else 1e-2, "grad": 1e-3}
        given[name] = given[name] * by.get(name[:-1], 1) if given[name] is not None else None
    assert (given["x"].double() @ given["lora_A0"].double().T).abs().max() * 64 > torch.finfo(FP16).max
    check(case, run(case, given), given)


@few_and_many_rows
def test_tiny_gradients_in_float16_are_not_lost(rows, backend):
    """dY of 1e-6 times B is below float16's smallest normal number, though s times that is not."""
    case = Case("linear", (rows, 48), (48,), (4,), FP16, FP16, scalings=(64.0,), bias=(False,), backend=backend)
    given = make(case)
    given |= {"grad0": given["grad0"] * 1e-6, "lora_B0": given["lora_B0"] * 0.02}
    check(case, run(case, given), given)


def test_db_may_be_beyond_float16(backend):
    """A and B in float32 beside float16: a sum of 131,072 is theirs to hold."""
    ones = {"x": torch.ones(64, 32), "weight": torch.zeros(8, 32), "lora_A": torch.ones(4, 32)}
    x, weight, lora_A = (t.half().to(DEVICE) for t in ones.values())
    lora_A, lora_B = lora_A.float(), torch.ones(8, 4, device=DEVICE, requires_grad=True)
    y = lora_linear(x, weight, None, lora_A, lora_B, 1.0)
    (db,) = torch.autograd.grad(y, lora_B, torch.full_like(y, 64))
    assert db.tolist() == [[64.0 * 64 * 32] * 4] * 8


# Autocast.


@few_and_many_rows
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
@every_op
def test_autocast_casts_as_linear_does(op, lora_dtype, rows, backend):
    """x, weights and biases; base_out stays as it is."""
    case = small(
        op, rows, lora_dtype=lora_dtype, autocast=True, base_dtype=BF16 if lora_dtype == BF16 else FP32, backend=backend
    )
    given, leaf = make(case), leaves(case, make(case))
    found = run(case, leaf)
    assert found["Y0"].dtype == (case.base_dtype if op == "branch" else BF16) and found["x"].dtype == FP32
    kept = ("lora", "base_out", "grad")
    low = changed(given, lambda name, t: t if name.startswith(kept) else t.to(BF16))
    for i, y in enumerate(ours(case, low)):
        assert torch.equal(found[f"Y{i}"], y)
    if "base_out" in found:
        found["base_out"] = given["grad0"]
    check(case, found, given)


@pytest.mark.covering(1)
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("rows", [5, 70, 130])
@every_op
def test_backward_inside_autocast_is_the_forwards(op, rows, forward, backend):
    """Autocast would make some products bfloat16 of a float32 forward, where autograd calls plain operators."""
    trained = ["x", "weight0", "bias0", "weight1", "lora_A0", "lora_A1", "lora_B0", "lora_B1"] if op != "mlp" else None
    case = small(op, rows, wanted=trained, autocast=forward, backend=backend)
    inside = forward or (op != "branch" and rows > 64)
    found = run(case.but(backward_in_autocast=inside))
    assert all(found[name].dtype == FP32 for name in case.wanted_names if name in found)
    assert_close(found, run(case))


def test_autocast_in_other_dtypes(backend):
    """float16 as well; float64 and a disabled autocast change nothing."""
    for op in ("linear", "group", "mlp"):
        case = small(op, backend=backend)
        given = make(case)
        with torch.autocast(DEVICE, FP16):
            assert ours(case, given)[0].dtype == FP16
            with torch.autocast(DEVICE, enabled=False):
                assert ours(case, given)[0].dtype == FP32
        if backend == "torch":
            assert run(case.but(dtype=FP64, lora_dtype=FP64, autocast=True))["Y0"].dtype == FP64


# Defaults, meta tensors, float64.


@few_and_many_rows
@pytest.mark.parametrize("p", [0.0, 0.3])
@every_op
def test_the_defaults_of_device_and_dtype_do_not_matter(op, p, rows, backend):
    case = small(op, rows, p=p, backend=backend)
    given, before = make(case), torch.get_default_dtype()
    expected = run(case, given)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = run(case, given)
    finally:
        torch.set_default_dtype(before)
    assert_close(found, expected)


@pytest.mark.parametrize("leading", [(5,), (70,), (2, 35)], ids=str)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_the_meta_device_gives_shapes(op, leading, backend):
    case = small(op, leading, p=0.3, backend=backend)
    given = changed(make(case), lambda name, t: t.to("meta"))
    found = run(case, given)
    assert all(t.device.type == "meta" for t in found.values())
    assert [found[name].shape for name in case.wanted_names] == [given[name].shape for name in case.wanted_names]
    assert found["Y0"].shape == given["base_out" if op == "branch" else f"grad{case.outputs()[0]}"].shape


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("op", ["linear", "nf4"])
def test_float64_on_pytorchs_path_is_the_oracle(op, p):
    case = small(op, p=0.0, dtype=FP64, lora_dtype=FP64, backend="torch")
    given = make(case)
    assert_close(run(case, given), oracle(case, given, [None], 0.0), 1e-12)

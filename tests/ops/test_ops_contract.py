"""What ``nn.functional.linear`` allows, every op allows: in-place consumers, any default device,
empty sizes, autocast, NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from stablelora_kernels.functional import LoRAWeights, lora_linear, lora_mlp
from stablelora_kernels.ops import cpu_products
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    Case,
    Mask,
    Operands,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.expectations import changed, eager
from tests.helpers.case_checks import assert_close, check
from tests.helpers.cases import FEW, MANY, OPS, small

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
every_op = pytest.mark.parametrize("op", OPS)


# Consumers.


def zero_a_slice(y: Tensor) -> Tensor:
    y[..., 1:3] = 0
    return y


IN_PLACE = {
    "relu_": (torch.relu_, torch.relu),
    "ReLU(inplace=True)": (nn.ReLU(inplace=True), nn.ReLU()),
    "+=": (lambda y: y.add_(1.5), lambda y: y + 1.5),
    "slice": (zero_a_slice, lambda y: torch.cat((y[..., :1], y[..., 1:3] * 0, y[..., 3:]), -1)),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("consumer", IN_PLACE)
@every_op
def test_outputs_may_be_changed_in_place(op, leading, consumer, p, backend):
    case = small(op, leading, p=p, backend=backend)
    given = make(case)
    in_place, apart = (
        run(case, given, lambda case, leaf, change=change: [change(y) for y in ours(case, leaf)])
        for change in IN_PLACE[consumer]
    )
    assert_close(in_place, apart)


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


@every_op
def test_saved_tensors_may_be_mutated_where_autograd_allows_it(op, backend):
    """A dispatch mode that knows no output but ``out``."""
    case = small(op, p=0.3, backend=backend)
    expected = run(case)
    with allow_mutation_on_saved_tensors():
        assert_close(run(case), expected)


# Sizes and dropout.


@pytest.mark.covering
@pytest.mark.parametrize("sizes", [(0, 20), (24, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp", "mlp without branches"])
def test_no_columns(op, leading, sizes, backend):
    """Eager PyTorch's results, from sums over nothing: the bias, or nothing, and gradients of
    zeros.
    """
    k, n = sizes
    case = small(op.split()[0], leading, backend=backend)
    columns = {"mlp": (n, n, 20), "group": (n, n // 2, 4)}.get(case.op, (n,))
    ranks = (None, 3, None) if "without" in op else case.ranks
    case = case.but(shape=(*leading, k), sizes=columns, ranks=ranks)
    assert_close(run(case), eager(case, make(case), [Mask()] * 3), 1e-4)


@pytest.mark.covering
@pytest.mark.parametrize("p", [0.9999924, 1 - 2**-53])
@every_op
def test_dropout_may_be_close_to_one(op, rows, p, backend):
    """On a CPU the mask has 16 bits an element, of which not all values may drop."""
    assert all(t.isfinite().all() for t in run(small(op, rows, p=p, backend=backend)).values())


@pytest.mark.covering
@every_op
def test_dropout_only_in_training_and_only_on_the_branch(op, rows, backend):
    case = small(op, rows, p=0.5, backend=backend)
    given = make(case)
    still = run(case.but(p=0.0), given)
    assert_close(run(case.but(training=False), given), still)
    assert not torch.equal(run(case, given)["Y0"], still["Y0"])
    without = given | {name: torch.zeros_like(given[name]) for name in case.of_branches("lora_B")}
    dropped, still = (run(each.but(wanted=[]), without) for each in (case, case.but(p=0.0)))
    assert_close(dropped, still, 1e-5)


# NaN, infinity and the ends of float16.


def far_reaching(op: str, sign: int, rows: int, backend: str) -> tuple[Case, Operands]:
    """S of about 1300 and a scaling of 64: their product is no float16, G, Y and all gradients are."""
    case = small(
        op, rows, dtype=FP16, lora_dtype=FP16, scalings=(sign * 64.0, -64.0, 64.0), backend=backend
    )
    given = make(case)
    for name in given:
        # The input of down is small.
        down = op == "mlp" and name[-1] == "2"
        by = {
            "lora_A": 10 if down else 1000,
            "lora_B": 1e-3 if down else 1e-4 if op == "mlp" else 1e-2,
            "grad": 1e-3,
        }
        given[name] = given[name] * by.get(name[:-1], 1) if given[name] is not None else None
    assert (given["x"].double() @ given["lora_A0"].double().T).abs().max() * 64 > torch.finfo(
        FP16
    ).max
    return case, given


def with_tiny_gradients(rows: int, backend: str) -> tuple[Case, Operands]:
    """dY of 1e-6 times B is below float16's smallest normal number, though s times that is not."""
    case = Case(
        "linear",
        (rows, 48),
        (48,),
        (4,),
        FP16,
        FP16,
        scalings=(64.0,),
        bias=(False,),
        backend=backend,
    )
    given = make(case)
    given |= {"grad0": given["grad0"] * 1e-6, "lora_B0": given["lora_B0"] * 0.02}
    return case, given


@pytest.mark.covering
@pytest.mark.parametrize("broken", ["x", "weight1", "lora_A0", "lora_B2", "grad0"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("scaling", [1.7, 0.0])
@every_op
def test_nan_and_infinity_go_where_eagers_go(op, rows, scaling, value, broken, backend):
    """Also through a branch whose scaling is 0, since 0 times NaN is NaN."""
    case = small(op, rows, scalings=(scaling,), backend=backend)
    given = make(case)
    # An op with fewer projections has its first one's operand.
    name = next(
        name
        for name in (broken, f"{broken[:-1]}0", "grad2", "x")
        if isinstance(given.get(name), Tensor)
    )
    given[name][(1,) * given[name].dim()] = value
    found, expected = run(case, given), eager(case, given, [Mask()] * 3)
    assert any(not t.isfinite().all() for t in expected.values())
    for name, t in found.items():
        # Which of NaN and infinity comes out depends on the order of a sum.
        assert torch.equal(t.isfinite(), expected[name].isfinite()), name
        torch.testing.assert_close(
            t[t.isfinite()], expected[name][t.isfinite()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.covering
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_float16_reaches_as_far_as_by_hand(op, sign, rows, backend):
    case, given = far_reaching(op, sign, rows, backend)
    check(case, run(case, given), given)


def test_tiny_gradients_in_float16_are_not_lost(rows, backend):
    case, given = with_tiny_gradients(rows, backend)
    check(case, run(case, given), given)


@pytest.mark.parametrize("multiplied", [False, True])
def test_db_may_be_beyond_float16(multiplied, backend, monkeypatch):
    """A and B in float32 beside float16: a sum of 131,072 is theirs to hold, whether or not the
    processor multiplies float16.
    """
    monkeypatch.setattr(
        cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
    )
    ones = {"x": torch.ones(64, 32), "weight": torch.zeros(8, 32), "lora_A": torch.ones(4, 32)}
    x, weight, lora_A = (t.half().to(DEVICE) for t in ones.values())
    lora_A, lora_B = lora_A.float(), torch.ones(8, 4, device=DEVICE, requires_grad=True)
    y = lora_linear(x, weight, None, lora_A, lora_B, 1.0)
    (db,) = torch.autograd.grad(y, lora_B, torch.full_like(y, 64))
    assert db.tolist() == [[64.0 * 64 * 32] * 4] * 8


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize(("dtype", "base_dtype"), [(BF16, FP32), (FP32, FP16)], ids=str)
def test_a_branch_of_zero_leaves_the_other_layers_output_as_it_is(
    dtype, base_dtype, multiplied, rows, backend, monkeypatch
):
    """To the bit, also where it is wider than x, whether or not the processor multiplies x's dtype."""
    monkeypatch.setattr(
        cpu_products, "MULTIPLIED", dict.fromkeys(cpu_products.MULTIPLIED, multiplied)
    )
    case = small("branch", rows, dtype=dtype, base_dtype=base_dtype, backend=backend)
    given = make(case)
    given["lora_B0"].zero_()
    assert torch.equal(run(case, given)["Y0"], given["base_out"])


# Autocast.


@pytest.mark.covering
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
@every_op
def test_autocast_casts_as_linear_does(op, lora_dtype, rows, backend):
    """x, weights and biases; base_out stays as it is."""
    case = small(
        op, rows, lora_dtype=lora_dtype, autocast=True, base_dtype=lora_dtype, backend=backend
    )
    given = make(case)
    found = run(case, given)
    assert (
        found["Y0"].dtype == (case.base_dtype if op == "branch" else BF16)
        and found["x"].dtype == FP32
    )
    kept = ("lora", "base_out", "grad")
    low = changed(given, lambda name, t: t if name.startswith(kept) else t.to(BF16))
    expected = run(case.but(autocast=False, dtype=BF16), low)
    for name, value in found.items():
        # Adapters are cast on the fly or not at all: the gradients of those in float32 are not
        # rounded to bfloat16.
        if name.startswith(("Y", "lora")):
            assert torch.equal(value, expected[name]), name
    check(case, found, given)


@pytest.mark.covering(1)
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("rows", [FEW, 70, 130, MANY["torch"]])
@every_op
def test_backward_inside_autocast_is_the_forwards(op, rows, forward, backend):
    """Autocast would make some products bfloat16 of a float32 forward, where autograd calls plain
    operators.
    """
    trained = ["x", "weight0", "bias0", "weight1", "lora_A", "lora_B"] if op != "mlp" else None
    case = small(op, rows, wanted=trained, autocast=forward, backend=backend)
    inside = forward or (op != "branch" and rows >= MANY[backend])
    found = run(case.but(backward_in_autocast=inside))
    assert all(found[name].dtype == FP32 for name in case.wanted_names if name in found)
    is_plain = backend == "torch" and rows == FEW and op in ("linear", "group", "mlp", "tiled mlp")
    if forward and is_plain:
        # PyTorch's own operators compute these branches in float32 on a CPU with bfloat16
        # instructions. In backward, autocast rounds what they multiply.
        check(case, found, make(case))
    else:
        assert_close(found, run(case))


@pytest.mark.parametrize("op", ["linear", "group", "mlp"])
def test_autocast_in_other_dtypes(op, backend):
    """float16 as well; float64 and a disabled autocast change nothing."""
    case = small(op, backend=backend)
    given = make(case)
    with torch.autocast(DEVICE, FP16):
        assert ours(case, given)[0].dtype == FP16
        with torch.autocast(DEVICE, enabled=False):
            assert ours(case, given)[0].dtype == FP32
    if backend == "torch":
        assert run(case.but(dtype=FP64, lora_dtype=FP64, autocast=True))["Y0"].dtype == FP64


# Defaults and meta tensors.


@pytest.mark.covering
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


@pytest.mark.covering
@pytest.mark.parametrize("leading", ["few", "many", "many in two dimensions"], indirect=True)
@pytest.mark.parametrize("op", ["linear", "branch", "group", "mlp"])
def test_the_meta_device_gives_shapes(op, leading, backend):
    case = small(op, leading, p=0.3, backend=backend)
    given = changed(make(case), lambda name, t: t.to("meta"))
    found = run(case, given)
    like = given | {
        f"Y{i}": given["base_out" if op == "branch" else f"grad{i}"] for i in case.outputs()
    }
    if op == "mlp":
        like["Y0"] = given["grad2"]
    for name, t in found.items():
        assert (t.device.type, t.shape) == ("meta", like[name].shape), name


def test_a_shared_A_has_one_mask_under_autocast():
    """Also in another dtype than autocast's, to which the A of gate and of up are cast."""
    torch.manual_seed(0)
    x = torch.randn(70, 16)
    weights = [torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)]
    shared = torch.randn(3, 16, dtype=FP16)
    lora_As = [shared, shared, torch.randn(3, 24, dtype=FP16)]
    lora_Bs = [torch.randn(w.shape[0], 3, dtype=FP16) for w in weights]

    def output(dtype: torch.dtype | None) -> torch.Tensor:
        def cast(t: torch.Tensor) -> torch.Tensor:
            return t if dtype is None else t.to(dtype)

        cast_As = [cast(a) for a in lora_As]
        cast_As[1] = cast_As[0]
        layers = zip(weights, cast_As, lora_Bs, strict=True)
        projections = [LoRAWeights(cast(w), None, a, cast(b), 2.0) for w, a, b in layers]
        torch.manual_seed(1)
        return lora_mlp(cast(x), *projections, "silu", dropout_p=0.3)

    with torch.autocast("cpu", BF16):
        found = output(None)
    assert found.equal(output(BF16))

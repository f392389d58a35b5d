"""What ``nn.functional.linear`` allows, the ops allow: in-place consumers, any default device, empty sizes, meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.functional import LoRAWeights, lora_branch, lora_linear, lora_linear_group, lora_mlp
from tests.helpers.inputs import DEVICE, FP16, FP32, SCALING, Inputs, make_branch_inputs, make_inputs
from tests.helpers.oracle import leaves, run

OPS = ("linear", "branch", "group")
# Below and above the number of rows from which the PyTorch path has its own autograd function; one row without a row index.
LEADING = [(), (5,), (70,), (2, 35), (0,)]


def outputs(op: str, given: Inputs, scaling: float = SCALING) -> tuple[Tensor, ...]:
    """The op's outputs; the group's second projection has half of the first one's columns."""
    pair = given["lora_A"], given["lora_B"]
    if op == "branch":
        base = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
        return (lora_branch(base, given["x"], *pair, scaling),)
    if op == "linear":
        return (lora_linear(given["x"], given["weight"], given["bias"], *pair, scaling),)
    half = given["weight"].shape[0] // 2
    several = [given["weight"], given["weight"][:half]], [given["bias"], given["bias"][:half]]
    return lora_linear_group(given["x"], *several, [pair[0]] * 2, [pair[1], pair[1][:half]], [scaling] * 2)


def results(op: str, inputs: Inputs, change) -> list[Tensor]:
    """The outputs after ``change``, and the gradients of x, A and B through it."""
    given = leaves(inputs)
    ys = [change(y) for y in outputs(op, given)]
    total = sum((y.float() * torch.linspace(-1, 1, y.shape[-1], device=y.device)).sum() for y in ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(total, [given[name] for name in ("x", "lora_A", "lora_B")])]


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


@pytest.mark.parametrize("consumer", IN_PLACE)
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_outputs_may_be_changed_in_place(op, leading, consumer, backend):
    inputs = make_inputs((*leading, 24), 20, 6)
    in_place, apart = IN_PLACE[consumer]
    found, expected = results(op, inputs, in_place), results(op, inputs, apart)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_layers_output_may_be_dropped_in_place(backend):
    layer = slk.LoRALinear(24, 20, r=6, lora_dropout=0.3, device=DEVICE).train()
    for shape in ((70, 24), (5, 24), (2, 40, 24)):
        torch.manual_seed(0)
        y = torch.nn.functional.dropout(layer(torch.ones(shape, device=DEVICE)), 0.5, inplace=True)
        y.sum().backward()
        assert 0.2 < (y == 0).float().mean() < 0.8


@pytest.mark.parametrize("bias", ["expanded", "strided"])
@pytest.mark.parametrize("kernel", ["auto", "fused", "chained", "split", "vendor"])
@pytest.mark.parametrize("op", ["linear", "group"])
def test_a_bias_of_any_stride(op, kernel, bias, backend):
    """NaN between its elements: a kernel that ignores the stride reads them."""
    inputs = make_inputs((70, 24), 20, 6)
    values = torch.full((20, 2), torch.nan, device=DEVICE)
    values[:, 0] = inputs["bias"] if bias == "strided" else 3.0
    inputs["bias"] = values[:, 0] if bias == "strided" else values[0, 0].expand(20)
    with slk.use_kernel(kernel):
        found = outputs(op, inputs)
    expected = testing.oracle(inputs, SCALING)["Y"]
    for y in found:
        torch.testing.assert_close(y.double(), expected[:, : y.shape[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.9999924, 1 - 2**-53])
@pytest.mark.parametrize("rows", [5, 70])
def test_dropout_may_be_close_to_one(rows, p, backend):
    """On a CPU the mask has 16 bits an element, of which not all values may drop."""
    torch.manual_seed(0)
    given = leaves(make_inputs((rows, 24), 20, 6))
    pair = given["lora_A"], given["lora_B"], SCALING, p
    w, a, b = (torch.randn(size, device=DEVICE) for size in ((24, 24), (2, 24), (24, 2)))
    square = LoRAWeights(w, None, a, b, SCALING)
    y = lora_linear(lora_mlp(given["x"], square, square, square, "silu", p), given["weight"], given["bias"], *pair)
    grads = torch.autograd.grad(y.sum(), [given[name] for name in ("x", "lora_A", "lora_B")])
    assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("op", OPS)
def test_negated_views_mean_their_values(op, backend):
    """Their memory holds them times -1, as in the imaginary part of a conjugate."""
    inputs = make_inputs((70, 24), 20, 6)
    found = results(op, {name: torch._neg_view(-t) for name, t in inputs.items()}, lambda y: y)
    for one, other in zip(found, results(op, inputs, lambda y: y), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [5, 70, 130])
@pytest.mark.parametrize("op", OPS)
def test_backward_inside_autocast_is_the_forwards(op, rows, backend):
    """Of a float32 forward outside: autocast would make some of the products bfloat16."""
    inputs = make_inputs((rows, 24), 20, 6)
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    found = []
    for enabled in (False, True):
        given = leaves(inputs, names)
        ys = outputs(op, given)
        # Without a product of autograd's own in the way.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled and (op != "branch" and rows > 64)):
            grads = torch.autograd.grad(ys, [given[name] for name in names], [torch.ones_like(y) for y in ys])
        found.append(grads)
        assert all(grad.dtype == FP32 for grad in grads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (24, 0), (0, 0)])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_columns(op, leading, k, n, backend):
    """Eager PyTorch returns the bias, or nothing; gradients have their shapes."""
    inputs = make_inputs((*leading, max(k, 1)), n, 6)
    inputs |= {name: inputs[name][..., :k] for name in ("x", "weight", "lora_A")}
    given = leaves(inputs)
    ys = outputs(op, given)
    for y in ys:
        assert torch.equal(y, given["bias"][: y.shape[-1]].expand(y.shape))
    grads = torch.autograd.grad(
        ys, [given[name] for name in ("x", "lora_A", "lora_B")], [torch.ones_like(y) for y in ys]
    )
    for grad, name in zip(grads, ("x", "lora_A", "lora_B"), strict=True):
        assert torch.equal(grad, torch.zeros_like(inputs[name])), name


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("broken", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("op", OPS)
def test_a_scaling_of_zero_hides_no_nan(op, broken, rows, backend):
    """0 · NaN is NaN, forward and backward, as by hand."""
    inputs = make_inputs((rows, 24), 20, 6)
    inputs[broken][..., 0, 0] = torch.nan
    given = leaves(inputs)
    ys = outputs(op, given, 0.0)
    by_hand = testing.run(
        lambda g: (
            torch.nn.functional.linear(g["x"], g["weight"], g["bias"]) + g["x"] @ g["lora_A"].T @ g["lora_B"].T * 0.0
        ),
        inputs,
    )
    for y in ys:
        assert torch.equal(y.isnan(), by_hand["Y"][:, : y.shape[1]].isnan())
    if op != "group":
        found = torch.autograd.grad(ys, [given[name] for name in ("x", "lora_A", "lora_B")], inputs["grad"])
        for grad, name in zip(found, ("dX", "dA", "dB"), strict=True):
            assert torch.equal(grad.isnan(), by_hand[name].isnan()), name


@pytest.mark.parametrize("leading", [(5,), (70,), (2, 35)], ids=str)
def test_layers_on_the_meta_device_give_shapes(leading, backend):
    layer = slk.LoRALinear(24, 20, r=6, lora_dropout=0.3, device="meta").train()
    x = torch.empty(*leading, 24, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.shape, y.device.type) == ((*leading, 20), "meta")
    y.sum().backward()
    assert (x.grad.shape, layer.lora_A.grad.shape, layer.lora_B.grad.shape) == (x.shape, (6, 24), (20, 6))


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_defaults_of_device_and_dtype_do_not_matter(rows, p, backend):
    inputs = make_inputs((rows, 24), 20, 6)

    def seeded() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return run(inputs, backend, p)

    expected, before = seeded(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = seeded()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["linear", "branch"])
def test_float16_reaches_as_far_as_by_hand(op, sign, rows, backend):
    """S of about 1300 and a scaling of 64: their product is no float16, Y and all gradients are."""
    if op == "branch":
        inputs = make_branch_inputs((rows, 32), 24, 4, FP16, FP16, FP16)
    else:
        inputs = make_inputs((rows, 32), 24, 4, dtype=FP16)
    inputs["lora_A"], inputs["lora_B"] = inputs["lora_A"] * 1000, inputs["lora_B"] * 0.01
    inputs["grad"] = inputs["grad"] * 1e-3
    scaling = sign * 64.0
    assert (inputs["x"].double() @ inputs["lora_A"].double().T).abs().max() * 64 > torch.finfo(FP16).max

    def ours(given: Inputs) -> Tensor:
        rest = given["x"], given["lora_A"], given["lora_B"], scaling
        if op == "branch":
            return lora_branch(given["base_out"], *rest)
        return lora_linear(given["x"], given["weight"], given["bias"], *rest[1:])

    ref, base = testing.oracle(inputs, scaling), testing.eager(inputs, scaling)
    for name, value in testing.run(ours, inputs).items():
        if name != "dBASE":
            testing.assert_no_worse(value, ref[name], base[name], name=name)


@pytest.mark.parametrize("rows", [5, 70])
def test_tiny_gradients_in_float16_are_not_lost(rows, backend):
    """dY of 1e-6 times B is below float16's smallest normal number, though s times that is not."""
    inputs = make_inputs((rows, 48), 48, 4, dtype=FP16, bias=False)
    inputs["grad"], inputs["lora_B"] = inputs["grad"] * 1e-6, inputs["lora_B"] * 0.02
    ref, base = testing.oracle(inputs, 64.0), testing.eager(inputs, 64.0)
    found = testing.run(lambda g: lora_linear(g["x"], g["weight"], None, g["lora_A"], g["lora_B"], 64.0), inputs)
    for name, value in found.items():
        testing.assert_no_worse(value, ref[name], base[name], name=name)


def test_db_may_be_beyond_float16(backend):
    """A and B in float32 beside float16: a sum of 131,072 is theirs to hold."""
    ones = {"x": torch.ones(64, 32), "weight": torch.zeros(8, 32), "lora_A": torch.ones(4, 32)}
    x, weight, lora_A = (t.half().to(DEVICE) for t in ones.values())
    lora_A, lora_B = lora_A.float(), torch.ones(8, 4, device=DEVICE, requires_grad=True)
    y = lora_linear(x, weight, None, lora_A, lora_B, 1.0)
    (db,) = torch.autograd.grad(y, lora_B, torch.full_like(y, 64))
    assert db.tolist() == [[64.0 * 64 * 32] * 4] * 8

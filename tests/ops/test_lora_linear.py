"""The fused op against a float64 oracle, bounded by eager PyTorch's own error, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stablelora_kernels import testing
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops.torch_path import draw_keep
from stablelora_kernels.reference import dropout_keep_ref
from tests.helpers.inputs import BF16, DEVICE, DTYPES, FP16, FP32, SCALING, SHAPES, make_inputs
from tests.helpers.oracle import bytes_held, call, check, check_compiled, leaves, run, run_dropped

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
few_and_many_rows = pytest.mark.parametrize("rows", [5, 70])


@pytest.mark.parametrize(("dtype", "lora_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
def test_matches_the_oracle(shape, n, r, dtype, lora_dtype, backend):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, bias=r != 3)
    check(inputs, run(inputs, backend))


@few_and_many_rows
def test_any_strides(rows, backend):
    inputs = make_inputs((rows, 24), 20, 6)
    strided = inputs | {
        "x": inputs["x"].t().contiguous().t(),
        "weight": torch.stack((inputs["weight"], inputs["weight"]), -1)[..., 0],
        "lora_A": inputs["lora_A"].t().contiguous().t(),
        "lora_B": torch.cat((inputs["lora_B"], inputs["lora_B"]), 1)[:, :6],
        "grad": torch.stack((inputs["grad"], inputs["grad"]), 1)[:, 0],
    }
    for name in ("x", "weight", "lora_A", "lora_B", "grad"):
        assert not strided[name].is_contiguous() and torch.equal(strided[name], inputs[name])
    check(inputs, run(strided, backend))


@few_and_many_rows
def test_broadcast_input_and_gradient(rows, backend):
    """A row repeated by expand(), and the stride-0 gradient that sum() sends back."""
    inputs = make_inputs((rows, 24), 20, 6)
    inputs["x"] = inputs["x"][:1].expand(rows, 24)
    inputs["grad"] = torch.ones((), device=DEVICE).expand(rows, 20)
    assert inputs["x"].stride(0) == 0 and inputs["grad"].stride() == (0, 0)
    given = leaves(inputs)
    y = call(given)
    grads = torch.autograd.grad(y.sum(), [given[name] for name in ("x", "lora_A", "lora_B")])
    check(inputs, {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))})


@pytest.mark.parametrize("shape", [(3, 5, 16), (80, 16)])
def test_leading_dimensions_that_cannot_be_flattened(shape):
    inputs = make_inputs(shape, 12, 4)
    swapped = inputs | {"x": inputs["x"].transpose(0, -2).contiguous().transpose(0, -2)}
    for backend in ("torch", "triton"):
        check(inputs, run(swapped, backend))


def test_two_runs_are_equal_bit_for_bit(backend):
    inputs = make_inputs((150, 65), 70, 8, dtype=BF16, lora_dtype=FP32)
    first, second = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@few_and_many_rows
def test_gradients_of_weight_and_bias(rows, backend):
    """The layer freezes them, but a trainable weight that is passed to the function must not lose its gradient."""
    inputs = make_inputs((rows, 24), 20, 6)
    given = leaves(inputs, ("weight", "bias"))
    dw, dbias = torch.autograd.grad(call(given), (given["weight"], given["bias"]), inputs["grad"])
    torch.testing.assert_close(dw, inputs["grad"].T @ inputs["x"])
    torch.testing.assert_close(dbias, inputs["grad"].sum(0))


def test_backward_holds_only_s(backend):
    def saved_bytes(*wanted: str, p: float = 0.0) -> int:
        given = leaves(make_inputs((128, 24), 20, 6), wanted)
        return bytes_held(lambda: call(given, p), given.values())

    assert saved_bytes("x", "lora_A", "lora_B") == 128 * 6 * 4
    assert saved_bytes("x", "lora_A") == 0
    # The kernels draw the mask again from a seed of 8 bytes; the PyTorch path keeps a byte per element.
    mask = 8 if backend == "triton" else 128 * 24
    assert saved_bytes("x", "lora_A", "lora_B", p=0.25) == 128 * 6 * 4 + mask


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)])
@pytest.mark.parametrize(
    ("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((0, 16), 8, 4), ((67, 33), 40, 100)]
)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_in_the_kernels_is_the_reference_mask(shape, n, r, dtype, lora_dtype, p):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype)
    check(inputs, *run_dropped(inputs, "triton", p))


@pytest.mark.parametrize(("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((0, 16), 8, 4)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_dropout_on_pytorch_uses_one_mask_in_both_directions(shape, n, r, dtype):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=FP32)
    check(inputs, *run_dropped(inputs, "torch", 0.3))


def test_dropout_keeps_the_right_share_everywhere():
    """Each of the four lanes of a 64-bit word, and every column, within five standard errors."""
    x = torch.empty(2000, 64)
    for p in (0.1, 0.5, 0.9):
        keep, real = draw_keep(x, p)
        assert abs(real - p) <= 2**-17
        assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
        philox = dropout_keep_ref(2000, 64, p, seed=2**62 + 5)
        for mask in (keep, philox):
            assert (mask.double().mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5


def test_dropout_only_in_training_and_only_on_the_branch(backend):
    inputs = make_inputs((70, 24), 20, 6)
    args = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    still = lora_linear(*args, SCALING, 0.5, training=False)
    assert torch.equal(still, lora_linear(*args, SCALING, 0.0))
    assert not torch.equal(still, lora_linear(*args, SCALING, 0.5))
    args[4] = torch.zeros_like(args[4])
    plain = torch.nn.functional.linear(*args[:3])
    torch.testing.assert_close(lora_linear(*args, SCALING, 0.5), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_same_mask(backend, reentrant):
    inputs = make_inputs((70, 24), 20, 6)

    def gradients(wrap: bool) -> tuple[Tensor, ...]:
        given = leaves(inputs)

        def layer(x: Tensor) -> Tensor:
            return call(given | {"x": x}, 0.4)

        torch.manual_seed(5)
        y = checkpoint(layer, given["x"], use_reentrant=reentrant) if wrap else layer(given["x"])
        y.backward(inputs["grad"])
        return given["x"].grad, given["lora_A"].grad, given["lora_B"].grad

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_in_float64(p):
    inputs = testing.make_inputs((66, 3), 2, 2, dtype=torch.float64, seed=3)
    tensors = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "lora_A", "lora_B")]

    def function(*args: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(*args, SCALING, p)

    assert torch.autograd.gradcheck(function, tensors)
    few = [inputs["x"].detach()[:3].requires_grad_(), *tensors[1:]]
    assert torch.autograd.gradcheck(function, few)


@few_and_many_rows
def test_autocast_casts_as_linear_does(rows, backend):
    inputs = make_inputs((rows, 24), 20, 6)
    low = inputs | {name: inputs[name].to(BF16) for name in ("x", "weight", "bias", "grad")}
    given = leaves(inputs)
    with torch.autocast(DEVICE, BF16):
        y = call(given)
    assert y.dtype == BF16 and torch.equal(y, call(low))
    dx, da, db = torch.autograd.grad(y, [given[name] for name in ("x", "lora_A", "lora_B")], low["grad"])
    assert dx.dtype == da.dtype == db.dtype == FP32
    check(low, {"Y": y.detach(), "dX": dx.to(BF16), "dA": da, "dB": db})


@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    inputs = make_inputs((rows, 24), 20, 6)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, p)

    check_compiled(function, [inputs[name] for name in ("x", "lora_A", "lora_B")], inputs["grad"])


def test_ops_pass_opcheck():
    inputs = make_inputs((9, 24), 20, 6)
    x, weight, bias, a, b, grad = (inputs[n] for n in ("x", "weight", "bias", "lora_A", "lora_B", "grad"))
    seed, s = torch.tensor([3], device=DEVICE), torch.randn(9, 6, device=DEVICE)
    library = torch.ops.stablelora_kernels
    for p, random in ((0.0, None), (0.3, seed)):
        for save_s in (True, False):
            torch.library.opcheck(library.lora_linear_fwd.default, (x, weight, bias, a, b, random, SCALING, p, save_s))
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            args = (x, grad, weight, a, b, s, random, SCALING, p, *need)
            torch.library.opcheck(library.lora_linear_bwd.default, args)


def test_dropout_below_the_grid_drops_nothing():
    """PyTorch's path has 16 random bits: each element is dropped with the very probability that the scale uses."""
    torch.manual_seed(0)
    keep, real = draw_keep(torch.empty(1 << 21, 1), 2.0**-18)
    assert real == 0.0 and keep.all()

"""The branch alone, on the output of another layer, against a float64 oracle, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_branch
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32, SCALING, SHAPES, make_branch_inputs, make_inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import call, check, check_compiled, leaves, run, run_dropped

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
NAMES = ("base_out", "x", "lora_A", "lora_B")
# x, A and B, base_out.
DTYPES = [(FP32, FP32, FP32), (BF16, FP32, BF16), (FP16, FP16, FP16), (BF16, FP32, FP32), (FP32, FP32, FP16)]
few_and_many_rows = pytest.mark.parametrize("rows", [5, 70])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
def test_matches_the_oracle(shape, n, r, dtypes, backend):
    inputs = make_branch_inputs(shape, n, r, *dtypes)
    check(inputs, run(inputs, backend))


@few_and_many_rows
def test_any_strides(rows, backend):
    inputs = make_branch_inputs((rows, 24), 20, 6)
    strided = {name: t.t().contiguous().t() for name, t in inputs.items()}
    strided["lora_B"] = torch.cat((inputs["lora_B"], inputs["lora_B"]), 1)[:, :6]
    assert not any(t.is_contiguous() for t in strided.values())
    check(inputs, run(strided, backend))
    # Rows of unit stride, wider apart than they are long.
    strided["base_out"] = torch.cat((inputs["base_out"], inputs["base_out"]), 1)[:, :20]
    check(inputs, run(strided, backend))


@few_and_many_rows
def test_broadcast_tensors(rows, backend):
    """Rows repeated by expand(), and the stride-0 gradient that sum() sends back."""
    inputs = make_branch_inputs((rows, 24), 20, 6)
    inputs["x"] = inputs["x"][:1].expand(rows, 24)
    inputs["base_out"] = inputs["base_out"][:1].expand(rows, 20)
    inputs["grad"] = torch.ones((), device=DEVICE).expand(rows, 20)
    assert inputs["grad"].stride() == (0, 0)
    check(inputs, run(inputs, backend))


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, FP32, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((67, 33), 40, 100)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_is_one_mask_in_both_directions(shape, n, r, dtypes, p, backend):
    inputs = make_branch_inputs(shape, n, r, *dtypes)
    check(inputs, *run_dropped(inputs, backend, p))


@few_and_many_rows
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_asked_for(rows, p, backend):
    inputs = make_branch_inputs((rows, 24), 20, 6)

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        given = leaves(inputs, wanted)
        torch.manual_seed(3)
        call(given, p).backward(inputs["grad"])
        assert {name for name in NAMES if given[name].grad is not None} == set(wanted)
        return {name: given[name].grad for name in wanted}

    every = gradients(NAMES)
    for wanted in (("base_out",), ("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_B")):
        for name, grad in gradients(wanted).items():
            torch.testing.assert_close(grad, every[name])


def launches(inputs: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    given = leaves(inputs, NAMES)
    with count_launches() as forward:
        y = call(given, backend="triton")
    with count_launches() as backward:
        y.backward(inputs["grad"])
    return sorted(forward.elements()), sorted(backward.elements())


def test_launches():
    """One forward, one backward; two each for a high rank, where S, or dS with dB, has its own."""
    branch, shrink, grads = "_lora_expand_kernel", "_lora_shrink_kernel", "_lora_weight_grads_kernel"
    backward = "_lora_linear_kernel"
    assert launches(make_branch_inputs((5, 24), 20, 6)) == ([branch], [backward])
    assert launches(make_branch_inputs((70, 24), 20, 6)) == ([branch], [backward])
    assert launches(make_branch_inputs((70, 24), 20, 80)) == (sorted([shrink, branch]), [backward])
    assert launches(make_branch_inputs((70, 24), 20, 130)) == (sorted([shrink, branch]), sorted([shrink, backward]))
    assert launches(make_branch_inputs((0, 24), 20, 6)) == ([], [grads])


@few_and_many_rows
def test_base_out_is_left_alone_and_may_be_needed_by_another_backward(rows, backend):
    inputs = make_branch_inputs((rows, 24), 20, 6)
    pre = inputs["base_out"].clone().requires_grad_()
    base = pre.exp()
    before = base.detach().clone()
    y = call(inputs | {"base_out": base})
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()
    # exp's backward reads its own output.
    (grad,) = torch.autograd.grad(y, pre, inputs["grad"])
    torch.testing.assert_close(grad, inputs["grad"] * before)


def test_adds_up_to_lora_linear(backend):
    """Base and one branch, or two, against the fused op of the same."""
    inputs = make_inputs((70, 24), 20, 6)
    branch = inputs | {"base_out": torch.nn.functional.linear(*(inputs[name] for name in ("x", "weight", "bias")))}
    once = call(branch)
    torch.testing.assert_close(once, call(inputs))
    twice = inputs | {"lora_B": 2 * inputs["lora_B"]}
    torch.testing.assert_close(call(branch | {"base_out": once}), call(twice))


@few_and_many_rows
def test_autocast_casts_x_and_leaves_base_out(rows, backend):
    for base_dtype in (FP32, BF16):
        inputs = make_branch_inputs((rows, 24), 20, 6, FP32, FP32, base_dtype)
        given = leaves(inputs, ("x",))
        with torch.autocast(DEVICE, BF16):
            y = call(given)
        assert y.dtype == base_dtype and torch.equal(y, call(inputs | {"x": inputs["x"].to(BF16)}))
        assert torch.autograd.grad(y.sum(), given["x"])[0].dtype == FP32


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 66])
def test_gradcheck_in_float64(p, rows):
    inputs = make_branch_inputs((rows, 3), 2, 2, *3 * [torch.float64], seed=3)

    def function(*args: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_branch(*args, SCALING, p)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in NAMES])


@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    inputs = make_branch_inputs((rows, 24), 20, 6)
    tensors = [inputs[name] for name in NAMES]
    check_compiled(lambda *args: lora_branch(*args, SCALING, p), tensors, inputs["grad"])


def test_ops_pass_opcheck():
    inputs = make_branch_inputs((9, 24), 20, 6)
    base, x, a, b = (inputs[name] for name in NAMES)
    seed, s = torch.tensor([3], device=DEVICE), torch.randn(9, 6, device=DEVICE)
    library = torch.ops.stablelora_kernels
    for p, random in ((0.0, None), (0.3, seed)):
        for save_s in (True, False):
            torch.library.opcheck(library.lora_branch_fwd.default, (base, x, a, b, random, SCALING, p, save_s))
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            args = (x, inputs["grad"], a, b, s, random, SCALING, p, *need)
            torch.library.opcheck(library.lora_branch_bwd.default, args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base_out": torch.zeros(4, 4)}, ValueError, r"base_out must be \[..., N\] .* fit x \[5, 6\], got \[4, 4\]"),
        ({"base_out": torch.zeros(())}, ValueError, r"base_out must be .* got \[\]"),
        ({"x": torch.zeros(())}, ValueError, r"base_out must be .* fit x \[\], got \[5, 4\]"),
        ({"lora_A": torch.zeros(2, 5)}, ValueError, r"lora_A must be \[r, 6\] .* base_out \[5, 4\], got \[2, 5\]"),
        ({"lora_B": torch.zeros(5, 2)}, ValueError, r"lora_B must be \[4, 2\] to fit base_out \[5, 4\] .* got \[5, 2\]"),
        ({"base_out": torch.zeros(5, 4, device="meta")}, ValueError, r"base_out must be on x's device .*, got meta"),
        ({"base_out": torch.zeros(5, 4).int()}, TypeError, r"base_out must be bfloat16, .* got torch.int32"),
        ({"lora_A": torch.zeros(2, 6).half()}, TypeError, r"one dtype, got torch.float16 and torch.float32"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    inputs = make_branch_inputs((5, 6), 4, 2)
    inputs.pop("grad")
    with pytest.raises(error, match=message):
        lora_branch(**inputs | {"scaling": 1.0} | changes)


def test_float64_does_not_fall_back_silently():
    inputs = make_branch_inputs((5, 6), 4, 2)
    inputs.pop("grad")
    inputs["base_out"] = inputs["base_out"].double()
    with slk.use_backend("triton"), pytest.raises(TypeError, match=r"base_out is torch.float64.*use_backend"):
        lora_branch(**inputs, scaling=1.0)

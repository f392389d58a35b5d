"""The branch alone, on the output of somebody else's layer, against a float64 oracle, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem
from stablelora_kernels.functional import lora_branch, lora_linear
from stablelora_kernels.ops import torch_path
from stablelora_kernels.reference import dropout_keep_ref, lora_branch_grads_ref, lora_branch_ref
from stablelora_kernels.testing import assert_no_worse, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
SCALING = 1.7
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("base_out", "x", "lora_A", "lora_B")
# x's shape, out_features, r: odd, prime, single, empty, and above one tile or one block of ranks.
SHAPES = [
    ((1, 1), 1, 1),
    ((37,), 5, 3),
    ((5, 37), 53, 3),
    ((2, 3, 31), 17, 20),
    ((0, 16), 8, 4),
    ((3, 0, 16), 8, 4),
    ((130, 67), 71, 8),
    ((67, 33), 40, 100),
]
# x, A and B, base_out.
DTYPES = [(FP32, FP32, FP32), (BF16, FP32, BF16), (FP16, FP16, FP16), (BF16, FP32, FP32), (FP32, FP32, FP16)]


def make(shape, n, r, dtype=FP32, lora_dtype=FP32, base_dtype=None, **kwargs):
    """The arguments by name, base_out in place of the weight, and the gradient that comes in."""
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, device=DEVICE, **kwargs)
    base = torch.nn.functional.linear(inputs["x"].double(), inputs["weight"].double()).to(base_dtype or dtype)
    tensors = {name: inputs[name] for name in ("x", "lora_A", "lora_B")}
    return tensors | {"base_out": base, "grad": inputs["grad"].to(base.dtype)}


def run(inputs: dict[str, Tensor], backend: str, p: float = 0.0) -> dict[str, Tensor]:
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    with slk.use_backend(backend):
        y = lora_branch(*leaves, SCALING, p)
    grads = torch.autograd.grad(y, leaves, inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dBASE", "dX", "dA", "dB"), grads, strict=True))}


def eager(inputs: dict[str, Tensor], keep: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    """Operator by operator, products in x's dtype."""
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    base, x, a, b = leaves
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
    y = (base + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * SCALING).to(base.dtype)
    grads = torch.autograd.grad(y, leaves, inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dBASE", "dX", "dA", "dB"), grads, strict=True))}


def check(inputs: dict[str, Tensor], out: dict[str, Tensor], keep: Tensor | None = None, p: float = 0.0) -> None:
    d = {name: t.detach().double() for name, t in inputs.items()}
    args = (d["x"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    ref = {"Y": lora_branch_ref(d["base_out"], *args), **lora_branch_grads_ref(d["grad"], *args)}
    base = eager(inputs, keep, p)
    for name in ("Y", "dX", "dA", "dB"):
        # Gradients are made of products in x's dtype; the output is rounded to base_out's.
        dtype = inputs["base_out"].dtype if name == "Y" else inputs["x"].dtype
        assert_no_worse(out[name], ref[name], base[name], dtype=dtype, name=name)
    assert torch.equal(out["dBASE"], inputs["grad"])
    for name, like in (("Y", "base_out"), ("dX", "x"), ("dA", "lora_A"), ("dB", "lora_B")):
        assert out[name].dtype == inputs[like].dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
def test_matches_the_oracle(shape, n, r, dtypes, backend):
    inputs = make(shape, n, r, *dtypes)
    check(inputs, run(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_any_strides(rows, backend):
    inputs = make((rows, 24), 20, 6)
    strided = {name: t.t().contiguous().t() for name, t in inputs.items()}
    strided["lora_B"] = torch.cat((inputs["lora_B"], inputs["lora_B"]), 1)[:, :6]
    assert not any(t.is_contiguous() for t in strided.values())
    check(inputs, run(strided, backend))
    # Rows of unit stride, wider apart than they are long.
    strided["base_out"] = torch.cat((inputs["base_out"], inputs["base_out"]), 1)[:, :20]
    check(inputs, run(strided, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_broadcast_tensors(rows, backend):
    """Rows repeated by expand(), and the stride-0 gradient that sum() sends back."""
    inputs = make((rows, 24), 20, 6)
    inputs["x"] = inputs["x"][:1].expand(rows, 24)
    inputs["base_out"] = inputs["base_out"][:1].expand(rows, 20)
    inputs["grad"] = torch.ones((), device=DEVICE).expand(rows, 20)
    assert inputs["grad"].stride() == (0, 0)
    check(inputs, run(inputs, backend))


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, FP32, BF16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((67, 33), 40, 100)])
@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_one_mask_in_both_directions(shape, n, r, dtypes, p, backend):
    inputs = make(shape, n, r, *dtypes)
    torch.manual_seed(11)
    out = run(inputs, backend, p)
    torch.manual_seed(11)
    rows = inputs["x"].reshape(-1, shape[-1])
    if backend == "triton":
        seed = int(torch.randint(2**63 - 1, (1,), device=DEVICE))
        keep = dropout_keep_ref(*rows.shape, p, seed).to(DEVICE)
    else:
        keep, p = torch_path.draw_keep(rows, p)
    check(inputs, out, keep.view(shape), p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_asked_for(rows, p, backend):
    inputs = make((rows, 24), 20, 6)

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_(name in wanted) for name in NAMES}
        torch.manual_seed(3)
        with slk.use_backend(backend):
            y = lora_branch(*leaves.values(), SCALING, p)
        y.backward(inputs["grad"])
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == list(wanted)
        return {name: leaves[name].grad for name in wanted}

    every = gradients(NAMES)
    for wanted in (("base_out",), ("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("x", "lora_B")):
        for name, grad in gradients(wanted).items():
            torch.testing.assert_close(grad, every[name])


def launches(inputs: dict[str, Tensor], p: float = 0.0) -> tuple[list[str], list[str]]:
    from stablelora_kernels.launch.base import launch_counts

    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    made = []
    with slk.use_backend("triton"):
        before = launch_counts.copy()
        y = lora_branch(*leaves, SCALING, p)
        made.append(sorted((launch_counts - before).elements()))
        before = launch_counts.copy()
        torch.autograd.grad(y, leaves, inputs["grad"])
        made.append(sorted((launch_counts - before).elements()))
    return made[0], made[1]


def test_launches():
    """One forward; backward two for few rows, and three for many, where dB goes with dS."""
    branch, shrink, grads = "_lora_expand_kernel", "_lora_shrink_kernel", "_lora_weight_grads_kernel"
    assert launches(make((5, 24), 20, 6)) == ([branch], sorted([branch, grads]))
    assert launches(make((70, 24), 20, 6)) == ([branch], sorted([shrink, branch, grads]))
    assert launches(make((70, 24), 20, 80)) == (sorted([shrink, branch]), sorted([shrink, branch, grads]))
    assert launches(make((0, 24), 20, 6)) == ([], [grads])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_base_out_is_left_alone_and_may_be_needed_by_another_backward(rows, backend):
    inputs = make((rows, 24), 20, 6)
    pre = inputs["base_out"].clone().requires_grad_()
    base = pre.exp()
    before = base.detach().clone()
    with slk.use_backend(backend):
        y = lora_branch(base, inputs["x"], inputs["lora_A"], inputs["lora_B"], SCALING)
    assert torch.equal(base, before) and y.data_ptr() != base.data_ptr()
    # exp's backward reads its own output.
    (grad,) = torch.autograd.grad(y, pre, inputs["grad"])
    torch.testing.assert_close(grad, inputs["grad"] * before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_up_to_lora_linear(backend):
    """Two adapters, and one: base, branch, branch against what the fused op makes of the same."""
    inputs = make_inputs((70, 24), 20, 6, device=DEVICE)
    x, w, bias, a, b = (inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    with slk.use_backend(backend):
        base = torch.nn.functional.linear(x, w, bias)
        torch.testing.assert_close(lora_branch(base, x, a, b, SCALING), lora_linear(x, w, bias, a, b, SCALING))
        twice = lora_branch(lora_branch(base, x, a, b, SCALING), x, a, b, SCALING)
        torch.testing.assert_close(twice, lora_linear(x, w, bias, a, b, 2 * SCALING))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_autocast_casts_x_and_leaves_base_out(rows, backend):
    inputs = make((rows, 24), 20, 6)
    for base_dtype in (FP32, BF16):
        base = inputs["base_out"].to(base_dtype)
        x = inputs["x"].detach().requires_grad_()
        with slk.use_backend(backend):
            with torch.autocast(DEVICE, BF16):
                y = lora_branch(base, x, inputs["lora_A"], inputs["lora_B"], SCALING)
            explicit = lora_branch(base, x.detach().to(BF16), inputs["lora_A"], inputs["lora_B"], SCALING)
        assert y.dtype == base_dtype and torch.equal(y, explicit)
        assert torch.autograd.grad(y.sum(), x)[0].dtype == FP32


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 66])
def test_gradcheck_in_float64(p, rows):
    inputs = make((rows, 3), 2, 2, torch.float64, torch.float64, seed=3)

    def function(*args: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_branch(*args, SCALING, p)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in NAMES])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    inputs = make((rows, 24), 20, 6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: lora_branch(*args, SCALING, p), backend="aot_eager", fullgraph=True)
    results = []
    for call in (lambda *args: lora_branch(*args, SCALING, p), compiled):
        leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
        torch.manual_seed(7)
        with slk.use_backend(backend):
            y = call(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, inputs["grad"])))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


def test_ops_pass_opcheck():
    inputs = make((9, 24), 20, 6)
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
        (
            {"base_out": torch.zeros(4, 4)},
            ValueError,
            r"base_out must be \[..., N\] .* fit x \[5, 6\], got \[4, 4\]",
        ),
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
    inputs = make((5, 6), 4, 2)
    inputs.pop("grad")
    with pytest.raises(error, match=message):
        lora_branch(**inputs | {"scaling": 1.0} | changes)


def test_float64_does_not_fall_back_silently():
    inputs = make((5, 6), 4, 2)
    inputs.pop("grad")
    inputs["base_out"] = inputs["base_out"].double()
    with slk.use_backend("triton"), pytest.raises(TypeError, match=r"base_out is torch.float64.*use_backend"):
        lora_branch(**inputs, scaling=1.0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_what_explain_says_is_what_runs(arch, monkeypatch):
    from stablelora_kernels.launch.base import launch_counts

    monkeypatch.setattr(problem, "device_of", lambda _: problem.DEVICES[arch])
    for m, r, p in [
        (8, 16, 0.0),
        (8, 16, 0.1),
        (64, 64, 0.0),
        (8, 100, 0.0),
        (70, 16, 0.0),
        (70, 20, 0.3),
        (70, 128, 0.1),
    ]:
        before = launch_counts.copy()
        run(make((m, 64), 80, r, BF16, FP32), "triton", p)
        said = slk.explain(m, 80, 64, r, BF16, p, branch_only=True, device=arch)
        made = sorted((launch_counts - before).elements())
        assert made == sorted(f"_{step.kernel}_kernel" for step in (*said.forward, *said.backward))
        assert said.forward_kernel == ("fused" if len(said.forward) == 1 else "split")
        assert said.backward_kernel == ("fused" if len(said.backward) == 2 else "split")
        assert said.forward_reason in str(said) and said.backward_reason in str(said)


def test_explaining_the_branch_alone():
    few, high = (slk.explain(8, 4096, 4096, r, branch_only=True, device="sm_90") for r in (16, 128))
    assert [step.kernel for step in few.forward] == ["lora_expand"]
    assert [step.kernel for step in few.backward] == ["lora_expand", "lora_weight_grads"]
    assert "rank above 64" in high.forward_reason and "dS with dB" in high.backward_reason
    dropped = slk.explain(8, 4096, 4096, 16, dropout_p=0.1, branch_only=True, device="sm_90")
    assert [step.kernel for step in dropped.forward] == ["lora_shrink", "lora_expand"]
    assert "draw the mask anew" in dropped.forward_reason
    # Nothing is measured, and no kernel can be forced.
    with slk.use_kernel("vendor"):
        assert slk.explain(8, 4096, 4096, 16, branch_only=True, device="sm_90") == few
    none = slk.explain(0, 64, 64, 4, branch_only=True, device="sm_90")
    assert none.forward == () and [step.kernel for step in none.backward] == ["lora_weight_grads"]
    with slk.use_backend("torch"):
        assert slk.explain(8, 64, 64, 4, branch_only=True, device="cpu").backend == "torch"
    with pytest.raises(ValueError, match=r"quantized must be None where branch_only is true, .* got 'nf4'"):
        slk.explain(8, 64, 64, 4, branch_only=True, quantized="nf4", device="sm_90")

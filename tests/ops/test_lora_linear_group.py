"""Projections of one X in one op, against a float64 oracle and against separate calls, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem
from stablelora_kernels.functional import lora_linear, lora_linear_group
from stablelora_kernels.reference import lora_linear_grads_ref, lora_linear_ref
from stablelora_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# x's shape, out_features, ranks: two and three projections, odd, prime, single, empty, different ranks, above a block of ranks.
SHAPES = [
    ((1, 1), (1, 1), (1, 1)),
    ((5, 37), (53, 17, 1), (3, 1, 20)),
    ((2, 35, 31), (17, 8, 8), (20, 4, 3)),
    ((0, 16), (8, 4), (4, 2)),
    ((3, 0, 16), (8, 4, 4), (4, 2, 2)),
    ((130, 67), (71, 40), (8, 16)),
    ((70, 264), (40, 24, 24), (8, 8, 8)),
    ((67, 33), (40, 8, 8), (100, 3, 3)),
]
DTYPES = [(FP32, FP32), (BF16, FP32), (FP16, FP16)]


class Group:
    """The arguments of a call, and the gradients that come in."""

    def __init__(self, shape, ns, rs, dtype=FP32, lora_dtype=FP32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size, std=1.0, to=dtype):
            return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(DEVICE, to)

        k = shape[-1]
        self.x = normal(*shape)
        self.weights = [normal(n, k, std=k**-0.5) for n in ns]
        self.biases: list[Tensor | None] = [normal(n) for n in ns[:-1]] + [None]
        self.lora_As = [normal(r, k, std=k**-0.5, to=lora_dtype) for r in rs]
        self.lora_Bs = [normal(n, r, std=r**-0.5, to=lora_dtype) for n, r in zip(ns, rs, strict=True)]
        self.scalings = [0.5 + i for i in range(len(ns))]
        self.grads = [normal(*shape[:-1], n) for n in ns]

    def leaves(self):
        return [t.detach().clone().requires_grad_() for t in (self.x, *self.lora_As, *self.lora_Bs)]

    def run(self, together=True, p=0.0, seed=3):
        """The outputs and the gradients of x, the A's and the B's."""
        x, *pairs = leaves = self.leaves()
        g = len(self.weights)
        torch.manual_seed(seed)
        if together:
            ys = lora_linear_group(x, self.weights, self.biases, pairs[:g], pairs[g:], self.scalings, p)
        else:
            members = zip(self.weights, self.biases, pairs[:g], pairs[g:], self.scalings, strict=True)
            ys = [lora_linear(x, *member, p) for member in members]
        return [y.detach() for y in ys], torch.autograd.grad(ys, leaves, self.grads)

    def eager(self):
        x, *pairs = leaves = self.leaves()
        g, ys = len(self.weights), []
        for w, bias, a, b, s in zip(self.weights, self.biases, pairs[:g], pairs[g:], self.scalings, strict=True):
            branch = x @ a.to(x.dtype).T @ b.to(x.dtype).T
            ys.append(torch.nn.functional.linear(x, w, bias) + s * branch)
        return [y.detach() for y in ys], torch.autograd.grad(ys, leaves, self.grads)

    def oracle(self):
        x, dx, ys, das, dbs = self.x.double(), 0, [], [], []
        everything = (self.weights, self.biases, self.lora_As, self.lora_Bs, self.scalings, self.grads)
        for w, bias, a, b, s, grad in zip(*everything, strict=True):
            w, a, b, grad = (t.double() for t in (w, a, b, grad))
            ys.append(lora_linear_ref(x, w, None if bias is None else bias.double(), a, b, s))
            grads = lora_linear_grads_ref(grad, x, w, a, b, s)
            dx = dx + grads["dX"]
            das.append(grads["dA"])
            dbs.append(grads["dB"])
        return ys, [dx, *das, *dbs]


def names(group):
    g = range(len(group.weights))
    return [f"Y{i}" for i in g] + ["dX"] + [f"dA{i}" for i in g] + [f"dB{i}" for i in g]


def check(group, found):
    expected, baseline = group.oracle(), group.eager()
    everything = ([*ys, *grads] for ys, grads in (found, expected, baseline))
    for name, out, ref, base in zip(names(group), *everything, strict=True):
        assert_no_worse(out, ref, base, dtype=group.x.dtype, name=name)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize(("shape", "ns", "rs"), SHAPES, ids=str)
def test_matches_the_oracle(shape, ns, rs, dtypes, backend):
    group = Group(shape, ns, rs, *dtypes)
    check(group, group.run())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["auto", "fused", "vendor"])
def test_every_kernel_on_every_kind_of_gpu(kernel, p, arch, monkeypatch):
    """Rows of 16 bytes' multiples, which descriptors want; sums that several programs share."""
    if kernel == "fused" and p:
        pytest.skip("the fused kernel has no dropout")
    monkeypatch.setattr(problem, "device_of", lambda device: problem.DEVICES[arch])
    group = Group((136, 264), (72, 40, 40), (16, 8, 20), BF16, FP32)
    with slk.use_backend("triton"), slk.use_kernel(kernel):
        found, apart = group.run(p=p), group.run(together=False, p=p)
    for name, out, other in zip(names(group), *([*ys, *grads] for ys, grads in (found, apart)), strict=True):
        torch.testing.assert_close(out, other, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}")
    if not p:
        check(group, found)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(("shape", "ns", "rs"), [SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[7]], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_draws_the_masks_of_separate_calls(shape, ns, rs, dtype, p, backend):
    """A projection's own each: with one for all, or others than separate calls draw, outputs would be far off."""
    group = Group(shape, ns, rs, dtype)
    (ys, grads), (separate_ys, separate_grads) = group.run(p=p), group.run(together=False, p=p)
    # A mask that differs moves results by about their own size.
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    for name, out, other in zip(names(group), (*ys, *grads), (*separate_ys, *separate_grads), strict=True):
        torch.testing.assert_close(out, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(ys[0], group.run(p=p, seed=4)[0][0])


@pytest.mark.parametrize("rows", [5, 70])
def test_any_strides(rows, backend):
    group = Group((rows, 24), (20, 12), (6, 3))
    group.x = group.x.t().contiguous().t()
    for tensors in (group.weights, group.lora_As, group.lora_Bs, group.grads):
        tensors[:] = [t.t().contiguous().t() for t in tensors]
        assert not any(t.is_contiguous() for t in tensors)
    check(group, group.run())
    group.x = group.x[:1].expand(rows, 24)
    group.grads = [torch.ones((), device=DEVICE).expand(rows, n) for n in (20, 12)]
    check(group, group.run())


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_asked_for(rows, p, backend):
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))
    every = dict(zip(names(group)[3:], group.run(p=p)[1], strict=True))
    order = ["dX", "dA0", "dA1", "dA2", "dB0", "dB1", "dB2"]
    for wanted in (["dX"], order[1:4], order[4:], order[1:], ["dX", *order[4:]], ["dA1"], ["dX", "dA0", "dB2"]):
        tensors = (group.x, *group.lora_As, *group.lora_Bs)
        leaves = [t.detach().clone().requires_grad_(name in wanted) for name, t in zip(order, tensors, strict=True)]
        torch.manual_seed(3)
        ys = lora_linear_group(leaves[0], group.weights, group.biases, leaves[1:4], leaves[4:], group.scalings, p)
        used = [(y, grad) for y, grad in zip(ys, group.grads, strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*used, strict=True))
        assert [name for name, leaf in zip(order, leaves, strict=True) if leaf.grad is not None] == wanted
        for name, leaf in zip(order, leaves, strict=True):
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, every[name])


@pytest.mark.parametrize("rows", [5, 70])
def test_outputs_that_nobody_uses(rows, backend):
    """An unused projection has no part in backward; with none used there are no gradients at all."""
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))
    for used in ((0,), (2,), (0, 2), (1, 2)):
        results = []
        for together in (True, False):
            x, *pairs = leaves = group.leaves()
            if together:
                ys = lora_linear_group(x, group.weights, group.biases, pairs[:3], pairs[3:], group.scalings)
            else:
                members = zip(group.weights, group.biases, pairs[:3], pairs[3:], group.scalings, strict=True)
                ys = [lora_linear(x, *member) for member in members]
            wanted = [ys[i] for i in used]
            results.append(torch.autograd.grad(wanted, leaves, [group.grads[i] for i in used], allow_unused=True))
        for grad, other in zip(*results, strict=True):
            assert (grad is None) == (other is None)
            if grad is not None:
                torch.testing.assert_close(grad, other)


def test_trainable_weights_and_biases_get_theirs(backend):
    group = Group((70, 24), (20, 12), (6, 3))
    weights = [w.clone().requires_grad_() for w in group.weights]
    bias = group.biases[0].clone().requires_grad_()
    ys = lora_linear_group(group.x, weights, [bias, None], group.lora_As, group.lora_Bs, group.scalings)
    torch.autograd.backward(ys, group.grads)
    for weight, grad in zip(weights, group.grads, strict=True):
        torch.testing.assert_close(weight.grad, grad.T @ group.x)
    torch.testing.assert_close(bias.grad, group.grads[0].sum(0))


def launched(group, p=0.0):
    from stablelora_kernels.launch.base import launch_counts

    before = launch_counts.copy()
    group.run(p=p)
    return {name.removeprefix("_").removesuffix("_kernel"): n for name, n in (launch_counts - before).items()}


def test_launches():
    """Above 64 rows one launch for S and one for dA, whatever the number of projections; below as separate calls."""
    with slk.use_backend("triton"):
        group = Group((70, 24), (20, 12, 12), (6, 3, 3), BF16)
        assert launched(group) == {
            "lora_shrink_group": 1, "lora_linear": 6, "lora_shrink": 3, "lora_weight_grads_group": 1
        }  # fmt: skip
        assert launched(group, 0.2) == launched(group)
        assert launched(Group((9, 24), (20, 12), (6, 3), BF16)) == {"lora_linear_split_k": 4, "lora_shrink": 2}
        # A rank above a block.
        assert launched(Group((70, 24), (20, 12), (80, 3), BF16)) == {"lora_linear": 4, "lora_shrink": 4}


def test_explain_lists_what_is_launched():
    found = slk.explain(8192, (4096, 1024, 1024), 4096, 16, device="sm_90")
    assert [step.kernel for step in found.forward] == ["lora_shrink_group"] + ["lora_linear_tma"] * 3
    assert [step.kernel for step in found.backward] == ["lora_shrink", "lora_linear_tma"] * 3 + [
        "lora_weight_grads_group"
    ]
    assert found.forward_kernel == "together: split, split, split" and "one read of X" in found.forward_reason
    assert sum("add" in step.variant for step in found.backward) == 2
    few = slk.explain(8, [4096, 1024], 4096, 16, device="sm_90")
    assert few.forward_kernel == "apart: fused, fused" and "saves its launch" in few.forward_reason
    with pytest.raises(ValueError, match=r"N must be one size or 2 to 3, got \(4096,\)"):
        slk.explain(8, (4096,), 4096, 16, device="sm_90")
    with pytest.raises(ValueError, match=r"N must be .* 1, got 0"):
        slk.explain(8, (4096, 0), 4096, 16, device="sm_90")
    with pytest.raises(ValueError, match=r"quantized must be None for several N, got 'nf4'"):
        slk.explain(8, (4096, 4096), 4096, 16, device="sm_90", quantized="nf4")


@pytest.mark.parametrize("rows", [5, 70])
def test_autocast(rows, backend):
    group = Group((rows, 24), (20, 12), (6, 3))
    x = group.x.clone().requires_grad_()
    with torch.autocast(DEVICE, BF16):
        ys = lora_linear_group(x, group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings)
        members = zip(group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings, strict=True)
        separate = [lora_linear(x, *member) for member in members]
    for y, other in zip(ys, separate, strict=True):
        assert y.dtype == BF16
        torch.testing.assert_close(y, other)
    assert torch.autograd.grad(sum(y.sum() for y in ys), x)[0].dtype == FP32


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 66])
def test_gradcheck_in_float64(p, rows):
    group = Group((rows, 3), (2, 3), (2, 1), torch.float64, torch.float64)

    def function(x, *pairs):
        torch.manual_seed(0)
        return lora_linear_group(x, group.weights, group.biases, pairs[:2], pairs[2:], group.scalings, p)

    assert torch.autograd.gradcheck(function, group.leaves())


@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))

    def function(x, *pairs):
        return lora_linear_group(x, group.weights, group.biases, pairs[:3], pairs[3:], group.scalings, p)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for call in (function, compiled):
        leaves = group.leaves()
        torch.manual_seed(7)
        ys = call(*leaves)
        results.append([*ys, *torch.autograd.grad(ys, leaves, group.grads)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


def test_ops_pass_opcheck():
    group = Group((70, 24), (20, 12), (6, 3))
    seeds = [torch.tensor([i], device=DEVICE) for i in range(2)]
    library = torch.ops.stablelora_kernels
    given = (group.weights, group.biases, group.lora_As, group.lora_Bs)
    s = [torch.randn(70, r, device=DEVICE) for r in (6, 3)]
    for p, random in ((0.0, []), (0.3, seeds)):
        torch.library.opcheck(library.lora_linear_group_fwd.default, (group.x, *given, random, group.scalings, p))
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            args = (group.x, group.grads, group.weights, group.lora_As, group.lora_Bs, s, random, group.scalings, p)
            torch.library.opcheck(library.lora_linear_group_bwd.default, (*args, *need))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": []}, ValueError, r"one length, of 1 to 3, got 0, 2, 2, 2, 2"),
        ({"scalings": [1.0]}, ValueError, r"one length, of 1 to 3, got 2, 2, 2, 2, 1"),
        ({"lora_As": [torch.zeros(6, 24), torch.zeros(3, 23)]}, ValueError, r"lora_A must be \[r, 24\] .* got \[3, 23\]"),
        ({"x": torch.zeros(5, 23)}, ValueError, r"x must be \[..., 24\] to fit weight \[20, 24\], got \[5, 23\]"),
        ({"biases": [torch.zeros(12), None]}, ValueError, r"bias must be \[20\] to fit weight \[20, 24\], got \[12\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    group = Group((5, 24), (20, 12), (6, 3))
    arguments = {name: getattr(group, name) for name in ("x", "weights", "biases", "lora_As", "lora_Bs", "scalings")}
    with pytest.raises(error, match=message):
        lora_linear_group(**arguments | changes)


def test_pairs_of_two_dtypes_are_refused():
    group = Group((5, 24), (20, 12), (6, 3), BF16, FP32)
    group.lora_As[1], group.lora_Bs[1] = group.lora_As[1].to(BF16), group.lora_Bs[1].to(BF16)
    with pytest.raises(TypeError, match=r"lora_As must have one dtype, got torch.float32 and torch.bfloat16"):
        group.run()

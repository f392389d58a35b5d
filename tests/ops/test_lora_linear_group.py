"""Projections of one X in one op, against a float64 oracle and against separate calls, on both backends."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.dispatch import problem
from stablelora_kernels.functional import lora_linear, lora_linear_group
from stablelora_kernels.testing import group_results
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32, make_inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import check_all, check_compiled

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
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
    """The arguments of a call, the gradients that come in, and the names of those that go out."""

    def __init__(self, shape, ns, rs, dtype=FP32, lora_dtype=FP32):
        parts = [
            make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, seed=i)
            for i, (n, r) in enumerate(zip(ns, rs, strict=True))
        ]
        parts[-1]["bias"] = None
        self.x = parts[0]["x"]
        names = ("weight", "bias", "lora_A", "lora_B", "grad")
        self.weights, self.biases, self.lora_As, self.lora_Bs, self.grads = ([p[name] for p in parts] for name in names)
        numbers = range(len(ns))
        self.scalings = [0.5 + i for i in numbers]
        self.wanted = ["dX", *(f"dA{i}" for i in numbers), *(f"dB{i}" for i in numbers)]

    def leaves(self, wanted=None):
        """Copies of x, the A's and the B's, of which those whose gradients are ``wanted`` require them."""
        tensors = zip(self.wanted, (self.x, *self.lora_As, *self.lora_Bs), strict=True)
        return [t.detach().clone().requires_grad_(wanted is None or name in wanted) for name, t in tensors]

    def call(self, x, *pairs, p=0.0):
        count = len(self.weights)
        return lora_linear_group(x, self.weights, self.biases, pairs[:count], pairs[count:], self.scalings, p)

    def call_apart(self, x, *pairs, p=0.0):
        count = len(self.weights)
        members = zip(self.weights, self.biases, pairs[:count], pairs[count:], self.scalings, strict=True)
        return [lora_linear(x, *member, p) for member in members]

    def run(self, call=None, p=0.0, seed=3):
        """The outputs and the gradients by name, of one call or of separate ones."""
        leaves = self.leaves()
        torch.manual_seed(seed)
        ys = (call or self.call)(*leaves, p=p)
        grads = torch.autograd.grad(ys, leaves, self.grads)
        return {f"Y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(self.wanted, grads, strict=True))

    def by_parts(self, results):
        """What ``results``, of one projection's inputs and scaling, make of each projection."""
        names = ("weight", "bias", "lora_A", "lora_B", "grad")
        parts = zip(self.weights, self.biases, self.lora_As, self.lora_Bs, self.grads, strict=True)
        inputs = [{"x": self.x, **dict(zip(names, part, strict=True))} for part in parts]
        return group_results([results(*each) for each in zip(inputs, self.scalings, strict=True)])


def check(group, found):
    check_all(found, group.by_parts(testing.oracle), group.by_parts(testing.eager), group.x.dtype)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, out in found.items():
        torch.testing.assert_close(
            out, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.covering
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize(("shape", "ns", "rs"), SHAPES, ids=str)
def test_matches_the_oracle(shape, ns, rs, dtypes, backend):
    group = Group(shape, ns, rs, *dtypes)
    check(group, group.run())


@pytest.mark.covering
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
        found = group.run(p=p)
        assert_close(found, group.run(group.call_apart, p), 2e-2)
    if not p:
        check(group, found)


@pytest.mark.covering
@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(("shape", "ns", "rs"), [SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[7]], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_draws_the_masks_of_separate_calls(shape, ns, rs, dtype, p, backend):
    """A projection's own each: with one for all, or others than separate calls draw, outputs would be far off."""
    group = Group(shape, ns, rs, dtype)
    found = group.run(p=p)
    # A mask that differs moves results by about their own size.
    assert_close(found, group.run(group.call_apart, p), 3e-2 if dtype == BF16 else 1e-5)
    assert not torch.equal(found["Y0"], group.run(p=p, seed=4)["Y0"])


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


@pytest.mark.covering
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_requested_gradients(rows, p, backend):
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))
    every, order = group.run(p=p), group.wanted
    for wanted in (["dX"], order[1:4], order[4:], order[1:], ["dX", *order[4:]], ["dA1"], ["dX", "dA0", "dB2"]):
        leaves = group.leaves(wanted)
        torch.manual_seed(3)
        used = [(y, grad) for y, grad in zip(group.call(*leaves, p=p), group.grads, strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*used, strict=True))
        found = {name: leaf.grad for name, leaf in zip(order, leaves, strict=True) if leaf.grad is not None}
        assert list(found) == wanted
        for name, grad in found.items():
            torch.testing.assert_close(grad, every[name])


@pytest.mark.parametrize("rows", [5, 70])
def test_outputs_that_nobody_uses(rows, backend):
    """An unused projection has no part in backward; with none used there are no gradients at all."""
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))
    for used in ((0,), (2,), (0, 2), (1, 2)):
        results = []
        for call in (group.call, group.call_apart):
            leaves = group.leaves()
            ys = call(*leaves)
            wanted, grads = [ys[i] for i in used], [group.grads[i] for i in used]
            results.append(torch.autograd.grad(wanted, leaves, grads, allow_unused=True))
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
    with count_launches() as made:
        group.run(p=p)
    return {name.removeprefix("_").removesuffix("_kernel"): n for name, n in made.items()}


def test_an_empty_sum_gives_the_biases(backend):
    """X without columns, at as many rows as would share a read of X."""
    sizes = (8, 4, 4)
    weights, biases = [torch.zeros(n, 0, device=DEVICE) for n in sizes], [torch.randn(n, device=DEVICE) for n in sizes]
    pairs = [(torch.zeros(2, 0, device=DEVICE), torch.randn(n, 2, device=DEVICE)) for n in sizes]
    x = torch.zeros(70, 0, device=DEVICE)
    ys = lora_linear_group(x, weights, biases, *map(list, zip(*pairs, strict=True)), [1.0] * 3)
    for y, bias in zip(ys, biases, strict=True):
        assert torch.equal(y, bias.expand_as(y))


def test_launches():
    """Above 64 rows one launch for S and one for dA, whatever the number of projections; below as separate calls.

    A product's launch has dS and dB as well.
    """
    with slk.use_backend("triton"):
        group = Group((70, 24), (20, 12, 12), (6, 3, 3), BF16)
        assert launched(group) == {"lora_shrink_group": 1, "lora_linear": 6, "lora_weight_grads_group": 1}
        assert launched(group, 0.2) == launched(group)
        assert launched(Group((9, 24), (20, 12), (6, 3), BF16)) == {"lora_linear_split_k": 4}
        # A rank above a block.
        assert launched(Group((70, 24), (20, 12), (80, 3), BF16)) == {"lora_linear": 4}


@pytest.mark.parametrize("rows", [5, 70])
def test_autocast(rows, backend):
    group = Group((rows, 24), (20, 12), (6, 3))
    leaves = group.leaves()
    with torch.autocast(DEVICE, BF16):
        ys, separate = group.call(*leaves), group.call_apart(*leaves)
    for y, other in zip(ys, separate, strict=True):
        assert y.dtype == BF16
        torch.testing.assert_close(y, other)
    assert torch.autograd.grad(sum(y.sum() for y in ys), leaves[0])[0].dtype == FP32


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 66])
def test_gradcheck_in_float64(p, rows):
    group = Group((rows, 3), (2, 3), (2, 1), torch.float64, torch.float64)

    def function(*leaves):
        torch.manual_seed(0)
        return group.call(*leaves, p=p)

    assert torch.autograd.gradcheck(function, group.leaves())


@pytest.mark.covering(1)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    group = Group((rows, 24), (20, 12, 12), (6, 3, 3))
    check_compiled(partial(group.call, p=p), group.leaves(), group.grads)


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

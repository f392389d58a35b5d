"""A gated MLP as one op, against a float64 oracle and against separate layers, on both backends."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import EPS, fp8_weight, nf4_weight
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32
from tests.helpers.launches import count_launches
from tests.helpers.layer_calls import check_value
from tests.helpers.mlps import (
    ACTIVATIONS,
    MLP,
    PROJECTIONS,
    ROUNDINGS,
    Results,
    absolute_values,
    assert_close,
    backward_launches,
    check,
    launched,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# On a GPU the kernels run on the GPU that is there.
pretends = pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended")
# x's shape, F, N, ranks: odd, prime, single, empty, different ranks, above a block of ranks; rows that share a read of X.
SHAPES = [
    ((37,), 5, 3, (3, 1, 2)),
    ((5, 37), 53, 17, (3, 1, 20)),
    ((2, 35, 31), 17, 40, (20, 4, 3)),
    ((0, 16), 8, 4, (4, 2, 3)),
    ((3, 0, 16), 8, 4, (4, 2, 3)),
    ((65, 67), 71, 24, (8, 16, 5)),
    ((66, 72), 40, 24, (8, 8, 8)),
    ((65, 33), 40, 24, (100, 3, 20)),
    ((66, 40), 33, 24, (3, 20, 100)),
]
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP16)]
WITHOUT_A_BRANCH = [
    (None, 8, 5), (8, None, 5), (8, 5, None), (None, None, 5), (None, 8, None), (8, None, None), (None, None, None),
]  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize(("shape", "f", "n", "ranks"), SHAPES, ids=str)
def test_matches_the_oracle(shape, f, n, ranks, dtypes, activation, backend):
    mlp = MLP(shape, f, n, ranks, *dtypes, activation)
    (check_one_row if len(shape) == 1 and dtypes[0] == FP32 else check)(mlp, mlp.run())


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
def test_a_single_element(dtypes, activation, backend):
    mlp = MLP((1, 1), 1, 1, (1, 1, 1), *dtypes, activation)
    check_one_row(mlp, mlp.run())


def check_one_row(mlp: MLP, found: Results) -> None:
    """Eager's own error of few elements may be next to nothing by chance, so roundings of their terms are allowed too."""
    ref, eager, absolute = mlp.oracle(), mlp.eager(), absolute_values(mlp).oracle()
    for name, value in found.items():
        check_value(name, value, ref[name], eager[name], absolute[name], ROUNDINGS * EPS[mlp.x.dtype], broken=False)


@pretends
@pytest.mark.covering(1)
@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("kernel", "p"),
    # The fused kernel has no dropout.
    [("auto", 0.3), ("fused", 0.0), ("chained", 0.3), ("split", 0.0), ("split", 0.3), ("vendor", 0.3)],
)
def test_every_kernel_on_every_kind_of_gpu(kernel, activation, p, arch, processors, monkeypatch):
    """Rows of 16 bytes' multiples, which descriptors want; sums that several programs share, and GPUs without idle ones."""
    device = problem.DEVICES[arch]._replace(processors=processors)
    monkeypatch.setattr(problem, "device_of", lambda _: device)
    mlp = MLP((70, 136), 72, 24, (16, 8, 20), BF16, FP32, activation)
    with slk.use_backend("triton"), slk.use_kernel(kernel):
        check(mlp, mlp.run(p=p), p)


@pretends
@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", [(70, 40), (70, 37), (6, 40)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(8, 3, 5), *WITHOUT_A_BRANCH], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gate_and_up_in_one_kernel(p, ranks, transposed, shape, arch, monkeypatch):
    """By descriptors and by pointers, with each branch and without it; W as a linear layer has it, and as Conv1D does."""
    device = problem.DEVICES[arch]._replace(processors=1)
    monkeypatch.setattr(problem, "device_of", lambda _: device)
    mlp = MLP(shape, 48, 24, ranks, BF16, FP32, "gelu", biases=(False, True, False))
    if transposed:
        mlp.weights = [w.t().contiguous().t() for w in mlp.weights]
    with slk.use_backend("triton"), slk.use_kernel("split"):
        with count_launches() as made:
            found = mlp.run(p=p)
        check(mlp, found, p)
    tma = arch == "sm_90" and shape[1] % 8 == 0
    assert launched(made)["lora_gate_up_tma" if tma else "lora_gate_up"] == 1


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", WITHOUT_A_BRANCH, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_projections_without_a_branch(dtype, ranks, p, rows, backend):
    mlp = MLP((rows, 40), 48, 24, ranks, dtype)
    check(mlp, mlp.run(p=p), p)


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize(("shape", "f", "n", "ranks"), [SHAPES[i] for i in (2, 3, 4, 6, 8)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dropout_draws_the_masks_of_separate_calls(shape, f, n, ranks, dtype, p, backend):
    """In the order of gate, up and down; with other masks, results would be off by about their own size."""
    mlp = MLP(shape, f, n, ranks, dtype)
    found = mlp.run(p=p)
    check(mlp, found, p)
    if dtype == FP32:
        # The kernels do not round dH, separate layers do.
        assert_close(found, mlp.run(mlp.call_apart, p), 1e-4)
    if found["Y"].numel():
        assert not torch.equal(found["Y"], mlp.run(p=p, seed=4)["Y"])


@pytest.mark.parametrize("rows", [9, 70])
def test_dropout_only_in_training(rows, backend):
    mlp = MLP((rows, 24), 40, 20, (6, 3, 4))
    still = slk.functional.lora_mlp(mlp.x, *mlp.projections(mlp.tensors()[1:]), "silu", 0.5, training=False)
    assert torch.equal(still, mlp.call(*mlp.tensors()))
    assert not torch.equal(still, mlp.call(*mlp.tensors(), p=0.5))


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_shared_a_has_one_mask(quantized, dtype, rows, p, backend):
    """As Phi-3's: gate and up are halves of one projection, whose A is one tensor and gets one gradient."""
    mlp = MLP((rows, 64), 48, 24, (6, 6, 3), dtype, FP32, shared=True)
    mlp.scalings[1] = mlp.scalings[0]
    if quantized:
        mlp.weights[:2] = [nf4_weight(48, 64, 64, True), nf4_weight(48, 64, 64, False)]
    found = mlp.run(p=p)
    check(mlp, found, p)
    if not quantized:

        def stacked(x, *leaves, p):
            gate, up, down = mlp.projections(leaves)
            bias = torch.cat((gate.bias, torch.zeros_like(gate.bias)))
            both = torch.cat((gate.weight, up.weight)), bias, gate.lora_A, torch.cat((gate.lora_B, up.lora_B))
            g, u = lora_linear(x, *both, gate.scaling, p).chunk(2, -1)
            return lora_linear(ACTIVATIONS["silu"](g) * u, *down, p)

        if dtype == FP32:
            assert_close(found, mlp.run(stacked, p), 1e-4)


# Quantized weights.

NF4, NESTED, FP8 = (lambda n, k: nf4_weight(n, k, 64, False)), (lambda n, k: nf4_weight(n, k, 64, True)), fp8_weight
QUANTIZED = {
    "nf4": (NF4, NF4, NF4),
    "nf4 nested": (NESTED, NESTED, NESTED),
    "fp8": (FP8, FP8, FP8),
    "each another": (NF4, FP8, NESTED),
    "gate plain": (None, NESTED, FP8),
    "down alone": (None, None, NESTED),
    "up alone": (None, FP8, None),
}


def quantize(mlp, kinds):
    for i, make in enumerate(kinds):
        if make is not None:
            mlp.weights[i] = make(*mlp.weights[i].shape)
    return mlp


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", [5, 70, 260])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(6, 3, 8), (None, 3, 8), (6, None, None)], ids=str)
@pytest.mark.parametrize("kinds", QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_weights(kinds, ranks, p, rows, dtype, backend):
    """Up to 256 rows by separate layers on Triton, whose products dequantize; above, each weight right before its product."""
    mlp = quantize(MLP((rows, 64), 48, 128, ranks, dtype, FP32, "gelu_tanh"), kinds)
    check(mlp, mlp.run(p=p), p)


@pytest.mark.parametrize("kind", ["each another", "down alone"])
def test_many_rows_dequantize_each_weight_twice(kind):
    """Once forward and once backward, where only the weights that its gradients need are dequantized."""
    mlp = quantize(MLP((260, 64), 48, 128, (6, 3, 8), BF16, FP32), QUANTIZED[kind])
    count = sum(make is not None for make in QUANTIZED[kind])
    with slk.use_backend("triton"):
        with count_launches() as made:
            mlp.run()
        assert made["_dequantize_kernel"] == 2 * count
        assert backward_launches(mlp, ["gate.dA", "gate.dB", "up.dA", "up.dB"])["dequantize"] == 1
        assert "dequantize" not in backward_launches(mlp, ["down.dA", "down.dB"])


# Only what is asked for.


def subsets(mlp):
    order = mlp.wanted
    of_a, of_b = ([name for name in order if name.endswith(kind)] for kind in ("dA", "dB"))
    return [
        ["dX"], of_a, of_b, ["dX", *of_b], ["gate.dA", "up.dA"], ["gate.dB", "up.dB"], ["down.dA"], ["down.dB"],
        # Not uniform: separate layers.
        ["up.dB"], ["dX", "gate.dA", "down.dB"],
    ]  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_requested_gradients(rows, p, backend):
    mlp = MLP((rows, 24), 24, 8, (6, 3, 4))
    every = mlp.run(p=p)
    for wanted in subsets(mlp):
        leaves = mlp.leaves(wanted)
        torch.manual_seed(3)
        mlp.call(*leaves, p=p).backward(mlp.grad)
        found = {name: leaf.grad for name, leaf in zip(mlp.wanted, leaves, strict=True) if leaf.grad is not None}
        assert set(found) == set(wanted)
        for name, grad in found.items():
            torch.testing.assert_close(grad, every[name], rtol=1e-4, atol=1e-5)


@pretends
def test_backward_launches_what_is_asked_for(monkeypatch):
    """A whole backward, and its parts; a product's launch may have dS, dA and dB as well."""
    monkeypatch.setattr(problem, "device_of", lambda _: problem.DEVICES["sm_80"])
    mlp = MLP((70, 24), 40, 20, (6, 3, 4), BF16)
    product, shared = "lora_linear", "lora_weight_grads_group"
    expected = {
        ("dX",): {product: 3},
        tuple(mlp.wanted): {product: 3, shared: 1},
        # dG and dU without dX.
        ("gate.dA", "up.dA"): {product: 1, "lora_shrink": 2, shared: 1},
        ("gate.dB", "up.dB"): {product: 1, "lora_weight_grads": 2},
        ("gate.dA", "up.dA", "gate.dB", "up.dB"): {product: 1, "lora_shrink": 2, shared: 1},
        # Nothing of gate and up.
        ("down.dA", "down.dB"): {product: 1},
        ("down.dA",): {product: 1},
        ("down.dB",): {"lora_weight_grads": 1},
    }
    with slk.use_backend("triton"):
        for wanted, launches in expected.items():
            assert backward_launches(mlp, wanted, p=0.3) == launches, wanted


@pretends
@pytest.mark.parametrize(("processors", "forward"), [
    (1, {"lora_shrink_group": 1, "lora_gate_up_tma": 1, "lora_linear_tma": 1}),
    (132, {"lora_shrink_group": 1, "lora_linear_tma": 3, "gated_activation": 1}),
])  # fmt: skip
def test_launches_of_a_forward(processors, forward, monkeypatch):
    device = problem.DEVICES["sm_90"]._replace(processors=processors)
    monkeypatch.setattr(problem, "device_of", lambda _: device)
    mlp = MLP((130, 64), 48, 24, (6, 3, 4), BF16)
    with slk.use_backend("triton"), count_launches() as made:
        y = mlp.call(*mlp.leaves())
    assert launched(made) == forward
    with slk.use_backend("triton"), count_launches() as made:
        y.backward(mlp.grad)
    assert launched(made) == {"lora_linear_tma": 3, "lora_weight_grads_group": 1}


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_trainable_weights_and_biases_get_theirs(which, rows, backend):
    mlp = MLP((rows, 24), 40, 20, (6, 3, 4), biases=(True, True, True))
    weight = mlp.weights[which] = mlp.weights[which].clone().requires_grad_()
    bias = mlp.biases[which] = mlp.biases[which].clone().requires_grad_()
    found = []
    for call in (mlp.call, mlp.call_apart):
        results = torch.autograd.grad(call(*mlp.leaves()), (weight, bias), mlp.grad)
        found.append(dict(zip(("weight", "bias"), results, strict=True)))
    assert_close(*found, 1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("kind", ["dA", "dB"])
def test_one_frozen_operand(kind, name, rows, backend):
    """The others get their gradients, if need be by separate layers."""
    mlp = MLP((rows, 24), 40, 20, (6, 3, 4))
    wanted = [each for each in mlp.wanted if each != f"{name}.{kind}"]
    found = mlp.run(wanted=wanted)
    assert list(found) == ["Y", *wanted]
    check(mlp, found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates(activation, backend):
    """Where act and its slope are 0 or 1 to the last bit, nothing overflows on the way."""
    mlp = MLP((70, 24), 40, 20, (6, 3, 4), activation=activation)
    mlp.x = mlp.x * torch.logspace(0, 4, 70, device=DEVICE)[:, None]
    check(mlp, mlp.run())

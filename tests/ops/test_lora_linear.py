"""The fused op against a float64 oracle, bounded by eager PyTorch's own error, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops import torch_path
from stablelora_kernels.reference import dropout_keep_ref, lora_linear_grads_ref, lora_linear_ref
from stablelora_kernels.testing import assert_no_worse, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
SCALING = 1.7
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# x's shape, out_features, r: odd, prime, single, empty, and above one tile or one block of ranks.
SHAPES = [
    ((1, 1), 1, 1),
    ((37,), 5, 3),
    ((1, 64), 48, 64),
    ((5, 37), 53, 3),
    ((2, 3, 31), 17, 20),
    ((0, 16), 8, 4),
    ((3, 0, 16), 8, 4),
    ((130, 67), 71, 8),
    ((67, 33), 40, 100),
]
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]


def leaves(inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """x, A and B as leaves that require gradients, with the strides they came in."""
    return tuple(inputs[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B"))


def run(inputs: dict[str, Tensor | None], backend: str, dropout_p: float = 0.0) -> dict[str, Tensor]:
    x, a, b = leaves(inputs)
    with slk.use_backend(backend):
        y = lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, dropout_p)
    grads = torch.autograd.grad(y, (x, a, b), inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def eager(inputs: dict[str, Tensor | None], keep: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    """What a user writes by hand: operator by operator in x's dtype, gradients by autograd."""
    x, a, b = leaves(inputs)
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - p)
    base = torch.nn.functional.linear(x, inputs["weight"], inputs["bias"])
    y = base + (dropped @ a.to(x.dtype).T @ b.to(x.dtype).T) * SCALING
    grads = torch.autograd.grad(y, (x, a, b), inputs["grad"])
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def oracle(inputs: dict[str, Tensor | None], keep: Tensor | None = None, p: float = 0.0) -> dict[str, Tensor]:
    d = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    y = lora_linear_ref(d["x"], d["weight"], d["bias"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    grads = lora_linear_grads_ref(d["grad"], d["x"], d["weight"], d["lora_A"], d["lora_B"], SCALING, keep, p)
    return {"Y": y, "dX": grads["dX"], "dA": grads["dA"], "dB": grads["dB"]}


def check(inputs: dict[str, Tensor | None], out: dict[str, Tensor], keep: Tensor | None = None, p: float = 0.0) -> None:
    ref, base = oracle(inputs, keep, p), eager(inputs, keep, p)
    for name, value in out.items():
        assert_no_worse(value, ref[name], base[name], dtype=inputs["x"].dtype, name=name)
    assert out["Y"].dtype == out["dX"].dtype == inputs["x"].dtype
    assert out["dA"].dtype == out["dB"].dtype == inputs["lora_A"].dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "lora_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "n", "r"), SHAPES, ids=str)
def test_matches_the_oracle(shape, n, r, dtype, lora_dtype, backend):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, device=DEVICE, bias=r != 3)
    check(inputs, run(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_any_strides(rows, backend):
    inputs = make_inputs((rows, 24), 20, 6, device=DEVICE)
    strided = dict(inputs)
    strided["x"] = inputs["x"].t().contiguous().t()
    strided["weight"] = torch.stack((inputs["weight"], inputs["weight"]), -1)[..., 0]
    strided["lora_A"] = inputs["lora_A"].t().contiguous().t()
    strided["lora_B"] = torch.cat((inputs["lora_B"], inputs["lora_B"]), 1)[:, :6]
    strided["grad"] = torch.stack((inputs["grad"], inputs["grad"]), 1)[:, 0]
    for name in ("x", "weight", "lora_A", "lora_B", "grad"):
        assert not strided[name].is_contiguous()
        assert torch.equal(strided[name], inputs[name])
    check(inputs, run(strided, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_broadcast_input_and_gradient(rows, backend):
    """A row repeated by expand(), and the stride-0 gradient that sum() sends back."""
    inputs = make_inputs((rows, 24), 20, 6, device=DEVICE)
    inputs["x"] = inputs["x"][:1].expand(rows, 24)
    inputs["grad"] = torch.ones((), device=DEVICE).expand(rows, 20)
    assert inputs["x"].stride(0) == 0 and inputs["grad"].stride() == (0, 0)
    x, a, b = leaves(inputs)
    with slk.use_backend(backend):
        y = lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING)
    dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
    check(inputs, {"Y": y.detach(), "dX": dx, "dA": da, "dB": db})


@pytest.mark.parametrize("shape", [(3, 5, 16), (80, 16)])
def test_leading_dimensions_that_cannot_be_flattened(shape):
    inputs = make_inputs(shape, 12, 4, device=DEVICE)
    swapped = dict(inputs, x=inputs["x"].transpose(0, -2).contiguous().transpose(0, -2))
    for backend in BACKENDS:
        check(inputs, run(swapped, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend):
    inputs = make_inputs((150, 65), 70, 8, dtype=BF16, lora_dtype=FP32, device=DEVICE)
    first, second = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_gradients_of_weight_and_bias(rows, backend):
    """The layer freezes them, but who calls the function with a trainable weight must not lose its gradient."""
    inputs = make_inputs((rows, 24), 20, 6, device=DEVICE)
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    with slk.use_backend(backend):
        y = lora_linear(inputs["x"], weight, bias, inputs["lora_A"], inputs["lora_B"], SCALING)
    dw, dbias = torch.autograd.grad(y, (weight, bias), inputs["grad"])
    torch.testing.assert_close(dw, inputs["grad"].T @ inputs["x"])
    torch.testing.assert_close(dbias, inputs["grad"].sum(0))


def bytes_held(call: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Bytes that the graph of ``call`` holds for backward, other than of the tensors ``given``."""
    known = {t.untyped_storage().data_ptr() for t in given}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert call().requires_grad
    return sum(held.values())


def saved_bytes(wanted: str, backend: str, p: float = 0.0) -> int:
    """Bytes that the graph of one call holds for backward, other than its arguments."""
    inputs = make_inputs((128, 24), 20, 6, device=DEVICE)
    named = dict(zip("xAB", leaves(inputs), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    weight, bias = inputs["weight"], inputs["bias"]
    with slk.use_backend(backend):
        return bytes_held(
            lambda: lora_linear(named["x"], weight, bias, named["A"], named["B"], SCALING, p),
            (*named.values(), weight, bias),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_holds_only_s(backend):
    assert saved_bytes("xAB", backend) == 128 * 6 * 4
    assert saved_bytes("xA", backend) == 0
    # The kernels draw the mask again from a seed of 8 bytes; the PyTorch path keeps a byte an element.
    mask = 8 if backend == "triton" else 128 * 24
    assert saved_bytes("xAB", backend, p=0.25) == 128 * 6 * 4 + mask


@pytest.mark.parametrize(("dtype", "lora_dtype"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)])
@pytest.mark.parametrize(
    ("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((0, 16), 8, 4), ((67, 33), 40, 100)]
)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_in_the_kernels_is_the_reference_mask(shape, n, r, dtype, lora_dtype, p):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=lora_dtype, device=DEVICE)
    torch.manual_seed(11)
    out = run(inputs, "triton", p)
    torch.manual_seed(11)
    seed = int(torch.randint(2**63 - 1, (1,), device=DEVICE))
    rows = inputs["x"].numel() // shape[-1]
    keep = dropout_keep_ref(rows, shape[-1], p, seed).view(shape).to(DEVICE)
    check(inputs, out, keep, p)


@pytest.mark.parametrize(("shape", "n", "r"), [((5, 37), 53, 3), ((2, 40, 31), 17, 20), ((0, 16), 8, 4)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_dropout_on_pytorch_uses_one_mask_in_both_directions(shape, n, r, dtype):
    inputs = make_inputs(shape, n, r, dtype=dtype, lora_dtype=FP32, device=DEVICE)
    torch.manual_seed(11)
    out = run(inputs, "torch", 0.3)
    torch.manual_seed(11)
    keep, p = torch_path.draw_keep(inputs["x"].reshape(-1, shape[-1]), 0.3)
    check(inputs, out, keep.view(shape), p)


def test_dropout_keeps_the_right_share_everywhere():
    """Each of the four lanes of a 64-bit word, and every column, within five standard errors."""
    x = torch.empty(2000, 64)
    for p in (0.1, 0.5, 0.9):
        keep, real = torch_path.draw_keep(x, p)
        assert abs(real - p) <= 2**-17
        assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
        assert (keep.double().mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5
        philox = dropout_keep_ref(2000, 64, p, seed=2**62 + 5).double()
        assert (philox.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_only_in_training_and_only_on_the_branch(backend):
    inputs = make_inputs((70, 24), 20, 6, device=DEVICE)
    args = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with slk.use_backend(backend):
        still = lora_linear(*args, SCALING, 0.5, training=False)
        assert torch.equal(still, lora_linear(*args, SCALING, 0.0))
        assert not torch.equal(still, lora_linear(*args, SCALING, 0.5))
        args[4] = torch.zeros_like(args[4])
        torch.testing.assert_close(
            lora_linear(*args, SCALING, 0.5), torch.nn.functional.linear(*args[:3]), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_same_mask(backend, reentrant):
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs((70, 24), 20, 6, device=DEVICE)

    def gradients(wrap: bool) -> tuple[Tensor, ...]:
        x, a, b = leaves(inputs)

        def layer(x: Tensor) -> Tensor:
            with slk.use_backend(backend):
                return lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, 0.4)

        torch.manual_seed(5)
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrap else layer(x)
        y.backward(inputs["grad"])
        return x.grad, a.grad, b.grad

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_in_float64(p):
    inputs = make_inputs((66, 3), 2, 2, dtype=torch.float64, seed=3)
    tensors = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "lora_A", "lora_B")]

    def function(*args: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(*args, SCALING, p)

    assert torch.autograd.gradcheck(function, tensors)
    few = [inputs["x"].detach()[:3].requires_grad_(), *tensors[1:]]
    assert torch.autograd.gradcheck(function, few)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 70])
def test_autocast_casts_as_linear_does(rows, backend):
    inputs = make_inputs((rows, 24), 20, 6, device=DEVICE)
    low = {name: t.to(BF16) if name in ("x", "weight", "bias", "grad") else t for name, t in inputs.items()}
    x, a, b = leaves(inputs)
    with slk.use_backend(backend):
        with torch.autocast(DEVICE, BF16):
            y = lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING)
        explicit = lora_linear(low["x"], low["weight"], low["bias"], a, b, SCALING)
    assert y.dtype == BF16 and torch.equal(y, explicit)
    dx, da, db = torch.autograd.grad(y, (x, a, b), low["grad"])
    assert dx.dtype == da.dtype == db.dtype == FP32
    check(low, {"Y": y.detach(), "dX": dx.to(BF16), "dA": da, "dB": db})


def check_compiled(inputs: dict[str, Tensor | None], backend: str, p: float) -> None:
    """torch.compile takes a call whole, and gives what the call gives."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, inputs["weight"], inputs["bias"], a, b, SCALING, p)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for call in (function, compiled):
        x, a, b = leaves(inputs)
        torch.manual_seed(7)
        with slk.use_backend(backend):
            y = call(x, a, b)
        results.append((y, *torch.autograd.grad(y, (x, a, b), inputs["grad"])))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "p"), [(5, 0.0), (70, 0.0), (70, 0.3)])
def test_torch_compile_has_no_graph_break(rows, p, backend):
    check_compiled(make_inputs((rows, 24), 20, 6, device=DEVICE), backend, p)


def test_ops_pass_opcheck():
    inputs = make_inputs((9, 24), 20, 6, device=DEVICE)
    x, weight, bias, a, b, grad = (inputs[n] for n in ("x", "weight", "bias", "lora_A", "lora_B", "grad"))
    seed, s = torch.tensor([3], device=DEVICE), torch.randn(9, 6, device=DEVICE)
    library = torch.ops.stablelora_kernels
    for p, random in ((0.0, None), (0.3, seed)):
        for save_s in (True, False):
            torch.library.opcheck(library.lora_linear_fwd.default, (x, weight, bias, a, b, random, SCALING, p, save_s))
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            args = (x, grad, weight, a, b, s, random, SCALING, p, *need)
            torch.library.opcheck(library.lora_linear_bwd.default, args)

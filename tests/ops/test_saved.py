"""What the ops keep for backward and compute again there: saved bytes, masks, checkpoints, a second
backward.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stablelora_kernels.ops import dropout
from stablelora_kernels.testing.cases import (
    BF16,
    FP32,
    Case,
    forced,
    leaves,
    make,
    ours,
    results,
    run,
)
from tests.helpers.case_checks import assert_close, check, held_by
from tests.helpers.cases import MANY, OPS, small
from tests.helpers.operators import Operators

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
every_op = pytest.mark.parametrize("op", OPS)
# A generator's state, which the PyTorch path of the MLP keeps for a mask, has 5 kB whatever the
# sizes.
STATE = torch.get_rng_state().nbytes


# Bytes.


def words(width):
    """Bytes of a row's mask on Triton."""
    return 4 * -(-width // 32)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("op", ["linear", "branch", "group", "nf4"])
def test_backward_holds_each_s_and_its_mask(op, p, backend):
    """Backward reads S for dB alone. The kernels keep the mask in words of 32 elements; PyTorch
    keeps a byte an element.

    A quantized weight is not held in full: what the call holds of it is its operand.
    """
    case = small(op, 128, p=p, backend=backend)
    width = case.shape[-1]
    masks = 0 if not p else case.count * 128 * (words(width) if backend == "triton" else width)
    assert held_by(case) == 128 * sum(case.ranks) * 4 + masks
    without_b = [name for name in case.wanted_names if not name.startswith("lora_B")]
    assert held_by(case.but(wanted=without_b)) == masks


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_an_mlp_holds_g_and_u(shared, dtype, p, backend):
    """And each S, and each mask or the generator's state for it; x is the caller's. H and act(G)
    are not kept.
    """
    rows, k, f = (66, 128, 384) if backend == "triton" else (512, 256, 1024)
    case = Case(
        "mlp", (rows, k), (f, f, 64), (2, 2, 2), dtype, dtype, p=p, shared=shared, backend=backend
    )
    shares = 1 if shared else 2
    bits = rows * (shares * words(k) + words(f))
    masks = 0 if not p else bits if backend == "triton" else (shares + 1) * STATE
    wide, thin = 2 * rows * f * dtype.itemsize, rows * 6 * dtype.itemsize
    assert held_by(case) == wide + thin + masks
    x = rows * k * dtype.itemsize
    assert held_by(case) + x <= 1.01 * (wide + x) + (masks if backend == "triton" else 0)


@pytest.mark.parametrize(("p", "limit"), [(0.0, 512), (0.5, 64)])
def test_fewer_rows_take_plain_operators(p, limit):
    """With dropout these keep the masked x, the op does not."""
    for rows in (limit - 1, limit):
        case = small("linear", rows, p=p, backend="torch")
        with forced(case):
            (y,) = ours(case, leaves(case, make(case)))
        is_plain = "LoRALinear" not in type(y.grad_fn).__name__
        assert is_plain == (rows < limit)
        masked_x = rows * case.shape[-1] * case.dtype.itemsize
        assert (held_by(case) >= masked_x) == (is_plain and p > 0)


# Of an MLP's gradients: the bytes that are held for them, and the products of the PyTorch path's
# backward. Those are of each dS, and dX with the branch's part of it; each dA and dB. Without dA of
# gate and up x is not kept; without dB no S is.
G_AND_U, X = 2 * 70 * 40 * 4, 70 * 24 * 4
ALONE = {
    ("x",): (G_AND_U, 3 + 6),
    ("lora_B2",): (G_AND_U + 70 * 4 * 4, 1),
    ("lora_A2",): (G_AND_U, 2),
    ("lora_B0", "lora_B1"): (G_AND_U + 70 * 9 * 4, 3 + 2),
    ("lora_A0", "lora_A1"): (G_AND_U + X, 3 + 4),
}


@pytest.mark.parametrize("wanted", ALONE, ids="-".join)
def test_an_mlp_saves_and_multiplies_for_requested_gradients_alone(wanted, backend):
    case, (held, products) = small("mlp", wanted=wanted, backend=backend), ALONE[wanted]
    assert held_by(case, besides=["x"]) == held
    leaf = leaves(case, make(case))
    with forced(case):
        (y,) = ours(case, leaf)
        with Operators() as operators:
            y.backward(leaf["grad2"])
    names = [
        name
        for func, *_ in operators.calls
        if (name := func.overloadpacket.__name__) in ("mm", "addmm", "addmm_")
    ]
    assert len(names) == (products if backend == "torch" else 0), names


@pytest.mark.parametrize("processors", [1, 132])
def test_without_gradients_neither_g_nor_u_is_kept(processors):
    """One kernel stores H alone, or no output of the op has memory."""
    kept = []
    case = small("mlp", dtype=BF16, lora_dtype=BF16, arch="sm_90", processors=processors)
    trained = leaves(case, make(case))
    frozen = leaves(case.but(wanted=()), trained)
    with forced(case):
        (expected,) = ours(case, trained)
        for leaf, mode in ((trained, torch.no_grad()), (frozen, torch.enable_grad())):
            with mode, Operators() as operators:
                assert torch.equal(ours(case, leaf)[0], expected)
            found = [
                results for func, _, results in operators.calls if "lora_mlp_fwd" in func.name()
            ]
            kept += [
                [[t.numel() for t in (y, g, u, *s, s_down)], masks]
                for y, g, u, s, s_down, masks in found
            ]
    assert kept == [[[70 * 20, 0, 0, 0, 0], []]] * 2


# What backward does once more, and what it doesn't.


@pytest.mark.covering
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", [*OPS, "shared", "shared, trained weight"])
def test_checkpointing_sees_the_same_masks(op, rows, reentrant, backend):
    """Also where separate layers compute under one mask, in the forward without gradients that a
    checkpoint runs first.
    """
    case = small(op.partition(",")[0].replace("shared", "mlp"), rows, p=0.4, backend=backend)
    if "shared" in op:
        case = case.but(ranks=(6, 6, 4), shared=True)
    if "trained" in op:
        case = case.but(wanted=[*case.wanted_names, "weight0"])
    outputs = []

    def layer(x, given):
        outputs.append(ours(case, given | {"x": x}))
        return outputs[-1]

    found = run(
        case, call=lambda case, leaf: checkpoint(layer, leaf["x"], leaf, use_reentrant=reentrant)
    )
    assert_close(found, run(case))
    assert all(
        torch.equal(one, other)
        for each in outputs
        for one, other in zip(each, outputs[0], strict=True)
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.4])
@every_op
def test_a_second_backward_gives_the_same_gradients(op, p, rows, backend):
    """Nothing that is saved is changed in place, and masks are drawn again. The generator stays
    where forward left it.
    """
    case = small(op, rows, p=p, backend=backend)
    leaf = leaves(case, make(case))
    wanted = [leaf[name] for name in case.wanted_names]
    grads = [leaf[f"grad{i}"] for i in case.outputs()]
    with forced(case):
        ys = ours(case, leaf)
        state = torch.get_rng_state()
        first, second = (
            torch.autograd.grad(ys, wanted, grads, retain_graph=True) for _ in range(2)
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# Its masks are too large to be kept as bools, and not large enough for positions.
DRAWN_AGAIN = Case("mlp", (130, 72), (72, 72, 16), (6, 3, 4), FP32, FP32, p=0.4)


@pytest.mark.parametrize("case", [*map(small, OPS), DRAWN_AGAIN], ids=str)
def test_a_mask_drawn_again_is_the_mask(case, backend):
    """With other numbers drawn between forward and backward, in another order, and with another
    seed set.
    """
    cases = [case.but(p=0.4, seed=seed, backend=backend) for seed in (1, 2)]
    expected, pending = [run(case) for case in cases], []
    for case in cases:
        leaf = leaves(case, make(case))
        torch.manual_seed(case.seed)
        with forced(case):
            pending.append((case, ours(case, leaf), leaf))
    torch.manual_seed(77)
    for call, right in reversed([*zip(pending, expected, strict=True)]):
        assert_close(results(*call), right)


def numbers(count):
    """From torch's generator, each of 62 bits: two alike are one that was given twice."""
    return torch.randint(2**62, (count,))


def while_a_mask_is_drawn(monkeypatch, do):
    """Call ``do`` whenever dropout has read the generator's state, five times in all, as another
    thread would. Its results.
    """
    read_state = torch.get_rng_state
    done = []

    def read():
        state = read_state()
        if len(done) < 5:
            done.append(do())
        return state

    monkeypatch.setattr(torch, "get_rng_state", read)
    return done


def test_another_thread_may_draw_while_a_mask_is_drawn(monkeypatch):
    """It gets no number twice, and backward has forward's masks."""
    case = DRAWN_AGAIN.but(backend="torch")
    leaf = leaves(case, make(case))
    masks = []
    own_bools = dropout._bools_of
    monkeypatch.setattr(
        dropout, "_bools_of", lambda *args: masks.append(own_bools(*args)) or masks[-1]
    )
    torch.manual_seed(case.seed)
    with monkeypatch.context() as patch, forced(case):
        drawn = while_a_mask_is_drawn(patch, lambda: numbers(5000))
        (y,) = ours(case, leaf)
    assert len(drawn) == 5
    drawn.append(numbers(100_000))
    assert torch.cat(drawn).unique().numel() == 125_000
    of_forward = [*masks]
    assert len(of_forward) == 3
    y.backward(leaf["grad2"])
    again = masks[3:]
    assert len(again) == 3
    for mask in of_forward:
        assert any(mask.equal(other) for other in again if other.shape == mask.shape)


def test_two_threads_draw_masks_of_their_own(monkeypatch):
    """Where the second reads the generator's state behind the first, before the first draws."""
    x = torch.empty(130, 72)
    read_state = torch.get_rng_state
    second = []

    def read():
        state = read_state()
        if not second:
            second.append(None)
            second[0] = dropout.draw_for_backward(x, 0.4)
        return state

    monkeypatch.setattr(torch, "get_rng_state", read)
    first = dropout.draw_for_backward(x, 0.4)
    assert not first.mask.equal(second[0].mask)
    for drawn in (first, second[0]):
        assert dropout.drawn_again(drawn.recipe, x.shape, 0.4).equal(drawn.mask)


SEVERAL_WORDS = (
    Case("linear", (70, 72), (40,), (6,), FP32, FP32, p=0.3),
    Case("group", (70, 72), (40, 24), (6, 3), FP32, FP32, p=0.3),
    Case("mlp", (70, 72), (40, 40, 16), (6, 3, 4), FP32, FP32, p=0.3),
)


@pytest.mark.parametrize("case", [*map(small, OPS), *SEVERAL_WORDS], ids=str)
def test_what_is_saved_may_come_back_in_another_layout(case, backend):
    """As from a hook that keeps it elsewhere; also a mask of several words a row."""
    case = case.but(backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t
    ):
        check(case, run(case))


@pytest.mark.parametrize("name", ["x", "weight2"])
def test_what_is_saved_may_not_be_changed_in_between(name, backend):
    """x and the weights are saved as they are; autograd sees a change."""
    case = small("mlp", backend=backend)
    leaf = leaves(case, make(case))
    leaf |= {name: leaf[name].clone()}
    (y,) = ours(case, leaf)
    with torch.no_grad():
        leaf[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(leaf["grad2"])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_second_derivatives_are_refused(op, warm, backend):
    case = small(op, rows=MANY[backend], backend=backend)
    leaf = leaves(case, make(case))
    for _ in range(3 * warm):
        ours(case, leaf)[0].sum().backward()
    (dx,) = torch.autograd.grad(ours(case, leaf)[0].square().sum(), leaf["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()

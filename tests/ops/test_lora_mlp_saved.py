"""What ``lora_mlp`` keeps for backward and computes again there: saved bytes, masks, checkpoints, a second backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops import torch_mlp
from tests.helpers.inputs import BF16, FP32
from tests.helpers.launches import recorded_launches
from tests.helpers.mlps import MLP, assert_close
from tests.helpers.oracle import bytes_held

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
few_and_many_rows = pytest.mark.parametrize("rows", [5, 70])


def small(rows=70, **options):
    return MLP((rows, 24), 40, 20, (6, 3, 4), **options)


@pytest.mark.parametrize("processors", [1, 132])
def test_without_gradients_neither_g_nor_u_is_kept(processors, monkeypatch):
    """One kernel stores H alone, or no output of the op has memory."""
    device = problem.DEVICES["sm_90"]._replace(processors=processors)
    monkeypatch.setattr(problem, "device_of", lambda _: device)
    kept = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if "lora_mlp_fwd" in func.name():
                kept.append([t.numel() for t in results])
            return results

    mlp = MLP((70, 24), 40, 16, (6, 3, 4), BF16)
    with slk.use_backend("triton"):
        expected = mlp.call(*mlp.leaves()).detach()
        for leaves, mode in ((mlp.leaves(), torch.no_grad()), (mlp.tensors(), torch.enable_grad())):
            with mode, Outputs(), recorded_launches({}) as launches:
                assert torch.equal(mlp.call(*leaves), expected)
            flags = [constants["STORE_GU"] for *_, constants, _ in launches if "STORE_GU" in constants]
            assert flags == ([False] if processors == 1 else [])
            with mode, Outputs():
                mlp.call(*leaves)
    assert kept == [[70 * 16, 0, 0, 0, 0]] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_shared_a_and_trained_weights(reentrant, backend):
    """By separate layers under one mask, also in a forward without gradients, which a checkpoint runs first."""
    mlp = MLP((70, 24), 40, 20, (6, 6, 4), shared=True)
    mlp.weights[0] = mlp.weights[0].clone().requires_grad_()

    def gradients(wrap):
        leaves = mlp.leaves()
        torch.manual_seed(5)
        outputs = []

        def layer(x):
            outputs.append(mlp.call(x, *leaves[1:], p=0.4))
            return outputs[-1]

        y = checkpoint(layer, leaves[0], use_reentrant=reentrant) if wrap else layer(leaves[0])
        y.backward(mlp.grad)
        assert all(torch.equal(each, outputs[0]) for each in outputs)
        return {name: leaf.grad for name, leaf in zip(mlp.wanted, leaves, strict=True)}

    assert_close(gradients(True), gradients(False), 0)


@pytest.mark.covering(1)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_sees_the_same_masks(shared, rows, reentrant, backend):
    mlp = MLP((rows, 24), 40, 20, (6, 6, 4), shared=shared)

    def wrapped(x, *leaves, p):
        return checkpoint(lambda x: mlp.call(x, *leaves, p=p), x, use_reentrant=reentrant)

    def gradients(call):
        leaves = mlp.leaves()
        torch.manual_seed(5)
        call(*leaves, p=0.4).backward(mlp.grad)
        return {name: leaf.grad for name, leaf in zip(mlp.wanted, leaves, strict=True)}

    assert_close(gradients(wrapped), gradients(mlp.call), 0)


@pytest.mark.covering(1)
@few_and_many_rows
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_second_backward_gives_the_same_gradients(p, rows, backend):
    """Nothing that is saved is changed in place, and masks are drawn again."""
    mlp = small(rows)
    leaves = mlp.leaves()
    y = mlp.call(*leaves, p=p)
    first, second = (torch.autograd.grad(y, leaves, mlp.grad, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_may_not_be_changed_in_between(backend):
    """x and the weights are saved as they are; autograd sees a change."""
    for name in ("x", "weight"):
        mlp = small()
        mlp.weights[2] = mlp.weights[2].clone()
        leaves = [t.clone() if i == 0 else t for i, t in enumerate(mlp.leaves())]
        y = mlp.call(*leaves)
        with torch.no_grad():
            (leaves[0] if name == "x" else mlp.weights[2]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(mlp.grad)


def test_second_derivatives_are_refused(backend):
    mlp = small()
    leaves = mlp.leaves()
    (dx,) = torch.autograd.grad(mlp.call(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.covering(1)
@few_and_many_rows
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_generator_is_drawn_from_in_forward_alone(p, rows, backend):
    """Backward draws masks again, and leaves torch's generator where it was."""
    mlp = small(rows)
    apart = []
    for call in (mlp.call, mlp.call_apart):
        leaves = mlp.leaves()
        torch.manual_seed(8)
        y = call(*leaves, p=p)
        before = torch.get_rng_state()
        torch.autograd.grad(y, leaves, mlp.grad)
        assert torch.equal(torch.get_rng_state(), before)
        apart.append(before)
    assert torch.equal(*apart)


def test_a_mask_drawn_again_is_the_mask(backend):
    """With other numbers drawn between forward and backward, in another order, and with another seed set."""
    mlp, other = small(), small(seed=9)
    expected = [each.run(p=0.4, seed=seed) for each, seed in ((mlp, 1), (other, 2))]
    pending = []
    for each, seed in ((mlp, 1), (other, 2)):
        leaves = each.leaves()
        torch.manual_seed(seed)
        pending.append((each, each.call(*leaves, p=0.4), leaves))
    torch.manual_seed(77)
    found = [each.results(y, leaves) for each, y, leaves in reversed(pending)]
    for one, two in zip(reversed(found), expected, strict=True):
        assert_close(one, two, 0)


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_saved_bytes(shared, dtype, p, backend):
    """G, U, each S, and a seed or the generator's state for each mask; x is the caller's. H, act(G) and masks are not kept."""
    # A generator's state has 5 kB, whatever the sizes.
    rows, k, f = (66, 128, 384) if backend == "triton" else (512, 256, 1024)
    mlp = MLP((rows, k), f, 64, (2, 2, 2), dtype, shared=shared)
    leaves = mlp.leaves()
    held = bytes_held(lambda: mlp.call(*leaves, p=p), (*leaves, *mlp.weights))
    one = 8 if backend == "triton" else torch.get_rng_state().nbytes
    masks = (2 if shared else 3) * one if p else 0
    wide, thin = 2 * rows * f * dtype.itemsize, rows * 6 * dtype.itemsize
    assert held == wide + thin + masks
    assert held + rows * k * dtype.itemsize <= 1.01 * (wide + rows * k * dtype.itemsize)


def test_frozen_parts_are_not_saved(backend):
    """Without dA of gate and up x is not kept; without dB no S is."""
    mlp = small()

    def held(*wanted):
        leaves = mlp.leaves(wanted)
        return bytes_held(lambda: mlp.call(*leaves), (*leaves[1:], *mlp.weights))

    gu, x = 2 * 70 * 40 * 4, 70 * 24 * 4
    assert held("dX") == gu
    assert held("gate.dA", "up.dA") == gu + x
    assert held("gate.dB", "up.dB") == gu + 70 * 9 * 4
    assert held("down.dB") == gu + 70 * 4 * 4
    assert held("down.dA") == gu


def test_the_pytorch_path_multiplies_for_requested_gradients_alone():
    """The products of a backward, each of which makes an output or what an output needs."""
    mlp = small()
    names: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                names.append(func.name())
            return func(*args, **(kwargs or {}))

    expected = {
        # dS and dX of down; dS of gate and up, their two dX, and the branches' part of dX in one.
        ("dX",): 3 + 5,
        ("down.dB",): 1,
        ("down.dA",): 2,
        ("gate.dB", "up.dB"): 3 + 2,
        ("gate.dA", "up.dA"): 3 + 4,
    }
    with slk.use_backend("torch"):
        for wanted, count in expected.items():
            y = mlp.call(*mlp.leaves(wanted))
            names.clear()
            with Products():
                y.backward(mlp.grad)
            assert len(names) == count, (wanted, names)


@pytest.mark.parametrize(("shared", "draws"), [(False, 3), (True, 2)])
def test_backward_draws_each_mask_once(shared, draws, monkeypatch):
    """Gate and up that share A share the mask of X too."""
    drawn = []
    redrawn = torch_mlp.redrawn
    monkeypatch.setattr(torch_mlp, "redrawn", lambda *args: drawn.append(args) or redrawn(*args))
    mlp = MLP((66, 72), 40, 24, (8, 8, 8), shared=shared)
    with slk.use_backend("torch"):
        mlp.run(p=0.3)
    assert len(drawn) == draws

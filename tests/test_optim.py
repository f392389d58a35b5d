"""StableLoRAAdamW as a user meets it: parameters by name, Algorithm 1, resuming, PyTorch's contracts, every error message."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from stablelora_kernels.backend import use_backend
from stablelora_kernels.optim import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference_optim import StableAdamWRef

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 24, 40), (1, 7, 13), (3, 31, 5), (20, 16, 16)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # PyTorch's fused AdamW starts its threads for every tensor, however small, and waits for a busy machine to run them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def make_pairs(
    shapes: list[tuple[int, int, int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[LoRAPair]:
    """Pairs of (r, m, n), A of variance 1/n and B zero, as LoRA starts."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.to(DEVICE, dtype).requires_grad_()

    return [
        LoRAPair(f"layer{i}", leaf(torch.randn(r, n, generator=generator) / n**0.5), leaf(torch.zeros(m, r)))
        for i, (r, m, n) in enumerate(shapes)
    ]


def halves(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [p for pair in pairs for p in (pair.A, pair.B)]


def in_float64(pairs: list[LoRAPair]) -> list[LoRAPair]:
    return [LoRAPair(pair.name, pair.A.detach().double(), pair.B.detach().double()) for pair in pairs]


def set_grads(params: list[torch.Tensor], seed: int, scale: float = 1e-2) -> None:
    """Gradients with a drift, so that B grows, of every element its own size."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * (torch.randn(p.shape, generator=generator) + 0.5)).to(p.device, p.dtype)


def snapshot(optimizer: StableLoRAAdamW) -> list[torch.Tensor]:
    """Copies of everything that a step may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*params, *state]]


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Algorithm 1


@pytest.mark.parametrize("lr, ratio, steps", [(0.1, 5e-4, 15), (5e-2, 2e-3, 25), (1e-2, 5e-3, 60)])
def test_latch_steps_are_those_of_a_float64_run(backend: str, lr: float, ratio: float, steps: int) -> None:
    pairs = make_pairs()
    oracle = StableAdamWRef(in_float64(pairs), lr=lr, shrink_ratio=ratio)
    optimizer = StableLoRAAdamW(pairs, lr=lr, shrink_ratio=ratio)
    for step in range(steps):
        set_grads(halves(pairs), step)
        grads = zip(halves(oracle.pairs), halves(pairs), strict=True)
        oracle.step({ours: theirs.grad.double() for ours, theirs in grads})
        optimizer.step()
    report = optimizer.stability()
    assert {s.name: s.latched_at for s in report} == oracle.latched_at
    assert all(s.stable == (s.latched_at is not None) for s in report)
    assert sum(s.stable for s in report) > 1
    for ours, theirs in zip(halves(pairs), halves(oracle.pairs), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=2e-5, atol=2e-6)
    for pair, s in zip(pairs, report, strict=True):
        assert s.a_norm == pytest.approx(pair.A.norm().item() / pair.A.shape[1], rel=1e-5)
        assert s.b_norm == pytest.approx(pair.B.norm().item() / pair.B.shape[0], rel=1e-5)


def test_the_latch_holds_for_good(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        pair.B.fill_(100.0)
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    before = pair.A.detach().clone()
    set_grads([pair.A, pair.B], 0)
    optimizer.step()
    with torch.no_grad():
        pair.B.zero_()
    optimizer.step()
    assert torch.equal(pair.A, before)
    assert optimizer.stability()[0].latched_at == 1


def test_a_change_from_outside_is_noticed(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5)
    set_grads([pair.A, pair.B], 0)
    optimizer.step()
    assert optimizer.stability()[0].latched_at is None
    with torch.no_grad():
        pair.B.fill_(100.0)
    optimizer.step()
    assert optimizer.stability()[0].latched_at == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_low_precision_shrinks_on_average(backend: str, dtype: torch.dtype, scale: float) -> None:
    # At 1e-4 of its size A is subnormal in float16.
    (pair,) = make_pairs([(8, 16, 512)], dtype)
    with torch.no_grad():
        pair.A.mul_(scale)
    optimizer = StableLoRAAdamW([pair], lr=1e-3, shrink_ratio=5e-4, weight_decay=0.0, seed=1)
    before = pair.A.detach().double().norm()
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    for _ in range(100):
        optimizer.step()
    ratio = (pair.A.detach().double().norm() / before).item()
    assert ratio == pytest.approx((1 - 5e-4) ** 100, rel=0.01)
    assert not optimizer.stability()[0].stable
    assert optimizer.state[pair.A]["exp_avg"].dtype is torch.float32


def test_pair_without_gradient_of_a_is_left_alone(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first, second], lr=1e-2, shrink_ratio=0.1)
    set_grads(halves([first, second]), 0)
    optimizer.step()
    first.A.grad = None
    twin = first.B.detach().clone().requires_grad_()
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=1e-2)
    adamw.state[twin] = {
        key: optimizer.state[first.B][key].clone().reshape(() if key == "step" else twin.shape)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    adamw.state[twin]["step"] = adamw.state[twin]["step"].cpu()
    twin.grad = first.B.grad
    a = first.A.detach().clone()
    with torch.no_grad():
        # Enough for the latch, were it looked at.
        second_a = second.A.detach().clone()
    optimizer.step()
    adamw.step()
    assert torch.equal(first.A, a)
    assert optimizer.state[first.A]["step"].item() == 1
    assert optimizer.state[first.B]["step"].item() == 2
    assert not torch.equal(second.A, second_a)
    torch.testing.assert_close(first.B, twin, rtol=1e-6, atol=1e-8)
    # With its gradient back the pair goes on where it was.
    set_grads([first.A], 5)
    optimizer.step()
    assert optimizer.state[first.A]["step"].item() == 2


def test_pair_whose_b_has_no_gradient_still_shrinks(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    before = pair.A.detach().clone()
    set_grads([pair.A], 0)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(pair.A.detach(), before / 4, rtol=1e-6, atol=0)
    assert not pair.B.any()


def test_a_norm_that_is_not_finite_decides_nothing_and_is_reported(backend: str) -> None:
    good, bad = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([good, bad], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    with torch.no_grad():
        bad.B[0, 0] = math.nan
    before = bad.A.detach().clone()
    set_grads(halves([good, bad]), 0)
    optimizer.step()
    assert torch.equal(bad.A, before)
    assert optimizer.state[bad.A]["latched_at"].item() == 0
    for sync in (optimizer.stability, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"pair 'layer1' holds values that are not finite.*\|\|B\|\|_F = nan"):
            sync()


# AdamW


@pytest.mark.parametrize("maximize", [False, True])
def test_without_shrink_it_is_adamw(backend: str, maximize: bool) -> None:
    pairs = make_pairs()
    lone = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
    params = [*halves(pairs), lone]
    hyper = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    exact = [p.detach().double().requires_grad_() for p in params]
    plain = [p.detach().clone().requires_grad_() for p in params]
    optimizer = StableLoRAAdamW([*pairs, ("head.weight", lone)], shrink_ratio=0.0, **hyper)
    others = [torch.optim.AdamW(exact, **hyper), torch.optim.AdamW(plain, **hyper)]
    for step in range(12):
        set_grads(params, step)
        for p, q, s in zip(params, exact, plain, strict=True):
            q.grad, s.grad = p.grad.double(), p.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for p, q, s in zip(params, exact, plain, strict=True):
        error, theirs = (p - q).abs().max().item(), (s - q).abs().max().item()
        assert error <= 2 * theirs + 2e-7, f"off by {error}, AdamW in float32 by {theirs}"


def test_gradients_are_clipped_as_clip_grad_norm_does(backend: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, max_grad_norm=0.05)
    clipped = StableLoRAAdamW(twins, lr=1e-2)
    for step in range(4):
        # The first step's gradients are within the bound.
        for params in (halves(pairs), halves(twins)):
            set_grads(params, step, scale=1e-4 if step == 0 else 1.0 + step)
        torch.nn.utils.clip_grad_norm_(halves(twins), 0.05)
        optimizer.step()
        clipped.step()
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_lr_as_a_tensor(backend: str) -> None:
    lr = torch.tensor(1e-2, device=DEVICE)
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=lr), StableLoRAAdamW(twins, lr=1e-2)
    for step in range(3):
        for params in (halves(pairs), halves(twins)):
            set_grads(params, step)
        optimizer.step()
        other.step()
        lr.mul_(0.5)
        other.param_groups[0]["lr"] *= 0.5
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_every_group_has_its_own_hyper_parameters(backend: str) -> None:
    pairs = make_pairs([(4, 8, 8), (4, 8, 8)])
    # As a trainer may: every A in one group, every B in another.
    groups = [
        {"params": [("x.lora_A", pairs[0].A), ("y.lora_A", pairs[1].A)], "shrink_ratio": 0.25, "weight_decay": 0.0},
        {"params": [("x.lora_B", pairs[0].B), ("y.lora_B", pairs[1].B)], "lr": 1e-2},
    ]
    optimizer = StableLoRAAdamW(groups, lr=0.0)
    before = [p.detach().clone() for p in halves(pairs)]
    set_grads(halves(pairs), 0)
    optimizer.step()
    torch.testing.assert_close(pairs[0].A.detach(), before[0] * 0.75, rtol=1e-6, atol=0)
    # Adam's first step moves every element by lr against its gradient's sign.
    torch.testing.assert_close(pairs[1].B.detach(), -1e-2 * pairs[1].B.grad.sign(), rtol=1e-4, atol=0)
    assert [pair.name for pair in optimizer.pairs] == ["x", "y"]


def test_strided_and_expanded_gradients(backend: str) -> None:
    (pair,), (twin,) = make_pairs([(4, 8, 6)]), make_pairs([(4, 8, 6)])
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pair.A.grad, pair.B.grad = wide.t()[::2], torch.ones(1, 1, device=DEVICE).expand(8, 4)
    twin.A.grad, twin.B.grad = pair.A.grad.contiguous(), pair.B.grad.contiguous()
    optimizers = StableLoRAAdamW([pair], lr=1e-2), StableLoRAAdamW([twin], lr=1e-2)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(pair.A, twin.A) and torch.equal(pair.B, twin.B)


def test_a_dense_transposed_parameter_and_an_empty_one(backend: str) -> None:
    pairs, twins = make_pairs([(4, 8, 6)]), make_pairs([(4, 8, 6)])
    lone = torch.arange(12.0, device=DEVICE).view(3, 4).t().requires_grad_()
    same = lone.detach().contiguous().requires_grad_()
    empty, void = (torch.zeros(0, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    optimizers = (
        StableLoRAAdamW([*pairs, ("lone", lone), ("empty", empty)], lr=1e-2),
        StableLoRAAdamW([*twins, ("lone", same), ("empty", void)], lr=1e-2),
    )
    for params in ([*halves(pairs), lone, empty], [*halves(twins), same, void]):
        set_grads(params, 0)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(lone.detach(), same.detach(), rtol=0, atol=0)
    assert optimizers[0].state[empty]["step"].item() == 1


# Automatic mixed precision


def test_found_inf_changes_nothing(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.1)
    for step in range(2):
        set_grads(halves(pairs), step)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    pairs[0].A.grad[0, 0] = math.inf
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)
    # The step after it is the one that would have come, from the same sums of squares.
    optimizer.found_inf.zero_()
    twins = copy.deepcopy(optimizer)
    for o, scale in ((optimizer, 4.0), (twins, 1.0)):
        params = [p for group in o.param_groups for p in group["params"]]
        set_grads(params, 7, scale=1e-2 * scale)
        o.step()
    # The scale is a power of two.
    assert all_equal(snapshot(optimizer), snapshot(twins))


def test_grad_scaler_hands_over_scale_and_verdict(backend: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=1e-2), StableLoRAAdamW(twins, lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for poisoned in (False, True, False):
        loss = sum((p * torch.arange(p.numel(), device=DEVICE).view_as(p)).sum() for p in halves(pairs))
        scaler.scale(loss).backward()
        if poisoned:
            pairs[0].B.grad.fill_(math.inf)
        else:
            for p, q in zip(halves(pairs), halves(twins), strict=True):
                q.grad = p.grad / scaler.get_scale()
            other.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4.0
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


# Saving and resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(backend: str, dtype: torch.dtype) -> None:
    lr, ratio = 4e-2, 5e-3
    whole, cut = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
    straight = StableLoRAAdamW(whole, lr=lr, shrink_ratio=ratio, seed=5)
    optimizer = StableLoRAAdamW(cut, lr=lr, shrink_ratio=ratio, seed=5)
    for step in range(20):
        for params in (halves(whole), halves(cut)):
            set_grads(params, step)
        straight.step()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in halves(cut)]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    cut = make_pairs(dtype=dtype, seed=9)
    with torch.no_grad():
        for p, value in zip(halves(cut), saved["params"], strict=True):
            p.copy_(value)
    optimizer = StableLoRAAdamW(cut, lr=1.0, shrink_ratio=0.5, seed=6)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["shrink_ratio"] == ratio and optimizer.param_groups[0]["seed"] == 5
    for p in halves(cut):
        assert optimizer.state[p]["exp_avg"].dtype is torch.float32
    for step in range(20, 26):
        for params in (halves(whole), halves(cut)):
            set_grads(params, step)
        straight.step()
        optimizer.step()
    latched = [s.latched_at for s in straight.stability()]
    assert any(latched) and None in latched
    assert all_equal(snapshot(straight), snapshot(optimizer))


def test_the_backend_can_change_between_steps() -> None:
    pairs, twins = make_pairs(), make_pairs()
    switching, steady = StableLoRAAdamW(pairs, lr=2e-2), StableLoRAAdamW(twins, lr=2e-2)
    for step in range(8):
        for params in (halves(pairs), halves(twins)):
            set_grads(params, step)
        with use_backend("triton" if step % 4 < 2 else "torch"):
            switching.step()
        with use_backend("torch"):
            steady.step()
    assert [s.latched_at for s in switching.stability()] == [s.latched_at for s in steady.stability()]
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert switching.state[p]["step"].item() == 8


def test_deepcopy_and_pickle_go_on_alike(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, max_grad_norm=1.0)
    set_grads(halves(pairs), 0)
    optimizer.step()
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for o in [optimizer, *copies]:
        assert o.max_grad_norm == 1.0
        set_grads([p for group in o.param_groups for p in group["params"]], 1)
        o.step()
    for other in copies:
        assert other.state.keys().isdisjoint(optimizer.state)
        assert all_equal(snapshot(other), snapshot(optimizer))


def test_state_before_the_first_step_loads() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    optimizer.load_state_dict(StableLoRAAdamW(make_pairs(), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert [s.latched_at for s in optimizer.stability()] == [None] * len(pairs)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    set_grads(halves(pairs), 0)
    optimizer.step()
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    twins = make_pairs()
    adamw = torch.optim.AdamW(halves(twins))
    renamed = StableLoRAAdamW([LoRAPair(f"other{i}", pair.A, pair.B) for i, pair in enumerate(twins)])
    fewer = StableLoRAAdamW(twins[:2])
    wider = StableLoRAAdamW(make_pairs([(8, 24, 41), *SHAPES[1:]]))
    set_grads([p for group in wider.param_groups for p in group["params"]], 0)
    wider.step()
    incomplete = copy.deepcopy(optimizer.state_dict())
    del incomplete["state"][0]["latched_at"]
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0]["lr"] = math.nan
    for state, message in [
        (adamw.state_dict(), "not StableLoRAAdamW's: its group 0 has no 'shrink_ratio', 'seed'"),
        (renamed.state_dict(), "has 'other0.lora_A' where the optimizer has 'layer0.lora_A'"),
        (fewer.state_dict(), "has 4 parameters, the optimizer's 8"),
        (wider.state_dict(), "'exp_avg' of 'layer0.lora_A' must be [8, 40], got [8, 41]"),
        (incomplete, "has no 'latched_at' tensor for 'layer0.lora_A'"),
        (broken, "state_dict's group 0: lr must be a finite number in [0, inf), got nan"),
        ({"state": {}, "param_groups": []}, "has 0 parameter groups, the optimizer 1"),
        ({}, "must be a dict with 'state' and 'param_groups'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(state)
    assert all_equal(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


# PyTorch's contracts


def test_closure_scheduler_hooks_and_zero_grad(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in halves(pairs))
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[2] < losses[1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)
    assert seen == ["before", "after"] * 3
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)


def test_a_module_cast_after_construction(backend: str) -> None:
    model = nn.Module()
    (pair,) = make_pairs([(4, 8, 8)])
    model.lora_A, model.lora_B = nn.Parameter(pair.A.detach()), nn.Parameter(pair.B.detach())
    optimizer = StableLoRAAdamW.from_model(model, lr=1e-2)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    model.bfloat16()
    set_grads(list(model.parameters()), 1)
    optimizer.step()
    assert model.lora_A.dtype is torch.bfloat16
    assert optimizer.state[model.lora_A]["step"].item() == 2
    assert optimizer.state[model.lora_A]["exp_avg"].dtype is torch.float32


def test_backward_through_overwritten_parameters_is_noticed(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair])
    loss = (pair.A.square().sum() + pair.B.square().sum()).square()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_add_param_group_pairs_anew(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first], lr=1e-2)
    set_grads(halves([first]), 0)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.0, "weight_decay": 0.0, "shrink_ratio": 0.5})
    before = second.A.detach().clone()
    set_grads(halves([first, second]), 1)
    optimizer.step()
    torch.testing.assert_close(second.A.detach(), before / 2, rtol=1e-6, atol=0)
    assert optimizer.state[first.A]["step"].item() == 2
    assert [s.name for s in optimizer.stability()] == ["layer0", "layer1"]
    with pytest.raises(ValueError, match=r"pair 'z' has lora_A .* but no lora_B"):
        optimizer.add_param_group({"params": [("z.lora_A", torch.zeros(2, 3, requires_grad=True))]})
    assert len(optimizer.param_groups) == 2


def test_frozen_parameters_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].lora_A, model[0].lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.zeros(4, 2))
    # An inactive adapter, as PEFT freezes it.
    model[1].lora_A, model[1].lora_B = (nn.Parameter(torch.ones(s), requires_grad=False) for s in ((2, 4), (4, 2)))
    optimizer = StableLoRAAdamW.from_model(model)
    assert optimizer.param_groups[0]["param_names"] == ["0.lora_A", "0.lora_B"]
    assert [pair.name for pair in optimizer.pairs] == ["0"]


def test_float64_parameters_take_float64_steps() -> None:
    pairs = [
        LoRAPair(p.name, p.A.detach().double().requires_grad_(), p.B.detach().double().requires_grad_())
        for p in make_pairs()
    ]
    oracle = StableAdamWRef(in_float64(pairs), lr=1e-2)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    for step in range(5):
        set_grads(halves(pairs), step)
        oracle.step({q: p.grad for p, q in zip(halves(pairs), halves(oracle.pairs), strict=True)})
        optimizer.step()
    for p, q in zip(halves(pairs), halves(oracle.pairs), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)
    with use_backend("triton"), pytest.raises(TypeError, match="no float64 optimizer step"):
        optimizer.step()


# Bad input


def lora(a: tuple[int, ...] = (2, 4), b: tuple[int, ...] = (4, 2)) -> list[tuple[str, torch.Tensor]]:
    return [("q.lora_A", torch.ones(a, requires_grad=True)), ("q.lora_B", torch.zeros(b, requires_grad=True))]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lr": math.nan}, ValueError, "lr must be a finite number in [0, inf), got nan"),
        ({"lr": -1e-3}, ValueError, "lr must be a finite number in [0, inf), got -0.001"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3' of type str"),
        (
            {"lr": torch.zeros(2)},
            ValueError,
            "lr as a tensor must be a 0-d floating-point one, got [2] of torch.float32",
        ),
        ({"lr": torch.tensor(math.nan)}, ValueError, "lr must be a finite number in [0, inf), got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be a finite number in [0, 1), got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
        ({"eps": -1e-8}, ValueError, "eps must be a finite number in [0, inf), got -1e-08"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite number in [0, inf), got inf"),
        ({"shrink_ratio": 1.0}, ValueError, "shrink_ratio must be a finite number in [0, 1), got 1.0"),
        ({"shrink_ratio": True}, TypeError, "shrink_ratio must be a number, got True of type bool"),
        ({"maximize": 1}, TypeError, "maximize must be a bool, got 1 of type int"),
        ({"capturable": None}, TypeError, "capturable must be a bool, got None of type NoneType"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a finite number in (0, inf), got 0.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, f"seed must be below 2**63, got {2**63}"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5 of type float"),
    ],
)
def test_bad_hyper_parameters(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StableLoRAAdamW(lora(), **change)
    if "max_grad_norm" not in change:
        with pytest.raises(error, match=re.escape(message)):
            StableLoRAAdamW([{"params": lora(), **change}])
        optimizer = StableLoRAAdamW(lora())
        with pytest.raises(error, match=re.escape(message)):
            optimizer.add_param_group({"params": [("head", torch.ones(1, requires_grad=True))], **change})
        assert len(optimizer.param_groups) == 1


def frozen(named: list[tuple[str, torch.Tensor]], place: int) -> list[tuple[str, torch.Tensor]]:
    named[place][1].requires_grad_(False)
    return named


NAMES = "StableLoRAAdamW.from_model(model)"
SHARED = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    "params, error, message",
    [
        (torch.ones(2), TypeError, f"params must be named parameters, got a single tensor; .*{NAMES}"),
        ([torch.ones(2, requires_grad=True)], TypeError, f"a tensor of shape [2] without a name; .*{NAMES}"),
        ([{"params": [torch.ones(2, requires_grad=True)]}], TypeError, "a tensor of shape [2] without a name"),
        ({"params": lora()}, TypeError, "got one dict"),
        ([7], TypeError, "params holds a int"),
        ([{"lr": 1e-3}], ValueError, "a parameter group must have 'params', got the keys ['lr']"),
        ([{"params": lora()}, 7], TypeError, "a parameter group must be a dict, got int"),
        ([], ValueError, "no LoRA pair (lora_A with lora_B) among the 0 trainable parameters (none)"),
        ([("w", SHARED)], ValueError, "among the 1 trainable parameters ('w'); without one this would be plain AdamW"),
        (lora()[:1], ValueError, "pair 'q' has lora_A [2, 4] but no lora_B"),
        (lora()[1:], ValueError, "pair 'q' has lora_B [4, 2] but no lora_A"),
        (frozen(lora(), 0), ValueError, "pair 'q': lora_B is trainable but lora_A is frozen (requires_grad=False)"),
        (
            lora(b=(4, 3)),
            ValueError,
            "pair 'q': A must be [r, in] and B [out, r] with one r, got A [2, 4] and B [4, 3]",
        ),
        ([*lora(), *lora()[:1]], ValueError, "two parameters are named 'q.lora_A'"),
        ([*lora(), ("v", SHARED), ("w", SHARED)], ValueError, "one tensor is given as 'v' and as 'w'"),
        (
            [*lora(), ("z", SHARED.to(torch.complex64))],
            TypeError,
            "'z' must be float32, float64, bfloat16 or float16, got torch.complex64",
        ),
        ([*lora(), ("z", SHARED * 2)], ValueError, "parameter 'z' must be a leaf tensor"),
        ([*lora(), ("z", torch.ones(4)[::2].requires_grad_())], ValueError, "'z' must be dense in memory"),
        ([{"params": [SHARED], "param_names": ["a", "b"]}], ValueError, "a group has 1 params and 2 param_names"),
    ],
)
def test_bad_parameters(params: object, error: type[Exception], message: str) -> None:
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(error, match=pattern):
        StableLoRAAdamW(params)


def test_from_model_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        StableLoRAAdamW.from_model([])


def test_a_sparse_gradient_is_refused_before_anything_changes(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    lone = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    optimizer = StableLoRAAdamW([pair, ("embedding", lone)])
    set_grads([pair.A, pair.B], 0)
    before = [p.detach().clone() for p in (pair.A, pair.B, lone)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lone.grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (3, 2), device=DEVICE)
    with pytest.raises(RuntimeError, match=r"gradients must be dense tensors, got torch\.sparse_coo"):
        optimizer.step()
    assert all_equal(before, [p.detach() for p in (pair.A, pair.B, lone)])

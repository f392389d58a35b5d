"""Every option on every path and dtype against the float64 reference, and whom an option reaches."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import (
    DEVICE,
    halves,
    in_float64,
    make_pairs,
)
from tests.helpers.steps import latches, take_step, take_step_with
from tests.optim.options import BF16, FP32, FP64, LOW, OPTIONS, STORED

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
PATHS = ["torch", "triton", "in turn"]
CASES = [
    pytest.param(path, name, dtype, id=f"{path}-{name}-{str(dtype).removeprefix('torch.')}")
    for path in PATHS
    for name, row in OPTIONS.items()
    for dtype in row.dtypes
    if (dtype is not FP64 or path == "torch") and (path != "in turn" or name in STORED)
]
# By how much of what a parameter has moved, moments of few bits may lead astray. Each of their
# roundings moves an 8-bit second moment by an eighth at most, seldom: a walk of about a hundredth a
# step, half of which is in its root; the first adds as much.
ASTRAY = {FP32: 0.0, BF16: 0.01, torch.uint8: 0.1}


@pytest.mark.covering(1)
@pytest.mark.parametrize(("path", "name", "dtype"), CASES)
def test_steps_are_the_references(path, name, dtype):
    """In turn, either backend takes two steps and goes on from the other's. Without a gradient
    there is no step to count.
    """
    row = OPTIONS[name]
    pairs, lone = row.pairs(dtype), torch.ones(7, dtype=dtype, device=DEVICE, requires_grad=True)
    oracle = row.reference(in_float64(pairs), [lone.detach().to(FP64, copy=True)])
    optimizer = row.optimizer([*pairs, ("lone", lone)])
    start = [q.clone() for q in oracle.params]
    for step in range(STEPS):
        backend = ("torch", "triton")[step // 2 % 2] if path == "in turn" else path
        with settings(backend=backend):
            optimizer.zero_grad()
            optimizer.step()
            # Of norms above and below the bound that clips them.
            take_step_with(oracle, optimizer, step, scale=(1e-2, 1e-3, 4e-2)[step % 3])
    assert latches(optimizer) == oracle.latched_at
    for pair, said in zip(pairs, optimizer.stability(), strict=True):
        assert said.latched == (said.latched_at is not None)
        assert said.stable == (said.a_norm <= said.b_norm)
        norms = (
            pair.A.double().norm().item() / pair.A.shape[1],
            pair.B.double().norm().item() / pair.B.shape[0],
        )
        assert (said.a_norm, said.b_norm) == pytest.approx(norms, rel=1e-5)
    assert name != "plain" or (
        any(oracle.latched_at.values()) and None in oracle.latched_at.values()
    )
    rounded = dtype in LOW and not row.masters
    for p, q, s in zip([*halves(pairs), lone], oracle.params, start, strict=True):
        found = optimizer.state[p].get("master", p).detach()
        assert ("master" in optimizer.state[p]) == row.masters
        # The parameter is its master's nearest rounding.
        assert torch.equal(p.detach(), found.to(dtype))
        assert optimizer.state[p]["exp_avg"].dtype is (FP64 if dtype is FP64 else row.moments)
        if row.moments is FP32 and not rounded:
            # The norm that clips is float32's in any case.
            exact = dtype is FP64 and "max_grad_norm" not in row.options
            rtol, atol = (1e-12, 1e-14) if exact else (4e-5, 4e-6)
            torch.testing.assert_close(found.double(), q, rtol=rtol, atol=atol)
            continue
        error, moved = (found.double() - q).norm().item(), (q - s).norm().item()
        # Each step rounds at random by less than a unit in the last place.
        allowed = ASTRAY[row.moments] * moved + (
            3 * torch.finfo(dtype).eps * q.norm().item() if rounded else 0.0
        )
        assert 0 < error < allowed, f"{[*p.shape]} is off by {error:.3g}, moved by {moved:.3g}"


# Whom an option reaches


def test_every_group_has_its_own_hyperparameters(backend):
    """As a trainer may put them: every A in one group, every B in another, of which one has LoRA+'s
    rate.
    """
    pairs = make_pairs([(4, 8, 8)] * 2)
    groups = [
        {
            "params": [("x.lora_A", pairs[0].A), ("y.lora_A", pairs[1].A)],
            "shrink_ratio": 0.25,
            "weight_decay": 0.0,
        },
        {"params": [("x.lora_B", pairs[0].B)], "lr": 1e-2},
        {"params": [("y.lora_B", pairs[1].B)], "lr": 1e-2, "lr_ratio_B": 8.0},
    ]
    optimizer = StableLoRAAdamW(groups, lr=0.0, eps=0.0)
    before = pairs[0].A.detach().clone()
    take_step(0, optimizer)
    torch.testing.assert_close(pairs[0].A.detach(), before * 0.75, rtol=1e-6, atol=0)
    # Adam's first step moves every element by its rate.
    for pair, lr in zip(pairs, (1e-2, 8e-2), strict=True):
        torch.testing.assert_close(pair.B.detach(), -lr * pair.B.grad.sign(), rtol=1e-4, atol=0)
    assert [pair.name for pair in optimizer.pairs] == ["x", "y"]


def test_patterns_match_layers_of_peft_and_whole_names(backend):
    pairs = make_pairs([(2, 4, 4)] * 4)
    kept = {"m.0.q_proj": 0.5, "m.0.k_proj": 0.875, "m.1.q_proj": 0.25, "m.1.k_proj": 0.75}
    named = [
        (f"{name}.lora_{role}.default.weight", getattr(pair, role))
        for name, pair in zip(kept, pairs, strict=True)
        for role in "AB"
    ]
    patterns = {"m.1.q_proj.default": 0.75, "q_proj": 0.5, "^m.1.k_proj": 0.25}
    optimizer = StableLoRAAdamW(
        named, lr=0.0, shrink_ratio=0.125, weight_decay=0.0, shrink_pattern=patterns
    )
    before = [pair.A.detach().clone() for pair in pairs]
    take_step(0, optimizer)
    for pair, start, share in zip(pairs, before, kept.values(), strict=True):
        torch.testing.assert_close(pair.A.detach(), start * share, rtol=1e-6, atol=0)

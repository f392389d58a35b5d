"""A step of Triton's engine in which nothing changed takes a short way: it must notice whatever did change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import operators

pytestmark = pytest.mark.usefixtures("one_thread", "on_triton")

# A is square, so that it can be transposed.
SHAPES = [(8, 24, 8), (8, 24, 8), (3, 31, 5)]


def optimizers(count: int = 2, **settings: Any) -> list[StableLoRAAdamW]:
    """Alike, after three steps on gradients that stay where they are."""
    made = []
    for _ in range(count):
        pairs = [LoRAPair(p.name, *(torch.nn.Parameter(t.detach()) for t in (p.A, p.B))) for p in make_pairs(SHAPES)]
        optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.05, seed=1, **settings)
        set_grads(params_of(optimizer), 0)
        for _ in range(3):
            optimizer.step()
        made.append(optimizer)
    return made


def renewed(optimizer: StableLoRAAdamW) -> StableLoRAAdamW:
    """A fresh optimizer that is given the values, the state and, dense and in their own memory, the gradients of another."""
    pairs = [LoRAPair(p.name, *(torch.nn.Parameter(t.detach().clone()) for t in (p.A, p.B))) for p in optimizer.pairs]
    other = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.05, seed=1)
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        if p in optimizer.state:
            other.state[q] = {name: value.clone() for name, value in optimizer.state[p].items()}
        if p.grad is not None:
            q.grad = p.grad.detach().float().clone(memory_format=torch.contiguous_format)
    return other


def is_short(optimizer: StableLoRAAdamW, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step looks at no gradient and makes the launches of the step before."""
    ((_, engine),) = optimizer._engines
    looks, launches = [], engine.launches
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_take_gradients", lambda gradients: looks.append(gradients) or gradients)
        optimizer.step()
    return not looks and optimizer._engines[0][1] is engine and engine.launches is launches


def test_a_step_in_which_nothing_changed_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    (optimizer,) = optimizers(1)
    assert is_short(optimizer, monkeypatch)
    # As a backward pass leaves them: other objects, where the allocator put them before.
    for p in params_of(optimizer):
        p.grad = p.grad.detach().mul_(2)
    assert is_short(optimizer, monkeypatch)
    for p in params_of(optimizer):
        p.grad = p.grad.clone()
    assert not is_short(optimizer, monkeypatch)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "shrink_ratio"])
def test_a_hyperparameter_that_is_a_tensor_is_copied_and_nothing_more(name: str) -> None:
    """It used to take new memory for the copy at each step."""
    tensor = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
    made, steps = optimizers(2), []
    for optimizer, value in zip(made, (0.05, tensor), strict=True):
        optimizer.param_groups[0][name] = value
        optimizer.step()
        with operators() as seen:
            optimizer.step()
        steps.append(seen)
    assert steps[1] - steps[0] == {"aten::copy_": 1}


def assign(p: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
    p.grad = grad


def assign_data(p: torch.nn.Parameter, data: torch.Tensor) -> None:
    p.grad.data = data


def misaligned(p: torch.nn.Parameter) -> None:
    memory = torch.zeros(p.numel() + 1, device=p.device)
    memory[1:] = -3 * p.grad.flatten()
    p.grad = memory[1:].view_as(p)


def same_memory_as_bfloat16(p: torch.nn.Parameter) -> None:
    """Of values that bfloat16 holds, so that the other half of each float32 is zero."""
    p.grad.copy_(p.grad.bfloat16())
    p.grad.data = p.grad.data.flatten().view(torch.bfloat16)[: p.numel()].view(p.shape)


def part_of_a_graph(p: torch.nn.Parameter) -> None:
    with torch.enable_grad():
        p.grad = p.grad.clone().requires_grad_() * -3


def swaps(p: torch.nn.Parameter) -> None:
    grad = p.grad
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.full_like(p, 100)))
    p.grad = grad


def exchanged(p: torch.nn.Parameter, other: torch.nn.Parameter) -> None:
    p.grad, other.grad = other.grad, p.grad.mul_(2)


# To a parameter, the third of six.
TO_A_PARAMETER: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "gradient in place": lambda p: p.grad.mul_(-3),
    "another gradient": lambda p: assign(p, -3 * p.grad),
    "no gradient": lambda p: assign(p, None),
    "gradient in other memory": lambda p: assign_data(p, -3 * p.grad),
    "transposed data": lambda p: assign_data(p, p.grad.data.t()),
    "transposed in place": lambda p: p.grad.t_(),
    "transposed view": lambda p: assign(p, p.grad.t()),
    "other dtype": lambda p: assign_data(p, (-3 * p.grad).double()),
    "other dtype, same memory": same_memory_as_bfloat16,
    "misaligned gradient": misaligned,
    "expanded gradient": lambda p: assign(p, p.grad[:1].clone().expand_as(p)),
    "gradient in a graph": part_of_a_graph,
    "value in place": lambda p: p.fill_(100),
    "value in other memory": lambda p: setattr(p, "data", torch.full_like(p, 100)),
    "value swapped": swaps,
}
# To its state: the optimizer, and the parameter.
TO_THE_STATE: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "gradients exchanged": lambda o, p: exchanged(p, params_of(o)[0]),
    "no first moment": lambda o, p: o.state[p].pop("exp_avg"),
    "renamed": lambda o, p: o.state[p].update(other=o.state[p].popitem()[1]),
    "moments exchanged": lambda o, p: o.state[p].update(
        exp_avg=o.state[p]["exp_avg_sq"], exp_avg_sq=o.state[p]["exp_avg"].abs_()
    ),
    "an equal tensor": lambda o, p: o.state[p].update(exp_avg=o.state[p]["exp_avg"].clone()),
    "another entry": lambda o, p: o.state.update({p: {**o.state[p], "step": torch.tensor(7.0, device=p.device)}}),
    "a further entry": lambda o, p: o.state[p].update(own=torch.zeros((), device=p.device)),
    "no entry": lambda o, p: o.state.pop(p),
    "a plain dict": lambda o, p: setattr(
        o, "state", {q: {k: t.clone() for k, t in e.items()} for q, e in o.state.items()}
    ),
}
CHANGES = {name: lambda o, p, change=change: change(p) for name, change in TO_A_PARAMETER.items()} | TO_THE_STATE


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    """The step after it is one of an optimizer that has seen nothing else."""
    (optimizer,) = optimizers(1)
    with torch.no_grad():
        CHANGES[name](optimizer, params_of(optimizer)[2])
    before, other = snapshot(optimizer), renewed(optimizer)
    optimizer.step()
    assert not all_equal(snapshot(optimizer), before)
    other.step()
    assert all_equal(snapshot(optimizer), snapshot(other))
    # And back again.
    for each in (optimizer, other):
        set_grads(params_of(each), 5)
        each.step()
    assert all_equal(snapshot(optimizer), snapshot(other))


def test_a_sparse_gradient_changes_nothing() -> None:
    (optimizer,) = optimizers(1)
    before = snapshot(optimizer)
    p = params_of(optimizer)[3]
    p.grad = p.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradients must be dense tensors, got torch\.sparse_coo"):
        optimizer.step()
    assert all_equal(snapshot(optimizer), before)


def test_parameters_that_change_groups() -> None:
    """The list of all parameters stays as it is, but one of them takes another group's learning rate."""
    first, second = make_pairs(SHAPES[:2])
    optimizer = StableLoRAAdamW([{"params": [first]}, {"params": [second], "lr": 0.0, "weight_decay": 0.0}], lr=1e-2)
    for step in range(2):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    upper, lower = optimizer.param_groups
    for key in ("params", "param_names"):
        lower[key].insert(0, upper[key].pop())
    before = first.B.detach().clone()
    optimizer.step()
    assert torch.equal(first.B, before)


def test_a_scale_and_a_verdict_come_and_go() -> None:
    optimizer, other = optimizers()
    for scale, verdict in [(None, None), (2.0, 0.0), (4.0, 0.0), (4.0, 1.0), (None, None)]:
        for p, q in zip(params_of(optimizer), params_of(other), strict=True):
            p.grad.copy_(q.grad * (scale or 1))
        optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=DEVICE)
        optimizer.found_inf = None if verdict is None else torch.tensor(verdict, device=DEVICE)
        optimizer.step()
        if not verdict:
            other.step()
        assert all_equal(snapshot(optimizer), snapshot(other))

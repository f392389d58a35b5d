"""A step of Triton's engine in which nothing changed takes a short way: it must notice whatever did change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels.dispatch import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, params_of, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("one_thread", "on_triton")

# A is square, so that it can be transposed.
SHAPES = [(8, 24, 8), (8, 24, 8), (3, 31, 5)]


@pytest.fixture
def on_triton():
    with use_backend("triton"):
        yield


def optimizers(count: int = 2, **settings) -> list[StableLoRAAdamW]:
    """Alike, after three steps on gradients that stay where they are."""
    made = []
    for _ in range(count):
        pairs = [
            LoRAPair(pair.name, torch.nn.Parameter(pair.A.detach()), torch.nn.Parameter(pair.B.detach()))
            for pair in make_pairs(SHAPES)
        ]
        optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.05, seed=1, **settings)
        set_grads(params_of(optimizer), 0)
        for _ in range(3):
            optimizer.step()
        made.append(optimizer)
    return made


def engine_of(optimizer: StableLoRAAdamW):
    ((_, engine),) = optimizer._engines
    return engine


def is_short(optimizer: StableLoRAAdamW, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step looks at no gradient and makes the launches of the step before."""
    engine = engine_of(optimizer)
    looks, launches = [], engine.launches
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_take_gradients", lambda gradients: looks.append(gradients) or gradients)
        optimizer.step()
    return not looks and engine_of(optimizer) is engine and engine.launches is launches


def test_a_step_in_which_nothing_changed_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    (optimizer,) = optimizers(1)
    assert is_short(optimizer, monkeypatch)
    # As a backward pass leaves them: other objects, where the allocator put them before.
    for p in params_of(optimizer):
        p.grad = p.grad.detach()
    assert is_short(optimizer, monkeypatch)
    for p in params_of(optimizer):
        p.grad.mul_(2)
    assert is_short(optimizer, monkeypatch)
    for p in params_of(optimizer):
        p.grad = p.grad.clone()
    assert not is_short(optimizer, monkeypatch)


class Operators(TorchDispatchMode):
    """Counts the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "shrink_ratio"])
def test_a_hyperparameter_that_is_a_tensor_is_copied_and_nothing_more(name: str) -> None:
    """It used to take new memory for the copy at each step."""
    tensor = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
    made, steps = optimizers(2), []
    for optimizer, value in zip(made, (0.05, tensor), strict=True):
        optimizer.param_groups[0][name] = value
        optimizer.step()
        with Operators() as seen:
            optimizer.step()
        steps.append(seen.counts)
    assert steps[1] - steps[0] == {"aten.copy_.default": 1}
    tensor.fill_(0.02)
    made[0].param_groups[0][name] = 0.02
    for optimizer in made:
        optimizer.step()
    for found, expected in zip(*map(snapshot, made), strict=True):
        torch.testing.assert_close(found, expected)


def values_in_place(p: torch.nn.Parameter) -> None:
    p.grad.mul_(-3)


def another_tensor(p: torch.nn.Parameter) -> None:
    p.grad = -3 * p.grad


def none(p: torch.nn.Parameter) -> None:
    p.grad = None


def other_memory(p: torch.nn.Parameter) -> None:
    p.grad.data = -3 * p.grad


def transposed_data(p: torch.nn.Parameter) -> None:
    p.grad.data = p.grad.data.t()


def transposed_in_place(p: torch.nn.Parameter) -> None:
    p.grad.t_()


def transposed_view(p: torch.nn.Parameter) -> None:
    p.grad = p.grad.t()


def other_dtype(p: torch.nn.Parameter) -> None:
    p.grad.data = (-3 * p.grad).double()


def other_dtype_same_memory(p: torch.nn.Parameter) -> None:
    """Bytes of float32 read as bfloat16: the second half of each pair is its bfloat16 rounding."""
    p.grad.data = p.grad.data.view(torch.bfloat16)[:, 1::2]


def misaligned(p: torch.nn.Parameter) -> None:
    memory = torch.zeros(p.numel() + 1, device=p.device)
    memory[1:] = -3 * p.grad.flatten()
    p.grad = memory[1:].view_as(p)


def expanded(p: torch.nn.Parameter) -> None:
    p.grad = p.grad[:1].clone().expand_as(p)


def part_of_a_graph(p: torch.nn.Parameter) -> None:
    with torch.enable_grad():
        p.grad = p.grad.clone().requires_grad_() * -3


CHANGES = [
    values_in_place,
    another_tensor,
    none,
    other_memory,
    transposed_data,
    transposed_in_place,
    transposed_view,
    other_dtype,
    other_dtype_same_memory,
    misaligned,
    expanded,
    part_of_a_graph,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_gradient_is_read_as_it_is(change: Callable[[torch.nn.Parameter], None]) -> None:
    optimizer, other = optimizers()
    before = snapshot(optimizer)
    with torch.no_grad():
        # Only the last of several, and in another optimizer its values as a dense tensor of its own.
        p, q = (params_of(each)[2] for each in (optimizer, other))
        change(p)
        q.grad = None if p.grad is None else p.grad.detach().float().clone(memory_format=torch.contiguous_format)
    for each in (optimizer, other):
        each.step()
    assert all_equal(snapshot(optimizer), snapshot(other)) and not all_equal(snapshot(optimizer), before)
    # And back again.
    for each in (optimizer, other):
        set_grads(params_of(each), 5)
        each.step()
    assert all_equal(snapshot(optimizer), snapshot(other))


def test_exchanged_gradients() -> None:
    optimizer, other = optimizers()
    a, b = params_of(optimizer)[0], params_of(optimizer)[2]
    a.grad, b.grad = b.grad, a.grad.mul_(2)
    a, b = params_of(other)[0], params_of(other)[2]
    a.grad, b.grad = b.grad.clone(), a.grad.clone() * 2
    for each in (optimizer, other):
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


def writes(p: torch.nn.Parameter) -> None:
    with torch.no_grad():
        p.fill_(100)


def moves(p: torch.nn.Parameter) -> None:
    p.data = torch.full_like(p, 100)


def swaps(p: torch.nn.Parameter) -> None:
    grad = p.grad
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.full_like(p, 100)))
    p.grad = grad


@pytest.mark.parametrize("change", [writes, moves, swaps], ids=lambda change: change.__name__)
def test_a_changed_parameter_is_noticed(change: Callable[[torch.nn.Parameter], None]) -> None:
    """Its pair latches by the norm of what was written."""
    (optimizer,) = optimizers(1)
    assert optimizer.stability()[1].latched_at is None
    p = optimizer.pairs[1].B
    change(p)
    optimizer.step()
    assert optimizer.stability()[1].latched_at == 4 and (p > 99).all()


def drops_an_entry(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    optimizer.state[p].pop("exp_avg")


def renames_the_last_entry(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    name, value = optimizer.state[p].popitem()
    optimizer.state[p][f"other_{name}"] = value


def exchanges_entries(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    entry = optimizer.state[p]
    entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"]


def replaces_a_tensor(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()


def replaces_an_entry(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    optimizer.state[p] = {**optimizer.state[p], "step": torch.tensor(7.0, device=p.device)}


def adds_an_entry(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    optimizer.state[p]["own"] = torch.zeros((), device=p.device)


def drops_a_parameter(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    del optimizer.state[p]


def takes_a_plain_dict(optimizer: StableLoRAAdamW, p: torch.Tensor) -> None:
    optimizer.state = {q: dict(entry) for q, entry in list(optimizer.state.items())[1:]}


STATE_CHANGES = [
    drops_an_entry,
    renames_the_last_entry,
    exchanges_entries,
    replaces_a_tensor,
    replaces_an_entry,
    adds_an_entry,
    drops_a_parameter,
    takes_a_plain_dict,
]


@pytest.mark.parametrize("change", STATE_CHANGES, ids=lambda change: change.__name__)
def test_a_changed_state_makes_new_engines(change: Callable[[StableLoRAAdamW, torch.Tensor], None]) -> None:
    (optimizer,) = optimizers(1)
    engine = engine_of(optimizer)
    optimizer.step()
    assert engine_of(optimizer) is engine
    change(optimizer, params_of(optimizer)[3])
    optimizer.step()
    assert engine_of(optimizer) is not engine


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

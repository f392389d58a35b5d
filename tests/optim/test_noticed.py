"""What a step notices of all that may change between two steps, on every path and for every kind of
state.

The step after a change is that of a fresh optimizer which is given everything as it is now, and has
seen nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.options import LIVE
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import (
    DEVICE,
    WRITES,
    all_equal,
    make_pairs,
    params_of,
    set_grads,
    snapshot,
)
from tests.helpers.steps import latches, take_step
from tests.optim.options import BF16, FP16, FP32, FP64

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[StableLoRAAdamW, Tensor], Any]
# By dtype of the parameters, and options. The pair that changes is square, so that it can be
# transposed.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (FP32, {}),
    "masters": (BF16, {"master_weights": True, "max_grad_norm": 0.1}),
    "8 bits": (FP32, {"moments_dtype": torch.uint8}),
}
SHAPES = [(8, 24, 8), (8, 8, 8), (3, 31, 5)]
TENSOR = torch.tensor(0.5, device=DEVICE)


def trained(storage: str) -> StableLoRAAdamW:
    """An optimizer of two groups after three steps on gradients that stay where they are. No pair
    has latched.
    """
    dtype, options = STORAGES[storage]
    pairs = [
        LoRAPair(p.name, *(torch.nn.Parameter(t.detach()) for t in (p.A, p.B)))
        for p in make_pairs(SHAPES, dtype)
    ]
    groups = [
        {"params": pairs[:2]},
        {"params": pairs[2:], "lr": torch.tensor([2e-3], dtype=FP64, device=DEVICE)},
    ]
    optimizer = StableLoRAAdamW(groups, lr=1e-3, shrink_ratio=0.05, seed=1, **options)
    set_grads(params_of(optimizer), 0)
    for _ in range(3):
        optimizer.step()
    assert not any(latches(optimizer).values())
    return optimizer


def cloned(t: Any) -> Any:
    return t.detach().clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t


def renewed(optimizer: StableLoRAAdamW) -> StableLoRAAdamW:
    """A fresh optimizer with the groups of another and, contiguous and in memory of their own, its
    values, state, gradients.
    """
    twins = {p: torch.nn.Parameter(p.detach().clone()) for p in params_of(optimizer)}
    groups = [
        {**group, "params": [twins[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    other = StableLoRAAdamW(groups)
    for p, twin in twins.items():
        if p in optimizer.state:
            other.state[twin] = {key: cloned(value) for key, value in optimizer.state[p].items()}
        twin.grad = None if p.grad is None else cloned(p.grad.to(p.dtype))
    other.grad_scale = getattr(optimizer, "grad_scale", None)
    return other


# Changes of a gradient


def misaligned(p: Tensor) -> None:
    memory = torch.zeros(p.numel() + 1, device=p.device, dtype=p.dtype)
    memory[1:] = -3 * p.grad.flatten()
    p.grad = memory[1:].view_as(p)


def same_memory_in_another_dtype(p: Tensor) -> None:
    p.grad.fill_(2.0**-7)
    p.grad.data = (
        p.grad.data.flatten().view(BF16 if p.dtype is FP32 else FP16)[: p.numel()].view(p.shape)
    )


GRADIENTS: dict[str, Change] = {
    "gradient in place": lambda o, p: p.grad.mul_(-3),
    "another gradient": lambda o, p: setattr(p, "grad", -3 * p.grad),
    "no gradient": lambda o, p: setattr(p, "grad", None),
    "gradient in other memory": lambda o, p: setattr(p.grad, "data", -3 * p.grad),
    "transposed data": lambda o, p: setattr(p.grad, "data", p.grad.data.t()),
    "transposed in place": lambda o, p: p.grad.t_(),
    "transposed view": lambda o, p: setattr(p, "grad", p.grad.t()),
    "another dtype": lambda o, p: setattr(p.grad, "data", (-3 * p.grad).double()),
    "another dtype, same memory": lambda o, p: same_memory_in_another_dtype(p),
    "misaligned gradient": lambda o, p: misaligned(p),
    "expanded gradient": lambda o, p: setattr(p, "grad", p.grad[:1].clone().expand_as(p)),
    "a scale of all": lambda o, p: setattr(o, "grad_scale", TENSOR),
}

# Changes of the state and of the groups


def cast(o: StableLoRAAdamW) -> None:
    for p in params_of(o):
        grad, p.grad = p.grad.to(FP16), None
        p.data = p.data.to(FP16)
        p.grad = grad


def add_group(o: StableLoRAAdamW, p: Tensor) -> None:
    lone = torch.ones(5, dtype=p.dtype, device=DEVICE, requires_grad=True)
    lone.grad = torch.ones_like(lone)
    o.add_param_group({"params": [("lone", lone)], "lr": 0.5})


def move_to_another_group(o: StableLoRAAdamW) -> None:
    first, second = o.param_groups
    for key in ("params", "param_names"):
        second[key].insert(0, first[key].pop())


STATE: dict[str, Change] = {
    "another tensor": lambda o, p: o.state[p].update(
        exp_avg=torch.ones_like(o.state[p]["exp_avg"])
    ),
    "a moment in other strides": lambda o, p: o.state[p].update(
        exp_avg=o.state[p]["exp_avg"].t().clone()
    ),
    "another step": lambda o, p: o.state[p].update(step=torch.tensor(7.0, device=DEVICE)),
    "a moment that is gone": lambda o, p: o.state[p].pop("exp_avg"),
    "an entry that is gone": lambda o, p: o.state.pop(p),
    "a state that is cleared": lambda o, p: o.state.clear(),
    "another dict": lambda o, p: setattr(
        o,
        "state",
        {q: {key: t.clone() for key, t in entry.items()} for q, entry in o.state.items()},
    ),
}
GROUPS: dict[str, Change] = {
    **{
        f"{key}: {value}": lambda o, p, key=key, value=value: o.param_groups[0].update({key: value})
        for key, value in [
            ("lr", 0.1), ("betas", (0.5, 0.6)), ("eps", 0.1), ("weight_decay", 0.5), ("shrink_ratio", 0.5),
            ("maximize", True), ("lr_ratio_B", 8.0), ("seed", 9),
            ("lr", TENSOR), ("lr", torch.tensor([0.1], dtype=torch.float64)), ("betas", (0.5, torch.tensor(0.75))),
            ("shrink_ratio", TENSOR), ("weight_decay", TENSOR),
        ]
    },
    "never, of a B that would latch": lambda o, p: (o.param_groups[0].update(stop_condition="never"), p.fill_(100)),
    "a tensor written to": lambda o, p: o.param_groups[1]["lr"].fill_(0.1),
    "a tensor in place of another": lambda o, p: o.param_groups[1].update(lr=TENSOR),
    "max_grad_norm": lambda o, p: setattr(o, "max_grad_norm", 1e-3),
    "a cast": lambda o, p: cast(o),
    "another group": add_group,
    "a parameter in another group": lambda o, p: move_to_another_group(o),
}  # fmt: skip
CHANGES = GRADIENTS | WRITES | STATE | GROUPS
# What codes of 8 bits cannot have.
FLOATS = ("a moment in other strides",)
# The steps of the parameter after the one that follows, where it is not the fourth.
STEPS = {
    "no gradient": 3,
    "another step": 8,
    "an entry that is gone": 1,
    "a state that is cleared": 1,
}


# Each by day with one storage, at night with all.
CASES = [
    pytest.param(
        name,
        storage,
        marks=() if storage == possible[place % len(possible)] else pytest.mark.nightly,
    )
    for place, name in enumerate(CHANGES)
    for possible in [[storage for storage in STORAGES if storage != "8 bits" or name not in FLOATS]]
    for storage in possible
]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "storage"), CASES)
def test_a_change_is_noticed(backend, name, storage):
    optimizer = trained(storage)
    with torch.no_grad():
        CHANGES[name](optimizer, optimizer.pairs[1].B)
    other = renewed(optimizer)
    for each in (optimizer, other):
        each.step()
    assert all_equal(snapshot(optimizer), snapshot(other)) and latches(optimizer) == latches(other)
    assert optimizer.state[optimizer.pairs[1].B]["step"].item() == STEPS.get(name, 4)
    assert name not in WRITES or latches(optimizer)["layer1"] == 4
    # And back again.
    for each in (optimizer, other):
        each.grad_scale = None
        take_step(5, each)
    assert all_equal(snapshot(optimizer), snapshot(other))


def test_another_backend_is_taken():
    optimizer = trained("float32")
    for name in ("triton", "triton", "torch", "triton"):
        with settings(backend=name), count_launches() as made:
            optimizer.step()
        assert bool(made) == (name == "triton")


def test_other_gradients_are_no_write_by_others():
    """The step after it measures no norm anew, which would be a launch more."""
    with settings(backend="triton"):
        optimizer = trained("float32")
        for change in (GRADIENTS["no gradient"], GRADIENTS["another gradient"]):
            change(optimizer, optimizer.pairs[0].B)
            optimizer.step()
            with count_launches() as made:
                optimizer.step()
            assert dict(made) == {"_stable_adamw_kernel": 1}
            set_grads(params_of(optimizer), 1)


@pytest.mark.parametrize("key", LIVE)
def test_a_tensor_on_the_host_is_compared_by_its_number(key):
    """Beside an engine on a GPU, which does not read it from there."""
    value = torch.tensor(0.1)
    optimizer = StableLoRAAdamW(make_pairs(SHAPES), **{key: value})
    steps, groups = optimizer._steps, optimizer.param_groups
    steps.on_cpu = False
    first = steps.snapshot(groups, {}, None)
    assert not steps.snapshot(groups, {}, None).since(first).hyper
    value.fill_(0.2)
    assert steps.snapshot(groups, {}, None).since(first).hyper


# Changes that do not fit: the next step names them and changes nothing


def put(key: str, value: Any) -> Change:
    return lambda o, p: o.state[p].update({key: value})


def group(which: int, **values: Any) -> Change:
    return lambda o, p: o.param_groups[which].update(values)


OF, FITS = "the state of 'layer1.lora_B':", f"must be torch.float32 [8, 8] on {TENSOR.device}, got"
CODES = torch.zeros(8, 8, dtype=torch.uint8)
# Of the optimizer's storage, a change, and the message.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "shape": ("float32", put("exp_avg", torch.zeros(8, 9)), f"{OF} 'exp_avg' {FITS} torch.float32 [8, 9]"),
    "a step of two": ("float32", put("step", torch.zeros(2)), f"{OF} 'step' must be a number or a 0-d tensor, got tensor("),
    "scales": ("8 bits", put("exp_avg_scale", torch.zeros(2)), f"{OF} 'exp_avg_scale' must be torch.float32 [1] on"),
    "strides of codes": ("8 bits", put("exp_avg", CODES.t()), "strides (8, 1), got (1, 8)"),
    "a master": ("masters", put("master", torch.zeros(8)), f"{OF} 'master' {FITS} torch.float32 [8]"),
    "a sparse gradient": ("float32", lambda o, p: setattr(p, "grad", p.grad.to_sparse()), "gradients must be dense tensors, got"),
    "two clips": ("masters", group(1, max_grad_norm=2.0), "must be one value for all groups, got 0.1 and 2.0"),
    "another storage": ("float32", group(0, moments_dtype=BF16), "must be one value for all groups, got torch.bfloat16 and"),
    "no name": ("float32", lambda o, p: o.param_groups[1]["params"].pop(), "group 1 has 1 params and 2 param_names: what"),
    "flat, as of ZeRO": ("float32", group(1, params=[torch.zeros(64)]), "group 1 has 1 params and 2 param_names: something"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_does_not_fit_is_named_before_anything_changes(backend, name):
    storage, change, message = REFUSED[name]
    optimizer = trained(storage)
    p, before = optimizer.pairs[1].B, snapshot(optimizer)
    entry = dict(optimizer.state[p])
    grad = p.grad
    groups = [dict(group) for group in optimizer.param_groups]
    groups[1]["params"] = list(groups[1]["params"])
    change(optimizer, p)
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            optimizer.step()
    optimizer.state[p].clear()
    optimizer.state[p].update(entry)
    p.grad = grad
    for own, kept in zip(optimizer.param_groups, groups, strict=True):
        own.update(kept)
    assert all_equal(snapshot(optimizer), before)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 4

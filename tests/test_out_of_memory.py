"""Out of memory in forward, backward and the optimizer's step: nothing is half done, and the next try gives the same bits.

Each allocation fails in turn. A launch of a kernel counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.functional import lora_branch, lora_linear, lora_linear_group
from stablelora_kernels.launch import counters
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32
from tests.helpers.memory_faults import Faults, each_allocation, fail
from tests.helpers.optimizers import all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import decide_on_device

pytestmark = pytest.mark.usefixtures("one_thread")

nightly = pytest.mark.nightly
# Few and many rows take different operators and kernels. With the larger k programs share a sum over it.
CALLS: dict[str, dict[str, Any]] = {
    "few rows": {"rows": 5, "k": 520},
    "few rows, dropout": {"rows": 5, "p": 0.3},
    "many rows": {"rows": 70},
    "many rows, dropout, bfloat16": {"rows": 70, "p": 0.3, "dtype": BF16},
    "dB in shared sums": {"rows": 300, "k": 16, "n": 8},
    "branch": {"rows": 70, "op": "branch"},
    "branch, few rows": {"rows": 5, "op": "branch"},
    "group": {"rows": 70, "op": "group"},
    "group, dropout": {"rows": 70, "op": "group", "p": 0.3},
    "group, few rows": {"rows": 5, "op": "group"},
    "NF4": {"rows": 70, "k": 64, "op": "nf4"},
    "NF4, few rows": {"rows": 5, "k": 256, "op": "nf4"},
}
CALLS_IN_CI = ["few rows", "few rows, dropout", "many rows", "branch", "group", "NF4"]


def sample(names: Iterable[str], in_ci: Iterable[str]) -> list[Any]:
    """All names, of which those not ``in_ci`` run at night."""
    return [name if name in in_ci else pytest.param(name, marks=nightly) for name in names]


def a_call(
    rows: int, k: int = 40, n: int = 24, r: int = 3, p: float = 0.0, op: str = "linear", dtype: torch.dtype = FP32
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The leaves of a call, and a function that runs it forward and backward."""
    many = 3 if op == "group" else 1
    members = [
        testing.make_inputs((rows, k), n, r, dtype=dtype, lora_dtype=FP32, device=DEVICE, seed=i) for i in range(many)
    ]
    x, grad = members[0]["x"], members[0]["grad"]
    leaves = {"x": x} | {f"{name}{i}": d[name] for i, d in enumerate(members) for name in ("lora_A", "lora_B")}
    base = members[0]["weight"] if op != "nf4" else testing.nf4_weight(n, k, 64, nested=True)
    if op == "branch":
        base = x @ base.T
        leaves["base"] = base
    for leaf in leaves.values():
        leaf.requires_grad_()
    a, b = ([leaves[f"{name}{i}"] for i in range(many)] for name in ("lora_A", "lora_B"))

    def run() -> None:
        torch.manual_seed(3)
        if op == "branch":
            outputs = [lora_branch(base, x, a[0], b[0], 1.7, p)]
        elif op == "group":
            weights, biases = ([d[name] for d in members] for name in ("weight", "bias"))
            outputs = lora_linear_group(x, weights, biases, a, b, [1.7] * many, p)
        else:
            outputs = [lora_linear(x, base, members[0]["bias"], a[0], b[0], 1.7, p)]
        results[:] = [y.detach() for y in outputs]
        torch.autograd.backward(outputs, [grad] * many)

    results: list[Tensor] = []
    leaves["outputs"] = results  # type: ignore[assignment]
    return leaves, run


def counters_are_zero() -> bool:
    return not any(bool(each.any()) for each in counters._in_use.values())


@pytest.mark.parametrize("name", sample(CALLS, CALLS_IN_CI))
def test_a_call_that_ran_out_of_memory_can_be_repeated(backend: str, name: str) -> None:
    leaves, run = a_call(**CALLS[name])
    outputs: Any = leaves.pop("outputs")
    values = [leaf.detach().clone() for leaf in leaves.values()]

    def grads() -> list[Tensor]:
        return [leaf.grad.clone() for leaf in leaves.values()]

    def set_grads_to(given: list[Tensor]) -> None:
        for leaf, grad in zip(leaves.values(), given, strict=True):
            leaf.grad = grad.clone()

    run()
    once = grads()
    run()
    expected, twice = [y.clone() for y in outputs], grads()

    def attempt(at: int) -> Faults:
        # Gradients of an earlier backward, which this one adds to.
        set_grads_to(once)
        outputs.clear()
        with fail(at) as faults:
            try:
                run()
            except torch.OutOfMemoryError:
                assert faults.raised
        assert counters_are_zero()
        if faults.raised:
            assert all_equal([leaf.detach() for leaf in leaves.values()], values)
            # Autograd adds leaf by leaf: each gradient is the old one or the sum.
            for leaf, old, new in zip(leaves.values(), once, twice, strict=True):
                assert torch.equal(leaf.grad, old) or torch.equal(leaf.grad, new)
            set_grads_to(once)
            run()
        assert all_equal(outputs, expected) and all_equal(grads(), twice)
        return faults

    assert each_allocation(attempt) >= 3


def schedule(step: int) -> float:
    return 0.1 / step


# Options, the parameters' dtype, and which gradients are missing in every second step.
STEPS: dict[str, tuple[dict[str, Any], torch.dtype, tuple[int, ...]]] = {
    "plain": ({}, FP32, ()),
    "missing gradients": ({}, FP32, (0, 3)),
    "schedule": ({"shrink_schedule": schedule}, FP32, ()),
    "clipped": ({"max_grad_norm": 0.01}, FP32, ()),
    "amsgrad": ({"amsgrad": True}, FP32, ()),
    "LoRA+": ({"lr_ratio_B": 4.0}, FP32, ()),
    "tensors": ({"lr": torch.tensor(2e-4), "weight_decay": torch.tensor(0.1), "shrink_ratio": torch.tensor(0.1)}, FP32, ()),
    "masters": ({"master_weights": True}, BF16, ()),
    "bfloat16": ({"max_grad_norm": 0.01, "lr_ratio_B": 4.0}, BF16, (1,)),
    "float16": ({}, FP16, ()),
    "moments in bfloat16": ({"moments_dtype": BF16, "lr_ratio_B": 4.0}, FP32, (2,)),
    "moments in 8 bits, clipped": ({"moments_dtype": torch.uint8, "max_grad_norm": 0.01, "lr_ratio_B": 4.0}, BF16, ()),
    "float64": ({"moments_dtype": BF16}, torch.float64, ()),
}  # fmt: skip
# The interpreter is slow, and rounding moments allocates a hundred times.
SLOW = {
    "torch": ["moments in 8 bits, clipped", "float64"],
    "torch as on a GPU": ["moments in bfloat16", "moments in 8 bits, clipped", "float64"],
    "triton": [name for name in STEPS if name not in ("missing gradients", "masters")],
}
PATHS = [
    pytest.param(path, name, marks=nightly if name in SLOW[path] else ())
    for path in SLOW
    for name in STEPS
    if (path, name) != ("triton", "float64")
]


def give_grads(optimizer: StableLoRAAdamW, step: int, missing: tuple[int, ...]) -> None:
    params = params_of(optimizer)
    set_grads(params, step)
    for i in missing if step % 2 else ():
        params[i].grad = None


def two_optimizers(options: dict[str, Any], dtype: torch.dtype) -> list[StableLoRAAdamW]:
    made = []
    for _ in range(2):
        # B of the first pair is so large that it latches at once.
        pairs = make_pairs([(4, 24, 40), (3, 7, 13)], dtype)
        with torch.no_grad():
            pairs[0].B.fill_(1.0)
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
        made.append(StableLoRAAdamW(pairs, **{"lr": 2e-4, "shrink_ratio": 0.1, "seed": 1} | copied))
    return made


def step_into(optimizer: StableLoRAAdamW, at: int) -> Faults:
    """A step whose allocation number ``at`` fails; nothing has changed then."""
    before = [p.detach().clone() for p in params_of(optimizer)]
    steps = [int(optimizer.state[p].get("step", 0)) for p in params_of(optimizer)]
    with fail(at) as faults:
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            assert faults.raised
    if faults.raised:
        assert all_equal([p.detach() for p in params_of(optimizer)], before)
        assert [int(optimizer.state[p].get("step", 0)) for p in params_of(optimizer)] == steps
    return faults


def assert_same(optimizer: StableLoRAAdamW, reference: StableLoRAAdamW) -> None:
    assert all_equal(snapshot(optimizer), snapshot(reference))
    assert optimizer.nonfinite_steps == reference.nonfinite_steps
    assert optimizer.param_groups[0].get("shrink_step") == reference.param_groups[0].get("shrink_step")


@pytest.mark.parametrize(("path", "name"), PATHS)
def test_a_step_that_ran_out_of_memory_has_changed_nothing(
    path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run: a step fails at the next allocation, and its batch is left out; another fails there, and is repeated."""
    if path == "torch as on a GPU":
        decide_on_device(monkeypatch)
    options, dtype, missing = STEPS[name]
    optimizer, reference = two_optimizers(options, dtype)
    group = optimizer.param_groups[0]
    # Alive, so that no step finds its gradients where the last one's were, and spares itself a table of addresses.
    held = []

    def attempt(at: int) -> Faults:
        lr = group["lr"]
        held.append([p.grad for p in params_of(optimizer)])
        give_grads(optimizer, 2 * at + 1, missing)
        group["lr"] = 3 * lr
        if not (faults := step_into(optimizer, at)).raised:
            return faults
        # Nothing that was prepared for this step may be taken for the next one's, nor memory be read that is free again.
        group["lr"] = lr
        unwritten = [torch.full((4, 16), torch.nan) for _ in range(64)]
        del unwritten
        give_grads(optimizer, 2 * at, missing)
        if (faults := step_into(optimizer, at)).raised:
            optimizer.step()
        give_grads(reference, 2 * at, missing)
        reference.step()
        assert_same(optimizer, reference)
        # Other steps run with some gradients missing.
        for each in (optimizer, reference) if at % 2 else ():
            give_grads(each, 2 * at + 1, missing)
            each.step()
        return faults

    with use_backend(path.split()[0]):
        # Builds the engines.
        for each in (optimizer, reference):
            give_grads(each, 100, missing)
            each.step()
        assert each_allocation(attempt) >= 3


@pytest.mark.parametrize(("path", "name"), PATHS)
def test_a_first_step_that_ran_out_of_memory_has_changed_nothing(
    path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch as on a GPU":
        decide_on_device(monkeypatch)
    options, dtype, missing = STEPS[name]
    _, reference = two_optimizers(options, dtype)

    def attempt(at: int) -> Faults:
        optimizer, _ = two_optimizers(options, dtype)
        give_grads(optimizer, 1, missing)
        faults = step_into(optimizer, at)
        if faults.raised:
            optimizer.step()
        assert_same(optimizer, reference)
        return faults

    with use_backend(path.split()[0]):
        give_grads(reference, 1, missing)
        reference.step()
        assert each_allocation(attempt) >= 3

"""Out of memory in forward, backward and the optimizer's step: nothing is half done, and the next
try gives the same bits.

Each allocation fails in turn. A launch of a kernel counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stablelora_kernels.ops.plans import NAMESPACE
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.testing.cases import BF16, Case, make, run
from tests.helpers.case_checks import assert_close
from tests.helpers.cases import small
from tests.helpers.optimizers import all_equal, make_pairs, params_of, set_grads, snapshot
from tests.optim.options import OPTIONS, STORED


class Faults(TorchDispatchMode):
    """Raise ``torch.OutOfMemoryError`` in place of the allocation number ``at``, counted from zero."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.raised = at, 0, False

    def allocate(self, what: str) -> None:
        self.count += 1
        if self.count == self.at + 1:
            self.raised = True
            raise torch.OutOfMemoryError(f"allocation {self.at}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            device = next(
                leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)
            )
            # The mode is off while it handles an operator; with it on again, the operator's own
            # allocations count.
            with self:
                return func._op_dk(
                    getattr(torch._C.DispatchKey, device.upper()), *args, **(kwargs or {})
                )
        # torch.tensor's memory shows as lift_fresh.
        if func is torch.ops.aten.lift_fresh.default or any(
            isinstance(result.type, (torch.TensorType, torch.ListType))
            and result.alias_info is None
            for result in func._schema.returns
        ):
            self.allocate(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def fail(at: int) -> Iterator[Faults]:
    """Let the allocation number ``at`` of the block fail; a launch counts as one, and the
    interpreter's own don't count.
    """
    faults = Faults(at)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def counted(*args: Any, **kwargs: Any) -> Any:
                faults.allocate("a launch")
                with _disable_current_modes():
                    return launch(*args, **kwargs)

            patch.setattr(GridExecutor, "__call__", counted)
        with faults:
            yield faults


def each_allocation(action: Callable[[int], Any]) -> int:
    """Call ``action(0)``, ``action(1)``, ..., each of which runs into that fault, until one has no
    such allocation.

    ``action`` returns the faults that it used. Returns how many allocations failed.
    """
    for at in range(10_000):
        if not action(at).raised:
            return at
    raise AssertionError("the action never ends")


pytestmark = pytest.mark.usefixtures("one_thread")
nightly = pytest.mark.nightly


# Few and many rows take different operators and kernels. With the larger k programs share a sum
# over it.
BY_DAY = [
    small("linear", shape=(5, 520)),
    small("linear", 5, p=0.3),
    *(small(op) for op in ("linear", "branch", "nf4")),
]
BY_NIGHT = [
    small("linear", p=0.3, dtype=BF16),
    small("linear", shape=(300, 16), sizes=(8,)),
    *(small(op, 5) for op in ("branch", "group", "nf4", "mlp")),
    *(small(op, p=p) for op in ("group", "mlp") for p in (0.0, 0.3)),
]


@pytest.mark.parametrize(
    "case", [*BY_DAY, *(pytest.param(case, marks=nightly) for case in BY_NIGHT)], ids=str
)
def test_a_call_that_ran_out_of_memory_can_be_repeated(backend: str, case: Case) -> None:
    case = case.but(backend=backend)
    given = make(case)
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    expected = run(case, given)

    def attempt(at: int) -> Faults:
        with fail(at) as faults:
            try:
                found = run(case, given)
            except torch.OutOfMemoryError:
                assert faults.raised
        if faults.raised:
            assert all_equal([given[name] for name in before], [*before.values()])
            found = run(case, given)
        assert_close(found, expected)
        return faults

    assert each_allocation(attempt) >= 3


NAMES = [*STORED, "lora-plus"]
# The interpreter is slow, and rounding moments allocates a hundred times.
SLOW = {
    "torch": ("8-bit-moments", "masters-8-bit-moments-clipped"),
    "triton": {*NAMES} - {"plain", "masters"},
}
PATHS = [
    pytest.param(backend, name, marks=nightly if name in slow else ())
    for backend, slow in SLOW.items()
    for name in NAMES
]


def two_optimizers(name: str) -> list[StableLoRAAdamW]:
    """Equal ones. B of the first pair is so large that it latches at once; the second's does not
    grow as large.
    """
    made, row = [], OPTIONS[name]
    slow = {} if "lr" in row.options else {"lr": 2e-4}
    for _ in range(2):
        pairs = make_pairs([(4, 24, 40), (3, 7, 13)], row.dtypes[0])
        with torch.no_grad():
            pairs[0].B.fill_(1.0)
        made.append(row.optimizer(pairs, **slow))
    return made


def give_grads(optimizer: StableLoRAAdamW, step: int) -> None:
    """In every second step some are missing."""
    params = params_of(optimizer)
    set_grads(params, step)
    for i in (0, 3) if step % 2 else ():
        params[i].grad = None


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


@pytest.mark.parametrize(("backend", "name"), PATHS, indirect=["backend"])
def test_a_step_that_ran_out_of_memory_has_changed_nothing(backend: str, name: str) -> None:
    """One run: a step fails at the next allocation, and its batch is left out; another fails there,
    and is repeated.
    """
    optimizer, reference = two_optimizers(name)
    group = optimizer.param_groups[0]
    # Alive, so that no step finds its gradients where the last one's were, and spares itself a
    # table of addresses.
    held = []

    def attempt(at: int) -> Faults:
        lr = group["lr"]
        held.append([p.grad for p in params_of(optimizer)])
        give_grads(optimizer, 2 * at + 1)
        group["lr"] = 3 * lr
        if not (faults := step_into(optimizer, at)).raised:
            return faults
        # Nothing that was prepared for this step may be taken for the next one's, nor memory be
        # read that is free again.
        group["lr"] = lr
        unwritten = [torch.full((4, 16), torch.nan) for _ in range(64)]
        del unwritten
        give_grads(optimizer, 2 * at)
        if (faults := step_into(optimizer, at)).raised:
            optimizer.step()
        give_grads(reference, 2 * at)
        reference.step()
        assert_same(optimizer, reference)
        # Other steps run with some gradients missing.
        for each in (optimizer, reference) if at % 2 else ():
            give_grads(each, 2 * at + 1)
            each.step()
        return faults

    # Builds the engines.
    for each in (optimizer, reference):
        give_grads(each, 100)
        each.step()
    assert each_allocation(attempt) >= 3


@pytest.mark.parametrize(("backend", "name"), PATHS, indirect=["backend"])
def test_a_first_step_that_ran_out_of_memory_has_changed_nothing(backend: str, name: str) -> None:
    _, reference = two_optimizers(name)
    give_grads(reference, 1)
    reference.step()

    def attempt(at: int) -> Faults:
        optimizer, _ = two_optimizers(name)
        give_grads(optimizer, 1)
        faults = step_into(optimizer, at)
        if faults.raised:
            optimizer.step()
        assert_same(optimizer, reference)
        return faults

    assert each_allocation(attempt) >= 3

"""Allocations that fail, one after another: every operator whose result is new memory, and every
launch of a kernel.
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

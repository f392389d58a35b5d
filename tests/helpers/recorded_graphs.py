"""A stand-in for ``graphed_step.Graphs`` on a CPU: a capture records PyTorch's operators and the
optimizer's launches.

A capture changes nothing, and a replay runs the recorded calls on the same memory, without the
Python around them. So a value that Python computed is a constant, as in a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablelora_kernels.launch.stable_adamw import Repeated
from stablelora_kernels.optim import staging

_run = Repeated.run


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Runs operators and keeps them in ``calls``; ``undo`` takes back what they wrote: what they
    allocated holds zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self.allocated: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(tensor, tensor.clone()) for tensor in tensors_in(value)]
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        fresh = [out.untyped_storage().data_ptr() not in given for out in tensors_in(result)]
        self.allocated += [
            out for out, is_fresh in zip(tensors_in(result), fresh, strict=True) if is_fresh
        ]

        def call() -> None:
            outputs = zip(tensors_in(result), tensors_in(func(*args, **kwargs)), fresh, strict=True)
            for old, new, is_fresh in outputs:
                if is_fresh:
                    old.detach().copy_(new)

        self.calls.append(call)
        return result

    def keep(self, launch: Repeated, device: torch.device) -> None:
        """A launch of the optimizer, whose results no operator needs: it is only kept."""
        self.calls.append(partial(_run, launch, device))

    def undo(self) -> None:
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)
        for tensor in self.allocated:
            tensor.zero_()


class RecordedGraphs:
    """Graphs of one :class:`~stablelora_kernels.GraphedStep`; ``captures`` and ``replays`` count."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.captures, self.replays = patch, 0, 0

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recording, generator = Recording(), torch.get_rng_state()
        with self.patch.context() as patch:
            patch.setattr(staging, "capturing", lambda: True)
            patch.setattr(Repeated, "run", lambda launch, device: recording.keep(launch, device))
            if "transformers.masking_utils" in sys.modules:
                # It asks whether a stream captures, and then reads no mask.
                patch.setattr("transformers.masking_utils.is_tracing", lambda *args: True)
            with recording:
                output = function()
        with torch.no_grad():
            recording.undo()
        torch.set_rng_state(generator)
        self.captures += 1
        return lambda: self.replay(recording.calls), output

    @torch.no_grad()
    def replay(self, calls: Iterable[Callable[[], None]]) -> None:
        self.replays += 1
        for call in calls:
            call()

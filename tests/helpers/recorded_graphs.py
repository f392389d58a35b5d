"""``torch.cuda.graph`` on a CPU: torch's own context manager around a stand-in for
``torch.cuda.CUDAGraph``.

A capture records PyTorch's operators and the optimizer's launches, and changes nothing. A replay
runs the recorded calls on the same memory, without the Python around them. So a value that Python
computed is a constant, as in a CUDA graph, and reading a tensor on the host raises. A layer's op is
one recorded call: its kernels run in Triton's interpreter, also while the capture records them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablelora_kernels.launch.base import launch_counts
from stablelora_kernels.launch.stable_adamw import Repeated

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
        launch_counts[launch._launch.kernel.__name__] += 1
        self.calls.append(partial(_run, launch, device))

    def undo(self) -> None:
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)
        for tensor in self.allocated:
            tensor.zero_()


class RecordedGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recording, self.generator = Recording(), torch.get_rng_state()
        self.patch = pytest.MonkeyPatch()
        # By these the optimizer asks whether a stream captures.
        self.patch.setattr(torch.cuda, "is_initialized", lambda: True)
        self.patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        keep = self.recording.keep
        self.patch.setattr(Repeated, "run", lambda launch, device: keep(launch, device))
        self.recording.__enter__()

    @torch.no_grad()
    def capture_end(self) -> None:
        self.recording.__exit__(None, None, None)
        self.patch.undo()
        self.recording.undo()
        torch.set_rng_state(self.generator)

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.recording.calls:
            call()


def use_recorded_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let ``torch.cuda.graph`` capture on a CPU while ``patch`` lasts. On a GPU, change nothing."""
    if torch.cuda.is_available():
        return
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    # What torch.cuda.graph does around a capture.
    patch.setattr(torch.cuda.graph, "default_capture_stream", object())
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)


def capture(function: Callable[[], Any]) -> tuple[Any, Any]:
    """Capture ``function``, and return the graph and what the function returns."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output

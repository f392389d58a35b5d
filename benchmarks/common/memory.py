"""Memory that a step holds."""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablelora_kernels.utils.memory import saved_for_backward

__all__ = ["MIB", "resident_over_start", "saved_for_backward", "status_mib"]

MIB = 1 << 20


def status_mib(field: str) -> float | None:
    """A size in /proc/self/status, in MiB; None if the system has none."""
    status = Path("/proc/self/status")
    found = (
        re.search(rf"^{field}:\s+(\d+)", status.read_text(), re.MULTILINE)
        if status.exists()
        else None
    )
    return int(found[1]) / 1024 if found else None


def resident_over_start(run: Callable[[], object]) -> float:
    """MiB of this process's memory at the peak of ``run``, beyond what it held before. Linux alone,
    with glibc.
    """
    gc.collect()
    # Have glibc give back what was freed, or the process would seem to hold it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_mib("VmRSS")
    # Reset the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = status_mib("VmHWM")
    assert before is not None and peak is not None
    return peak - before


class Block(NamedTuple):
    """A tensor's memory."""

    # The phase of :class:`LiveBytes` in which it was made.
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the memory that PyTorch's operators allocate in the block, as long as it is alive.

    Tensors may be on the meta device. What an operator allocates and frees inside itself is not
    seen. ``exclude``: tensors that were there before.
    """

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        super().__init__()
        # The storages themselves, so that no other one gets their address.
        self._excluded = {
            storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in exclude)
        }
        self._alive: dict[int, Block] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._phase = ""
        self.live = 0
        self.peak = 0
        # What was alive at the peak.
        self.at_peak: tuple[Block, ...] = ()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is made in the block."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        copies = _copies_of_operands(func, args, result)
        now = self.live + sum(copy.nbytes for copy in copies)
        if now > self.peak:
            self.peak = now
            self.at_peak = (*self._alive.values(), *copies)
        return result

    def _watch(self, tensor: Tensor) -> None:
        """Count the memory of ``tensor`` until its storage goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded or key in self._alive:
            return
        block = Block(self._phase, tuple(tensor.shape), tensor.dtype, storage.nbytes())
        self._alive[key] = block
        self.live += block.nbytes

        def forget(_: object) -> None:
            del self._alive[key], self._watched[key]
            self.live -= block.nbytes

        self._watched[key] = weakref.ref(storage, forget)


def _copies_of_operands(func: Any, args: Sequence[Any], result: Any) -> list[Block]:
    """What a pointwise operator on a CPU makes for itself: a copy of each operand of another dtype.
    On a GPU it converts elements in registers.
    """
    if not isinstance(result, Tensor) or result.device.type != "cpu":
        return []
    if torch.Tag.pointwise not in func.tags or func is torch.ops.aten._to_copy.default:
        return []
    return [
        Block("an operator", tuple(t.shape), result.dtype, t.numel() * result.itemsize)
        for t in args
        if isinstance(t, Tensor) and t.dim() and t.is_floating_point() and t.dtype != result.dtype
    ]

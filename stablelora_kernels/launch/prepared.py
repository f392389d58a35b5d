"""Launches that are prepared once and run again and again with other tensors of the same layouts.

Planning a launch, and Triton's binding and specialization of its arguments, take most of a call's host time. They depend on the
layouts of the tensors alone. A prepared launch keeps the compiled kernel and its list of arguments; a run sets the addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import Launch, VendorProduct, launch_counts, leaves, on_device, with_leaves
from stablelora_kernels.launch.compiled import MapSlot, Slot, descriptor_of, launcher_of
from stablelora_kernels.launch.counters import all_counters
from stablelora_kernels.launch.workspace import Workspace

# Of each part of a call's scratch, in bytes.
_ALIGNMENT = 256
#: Results of a call, and the launches that fill them.
Call = tuple[Sequence[Tensor], Sequence[Any]]


class NotPreparable(Exception):
    """A launch reads memory that is no operand, result or workspace of the call, such as a copy that its launcher made."""


class _View(NamedTuple):
    """A tensor of a launch as a view of one of the call's tensors."""

    # That tensor's place. -1: the view is empty, and of none.
    tensor: int
    # Bytes from the address of that tensor.
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensors: Sequence[Any], device: torch.device | None) -> Tensor:
        """The view; ``device`` is where an empty one is."""
        if self.tensor < 0:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        whole: Tensor = tensors[self.tensor]
        whole = whole if whole.dtype == self.dtype else whole.view(self.dtype)
        offset = whole.storage_offset() + self.offset // self.dtype.itemsize
        return whole.as_strided(self.shape, self.stride, offset)


class _Tensors:
    """A call's operands, results and workspace, with a lookup from launch argument to tensor."""

    def __init__(self, given: Sequence[Tensor | None], results: Sequence[Tensor], taken: Workspace) -> None:
        self._at: dict[int, tuple[int, int]] = {}
        # Launchers may take parts of a tensor. None: several tensors share the storage.
        self._in: dict[int, tuple[Tensor, int, int] | None] = {}
        for index, tensor in enumerate((*given, *results)):
            if tensor is not None:
                self._add(tensor, index, 0)
        # All scratch is one allocation in later calls.
        index, self.scratch_bytes = len(given) + len(results), 0
        for memory in taken.scratch:
            self._add(memory, index, self.scratch_bytes)
            self.scratch_bytes += -(-memory.nbytes // _ALIGNMENT) * _ALIGNMENT
        if taken.counters is not None:
            self._add(taken.counters, index + (self.scratch_bytes > 0), 0)

    def _add(self, tensor: Tensor, index: int, offset: int) -> None:
        if not tensor.numel():
            return
        if self._at.setdefault(tensor.data_ptr(), (index, offset)) != (index, offset):
            raise NotPreparable("two of the call's tensors have one address")
        storage = tensor.untyped_storage().data_ptr()
        self._in[storage] = None if storage in self._in else (tensor, index, offset)

    def view(self, tensor: Tensor) -> _View:
        index, offset = self._find(tensor)
        return _View(index, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        if not tensor.numel():
            return -1, 0
        if (found := self._at.get(tensor.data_ptr())) is not None:
            return found
        whole = self._in.get(tensor.untyped_storage().data_ptr())
        if whole is None:
            raise NotPreparable(f"a tensor of shape {list(tensor.shape)} is no part of one of the call's")
        return whole[1], whole[2] + tensor.data_ptr() - whole[0].data_ptr()


class _Vendor:
    """A :class:`VendorProduct` of any tensors."""

    def __init__(self, product: VendorProduct, tensors: _Tensors, device: torch.device) -> None:
        self._views = [None if t is None else tensors.view(t) for t in product[:4]]
        self._add = product.add

    def again(self, tensors: Sequence[Any], device: torch.device) -> VendorProduct:
        """The product of ``tensors``."""
        x, w, bias, y = (None if view is None else view.of(tensors, device) for view in self._views)
        return VendorProduct(x, w, bias, y, self._add)  # type: ignore[arg-type]

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], device: torch.device, stream: int) -> None:
        self.again(tensors, device).run(device)


def _needs_triton() -> bool:
    """Whether launch hooks or debugging of Triton are on."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or runtime.debug)


class Repeated:
    """A :class:`Launch` of the same tensors again and again. From the second run on it is prepared."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._seen = launch, False
        self._launcher: Any = None

    def run(self, device: torch.device) -> None:
        elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
        if not self._seen or elsewhere or not isinstance(self._launch.kernel, JITFunction) or _needs_triton():
            self._launch.run(device)
            self._seen = True
            return
        if self._launcher is None:
            self._launcher = launcher_of(self._launch, device)
        launch_counts[self._launch.kernel.__name__] += 1
        self._launcher.run((), (), driver.active.get_current_stream(device.index or 0))


class _Kernel:
    """A :class:`Launch` of any tensors."""

    def __init__(self, launch: Launch, tensors: _Tensors, device: torch.device) -> None:
        self._leaves = [*leaves(launch.args)]
        self._pointers: list[tuple[int, _View]] = []
        self._descriptors: list[tuple[int, _View, dict[str, Any]]] = []
        for at, value in enumerate(self._leaves):
            if isinstance(value, Tensor):
                self._pointers.append((at, tensors.view(value)))
            elif isinstance(value, TensorDescriptor):
                view = tensors.view(value.base)
                self._descriptors.append((at, view, {**vars(value), "base": None}))
        if isinstance(launch.kernel, JITFunction):
            pointers = [Slot(at, view.tensor, view.offset) for at, view in self._pointers if view.tensor >= 0]
            descriptors = [
                MapSlot(Slot(at, view.tensor, view.offset), partial(view.of, device=None))
                for at, view, _ in self._descriptors
            ]
            self._launcher = launcher_of(launch, device, pointers, descriptors)
        # What is prepared keeps no tensors.
        for changing in (self._pointers, self._descriptors):
            for at, *_ in changing:
                self._leaves[at] = None
        self._launch, self._name = launch._replace(args=with_leaves(launch.args, repeat(None))), launch.kernel.__name__

    def again(self, tensors: Sequence[Any], device: torch.device) -> Launch:
        """The launch of ``tensors``."""
        arguments = self._leaves.copy()
        for at, view in self._pointers:
            arguments[at] = view.of(tensors, device)
        for at, view, fields in self._descriptors:
            arguments[at] = descriptor_of(fields, view.of(tensors, device))
        return self._launch._replace(args=with_leaves(self._launch.args, iter(arguments)))

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], device: torch.device, stream: int) -> None:
        launch_counts[self._name] += 1
        self._launcher.run(tensors, addresses, stream)


class Prepared:
    """The launches of a call, for operands of the layouts that it was prepared with."""

    def __init__(
        self, given: Sequence[Tensor | None], results: Sequence[Tensor], launches: Sequence[Any], taken: Workspace
    ) -> None:
        if not all(result.is_contiguous() for result in results):
            raise NotPreparable("a result is not contiguous")
        tensors = _Tensors(given, results, taken)
        self._allocations = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
        if tensors.scratch_bytes:
            self._allocations.append(((tensors.scratch_bytes,), (1,), torch.uint8))
        self._results, self._counts, self._device = len(results), taken.counters is not None, results[0].device
        self._on_gpu = self._device.type == "cuda"
        self._steps = [
            (_Vendor if isinstance(each, VendorProduct) else _Kernel)(each, tensors, self._device) for each in launches
        ]
        # Not under the interpreter.
        self._compiled = any(isinstance(each, Launch) and isinstance(each.kernel, JITFunction) for each in launches)

    def run(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the launches on ``given`` and return the results.

        It trusts that the layouts are those of the preparation, and that no capture records the stream.
        """
        own = self.allocate()
        tensors = [*given, *own]
        if self._on_gpu and torch.cuda.current_device() != self._device.index:
            with on_device(self._device):
                self.launch(tensors)
        else:
            self.launch(tensors)
        return own[: self._results]

    def allocate(self) -> list[Tensor]:
        """New results and a new workspace."""
        device, empty = self._device, torch.empty_strided
        own = [empty(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self._allocations]
        if self._counts:
            own.append(all_counters(device))
        return own

    def launch(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the launches on operands, results and workspace, on the current device."""
        device = self._device
        if not self._compiled or _needs_triton():
            for step in self._steps:
                step.again(tensors, device).run(device)
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        stream = driver.active.get_current_stream(device.index or 0)
        for step in self._steps:
            step.run(tensors, addresses, device, stream)


def prepare(given: Sequence[Tensor | None], call: Callable[[], Call]) -> Prepared | None:
    """Prepare the launches of ``call``, of which ``given`` are the operands, without running them; None if that can't be."""
    with workspace.noted() as taken:
        results, launches = call()
    try:
        return Prepared(given, results, launches, taken)
    except NotPreparable:
        return None

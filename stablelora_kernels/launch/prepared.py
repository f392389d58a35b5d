"""Launches that are prepared once and run again and again with other tensors of the same layouts.

Planning a launch, and Triton's binding and specialization of its arguments, take most of a call's
host time. They depend on the layouts of the tensors alone. A prepared launch keeps the compiled
kernel and its list of arguments; a run sets the addresses.

It runs in one of two ways: by Triton's C launcher itself, where its version and the GPU have one
that takes a list of arguments, else by the call of Triton's compiled kernel. The latter makes a
CUDA tensor map for each descriptor of each launch, in Python; the former makes one for each
address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import (
    Launch,
    VendorProduct,
    launch_counts,
    leaves,
    on_device,
    with_leaves,
)
from stablelora_kernels.launch.workspace import Workspace, all_counters

# Of each part of a call's scratch, in bytes.
_ALIGNMENT = 256
# Most tensor maps, of 128 bytes, that one argument of a kernel keeps.
MAPS = 1024


class NotPreparable(Exception):
    """A launch reads memory that is no operand, result or workspace of the call, such as a copy
    that its launcher made.
    """


@dataclass(frozen=True, slots=True)
class View:
    """In place of a launch's tensor, or of a descriptor of it: a view of one of the call's tensors."""

    # That tensor's place among operands, results and workspace. -1: the view is empty, and of none.
    tensor: int
    # Bytes from the address of that tensor.
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    # A descriptor's fields, which were checked when it was made, but for its tensor.
    descriptor: dict[str, Any] | None

    def of(self, tensors: Sequence[Any], device: torch.device | None = None) -> Any:
        """The view, or a descriptor of it; ``device`` is where an empty one is."""
        if self.tensor < 0:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        whole: Tensor = tensors[self.tensor]
        whole = whole if whole.dtype == self.dtype else whole.view(self.dtype)
        offset = whole.storage_offset() + self.offset // self.dtype.itemsize
        view = whole.as_strided(self.shape, self.stride, offset)
        if self.descriptor is None:
            return view
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self.descriptor, base=view)
        return descriptor


class _Tensors:
    """A call's operands, results and workspace, with a lookup from launch argument to tensor."""

    def __init__(
        self, given: Sequence[Tensor | None], results: Sequence[Tensor], taken: Workspace
    ) -> None:
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

    def view(self, value: Any) -> Any:
        """The view that stands for a tensor or a descriptor; another value itself."""
        descriptor = {**vars(value), "base": None} if isinstance(value, TensorDescriptor) else None
        tensor = value if descriptor is None else value.base
        if not isinstance(tensor, Tensor):
            return value
        return View(
            *self._find(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), descriptor
        )

    def _find(self, tensor: Tensor) -> tuple[int, int]:
        if not tensor.numel():
            return -1, 0
        if (found := self._at.get(tensor.data_ptr())) is not None:
            return found
        whole = self._in.get(tensor.untyped_storage().data_ptr())
        if whole is None:
            raise NotPreparable(
                f"a tensor of shape {list(tensor.shape)} is no part of one of the call's"
            )
        return whole[1], whole[2] + tensor.data_ptr() - whole[0].data_ptr()


def _flat(launch: Launch) -> list[Any]:
    """The leaves of the arguments, addresses in place of tensors."""
    return [
        value.data_ptr() if isinstance(value, Tensor) else value for value in leaves(launch.args)
    ]


class ByTriton:
    """Launches by the call of Triton's compiled kernel. ``changing``: the arguments' leaves, views
    for those that change.
    """

    def __init__(self, compiled: Any, launch: Launch, changing: Sequence[Any]) -> None:
        # The kernel leaves the GPU with this object.
        self._compiled = compiled
        self._run, self._grid = compiled.run, (*launch.grid, 1, 1)[:3]
        self._head = (compiled.function, compiled.packed_metadata, None, None, None)
        self._flat, views = (
            _flat(launch),
            [(at, view) for at, view in enumerate(changing) if isinstance(view, View)],
        )
        self._constants = [
            launch.constants[name] for name in launch.kernel.arg_names if name in launch.constants
        ]
        self._pointers = [
            (at, v.tensor, v.offset) for at, v in views if v.descriptor is None and v.tensor >= 0
        ]
        self._descriptors = [(at, view) for at, view in views if view.descriptor is not None]
        for at, _ in self._descriptors:
            self._flat[at] = None
        # The arguments' tuples from a list of all leaves, in one expression: a loop would take most
        # of the launch's time.
        self._nested = eval(f"lambda v: {_display(launch.args, count())}")

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        flat = self._flat.copy()
        for at, tensor, offset in self._pointers:
            flat[at] = addresses[tensor] + offset
        for at, view in self._descriptors:
            flat[at] = view.of(tensors)
        self._run(*self._grid, stream, *self._head, *self._nested(flat), *self._constants)


def _display(values: Any, places: Iterator[int]) -> str:
    """Python's text for tuples in tuples, whose leaves are the items of a list ``v``."""
    if isinstance(values, tuple):
        return f"({''.join(f'{_display(value, places)}, ' for value in values)})"
    return f"v[{next(places)}]"


class Direct:
    """Launches by Triton's C launcher for NVIDIA's GPUs. ``changing``: as for :class:`ByTriton`.

    Raises:
        AttributeError, ImportError, StopIteration, TypeError: Triton has none like it.
    """

    def __init__(self, compiled: Any, launch: Launch, changing: Sequence[Any]) -> None:
        from triton.backends.nvidia import driver as nvidia

        launcher = compiled.run
        if type(launcher) is not nvidia.CudaLauncher or launcher.gsan_enabled:
            raise TypeError("another launcher")
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise TypeError("a launch allocates memory")
        self._compiled, self._make = compiled, nvidia.make_tensordesc_arg
        self._run, self._grid = driver.active.utils.launch, (*launch.grid, 1, 1)[:3]
        layouts = iter(compiled.metadata.tensordesc_meta or ())
        # The launcher's arguments, which leave out constants.
        self._arguments: list[Any] = []
        self._pointers: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int, View, Any, dict[int, Any]]] = []
        kinds = leaves(tuple(compiled.src.signature.values()))
        for kind, value, view in zip(kinds, _flat(launch), changing, strict=False):
            at = len(self._arguments)
            if isinstance(value, TensorDescriptor):
                # A map, then sizes and strides, which stay.
                layout = next(layouts)
                self._arguments += self._make(value, layout, None)
                if isinstance(view, View):
                    self._maps.append((at, view.tensor, view.offset, view, layout, {}))
            elif kind != "constexpr":
                self._arguments.append(value)
                if isinstance(view, View) and view.tensor >= 0:
                    self._pointers.append((at, view.tensor, view.offset))
        marks = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)] * len(
            self._arguments
        )
        self._head = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
            None, None, None, None, None, marks, launcher.kernel_signature,
        )  # fmt: skip

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        arguments = self._arguments.copy()
        for at, tensor, offset in self._pointers:
            arguments[at] = addresses[tensor] + offset
        for at, tensor, offset, view, layout, maps in self._maps:
            address = addresses[tensor] + offset
            found = maps.get(address)
            if found is None:
                if len(maps) >= MAPS:
                    maps.clear()
                found = maps[address] = self._make(view.of(tensors), layout, None)[0]
            arguments[at] = found
        self._run(*self._grid, stream, *self._head, arguments)


def _launcher_of(
    launch: Launch, device: torch.device, changing: Sequence[Any]
) -> Direct | ByTriton:
    """Repeats ``launch`` on ``device``. Launches nothing, and compiles nothing that is compiled
    already.
    """
    with on_device(device):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.compiled_with)
        try:
            return Direct(compiled, launch, changing)
        except (AttributeError, ImportError, StopIteration, TypeError):
            return ByTriton(compiled, launch, changing)


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
        if (
            not self._seen
            or elsewhere
            or not isinstance(self._launch.kernel, JITFunction)
            or _needs_triton()
        ):
            self._launch.run(device)
            self._seen = True
            return
        if self._launcher is None:
            self._launcher = _launcher_of(self._launch, device, [*leaves(self._launch.args)])
        launch_counts[self._launch.kernel.__name__] += 1
        self._launcher.run((), (), driver.active.get_current_stream(device.index or 0))


class _Step:
    """A :class:`Launch` or a :class:`VendorProduct` of any tensors."""

    def __init__(
        self, launch: Launch | VendorProduct, tensors: _Tensors, device: torch.device
    ) -> None:
        # It keeps no tensors.
        self._with_views = with_leaves(launch, map(tensors.view, leaves(launch)))
        self._leaves = [*leaves(self._with_views)]
        # None for a vendor's product, and under the interpreter.
        self.launcher: Any = None
        if isinstance(launch, Launch) and isinstance(launch.kernel, JITFunction):
            self.launcher = _launcher_of(launch, device, [*leaves(self._with_views.args)])
            self.name = launch.kernel.__name__

    def again(self, tensors: Sequence[Any], device: torch.device) -> Any:
        """The launch or the product of ``tensors``."""
        found = [
            leaf.of(tensors, device) if isinstance(leaf, View) else leaf for leaf in self._leaves
        ]
        return with_leaves(self._with_views, iter(found))


class Prepared:
    """The launches of a call, for operands of the layouts that it was prepared with."""

    def __init__(
        self,
        given: Sequence[Tensor | None],
        results: Sequence[Any],
        launches: Sequence[Any],
        taken: Workspace,
    ) -> None:
        # Of each result its place among all tensors, or a list's slice of them.
        self._places: list[int | slice] = []
        for each, end in zip(
            results,
            accumulate(1 if isinstance(t, Tensor) else len(t) for t in results),
            strict=True,
        ):
            self._places.append(
                end - 1 if isinstance(each, Tensor) else slice(end - len(each), end)
            )
        results = [t for each in results for t in ([each] if isinstance(each, Tensor) else each)]
        if not all(result.is_contiguous() for result in results):
            raise NotPreparable("a result is not contiguous")
        tensors = _Tensors(given, results, taken)
        self._allocations = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
        if tensors.scratch_bytes:
            self._allocations.append(((tensors.scratch_bytes,), (1,), torch.uint8))
        self._counts, self._device = taken.counters is not None, results[0].device
        self._on_gpu = self._device.type == "cuda"
        self._steps = [_Step(launch, tensors, self._device) for launch in launches]
        self._compiled = any(step.launcher is not None for step in self._steps)

    def run(self, given: Sequence[Tensor | None]) -> list[Any]:
        """Run the launches on ``given`` and return the results, tensors and lists of tensors.

        It trusts that the layouts are those of the preparation, and that no capture records the
        stream.
        """
        device, empty = self._device, torch.empty_strided
        own = [
            empty(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype in self._allocations
        ]
        if self._counts:
            own.append(all_counters(device))
        if self._on_gpu and torch.cuda.current_device() != device.index:
            with on_device(device):
                self._launch([*given, *own])
        else:
            self._launch([*given, *own])
        return [own[place] for place in self._places]

    def _launch(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the launches on operands, results and workspace, on the current device."""
        device, addresses, stream = self._device, [], 0
        if compiled := self._compiled and not _needs_triton():
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            stream = driver.active.get_current_stream(device.index or 0)
        for step in self._steps:
            if compiled and step.launcher is not None:
                launch_counts[step.name] += 1
                step.launcher.run(tensors, addresses, stream)
            else:
                step.again(tensors, device).run(device)


def prepare(
    given: Sequence[Tensor | None], call: Callable[[], tuple[Sequence[Any], Sequence[Any]]]
) -> Prepared | None:
    """Prepare the launches of ``call``, of which ``given`` are the operands, without running them;
    None if that can't be.

    ``call`` returns results, tensors and lists of tensors, and the launches that fill them.
    """
    with workspace.noted() as taken:
        results, launches = call()
    try:
        return Prepared(given, results, launches, taken)
    except NotPreparable:
        return None

"""Launches that are prepared once and run again and again with other tensors of the same layouts.

Planning a launch, and Triton's binding and specialization of its arguments, take most of a call's
host time. They depend on the layouts of the tensors alone. A prepared launch keeps the compiled
kernel and its list of arguments; a run sets the addresses.

It runs in one of two ways. :class:`Direct`, the usual one, calls Triton's C launcher, where its
version and the GPU have one that takes a list of arguments; it makes a CUDA tensor map for each
address. :class:`ByTriton` calls Triton's compiled kernel, which makes a tensor map for each
descriptor of each launch, in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch.tallies import Tally
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import (
    Argument,
    Launch,
    Launches,
    VendorProduct,
    launch_counts,
    leaves,
    on_device,
)
from stablelora_kernels.launch.workspace import Workspace, all_counters

# Of each part of a call's scratch, in bytes.
_ALIGNMENT = 256
# Most tensor maps, of 128 bytes, that one argument of a kernel keeps.
MAPS = 1024

# An op's result: a tensor or a list of tensors.
Result = Tensor | Sequence[Tensor]


class NotPreparable(Exception):
    """A launch reads memory that is no operand, result or workspace of the call, such as a copy
    that its launcher made.
    """


@dataclass(frozen=True, slots=True)
class View:
    """A view of one of the call's tensors, in place of a launch's tensor or of its descriptor."""

    # That tensor's place among operands, results and workspace. -1: the view is empty, and of none.
    tensor: int
    # Bytes from the address of that tensor.
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    # A descriptor's fields, which were checked when it was made, but for its tensor.
    descriptor: dict[str, Any] | None

    def of(
        self, tensors: Sequence[Tensor | None], device: torch.device | None = None
    ) -> Tensor | TensorDescriptor:
        """The view, or a descriptor of it; ``device`` is where an empty one is."""
        if self.tensor < 0:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        whole = tensors[self.tensor]
        assert whole is not None
        if whole.dtype != self.dtype:
            whole = whole.view(self.dtype)
        offset = whole.storage_offset() + self.offset // self.dtype.itemsize
        view = whole.as_strided(self.shape, self.stride, offset)
        if self.descriptor is None:
            return view
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self.descriptor, base=view)
        return descriptor


class _Place(NamedTuple):
    """Which of a call's tensors, and bytes from its address."""

    tensor: int
    offset: int


class _Placed(NamedTuple):
    """Memory and its place."""

    memory: Tensor
    place: _Place


class _CallTensors:
    """A call's operands, results and workspace, in this order: finds the place of a launch's
    argument among them.
    """

    def __init__(
        self, operands: Sequence[Tensor | None], results: Sequence[Tensor], taken: Workspace
    ) -> None:
        self._by_address: dict[int, _Place] = {}
        # Launchers may take parts of a tensor. None: several tensors share the storage.
        self._by_storage: dict[int, _Placed | None] = {}
        for index, tensor in enumerate((*operands, *results)):
            if tensor is not None:
                self._add(tensor, _Place(index, 0))
        index = len(operands) + len(results)
        # All scratch is one allocation in later calls.
        self.scratch_bytes = 0
        for memory in taken.scratch:
            self._add(memory, _Place(index, self.scratch_bytes))
            self.scratch_bytes += -(-memory.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self.scratch_bytes:
            index += 1
        if taken.counters is not None:
            self._add(taken.counters, _Place(index, 0))

    def _add(self, tensor: Tensor, place: _Place) -> None:
        """Let arguments that lie in ``tensor`` be found at ``place``."""
        if not tensor.numel():
            return
        if self._by_address.setdefault(tensor.data_ptr(), place) != place:
            raise NotPreparable("two of the call's tensors have one address")
        storage = tensor.untyped_storage().data_ptr()
        alone = storage not in self._by_storage
        self._by_storage[storage] = _Placed(tensor, place) if alone else None

    def view(self, value: Argument) -> Argument:
        """The view that stands for a tensor or a descriptor; another value itself."""
        if isinstance(value, TensorDescriptor):
            return self._view(value.base, {**vars(value), "base": None})
        if isinstance(value, Tensor):
            return self._view(value, None)
        return value

    def _view(self, tensor: Tensor, descriptor: dict[str, Any] | None) -> View:
        place = self._place_of(tensor)
        return View(
            tensor=place.tensor,
            offset=place.offset,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            descriptor=descriptor,
        )

    def _place_of(self, tensor: Tensor) -> _Place:
        if not tensor.numel():
            return _Place(-1, 0)
        address = tensor.data_ptr()
        if address in self._by_address:
            return self._by_address[address]
        whole = self._by_storage.get(tensor.untyped_storage().data_ptr())
        if whole is None:
            raise NotPreparable(
                f"a tensor of shape {list(tensor.shape)} is no part of one of the call's"
            )
        behind = address - whole.memory.data_ptr()
        return _Place(whole.place.tensor, whole.place.offset + behind)


def _replaced(values: Argument, replace: Callable[[Argument], Argument]) -> Argument:
    """``values``, a leaf or tuples in tuples, with ``replace`` of each leaf in its place."""
    if not isinstance(values, tuple):
        return replace(values)
    items = [_replaced(value, replace) for value in values]
    return tuple(items) if type(values) is tuple else type(values)(*items)


def _address_of(value: Argument) -> Argument:
    """A tensor's address; another value itself."""
    return value.data_ptr() if isinstance(value, Tensor) else value


def _grid_of(launch: Launch) -> tuple[int, int, int]:
    """The grid's three sizes, as launchers take them."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    return x, y, z


class Launcher(Protocol):
    """Launches a compiled kernel on the current device, for other tensors each time."""

    def run(
        self, tensors: Sequence[Tensor | None], addresses: Sequence[int], stream: int
    ) -> None: ...


class ByTriton:
    """Launches by the call of Triton's compiled kernel. ``changing``: the launch's arguments, with
    views in place of tensors and descriptors that change.
    """

    def __init__(self, compiled: Any, launch: Launch, changing: tuple[Argument, ...]) -> None:
        # The kernel leaves the GPU with this object.
        self._compiled = compiled
        self._run = compiled.run
        self._grid = _grid_of(launch)
        self._head = (compiled.function, compiled.packed_metadata, None, None, None)
        # Addresses stand for tensors. Constants follow.
        self._arguments = [_replaced(argument, _address_of) for argument in launch.args]
        self._arguments += [
            launch.constants[name] for name in launch.kernel.arg_names if name in launch.constants
        ]
        # Arguments with views, by their places.
        self._changing: dict[int, Argument] = {}
        for place, argument in enumerate(changing):
            if any(isinstance(leaf, View) and leaf.tensor >= 0 for leaf in leaves((argument,))):
                self._changing[place] = argument

    def run(self, tensors: Sequence[Tensor | None], addresses: Sequence[int], stream: int) -> None:
        def at_its_address(leaf: Argument) -> Argument:
            if not isinstance(leaf, View):
                return leaf
            if leaf.descriptor is not None:
                return leaf.of(tensors)
            return addresses[leaf.tensor] + leaf.offset if leaf.tensor >= 0 else 0

        arguments = self._arguments.copy()
        for place, argument in self._changing.items():
            arguments[place] = _replaced(argument, at_its_address)
        self._run(*self._grid, stream, *self._head, *arguments)


# An argument that is an address: its place in the launcher's list, one of the call's tensors, and
# bytes from that tensor's address. A plain tuple, which every launch unpacks in less time than a
# record.
_Pointer = tuple[int, int, int]


@dataclass(slots=True)
class _MapArgument:
    """An argument that is a CUDA tensor map, and the maps that were made for it, by address."""

    pointer: _Pointer
    view: View
    # What Triton's compiler says of the descriptor.
    layout: Any
    maps: dict[int, Any]


class Direct:
    """Launches by Triton's C launcher for NVIDIA's GPUs. ``changing``: as for :class:`ByTriton`.

    Raises:
        AttributeError, ImportError, StopIteration, TypeError: Triton has none like it.
    """

    def __init__(self, compiled: Any, launch: Launch, changing: tuple[Argument, ...]) -> None:
        from triton.backends.nvidia import driver as nvidia

        launcher = _plain_launcher(compiled, nvidia.CudaLauncher)
        self._compiled = compiled
        self._run = driver.active.utils.launch
        self._grid = _grid_of(launch)
        self._make_map = nvidia.make_tensordesc_arg
        # The launcher's arguments, which leave out constants.
        self._arguments: list[Any] = []
        self._pointers: list[_Pointer] = []
        self._maps: list[_MapArgument] = []
        self._add_arguments(launch, changing)
        mark = nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)
        self._head = (
            compiled.function,
            launcher.launch_cooperative_grid,
            launcher.launch_pdl,
            compiled.packed_metadata,
            # Metadata for hooks, two hooks and two kinds of scratch.
            None,
            None,
            None,
            None,
            None,
            [mark] * len(self._arguments),
            launcher.kernel_signature,
        )

    def _add_arguments(self, launch: Launch, changing: tuple[Argument, ...]) -> None:
        """Fill the launcher's list, and note which of its places change."""
        layouts = iter(self._compiled.metadata.tensordesc_meta or ())
        kinds = leaves(tuple(self._compiled.src.signature.values()))
        # The signature also has the constants, which come last.
        for kind, value, view in zip(kinds, leaves(launch.args), leaves(changing), strict=False):
            if isinstance(value, TensorDescriptor):
                self._add_map(value, next(layouts), view)
            elif kind != "constexpr":
                if isinstance(view, View) and view.tensor >= 0:
                    place = len(self._arguments)
                    self._pointers.append((place, view.tensor, view.offset))
                self._arguments.append(_address_of(value))

    def _add_map(self, descriptor: TensorDescriptor, layout: Any, view: Argument) -> None:
        if isinstance(view, View):
            pointer = (len(self._arguments), view.tensor, view.offset)
            self._maps.append(_MapArgument(pointer, view, layout, maps={}))
        # A map, then sizes and strides, which stay.
        self._arguments += self._make_map(descriptor, layout, None)

    def run(self, tensors: Sequence[Tensor | None], addresses: Sequence[int], stream: int) -> None:
        arguments = self._arguments.copy()
        for place, tensor, offset in self._pointers:
            arguments[place] = addresses[tensor] + offset
        for argument in self._maps:
            place, tensor, offset = argument.pointer
            address = addresses[tensor] + offset
            tensor_map = argument.maps.get(address)
            if tensor_map is None:
                tensor_map = self._new_map(argument, address, tensors)
            arguments[place] = tensor_map
        self._run(*self._grid, stream, *self._head, arguments)

    def _new_map(
        self, argument: _MapArgument, address: int, tensors: Sequence[Tensor | None]
    ) -> Any:
        """Make and keep the tensor map for ``address``."""
        if len(argument.maps) >= MAPS:
            argument.maps.clear()
        tensor_map = self._make_map(argument.view.of(tensors), argument.layout, None)[0]
        argument.maps[address] = tensor_map
        return tensor_map


def _plain_launcher(compiled: Any, kind: type) -> Any:
    """Triton's launcher of ``compiled``; TypeError if it is not of this ``kind``, or does more than
    launch.
    """
    launcher = compiled.run
    is_known: bool = type(launcher) is kind
    if not is_known or launcher.gsan_enabled:
        raise TypeError("another launcher")
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        raise TypeError("a launch allocates memory")
    return launcher


def launcher_of(launch: Launch, device: torch.device, changing: tuple[Argument, ...]) -> Launcher:
    """Repeats ``launch`` on ``device``. Launches nothing, and compiles nothing that is compiled
    already.
    """
    with on_device(device):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.compiled_with)
        try:
            return Direct(compiled, launch, changing)
        except (AttributeError, ImportError, StopIteration, TypeError):
            return ByTriton(compiled, launch, changing)


def needs_triton() -> bool:
    """Whether launch hooks or debugging of Triton are on."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or runtime.debug)


class _Step:
    """A :class:`Launch` or a :class:`VendorProduct` of any tensors. It keeps no tensors."""

    def __init__(
        self, launch: Launch | VendorProduct, tensors: _CallTensors, device: torch.device
    ) -> None:
        # The launch, with views in place of tensors.
        self._template = _replaced(launch, tensors.view)
        # None for a vendor's product, and under the interpreter.
        self.launcher: Launcher | None = None
        self.name = ""
        if isinstance(launch, Launch) and isinstance(launch.kernel, JITFunction):
            self.launcher = launcher_of(launch, device, self._template.args)
            self.name = launch.kernel.__name__

    def launch_of(
        self, tensors: Sequence[Tensor | None], device: torch.device
    ) -> Launch | VendorProduct:
        """The launch or the product of ``tensors``."""

        def of_tensors(leaf: Argument) -> Argument:
            return leaf.of(tensors, device) if isinstance(leaf, View) else leaf

        launch: Launch | VendorProduct = _replaced(self._template, of_tensors)
        return launch


# A tensor that each run allocates: shape, strides and dtype. A plain tuple, as a pointer.
_Allocation = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _tensors_in(results: Sequence[Result]) -> Iterator[Tensor]:
    for result in results:
        if isinstance(result, Tensor):
            yield result
        else:
            yield from result


def _places_of(results: Sequence[Result]) -> list[int | slice]:
    """Of each result its place among all of their tensors, or a list's slice of them."""
    places: list[int | slice] = []
    end = 0
    for result in results:
        start = end
        if isinstance(result, Tensor):
            end += 1
            places.append(start)
        else:
            end += len(result)
            places.append(slice(start, end))
    return places


class Prepared:
    """The launches of a call, for operands of the layouts that it was prepared with."""

    def __init__(
        self,
        operands: Sequence[Tensor | None],
        results: Sequence[Result],
        launches: Launches,
        taken: Workspace,
        tally: Tally,
    ) -> None:
        self._tally = tally
        self._places = _places_of(results)
        outputs = [*_tensors_in(results)]
        if not all(output.is_contiguous() for output in outputs):
            raise NotPreparable("a result is not contiguous")
        tensors = _CallTensors(operands, outputs, taken)
        # Results, then one piece of scratch.
        self._allocations: list[_Allocation] = [
            (tuple(t.shape), t.stride(), t.dtype) for t in outputs
        ]
        if tensors.scratch_bytes:
            self._allocations.append(((tensors.scratch_bytes,), (1,), torch.uint8))
        self._counts = taken.counters is not None
        self._device = next(t.device for t in (*outputs, *operands) if t is not None)
        self._on_gpu = self._device.type == "cuda"
        self._steps = [_Step(launch, tensors, self._device) for launch in launches]
        self._compiled = any(step.launcher is not None for step in self._steps)

    def run(self, operands: Sequence[Tensor | None]) -> list[Any]:
        """Run the launches on ``operands`` and return the results, tensors and lists of tensors.

        It trusts that the layouts are those of the preparation, and that no capture records the
        stream.
        """
        self._tally.calls += 1
        device = self._device
        empty = torch.empty_strided
        allocated = [
            empty(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype in self._allocations
        ]
        tensors = [*operands, *allocated]
        if self._counts:
            tensors.append(all_counters(device))
        if self._on_gpu and torch.cuda.current_device() != device.index:
            with on_device(device):
                self._launch(tensors)
        else:
            self._launch(tensors)
        return [allocated[place] for place in self._places]

    def _launch(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the launches on operands, results and workspace, on the current device."""
        device = self._device
        addresses: list[int] = []
        stream = 0
        by_launchers = self._compiled and not needs_triton()
        if by_launchers:
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            stream = driver.active.get_current_stream(device.index or 0)
        for step in self._steps:
            launcher = step.launcher
            if by_launchers and launcher is not None:
                launch_counts[step.name] += 1
                launcher.run(tensors, addresses, stream)
            else:
                step.launch_of(tensors, device).run(device)


def prepare(
    operands: Sequence[Tensor | None],
    call: Callable[[], tuple[Sequence[Result], Launches]],
    tally: Tally,
) -> Prepared | None:
    """Prepare the launches of ``call``, of which these are the ``operands``, without running them;
    None if that can't be. ``tally`` counts the runs.

    ``call`` returns results, tensors and lists of tensors, and the launches that fill them.
    """
    with workspace.noted() as taken:
        results, launches = call()
    try:
        return Prepared(operands, results, launches, taken, tally)
    except NotPreparable:
        return None

"""A compiled kernel and its arguments, launched again and again with other addresses.

Two ways: Triton's C launcher itself, where its version and the GPU have one that takes a list of arguments, else the call of
Triton's compiled kernel. The latter makes a CUDA tensor map for each descriptor of each launch, in Python; the former makes one
for each address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.launch.base import Launch, leaves, on_device, with_leaves

# Most tensor maps, of 128 bytes, that one argument of a kernel keeps.
MAPS = 1024


class Slot(NamedTuple):
    """An argument that differs from launch to launch: the address of one of the call's tensors."""

    # Its place among the leaves of the kernel's arguments.
    at: int
    # The tensor's place among the call's, and bytes from its address.
    tensor: int
    offset: int


class MapSlot(NamedTuple):
    """An argument that is a descriptor of one of the call's tensors, or of a part of it."""

    slot: Slot
    # Makes what it describes from the call's tensors.
    described: Callable[[Sequence[Any]], Tensor]


Maps = Sequence[MapSlot]


def descriptor_of(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """A descriptor with the ``fields`` of one that was checked when it was made, for another tensor of the same layout."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(fields, base=base)
    return descriptor


def _flat(launch: Launch) -> list[Any]:
    """The leaves of the arguments, addresses in place of tensors."""
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in leaves(launch.args)]


class ByTriton:
    """Launches by the call of Triton's compiled kernel."""

    def __init__(self, compiled: Any, launch: Launch, pointers: Sequence[Slot], maps: Maps) -> None:
        # The kernel leaves the GPU with this object.
        self._compiled = compiled
        self._run, self._grid = compiled.run, (*launch.grid, 1, 1)[:3]
        self._head = (compiled.function, compiled.packed_metadata, None, None, None)
        self._flat, self._pointers = _flat(launch), pointers
        self._constants = [launch.constants[name] for name in launch.kernel.arg_names if name in launch.constants]
        self._descriptors = [
            (slot.at, described, {**vars(self._flat[slot.at]), "base": None}) for slot, described in maps
        ]
        for slot, _ in maps:
            self._flat[slot.at] = None
        # The arguments' tuples from a list of all leaves, in one expression: a loop would take most of the launch's time.
        places = with_leaves(launch.args, (f"v[{i}]" for i in count()))
        self._nested = eval(f"lambda v: {_display(places)}")

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        flat = self._flat.copy()
        for at, tensor, offset in self._pointers:
            flat[at] = addresses[tensor] + offset
        for at, described, fields in self._descriptors:
            flat[at] = descriptor_of(fields, described(tensors))
        self._run(*self._grid, stream, *self._head, *self._nested(flat), *self._constants)


def _display(values: Any) -> str:
    """Python's text for tuples in tuples of texts."""
    return f"({''.join(f'{_display(value)}, ' for value in values)})" if isinstance(values, tuple) else values


class Direct:
    """Launches by Triton's C launcher for NVIDIA's GPUs.

    Raises:
        AttributeError, ImportError, StopIteration, TypeError: Triton has none like it.
    """

    def __init__(self, compiled: Any, launch: Launch, pointers: Sequence[Slot], maps: Maps) -> None:
        from triton.backends.nvidia import driver as nvidia

        launcher = compiled.run
        if type(launcher) is not nvidia.CudaLauncher or launcher.gsan_enabled:
            raise TypeError("another launcher")
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise TypeError("a launch allocates memory")
        self._compiled = compiled
        self._run, self._grid = driver.active.utils.launch, (*launch.grid, 1, 1)[:3]
        layouts = iter(compiled.metadata.tensordesc_meta or ())
        self._arguments: list[Any] = []
        # Where each leaf is among the launcher's arguments, which leave out constants.
        places = []
        makers: dict[int, Callable[[Tensor], Any]] = {}
        for at, (kind, value) in enumerate(
            zip(leaves(tuple(compiled.src.signature.values())), _flat(launch), strict=False)
        ):
            places.append(len(self._arguments))
            if isinstance(value, TensorDescriptor):
                # A map, then sizes and strides, which stay.
                layout = next(layouts)
                self._arguments += nvidia.make_tensordesc_arg(value, layout, None)
                makers[at] = _map_maker(value, layout, nvidia.make_tensordesc_arg)
            elif kind != "constexpr":
                self._arguments.append(value)
        marks = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)] * len(self._arguments)
        self._head = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
            None, None, None, None, None, marks, launcher.kernel_signature,
        )  # fmt: skip
        self._pointers = [Slot(places[at], tensor, offset) for at, tensor, offset in pointers]
        self._maps = [(places[slot.at], slot, described, makers[slot.at], dict[int, Any]()) for slot, described in maps]

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        arguments = self._arguments.copy()
        for at, tensor, offset in self._pointers:
            arguments[at] = addresses[tensor] + offset
        for at, (_, tensor, offset), described, make, maps in self._maps:
            address = addresses[tensor] + offset
            found = maps.get(address)
            if found is None:
                if len(maps) >= MAPS:
                    maps.clear()
                found = maps[address] = make(described(tensors))
            arguments[at] = found
        self._run(*self._grid, stream, *self._head, arguments)


def _map_maker(descriptor: TensorDescriptor, layout: Any, make: Callable[..., Any]) -> Callable[[Tensor], Any]:
    fields = {**vars(descriptor), "base": None}
    return lambda tensor: make(descriptor_of(fields, tensor), layout, None)[0]


def launcher_of(
    launch: Launch, device: torch.device, pointers: Sequence[Slot] = (), maps: Maps = ()
) -> Direct | ByTriton:
    """Repeats ``launch`` on ``device``. Launches nothing, and compiles nothing that is compiled already.

    ``pointers`` and ``maps``: the slots of arguments that differ from launch to launch; offsets of descriptors are 0.
    """
    with on_device(device):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.compiled_with)
        try:
            return Direct(compiled, launch, pointers, maps)
        except (AttributeError, ImportError, StopIteration, TypeError):
            return ByTriton(compiled, launch, pointers, maps)

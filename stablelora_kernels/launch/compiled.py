"""A compiled kernel and its arguments, launched again and again with other addresses.

Two ways: Triton's C launcher itself, where its version and the GPU have one that takes a list of arguments, else the call of
Triton's compiled kernel. The latter makes a CUDA tensor map for each descriptor of each launch, in Python; the former makes one
for each address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.launch.base import Launch, on_device

# Most tensor maps, of 128 bytes, that one argument of a kernel keeps.
MAPS = 1024


class Slot(NamedTuple):
    """An argument that differs from launch to launch: the address of one of the call's tensors."""

    # Its place among the kernel's arguments.
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


class ByTriton:
    """Launches by the call of Triton's compiled kernel."""

    def __init__(
        self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any], pointers: Sequence[Slot], maps: Maps
    ) -> None:
        # The kernel leaves the GPU with this object.
        self._compiled = compiled
        self._run, self._grid = compiled.run, (*grid, 1, 1)[:3]
        self._head = (compiled.function, compiled.packed_metadata, None, None, None)
        self._arguments, self._pointers = [*arguments], pointers
        self._descriptors = [
            (slot.at, described, {**vars(arguments[slot.at]), "base": None}) for slot, described in maps
        ]
        for slot, _ in maps:
            self._arguments[slot.at] = None

    def run(self, tensors: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        arguments = self._arguments.copy()
        for at, tensor, offset in self._pointers:
            arguments[at] = addresses[tensor] + offset
        for at, described, fields in self._descriptors:
            arguments[at] = descriptor_of(fields, described(tensors))
        self._run(*self._grid, stream, *self._head, *arguments)


class Direct:
    """Launches by Triton's C launcher for NVIDIA's GPUs.

    Raises:
        AttributeError, ImportError, StopIteration, TypeError: Triton has none like it.
    """

    def __init__(
        self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any], pointers: Sequence[Slot], maps: Maps
    ) -> None:
        from triton.backends.nvidia import driver as nvidia

        launcher = compiled.run
        if type(launcher) is not nvidia.CudaLauncher or launcher.gsan_enabled:
            raise TypeError("another launcher")
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise TypeError("a launch allocates memory")
        self._compiled = compiled
        self._run, self._grid = driver.active.utils.launch, (*grid, 1, 1)[:3]
        self._head = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
            None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature,
        )  # fmt: skip
        layouts = iter(compiled.metadata.tensordesc_meta or ())
        self._arguments: list[Any] = []
        # Where each of the kernel's arguments is among the launcher's.
        places = []
        makers: dict[int, Callable[[Tensor], Any]] = {}
        for at, argument in enumerate(arguments):
            places.append(len(self._arguments))
            if isinstance(argument, TensorDescriptor):
                # A map, then sizes and strides, which stay.
                layout = next(layouts)
                self._arguments += nvidia.make_tensordesc_arg(argument, layout, None)
                makers[at] = _map_maker(argument, layout, nvidia.make_tensordesc_arg)
            else:
                self._arguments.append(argument)
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


def launcher_of(launch: Launch, device: torch.device, *rest: Any) -> Direct | ByTriton:
    """Repeats ``launch`` on ``device``. Launches nothing, and compiles nothing that is compiled already.

    ``rest``: all arguments of the kernel in order, constants and descriptors included; the slots of its pointers, and those of
    its descriptors, whose offsets are 0.
    """
    with on_device(device):
        compiled = launch.kernel.warmup(
            *launch.args, grid=launch.grid, enable_fp_fusion=True, **launch.constants, **launch.options
        )
        try:
            return Direct(compiled, launch.grid, *rest)
        except (AttributeError, ImportError, StopIteration, TypeError):
            return ByTriton(compiled, launch.grid, *rest)

"""One launch of a kernel, or one product of the vendor's library: everything it needs, and how it
runs and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.dispatch.tiles import Plan, Tile

# A Triton kernel: a JITFunction, or the interpreter's function.
Kernel = Any
# An argument of a kernel: a tensor, a descriptor, a number, None, or a tuple of such.
Argument = Any
# By their names.
Arguments = dict[str, Argument]

# Launches since the process started, by kernel; tests and benchmarks take differences.
launch_counts: Counter[str] = Counter()


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Kernel
    # The kernel's variant in words, and the reason for its tile.
    variant: str
    reason: str
    grid: tuple[int, ...]
    # Arguments in the kernel's order, its compile-time constants, Triton's options.
    args: tuple[Argument, ...]
    constants: Arguments
    options: dict[str, int]

    @property
    def compiled_with(self) -> Arguments:
        """What Triton takes beside the arguments."""
        constants = self.constants
        if isinstance(self.kernel, JITFunction):
            constants = {name: _marked(value) for name, value in constants.items()}
        # FP fusion is explicit, because Triton 3.10 changes the default, which would change
        # results.
        return {**constants, **self.options, "enable_fp_fusion": True}

    @property
    def arguments(self) -> Arguments:
        """Every argument and constant by its name."""
        args = iter(self.args)
        return {
            name: self.constants[name] if name in self.constants else next(args)
            for name in self.kernel.arg_names
        }

    @property
    def named(self) -> Arguments:
        """:attr:`arguments`, with those in tuples as ``branch.up_row``."""
        arguments = self.arguments
        return dict(_named(arguments, arguments.values()))

    def run(self, device: torch.device) -> None:
        """Run the kernel once on ``device``'s current stream."""
        launch_counts[self.kernel.__name__] += 1
        with on_device(device):
            self.kernel[self.grid](*self.args, **self.compiled_with)


def _marked(constant: Argument) -> Argument:
    """A constant as Triton 3.6 wants it, which compiles a tuple's items only if each is marked."""
    if not isinstance(constant, tuple):
        return constant
    return type(constant)(*map(tl.constexpr, constant))


class VendorProduct(NamedTuple):
    """y = x w^T + bias by the library that PyTorch calls; or y += x w^T."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    y: Tensor
    add: bool = False

    @property
    def variant(self) -> str:
        return "the vendor's product" + flag_words(add=self.add)

    @property
    def reason(self) -> str:
        return "cuBLAS, hipBLASLt or, on a CPU, PyTorch's BLAS"

    def run(self, device: torch.device) -> None:
        launch_counts["vendor"] += 1
        if self.add:
            self.y.addmm_(self.x, self.w.t())
        elif self.bias is None:
            torch.mm(self.x, self.w.t(), out=self.y)
        else:
            torch.addmm(self.bias, self.x, self.w.t(), out=self.y)


Launches = list[Launch | VendorProduct]


def leaves(values: Iterable[Argument]) -> Iterator[Argument]:
    """The values of tuples in tuples, in order."""
    for value in values:
        if isinstance(value, tuple):
            yield from leaves(value)
        else:
            yield value


def _named(names: Iterable[str], values: Iterable[Argument]) -> Iterator[tuple[str, Argument]]:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _named([f"{name}.{field}" for field in fields], value)
        else:
            yield name, value


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one. Triton compiles, loads and launches for that, whatever the
    tensors' device.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tile_options(tile: Tile) -> dict[str, int]:
    """Triton's options for a launch with ``tile``."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def planned(
    kernel: Kernel,
    variant: str,
    plan: Plan,
    programs: int,
    arguments: Arguments,
    constants: Arguments,
) -> Launch:
    """A launch of ``programs`` programs with the tile of ``plan``; ``arguments`` by their names."""
    options = tile_options(plan.tile)
    args = in_order(kernel, arguments, constants)
    return Launch(kernel, variant, plan.reason, (programs,), args, constants, options)


def in_order(kernel: Kernel, arguments: Arguments, constants: Arguments) -> tuple[Argument, ...]:
    """``arguments`` in the order of the kernel's signature, which has ``constants`` as well."""
    args = tuple([arguments[name] for name in kernel.arg_names if name not in constants])
    if len(args) != len(arguments):
        unknown = {*arguments} - {*kernel.arg_names}
        raise TypeError(f"{kernel.__name__} has no arguments {sorted(unknown)}")
    return args


def flag_words(**flags: bool) -> str:
    """The names of the flags that are on, each behind a space."""
    return "".join(f" {name}" for name, on in flags.items() if on)


def tile_words(tile: Tile) -> str:
    """A product's tile in words."""
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"


def described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride begin at multiples of 16 bytes."""
    return (
        t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.stride(0) > 0
    )


class RowsContiguous(NamedTuple):
    """A matrix or its transpose, whichever may have rows of unit stride."""

    matrix: Tensor
    transposed: bool


def rows_contiguous(t: Tensor) -> RowsContiguous:
    """``t``, or its transpose if that one has rows of unit stride."""
    if t.stride(0) == 1:
        return RowsContiguous(t.t(), True)
    return RowsContiguous(t, False)


def descriptor(t: Tensor, rows: int, cols: int, trans: bool = False) -> TensorDescriptor:
    """Of blocks of ``rows`` by ``cols``; the other way round with ``trans``."""
    block = [cols, rows] if trans else [rows, cols]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)

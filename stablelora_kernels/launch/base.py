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

from stablelora_kernels.dispatch.tiles import Plan, Tile

# Launches since the process started, by kernel; tests and benchmarks take differences.
launch_counts: Counter[str] = Counter()


class Launch(NamedTuple):
    """A kernel with everything that its launch needs."""

    kernel: Any
    # The kernel's variant in words, and the reason for its tile.
    variant: str
    reason: str
    grid: tuple[int, ...]
    # Arguments in the kernel's order, its compile-time constants, Triton's options.
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def compiled_with(self) -> dict[str, Any]:
        """What Triton takes beside the arguments."""
        # Triton 3.6 compiles a tuple's constants if each is marked. FP fusion is explicit, because
        # Triton 3.10 changes the default, which would change results.
        marked = isinstance(self.kernel, JITFunction)
        constants = {
            name: type(value)(*map(tl.constexpr, value))
            if marked and isinstance(value, tuple)
            else value
            for name, value in self.constants.items()
        }
        return {**constants, **self.options, "enable_fp_fusion": True}

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument and constant by its name."""
        given = iter(self.args)
        return {
            name: self.constants[name] if name in self.constants else next(given)
            for name in self.kernel.arg_names
        }

    @property
    def named(self) -> dict[str, Any]:
        """:attr:`arguments`, with those in tuples as ``branch.b_row``."""
        arguments = self.arguments
        return dict(_named(arguments, arguments.values()))

    def run(self, device: torch.device) -> None:
        """Run the kernel once on ``device``'s current stream."""
        launch_counts[self.kernel.__name__] += 1
        with on_device(device):
            self.kernel[self.grid](*self.args, **self.compiled_with)


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


def leaves(values: Any) -> Iterator[Any]:
    """The values of tuples in tuples, in order."""
    for value in values:
        if isinstance(value, tuple):
            yield from leaves(value)
        else:
            yield value


def _named(names: Iterable[Any], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _named([f"{name}.{field}" for field in fields], value)
        else:
            yield name, value


def with_leaves(values: tuple[Any, ...], new: Iterator[Any]) -> Any:
    """``values``, each leaf of which is the next of ``new``."""
    made = [with_leaves(value, new) if isinstance(value, tuple) else next(new) for value in values]
    return tuple(made) if type(values) is tuple else type(values)(*made)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one. Triton compiles, loads and launches for that, whatever the
    tensors' device.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tile_options(tile: Tile) -> dict[str, Any]:
    """Triton's options for a launch with ``tile``."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def planned(
    kernel: Any,
    variant: str,
    plan: Plan,
    programs: int,
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> Launch:
    """A launch of ``programs`` programs with the tile of ``plan``."""
    return Launch(
        kernel, variant, plan.reason, (programs,), args, constants, tile_options(plan.tile)
    )


def flag_words(**flags: bool) -> str:
    """The names of the flags that are on, each behind a space."""
    return "".join(f" {name}" for name, on in flags.items() if on)

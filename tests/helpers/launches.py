"""Counting the launches of Triton kernels, and what Triton compiles them for."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="runs where Triton is installed, for launch plans: Linux on x86-64 and aarch64",
)


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """How often each kernel, by its name, was launched in the ``with`` block; it is counted when
    the block ends.
    """
    from stablelora_kernels.launch.base import launch_counts

    before, made = launch_counts.copy(), Counter()
    yield made
    made.update(launch_counts - before)


def specialization(value: Any) -> Any:
    """What Triton's key has of an argument, unless the kernel says do_not_specialize."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return type(value), value == 1, value % 16 == 0
    return type(value)


def described(value: Any, given: Mapping[int, str]) -> Any:
    """An argument of a launch, in words that are equal in two calls of one kind.

    ``given`` names the call's operands by their addresses; what a call allocates itself lies
    elsewhere each time.
    """
    if isinstance(value, Tensor):
        name = given.get(value.data_ptr(), "allocated") if value.numel() else "empty"
        return name, value.dtype, value.shape if name == "allocated" else None
    if hasattr(value, "block_shape"):
        return (
            "descriptor",
            described(value.base, given),
            [*value.shape],
            [*value.strides],
            value.block_shape,
            value.padding,
        )
    return type(value), str(value)


@contextmanager
def recorded_launches(given: Mapping[int, str]) -> Iterator[list[Any]]:
    """All that the launches of the block were told, kernel by kernel; ``given`` as in
    :func:`described`.
    """
    from stablelora_kernels.launch.base import Launch, VendorProduct, leaves

    made: list[Any] = []

    def record(run: Any) -> Any:
        def recording(self: Any, device: Any) -> None:
            if isinstance(self, Launch):
                arguments = [described(value, given) for value in leaves(self.args)]
                made.append(
                    (self.kernel.__name__, self.grid, arguments, self.constants, self.options)
                )
            else:
                operands = (self.x, self.w, self.bias, self.y)
                strides = [None if t is None else (t.shape, t.stride()) for t in operands]
                made.append(("vendor", [described(t, given) for t in operands], strides, self.add))
            run(self, device)

        return recording

    with (
        mock.patch.object(Launch, "run", record(Launch.run)),
        mock.patch.object(VendorProduct, "run", record(VendorProduct.run)),
    ):
        yield made


@contextmanager
def without_plans() -> Iterator[None]:
    """Every call is a first call."""
    from stablelora_kernels import functional
    from stablelora_kernels.ops import plans

    def nothing(kind: str, args: Any) -> None:
        return None

    with (
        mock.patch.object(plans, "key_of", nothing),
        mock.patch.object(functional, "key_of", nothing),
    ):
        yield

"""Bytes that the kernels move, counted in Triton's interpreter.

A byte is *issued* each time that a program asks for it; nobody asks for masked elements. It is *unique* the first time in its
launch: memory must deliver it even if a cache keeps everything else. Caches keep nothing between launches. An atomic operation
reads and writes. The 128 bytes of a descriptor, which the launch uploads, are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.lab.predict.formula import Tensors, Traffic, formula_by_tensor, named_tensors, total
from stablelora_kernels.dispatch import backend


class Counted(NamedTuple):
    """One launch. ``ideal``: the vendor's product; its bytes are the least possible, because its code is not known."""

    kernel: str
    traffic: Traffic
    tensors: Tensors
    ideal: bool = False


class _Bytes:
    """The bytes that elements touch."""

    def __init__(self) -> None:
        # By the width of an element.
        self.addresses: dict[int, list[np.ndarray]] = defaultdict(list)

    def issued(self) -> int:
        return sum(width * part.size for width, parts in self.addresses.items() for part in parts)

    def unique(self) -> int:
        touched = [
            (_distinct(np.concatenate(parts))[:, None] + np.arange(width)).ravel()
            for width, parts in self.addresses.items()
        ]
        return _distinct(np.concatenate(touched)).size if touched else 0


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Sorted. Much faster than np.unique, which hashes."""
    numbers = np.sort(numbers)
    return numbers[np.append(True, numbers[1:] != numbers[:-1])]


class _Recorder:
    """The accesses of one launch, by tensor. Tensors may be given twice, but must not overlap in part."""

    def __init__(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self.spans = []
        for name, t in tensors:
            if t.numel():
                reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                self.spans.append((t.data_ptr(), t.data_ptr() + reach * t.element_size(), name))
        self.read: dict[str, _Bytes] = defaultdict(_Bytes)
        self.written: dict[str, _Bytes] = defaultdict(_Bytes)

    def add(self, sets: Sequence[dict[str, _Bytes]], pointers: Any, mask: Any) -> None:
        addresses = pointers.data.reshape(-1)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)]
        if not addresses.size:
            return
        addresses = addresses.astype(np.int64)
        first = int(addresses[0])
        name = next((name for start, end, name in self.spans if start <= first < end), "elsewhere")
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for touched in sets:
            touched[name].addresses[width].append(addresses)

    def tensors(self) -> Tensors:
        names = dict.fromkeys((*self.read, *self.written))
        return {
            name: Traffic(read.issued(), written.issued(), read.unique(), written.unique())
            for name, read, written in ((name, self.read[name], self.written[name]) for name in names)
        }


@contextmanager
def counted(**labels: Sequence[Tensor]) -> Iterator[list[Counted]]:
    """Count every launch in the body of the ``with`` statement, into the list that it gives.

    ``labels`` name tensors that a kernel finds through a table of addresses; without a label they are "elsewhere". A launch that
    raises is not in the list. Counting covers the whole process, threads included.

    Raises:
        RuntimeError: the kernels do not run in Triton's interpreter.
    """
    if not backend.INTERPRETING:
        raise RuntimeError("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    from stablelora_kernels.launch.lora_common import VendorProduct

    found: list[Counted] = []
    current: list[_Recorder] = []
    others = [(name, tensor) for name, tensors in labels.items() for tensor in tensors]
    call, run = GridExecutor.__call__, VendorProduct.run

    def counting(name: str, *ways: str) -> Any:
        """The interpreter's function ``name``, counting what it reads or writes at its pointers."""
        real = getattr(interpreter_builder, name)
        place = 1 if name.endswith("rmw") else 0
        masks = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}

        # The last arguments differ between releases of Triton.
        def wrapper(*args: Any, **named: Any) -> Any:
            if current:
                mask = args[masks[name]] if name in masks else None
                current[-1].add([getattr(current[-1], way) for way in ways], args[place], mask)
            return real(*args, **named)

        return wrapper

    def counting_call(self: Any, *args: Any, **named: Any) -> Any:
        arguments = dict(zip(self.arg_names, args, strict=False)) | named
        recorder = _Recorder([*named_tensors(arguments).items(), *others])
        current.append(recorder)
        try:
            result = call(self, *args, **named)
        finally:
            current.pop()
        tensors = recorder.tensors()
        found.append(Counted(self.fn.__name__, total(tensors.values()), tensors))
        return result

    def counting_run(self: Any, device: torch.device) -> None:
        run(self, device)
        tensors = formula_by_tensor(self)
        found.append(Counted("vendor", total(tensors.values()), tensors, ideal=True))

    with ExitStack() as stack:
        # All loads and stores of kernels, descriptors' too, end in these.
        for name, *ways in (
            ("create_masked_load", "read"),
            ("create_masked_store", "written"),
            ("create_atomic_rmw", "read", "written"),
            ("create_atomic_cas", "read", "written"),
        ):
            stack.enter_context(patch.object(interpreter_builder, name, counting(name, *ways)))
        stack.enter_context(patch.object(GridExecutor, "__call__", counting_call))
        stack.enter_context(patch.object(VendorProduct, "run", counting_run))
        yield found

"""Bytes that the kernels move, counted in Triton's interpreter.

A byte is *issued* each time that a program asks for it; nobody asks for masked elements. It is
*unique* the first time in its launch: memory must deliver it even if a cache keeps everything else.
Caches keep nothing between launches. An atomic operation reads and writes. The 128 bytes of a
descriptor, which the launch uploads, are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.lab.predict.formula import Tensors, Traffic, formula_by_tensor, named_tensors, total
from stablelora_kernels.dispatch import backend
from stablelora_kernels.launch.base import Launch, VendorProduct

# The interpreter's functions in which all loads and stores of kernels end, descriptors' too: where
# each has its pointers and its mask among its arguments, whether it reads and whether it writes.
# The last arguments differ between releases of Triton.
ACCESSES = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}


class Counted(NamedTuple):
    """The traffic of one launch. The vendor's product counts as the least possible, because its
    code is not known.
    """

    launch: Launch | VendorProduct
    tensors: Tensors

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__ if isinstance(self.launch, Launch) else "vendor"

    @property
    def traffic(self) -> Traffic:
        return total(self.tensors.values())


class _Recorder:
    """The accesses of one launch, by the memory that its tensors are in."""

    def __init__(self, named: dict[str, Any]) -> None:
        memories = [(t.untyped_storage(), name) for name, t in named_tensors(named).items()]
        self.spans = [
            (each.data_ptr(), each.data_ptr() + each.nbytes(), name) for each, name in memories
        ]
        # Addresses that are read and those that are written, by tensor and the bytes of an element.
        self.touched: dict[tuple[str, int], tuple[list[np.ndarray], list[np.ndarray]]] = (
            defaultdict(lambda: ([], []))
        )

    def add(self, pointers: Any, mask: Any, *reads_writes: bool) -> None:
        addresses = pointers.data.reshape(-1)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)]
        if not addresses.size:
            return
        first, width = int(addresses[0]), max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        name = next((name for start, end, name in self.spans if start <= first < end), "elsewhere")
        for parts, moves in zip(self.touched[name, width], reads_writes, strict=True):
            if moves:
                parts.append(addresses.astype(np.int64))

    def tensors(self) -> Tensors:
        found: Tensors = {}
        for (name, width), both in self.touched.items():
            elements = [sum(part.size for part in parts) for parts in both] + [
                _distinct(parts) for parts in both
            ]
            found[name] = total(
                (found.get(name, Traffic()), Traffic(*(width * number for number in elements)))
            )
        return found


def _distinct(parts: list[np.ndarray]) -> int:
    """How many numbers there are, each once. Much faster than np.unique, which hashes."""
    numbers = np.sort(np.concatenate(parts)) if parts else np.empty(0)
    return numbers.size and 1 + np.count_nonzero(np.diff(numbers))


@contextmanager
def counted() -> Iterator[list[Counted]]:
    """Count every launch in the body of the ``with`` statement, into the list that it gives.

    Tensors that a kernel finds through a table of addresses are "elsewhere". A launch that raises
    is not in the list. Counting covers the whole process, threads included.
    """
    if not backend.INTERPRETING:
        raise RuntimeError(
            "bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )
    from triton.runtime.interpreter import interpreter_builder

    found: list[Counted] = []
    current: list[_Recorder] = []
    run, run_vendor = Launch.run, VendorProduct.run

    def counting(real: Any, pointers: int, mask: int | None, reads: bool, writes: bool) -> Any:
        def access(*args: Any, **named: Any) -> Any:
            if current:
                current[-1].add(args[pointers], None if mask is None else args[mask], reads, writes)
            return real(*args, **named)

        return access

    def counting_run(self: Launch, device: torch.device) -> None:
        current.append(_Recorder(self.named))
        try:
            run(self, device)
        finally:
            tensors = current.pop().tensors()
        found.append(Counted(self, tensors))

    def counting_vendor(self: VendorProduct, device: torch.device) -> None:
        run_vendor(self, device)
        found.append(Counted(self, formula_by_tensor(self)))

    with ExitStack() as stack:
        for name, places in ACCESSES.items():
            access = counting(getattr(interpreter_builder, name), *places)
            stack.enter_context(patch.object(interpreter_builder, name, access))
        stack.enter_context(patch.object(Launch, "run", counting_run))
        stack.enter_context(patch.object(VendorProduct, "run", counting_vendor))
        yield found

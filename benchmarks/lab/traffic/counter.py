"""Bytes that the kernels move: counted in Triton's interpreter, by formula, and the least that is possible.

A byte is *issued* each time that a program asks for it; elements that are masked off are not asked for. It is *unique* the
first time in its launch: what memory must deliver where a cache keeps all else. Between launches nothing is kept. An atomic
operation reads and writes. A descriptor's own 128 bytes, which the launch uploads, are not counted.
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

from benchmarks.lab.traffic.formula import (
    Tensors,
    Traffic,
    activation_bytes,
    floor_frozen_backward,
    floor_frozen_forward,
    floor_lora,
    floor_optimizer,
    formula,
    formula_by_tensor,
    named_tensors,
    optimizer_formula,
    total,
)
from stablelora_kernels.dispatch import backend

__all__ = [
    "Counted",
    "Tensors",
    "Traffic",
    "activation_bytes",
    "counted",
    "floor_frozen_backward",
    "floor_frozen_forward",
    "floor_lora",
    "floor_optimizer",
    "formula",
    "formula_by_tensor",
    "optimizer_formula",
    "total",
]


class Counted(NamedTuple):
    """One launch. ``ideal``: the vendor's product, which can't be looked into, so that its bytes are the least possible."""

    kernel: str
    traffic: Traffic
    tensors: Tensors
    ideal: bool = False


class _Bytes:
    """The bytes that elements touch, as flags by page; elements lie at multiples of their size."""

    BITS = 20

    def __init__(self) -> None:
        self.issued = 0
        self.pages: dict[int, np.ndarray] = {}

    def add(self, addresses: np.ndarray, width: int) -> None:
        self.issued += addresses.size * width
        pages, offsets = addresses >> self.BITS, addresses & ((1 << self.BITS) - 1)
        first, last = int(pages.min()), int(pages.max())
        for page in [first] if first == last else np.unique(pages).tolist():
            if page not in self.pages:
                self.pages[page] = np.zeros(1 << self.BITS, bool)
            touched = self.pages[page]
            inside = offsets if first == last else offsets[pages == page]
            for byte in range(width):
                touched[inside + byte] = True

    def unique(self) -> int:
        return sum(int(np.count_nonzero(touched)) for touched in self.pages.values())


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
            touched[name].add(addresses, width)

    def tensors(self) -> Tensors:
        names = dict.fromkeys((*self.read, *self.written))
        return {
            name: Traffic(read.issued, written.issued, read.unique(), written.unique())
            for name, read, written in ((name, self.read[name], self.written[name]) for name in names)
        }


@contextmanager
def counted(**labels: Sequence[Tensor]) -> Iterator[list[Counted]]:
    """Counts every launch in the body of the ``with`` statement; the list that it gives grows launch by launch.

    ``labels`` name tensors that a kernel finds through a table of addresses; without, they are "elsewhere". A launch that
    raises is not in the list. It holds for the whole process, threads included.

    Raises:
        RuntimeError: Triton's interpreter is not what runs the kernels.
    """
    if not backend.INTERPRETING:
        raise RuntimeError("bytes are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    from stablelora_kernels.launch.lora_common import VendorProduct

    found: list[Counted] = []
    current: list[_Recorder] = []
    others = [(name, tensor) for name, tensors in labels.items() for tensor in tensors]
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    update, swap = interpreter_builder.create_atomic_rmw, interpreter_builder.create_atomic_cas
    call, run = GridExecutor.__call__, VendorProduct.run

    # The other loads and stores, descriptors' too, end in these. Their last arguments differ between releases of Triton.
    def counting_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if current:
            current[-1].add((current[-1].read,), pointers, mask)
        return load(pointers, mask, *rest, **named)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if current:
            current[-1].add((current[-1].written,), pointers, mask)
        return store(pointers, value, mask, *rest, **named)

    def counting_update(op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if current:
            current[-1].add((current[-1].read, current[-1].written), pointers, mask)
        return update(op, pointers, value, mask, *rest, **named)

    def counting_swap(pointers: Any, *rest: Any, **named: Any) -> Any:
        if current:
            current[-1].add((current[-1].read, current[-1].written), pointers, None)
        return swap(pointers, *rest, **named)

    def counting_call(self: Any, *args: Any, **named: Any) -> Any:
        arguments = [*zip(self.arg_names, args, strict=False), *named.items()]
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
        for owner, name, replacement in (
            (interpreter_builder, "create_masked_load", counting_load),
            (interpreter_builder, "create_masked_store", counting_store),
            (interpreter_builder, "create_atomic_rmw", counting_update),
            (interpreter_builder, "create_atomic_cas", counting_swap),
            (GridExecutor, "__call__", counting_call),
            (VendorProduct, "run", counting_run),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield found

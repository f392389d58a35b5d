"""Images of memory: the storages of some tensors, copied into one array of bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle


class OutOfBounds(Exception):
    """A program accesses bytes outside all tensors."""


class Region(NamedTuple):
    """A storage's address, its size in bytes and its offset in an image. Name and dtype are those of a tensor in it."""

    number: int
    address: int
    size: int
    offset: int
    name: str
    storage: Any
    dtype: torch.dtype

    def moved(self, pointers: TensorHandle, image: Any) -> TensorHandle:
        """Turn pointers into the storage into pointers into ``image``."""
        delta = image.ctypes.data + self.offset - self.address
        return TensorHandle(pointers.data + np.uint64(delta % 2**64), pointers.dtype)


def _bytes(storage: Any) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class Layout:
    """Where the storages of ``named`` tensors lie in an image."""

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        storages: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages.setdefault(storage.data_ptr(), (name, tensor))
        self.regions: list[Region] = []
        offset = 0
        for number, (address, (name, tensor)) in enumerate(storages.items()):
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            self.regions.append(Region(number, address, size, offset, name, storage, tensor.dtype))
            # Elements stay aligned.
            offset += -(-size // 16) * 16
        self.by_address = sorted(self.regions, key=lambda region: region.address)
        self.addresses = [region.address for region in self.by_address]
        self.offsets = [region.offset for region in self.regions]
        # The image of the bytes that the tensors have now.
        self.initial = np.zeros(offset, np.uint8)
        for region in self.regions:
            self.initial[region.offset : region.offset + region.size] = _bytes(region.storage)

    def write_back(self, image: Any) -> None:
        """Copy an image into the tensors."""
        for region in self.regions:
            _bytes(region.storage)[:] = image[region.offset : region.offset + region.size]

    def locate(self, pointers: Any, size: int) -> tuple[Region, Any]:
        """The region of ``pointers`` [n] to elements of ``size`` bytes, and the bytes' indices in an image, [n, size].

        Raises:
            OutOfBounds: the pointers do not lie in one region.
        """
        first, last = int(pointers.min()), int(pointers.max()) + size
        region = self.by_address[max(bisect_right(self.addresses, first) - 1, 0)]
        if first < region.address or last > region.address + region.size:
            raise OutOfBounds(
                f"bytes {first - region.address} to {last - region.address} of the {region.size} of {region.name}"
            )
        start = (pointers - np.uint64(region.address)).astype(np.int64) + region.offset
        return region, start[:, None] + np.arange(size)

    def region_at(self, index: int) -> Region:
        """The region of an image's byte ``index``."""
        return self.regions[bisect_right(self.offsets, index) - 1]

    def describe(self, index: int, value: bytes) -> str:
        """Name the element at an image's byte ``index`` and its integer ``value``."""
        region = self.region_at(index)
        element = (index - region.offset) // len(value)
        return f"{region.name}[{element}] = {np.frombuffer(value, f'i{len(value)}')[0]}"

    def difference(self, found: Any, expected: Any) -> str | None:
        """Describe how ``found`` differs from ``expected``; None if it does not."""
        if np.array_equal(found, expected):
            return None
        texts = []
        for region in self.regions:
            span = slice(region.offset, region.offset + region.size)
            if np.array_equal(found[span], expected[span]):
                continue
            ours, right = (torch.from_numpy(image[span].copy()).view(region.dtype) for image in (found, expected))
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[region.dtype.itemsize]
            wrong = (ours.view(bits) != right.view(bits)).nonzero().flatten()
            i = int(wrong[0])
            texts.append(
                f"{region.name}: {len(wrong)} of {len(ours)} differ, [{i}] is {ours[i]:.6g}, not {right[i]:.6g}"
            )
        return "; ".join(texts)

"""Memory that a step holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20


def saved_for_backward(run: Callable[[], torch.Tensor], exclude: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that ``run``'s graph keeps, without the storages of
    ``exclude``.
    """
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Identify storages by themselves, not by address: tensors without memory have no address.
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    # The graph keeps every counted storage alive until here, so none was counted twice.
    del loss
    return sum(kept.values())


def status_mib(field: str) -> float | None:
    """A size in /proc/self/status, in MiB; None if the system has none."""
    status = Path("/proc/self/status")
    found = (
        re.search(rf"^{field}:\s+(\d+)", status.read_text(), re.MULTILINE)
        if status.exists()
        else None
    )
    return int(found[1]) / 1024 if found else None

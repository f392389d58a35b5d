"""Tensors that may be DTensors: a process's part, and the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(t: Any) -> torch.Tensor:
    """This process's part of ``t``, sharing its memory; ``t`` itself where it is no DTensor."""
    if not is_sharded(t):
        return t
    # Not to_local(), which makes a new view at every call.
    part = t._local_tensor
    # A collective that is still under way hands out a tensor that waits.
    return part.wait() if hasattr(part, "wait") else part


def local_grad(p: Any) -> torch.Tensor | None:
    """This process's part of the gradient of ``p``, brought to the placements of ``p`` if it has others."""
    grad = p.grad
    if grad is None or not is_sharded(p):
        return grad
    if grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def whole_like(part: torch.Tensor, p: Any) -> torch.Tensor:
    """``part``, of the shape of this process's part of ``p``, as a tensor placed as ``p`` is; it shares its memory."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def part_for(value: Any, p: Any) -> torch.Tensor:
    """The part of a saved ``value`` of the shape of ``p`` that belongs to this process's part of ``p``.

    A value that is placed in another way is redistributed, which all processes must do together; of a whole tensor each takes
    its part.
    """
    if not is_sharded(p):
        return value.full_tensor() if is_sharded(value) else value
    if is_sharded(value):
        if value.device_mesh != p.device_mesh:
            value = value.full_tensor()
        else:
            return local(value if value.placements == p.placements else value.redistribute(placements=p.placements))
    sizes, offsets = _extent(p)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        value = value.narrow(dim, min(offset, value.shape[dim]), size)
    return value


def _extent(p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of this process's part of a DTensor, and where it begins in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(sizes), tuple(offsets)


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, be it sharded or replicated; asked without importing DTensor, which takes a while."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """A DTensor's parts put together, by all processes of its mesh; anything else as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def copy(tensor: Any, value: Tensor) -> None:
    """Write the whole ``value`` to ``tensor``; to each process's part of a DTensor."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def is_first_rank() -> bool:
    """Whether this process is the one of all that are in contact which writes for them."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not available or torch.distributed.get_rank() == 0

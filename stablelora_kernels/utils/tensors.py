"""Tensors that may be DTensors: this process's shard, and the full tensor. And what
``torch.autocast`` asks of own ops.

``torch.distributed.tensor`` is imported only once a DTensor turns up, since the import is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, sharded or replicated."""
    return hasattr(tensor, "device_mesh")


def is_first_rank() -> bool:
    """Whether this process writes files for all: it has rank 0, or there is no process group."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not available or torch.distributed.get_rank() == 0


def local(tensor: Tensor) -> Tensor:
    """This process's shard of ``tensor``, sharing its memory; ``tensor`` itself if it is no
    DTensor.
    """
    if not is_sharded(tensor):
        return tensor
    # Not to_local(): it makes a new view at every call.
    shard = tensor._local_tensor
    # A collective in flight gives a tensor that must be waited for.
    return shard.wait() if hasattr(shard, "wait") else shard


def local_grad(p: Tensor) -> Tensor | None:
    """This process's shard of the gradient of ``p``, redistributed to the placements of ``p`` if it
    has others.
    """
    grad: Any = p.grad
    if grad is None or not is_sharded(p):
        return grad  # type: ignore[no-any-return]
    return _local_placed_as(grad, p)


def local_like(value: Tensor, p: Tensor) -> Tensor:
    """The part of ``value`` that corresponds to this process's shard of ``p``; ``value`` has the
    full shape of ``p``.

    A DTensor with other placements is redistributed, which all ranks must do together. A plain
    tensor is sliced.
    """
    if not is_sharded(p):
        return whole(value)
    if is_sharded(value):
        if value.device_mesh == p.device_mesh:
            return _local_placed_as(value, p)
        value = whole(value)
    sizes, offsets = shard_extent(p)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        value = value.narrow(dim, min(offset, value.shape[dim]), size)
    return value


def _local_placed_as(t: DTensor, p: DTensor) -> Tensor:
    """This process's shard of the DTensor ``t``, which is redistributed if its placements are not
    those of ``p``.
    """
    return local(t if t.placements == p.placements else t.redistribute(placements=p.placements))


def from_local(shard: Tensor, p: Tensor) -> Tensor:
    """``shard``, in the shape of this process's shard of ``p``, as a tensor placed as ``p``; it
    shares the memory.
    """
    if not is_sharded(p):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def shard_extent(p: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of this process's shard of the DTensor ``p``, and its offset in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(sizes), tuple(offsets)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered by all ranks of its mesh; any other tensor, detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def copy(tensor: Tensor, value: Tensor) -> None:
    """Write the full ``value`` to ``tensor``; of a DTensor, each rank writes its shard, scattered
    from rank 0.
    """
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def cast(t: T, dtype: torch.dtype) -> T:
    """``t`` in ``dtype``; None and quantized weights as they are. A call of ``to`` that casts
    nothing takes its time too.
    """
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype is not dtype else t  # type: ignore[return-value]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the surrounding ``torch.autocast`` for devices of this type, or None without
    one.
    """
    # PyTorch raises for the meta device, on which there is no autocast.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def outside_autocast(backward: Callable[..., T]) -> Callable[..., T]:
    """Run an autograd function's ``backward`` in the dtypes of its forward, even if it is called
    inside ``torch.autocast``.
    """

    @functools.wraps(backward)
    def run(ctx: object, *grads: Tensor | None) -> T:
        # A compiled backward is traced outside autocast.
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        device_type = next((grad.device.type for grad in grads if grad is not None), "meta")
        if autocast_dtype(device_type) is None:
            return backward(ctx, *grads)
        with torch.autocast(device_type, enabled=False):
            return backward(ctx, *grads)

    return run


def drop_share(dropout_p: float) -> float:
    """The probability by which dropout drops elements and scales the others: p rounded to 1/32768,
    below 1.

    On a GPU and on a CPU an element takes 15 random bits. Not all may be dropped, which would leave
    nothing to scale.
    """
    return min(round(dropout_p * 32768), 32767) / 32768

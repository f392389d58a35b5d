"""Tables that a step uploads to its device: copies from pinned memory, inside and outside of a CUDA
graph's capture, and the streams that read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# What becomes a tensor on the device: one on the host, a list of numbers, or rows of them.
Table = Tensor | Sequence[float] | Sequence[Sequence[float]]


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def upload(values: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a new tensor on ``device``. A GPU copies from fresh pinned memory, so the host
    does not wait for it.
    """
    host = _on_host(values, dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device, copy=True)


def _on_host(values: Table, dtype: torch.dtype) -> Tensor:
    """``values`` as a tensor in the host's memory."""
    if isinstance(values, Tensor):
        return values
    return torch.tensor(values, dtype=dtype, device="cpu")


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def keep_for_stream(tensors: Iterable[Tensor]) -> None:
    """Once a tensor is freed, let the allocator wait with its memory for what its device's current
    stream does until then.
    """
    for tensor in tensors:
        # Recording a stream is no part of a graph. The engine keeps what captured launches read.
        if tensor.device.type == "cuda" and not capturing():
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Staging:
    """Uploads tables; during a capture, from host memory reserved beforehand.

    A graph repeats its copies at each replay from the same host memory, so that memory may be
    neither freed nor rewritten. Pinned memory cannot be allocated during a capture. So some is
    reserved, and a capture keeps the memory that it uses.
    """

    # A step uploads at most four tables, so this is enough for four captures without a step between
    # them.
    SPARES = 16

    def __init__(self, device: torch.device, size: int, capturable: bool) -> None:
        """``size``: the bytes of the largest table."""
        self.device = device
        self.size = max(size, 1)
        self.wanted = self.SPARES if capturable else 0
        self.spares: list[Tensor] = []
        self.captured: list[Tensor] = []
        self.refill()

    def refill(self) -> None:
        """Replace the reserved memory that captures have used. Call it outside of a capture."""
        while len(self.spares) < self.wanted:
            pinned = self.device.type == "cuda"
            self.spares.append(
                torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            )

    def upload(self, values: Table, dtype: torch.dtype) -> Tensor:
        """``values`` as a tensor on the device. RuntimeError during a capture, if no reserved
        memory is free.
        """
        if not capturing():
            return upload(values, dtype, self.device)
        if not self.spares:
            remedy = (
                "Run a step between captures"
                if self.wanted
                else "Pass capturable=True to the optimizer"
            )
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: its gradients or hyperparameters differ from the last step's, and "
                f"no memory is reserved for their table. {remedy}"
            )
        table = _on_host(values, dtype)
        host = self.spares.pop()
        self.captured.append(host)
        staged = host[: table.nbytes].view(dtype).view(table.shape).copy_(table)
        return torch.empty_like(staged, device=self.device).copy_(staged, non_blocking=True)

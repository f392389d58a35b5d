"""How tables get to the device, also while a CUDA graph is being captured."""

from __future__ import annotations

from typing import Any

import torch

from stablelora_kernels.optim.stochastic_rounding import upload


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Staging:
    """Uploads tables. In a capture it copies from memory that was set aside for it.

    A graph copies anew at each replay, from the same host memory: that may be neither freed nor written again, and pinned memory
    cannot be had in the middle of a capture. So some of it waits here, and what a capture has used stays with it.
    """

    # A step has at most four tables, so four captures without a step between them.
    SPARES = 16

    def __init__(self, device: torch.device, size: int, capturable: bool) -> None:
        """``size``: of the largest table, in bytes."""
        self.device, self.size = device, max(size, 1)
        self.wanted = self.SPARES if capturable else 0
        self.spares: list[torch.Tensor] = []
        self.captured: list[torch.Tensor] = []
        self.refill()

    def refill(self) -> None:
        """Set memory aside again, outside of a capture."""
        while len(self.spares) < self.wanted:
            pinned = self.device.type == "cuda"
            self.spares.append(torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned))

    def upload(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        if not capturing():
            return upload(values, dtype, self.device)
        if not self.spares:
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: gradients or hyper-parameters are not those of the step before, "
                "and no memory is set aside for their table. "
                + ("Run a step between captures" if self.wanted else "Pass capturable=True when the optimizer is made")
            )
        table = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
        host = self.spares.pop()
        self.captured.append(host)
        held = host[: table.nbytes].view(dtype).view(table.shape).copy_(table)
        return torch.empty_like(held, device=self.device).copy_(held, non_blocking=True)

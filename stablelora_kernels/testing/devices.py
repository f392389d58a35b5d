"""Where a call runs: a device by its name, and a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops import plans


@contextmanager
def pretend_gpu(arch: str, processors: int | None = None) -> Iterator[None]:
    """Choose kernels and tiles in the block as on a GPU of ``arch``, such as ``"sm_90"``, for which
    the interpreter stands in.

    ``processors``: its number of processors, if it is not that of the model that
    :func:`stablelora_kernels.explain` knows.

    Raises:
        ValueError: ``arch`` is none that :func:`stablelora_kernels.explain` knows.
    """
    if arch not in problem.DEVICES:
        raise ValueError(f"arch must be one of {', '.join(problem.DEVICES)}, got {arch!r}")
    device = problem.DEVICES[arch]
    device = device._replace(processors=processors or device.processors)
    # Prepared launches are those of the GPU before.
    plans.clear()
    try:
        with mock.patch.object(problem, "device_of", lambda _: device):
            yield
    finally:
        plans.clear()


def torch_device(name: str | None) -> torch.device:
    """The device ``name``; if None, the GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is neither the CPU nor an available GPU.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(
            f"device must be a torch device, got {name!r}: {str(error).splitlines()[0]}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be of type cpu or cuda, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be available, got {name!r} where PyTorch sees {count} GPUs")
    return device

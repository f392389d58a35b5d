"""What limits a GPU while it works, by NVIDIA's management library: its clock, its power, and why it slows down."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

# The columns of a timed row.
LOAD = ("sm_mhz", "watts", "throttle")
# NVML's number of the multiprocessors' clock, and the bits of its reasons for a lower one. Bit 1, an idle GPU, is none.
SM_CLOCK = 1
REASONS = {
    2: "application clocks", 4: "power cap", 8: "slowdown", 16: "sync boost", 32: "thermal", 64: "hardware thermal",
    128: "power brake", 256: "display clock",
}  # fmt: skip


class Load:
    """Readings of one GPU by the driver's libnvidia-ml.so.1. What the library does not tell is missing."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = ctypes.c_void_p()
        self._clocks, self._milliwatts, self._reasons = list[int](), list[int](), 0
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        self._library.nvmlInit_v2()
        # Not by number: NVML's numbers do not follow CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        self._library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(self._gpu))

    def _numbers(self, function: str, kind: Any, *arguments: int) -> list[int]:
        """Return the number that ``function`` tells, or nothing."""
        value = kind()
        if not self._gpu or getattr(self._library, function)(self._gpu, *arguments, ctypes.byref(value)):
            return []
        return [value.value]

    def max_mhz(self) -> int | None:
        return next(iter(self._numbers("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, SM_CLOCK)), None)

    def driver(self) -> str | None:
        words = ctypes.create_string_buffer(80)
        if not self._gpu or self._library.nvmlSystemGetDriverVersion(words, len(words)):
            return None
        return words.value.decode()

    def read(self) -> None:
        """Take a reading. Do so while work is queued, or it is an idle GPU's."""
        self._clocks += self._numbers("nvmlDeviceGetClockInfo", ctypes.c_uint, SM_CLOCK)
        self._milliwatts += self._numbers("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        for bits in self._numbers("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong):
            self._reasons |= bits

    def columns(self) -> dict[str, Any]:
        """Return the lowest clock, the highest power and every reason since the last call."""
        found: dict[str, Any] = {}
        if self._clocks and self._milliwatts:
            reasons = ", ".join(name for bit, name in REASONS.items() if self._reasons & bit)
            found = dict(zip(LOAD, (min(self._clocks), max(self._milliwatts) / 1000, reasons), strict=True))
        self._clocks, self._milliwatts, self._reasons = [], [], 0
        return found

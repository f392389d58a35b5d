"""What ``benchmarks.lab.gpu`` needs from a device: times, CUDA graphs, peak memory. A GPU, and a CPU that stands in for it.

Both classes have the same methods, so a dry run executes the code that measures. On the CPU times come from the host clock,
a "graph" calls the function again, and figures without a meaning there are None. ``python -m benchmarks.lab.gpu.device``
prints, as JSON, what the machine is and what its GPU reaches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.measure import environment, shuffled

Arms = dict[str, Callable[[], Any]]
# Untimed calls of each arm: kernels compile, libraries choose their algorithms, the allocator gets its blocks.
WARMUP = 2


class CudaDevice:
    """One NVIDIA GPU. All work is on one stream of its own, because the default stream cannot be captured."""

    dry = False

    def __init__(self) -> None:
        index = torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        cache = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0) or 2**26
        self._flush = torch.empty(max(4 * cache, 2**27) // 4, dtype=torch.float32, device=self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Fill L2 with other data. Write it and then read it, so that a timed region does not pay for the write-back."""
        self._flush.zero_()
        self._flush.sum()

    def time(
        self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40
    ) -> dict[str, list[float]]:
        """Return seconds per call on the device's clock, by arm. Flush L2 before each call, and shuffle the arms.

        ``queued`` queues a call behind the flush, so that the device never waits for the host (for graphs). Otherwise each call
        starts on an idle device, and includes any host time between launches that the device waits for. There are at least
        ``least`` and at most ``most`` rounds, about as many as fit into ``seconds``.
        """
        names = list(arms)
        events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in names}
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(WARMUP):
            for name in names:
                arms[name]()
        self.synchronize()
        until = time.perf_counter() + seconds
        for turn in range(most):
            if turn >= least and time.perf_counter() > until:
                break
            for name in shuffled(names, turn):
                start, end = events[name]
                self.flush()
                if not queued:
                    self.synchronize()
                start.record()
                arms[name]()
                end.record()
            self.synchronize()
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e-3)
        return samples

    def host_seconds(self, run: Callable[[], Any], times: int = 20) -> list[float]:
        """Return seconds until the call returns. The device is idle at its start, and nothing waits for it."""
        samples = []
        for _ in range(times):
            self.synchronize()
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        self.synchronize()
        return samples

    def capture(self, run: Callable[[], Any], warmup: int = WARMUP) -> Callable[[], None]:
        """Capture ``run`` in a CUDA graph, after ``warmup`` calls outside it, and return the replay.

        The tensors of ``run`` must have been made on the current stream.
        """
        for _ in range(warmup):
            run()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return graph.replay

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Return the most memory that ``run`` holds at once, beyond what was allocated before it."""
        run()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> dict[str, float]:
        """Return what the GPU reaches: bytes a second of a copy, read and written, and operations a second in bf16."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        size = 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        arms: Arms = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        # Let the clocks rise first.
        self.time(arms, 0.5, queued=True, most=100)
        found = self.time(arms, 0.3, queued=True)
        seconds = {name: statistics.median(values) for name, values in found.items()}
        return {"copy_bytes": 2 * source.numel() / seconds["copy"], "bf16_flops": 2.0 * size**3 / seconds["product"]}


class DryDevice:
    """A CPU, on which the kernels run in Triton's interpreter. None of its figures is a measurement."""

    dry = True
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def time(
        self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40
    ) -> dict[str, list[float]]:
        """Call each arm once, whatever the arguments say."""
        return {name: self.host_seconds(arms[name]) for name in shuffled(list(arms), 0)}

    def host_seconds(self, run: Callable[[], Any], times: int = 20) -> list[float]:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]

    def capture(self, run: Callable[[], Any], warmup: int = WARMUP) -> Callable[[], None]:
        return run

    def peak_bytes(self, run: Callable[[], Any]) -> None:
        run()


Device = CudaDevice | DryDevice


def ask(field: str) -> str:
    """Return nvidia-smi's answer about the first GPU, without units."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.split("\n")[0].strip()


def mhz(field: str) -> float | None:
    try:
        return float(ask(field))
    except ValueError:
        return None


def machine() -> dict[str, Any]:
    """Return the machine, its versions, and its GPU (None without one) with what that reaches."""
    found = environment()
    if not torch.cuda.is_available():
        return found | {"gpu": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": ask("driver_version"),
    }
    # The clock just after the products, while it is still theirs.
    return found | CudaDevice().ceilings() | {"clock_mhz": mhz("clocks.sm"), "max_clock_mhz": mhz("clocks.max.sm")}


if __name__ == "__main__":
    print(json.dumps(machine()))

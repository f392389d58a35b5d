"""What ``benchmarks.lab.gpu`` asks of a device: times, CUDA graphs, memory. One class for a GPU, and one that stands in on a CPU.

Both have the same methods, so that a dry run goes through the code that measures. The stand-in's times are a host clock's, its
graphs call the function again, and what has no meaning without a GPU is None.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measure import shuffled

Arms = dict[str, Callable[[], Any]]
# Calls of an arm before it is timed: kernels are compiled, libraries choose, the allocator has its blocks.
WARMUP = 2


class Captured:
    """A captured function: ``replay()`` runs it on what its input tensors hold then, into ``outputs``, the same tensors."""

    def __init__(self, replay: Callable[[], None], outputs: Any = None) -> None:
        self.replay, self.outputs = replay, outputs


class CudaDevice:
    """One NVIDIA GPU. All work is on one stream that is not the default one, which could not be captured."""

    dry = False

    def __init__(self) -> None:
        index = torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        properties = torch.cuda.get_device_properties(index)
        self.name, self.arch = properties.name, f"sm_{properties.major}{properties.minor}"
        cache = getattr(properties, "L2_cache_size", 0) or 2**26
        self._flush = torch.empty(max(4 * cache, 2**27) // 4, dtype=torch.float32, device=self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def flush(self) -> None:
        """Put something else into L2: written, and then read, so that a timed region doesn't pay for writing it back."""
        self._flush.zero_()
        self._flush.sum()

    def time(
        self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40
    ) -> dict[str, list[float]]:
        """Seconds a call on the device's clock, by arm; L2 flushed before each, arms in shuffled order, call by call.

        ``queued``: launches are queued behind the flush, so that the device waits for no host (for graphs). Otherwise every
        call starts on an idle device, and the host's time between launches counts where the device has to wait for it.
        At least ``least`` and at most ``most`` rounds, of which about as many as ``seconds`` hold.
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
        """Seconds until the call returns, on a device that is idle when it starts; it is not waited for inside."""
        samples = []
        for _ in range(times):
            self.synchronize()
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        self.synchronize()
        return samples

    def capture(self, run: Callable[[], Any], warmup: int = WARMUP) -> Captured:
        """``run`` in a CUDA graph, after ``warmup`` calls outside it. Its tensors must have been made on the current stream."""
        for _ in range(warmup):
            run()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = run()
        return Captured(graph.replay, outputs)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """The most memory that ``run`` holds at once beyond what is held already; what it returns is let go."""
        run()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> dict[str, float]:
        """What this GPU reaches: a copy's bytes a second, read and written, and a large bf16 product's operations a second."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        size = 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        arms: Arms = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        # The clocks rise first.
        self.time(arms, 0.5, queued=True, most=100)
        found = self.time(arms, 0.3, queued=True)
        seconds = {name: statistics.median(values) for name, values in found.items()}
        return {"copy_bytes": 2 * source.numel() / seconds["copy"], "bf16_flops": 2.0 * size**3 / seconds["product"]}


class DryDevice:
    """A CPU, on which the kernels run in Triton's interpreter. Nothing that it says is a measurement."""

    dry = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        # What dispatch takes the interpreter for.
        self.name, self.arch = "H100, pretended", "sm_90"

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 2**62

    def flush(self) -> None:
        pass

    def time(
        self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40
    ) -> dict[str, list[float]]:
        """One call of each arm, whatever is asked for."""
        samples: dict[str, list[float]] = {}
        for name in shuffled(list(arms), 0):
            start = time.perf_counter()
            arms[name]()
            samples[name] = [time.perf_counter() - start]
        return samples

    def host_seconds(self, run: Callable[[], Any], times: int = 20) -> list[float]:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]

    def capture(self, run: Callable[[], Any], warmup: int = 0) -> Captured:
        """As a capture, this computes nothing; ``outputs`` are there after the first replay."""
        for _ in range(warmup):
            run()
        captured = Captured(lambda: None)

        def replay() -> None:
            new = run()
            if captured.outputs is None:
                captured.outputs = new
            else:
                _copy(captured.outputs, new)

        captured.replay = replay
        return captured

    def peak_bytes(self, run: Callable[[], Any]) -> None:
        run()

    def ceilings(self) -> dict[str, float]:
        return {}


Device = CudaDevice | DryDevice


def _copy(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        with torch.no_grad():
            old.copy_(new)
    elif isinstance(old, (tuple, list)):
        for one, other in zip(old, new, strict=True):
            _copy(one, other)

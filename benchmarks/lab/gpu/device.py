"""What ``benchmarks.lab.gpu`` needs from a device: times, CUDA graphs, peak memory. A GPU, and a CPU that stands in for it.

Both classes have the same methods, so a dry run executes the code that measures. On the CPU times come from the host clock,
a "graph" calls the function again, and figures without a meaning there are None. ``python -m benchmarks.lab.gpu.device``
prints, as JSON, what the machine is and what its GPU reaches.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.common.measure import environment, shuffled
from benchmarks.lab.gpu.load import Load

Arms = dict[str, Callable[[], Any]]
# Untimed calls of each arm: kernels compile, libraries choose their algorithms, the allocator gets its blocks.
WARMUP = 2
# A graph of a short call holds so many calls that its own launch, of a few microseconds, is a small share; at most MOST_CALLS.
GRAPH_SECONDS, MOST_CALLS = 1e-3, 20


class Timing(NamedTuple):
    """Seconds per call, a sample for each round, and the GPU's load meanwhile."""

    seconds: list[float]
    load: dict[str, Any]


class Graph:
    """A captured sequence of ``calls`` calls."""

    def __init__(self, replay: Callable[[], Any], calls: int) -> None:
        self._replay, self.calls = replay, calls

    def __call__(self) -> None:
        self._replay()


class CudaDevice:
    """One NVIDIA GPU. All work is on one stream of its own, because the default stream cannot be captured."""

    dry = False

    def __init__(self) -> None:
        index = torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self._cache = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0) or 2**26
        self._flush = torch.empty(max(4 * self._cache, 2**27) // 4, dtype=torch.float32, device=self.device)
        self.load = Load(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Fill L2 with other data. Write it and then read it, so that a timed region does not pay for the write-back."""
        self._flush.zero_()
        self._flush.sum()

    def rotation(self, bytes_each: int) -> int:
        """Return how many sets of weights, used in turn, are larger than L2 twice over."""
        return min(MOST_CALLS, math.ceil(2 * self._cache / bytes_each) + 1)

    def time(self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40) -> dict[str, Timing]:
        """Return seconds per call on the device's clock, by arm. Flush L2 before each sample, and shuffle the arms.

        The time of a :class:`Graph` is divided by its calls. ``queued`` queues a sample behind the flush, so that the device
        never waits for the host (for graphs). Otherwise each call starts on an idle device, and includes any host time between
        launches that the device waits for. There are at least ``least`` and at most ``most`` rounds, about as many as fit into
        ``seconds``.
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
            # The GPU is still at work.
            self.load.read()
            self.synchronize()
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e-3 / getattr(arms[name], "calls", 1))
        load = self.load.columns()
        return {name: Timing(values, load) for name, values in samples.items()}

    def host_seconds(self, run: Callable[[], Any], times: int = 20) -> float:
        """Return the median of the seconds until the call returns. The device is idle at its start, and nothing waits for it."""
        samples = []
        for _ in range(times):
            self.synchronize()
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        self.synchronize()
        return statistics.median(samples)

    def capture(self, runs: Sequence[Callable[[], Any]], most: int = MOST_CALLS) -> Graph:
        """Capture calls of ``runs``, in turn, in one CUDA graph, after WARMUP calls of each outside it.

        ``runs`` do the same with other weights. Their tensors must have been made on the current stream.
        """
        for run in runs:
            for _ in range(WARMUP):
                run()
        self.synchronize()
        start = time.perf_counter()
        runs[0]()
        self.synchronize()
        seconds = time.perf_counter() - start
        calls = max(1, min(most, math.ceil(GRAPH_SECONDS / seconds)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for call in range(calls):
                runs[call % len(runs)]()
        return Graph(graph.replay, calls)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Return the most memory that ``run`` holds at once, beyond what was allocated before it."""
        run()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> dict[str, Any]:
        """Return what the GPU reaches: bytes a second of a copy, read and written, operations a second in bf16, and its load."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        size = 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        arms: Arms = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        # Let the clocks rise first.
        self.time(arms, 0.5, queued=True, most=100)
        found = self.time(arms, 0.3, queued=True)
        seconds = {name: statistics.median(timing.seconds) for name, timing in found.items()}
        return {
            "copy_bytes": 2 * source.numel() / seconds["copy"],
            "bf16_flops": 2.0 * size**3 / seconds["product"],
            **found["product"].load,
        }


class DryDevice:
    """A CPU, on which the kernels run in Triton's interpreter. None of its figures is a measurement."""

    dry = True
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def rotation(self, bytes_each: int) -> int:
        return 2

    def time(self, arms: Arms, seconds: float, *, queued: bool, least: int = 5, most: int = 40) -> dict[str, Timing]:
        """Call each arm once, whatever the arguments say."""
        return {name: Timing([self.host_seconds(arms[name])], {}) for name in shuffled(list(arms), 0)}

    def host_seconds(self, run: Callable[[], Any], times: int = 20) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def capture(self, runs: Sequence[Callable[[], Any]], most: int = MOST_CALLS) -> Graph:
        return Graph(runs[-1], 1)

    def peak_bytes(self, run: Callable[[], Any]) -> None:
        pass


Device = CudaDevice | DryDevice


def machine() -> dict[str, Any]:
    """Return the machine, its versions, and its GPU (None without one) with what that reaches."""
    found = environment()
    if not torch.cuda.is_available():
        return found | {"gpu": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = CudaDevice()
    found |= {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": device.load.driver(),
        "max_sm_mhz": device.load.max_mhz(),
    }
    return found | device.ceilings()


if __name__ == "__main__":
    print(json.dumps(machine()))

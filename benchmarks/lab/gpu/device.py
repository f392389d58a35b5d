"""What ``benchmarks.lab.gpu`` needs from a device: times, CUDA graphs, peak memory, and the load of
the GPU meanwhile.

In a dry run a CPU stands in for the GPU: times come from the host's clock, and a graph calls its
function.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.common.measure import shuffled

Run = Callable[[], Any]
# What is timed, and how many calls it makes if it is a CUDA graph; 0 if it is not.
Arm = tuple[Run, int]
# Seconds per call, round by round: the device's, and those until the call returns to the host.
Samples = tuple[list[float], list[float]]
# Untimed calls of each arm: kernels compile, libraries choose their algorithms, the allocator gets
# its blocks.
WARMUP = 2
# A graph of a short call holds so many calls that its own launch, of a few microseconds, is a small
# share; at most MOST_CALLS.
GRAPH_SECONDS, MOST_CALLS = 1e-3, 20
# There are at least and at most so many rounds.
LEAST, MOST = 5, 40
# NVML's reasons for a lower clock. Bit 1, an idle GPU, is none.
REASONS = {
    2: "application clocks", 4: "power cap", 8: "slowdown", 16: "sync boost", 32: "thermal", 64: "hardware thermal",
    128: "power brake", 256: "display clock",
}  # fmt: skip


class HostEvent:
    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


def reading() -> list[tuple[int, int, int]]:
    """Return NVML's clock in MHz, power in mW and reasons for a lower clock, nothing without
    nvidia-ml-py.
    """
    if not find_spec("pynvml"):
        return []
    import pynvml

    try:
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(torch.cuda._get_pynvml_handler())
        return [(torch.cuda.clock_rate(), torch.cuda.power_draw(), reasons)]
    except pynvml.NVMLError:
        return []


def load(readings: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return the columns of a row: the lowest clock, the highest power, and every reason for a
    lower clock.
    """
    if not readings:
        return {}
    clocks, milliwatts, bits = zip(*readings, strict=True)
    reasons = [name for bit, name in REASONS.items() if any(bit & each for each in bits)]
    return {"sm_mhz": min(clocks), "watts": max(milliwatts) / 1000, "throttle": ", ".join(reasons)}


class Device:
    """One NVIDIA GPU, with all work on one stream of its own, because the default stream cannot be
    captured. Or a CPU.
    """

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, torch.device("cpu")
        if not dry:
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.stream = torch.cuda.Stream()
            torch.cuda.set_stream(self.stream)
            # No graph reads what another one wrote, so all may use the same memory.
            self._pool = torch.cuda.graph_pool_handle()
            self._cache = getattr(
                torch.cuda.get_device_properties(self.device), "L2_cache_size", 2**26
            )
            self._flush = torch.empty(
                max(4 * self._cache, 2**27), dtype=torch.uint8, device=self.device
            )

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def replicas(self, bytes_each: int) -> int:
        """Return how many sets of weights, used in turn, are larger than L2 twice over."""
        return 2 if self.dry else max(1, min(MOST_CALLS, math.ceil(2 * self._cache / bytes_each)))

    def time(
        self, arms: Mapping[Any, Arm], seconds: float
    ) -> tuple[dict[Any, Samples], dict[str, Any]]:
        """Return the samples by arm, and the columns of the load. Flush L2 before each sample, and
        shuffle the arms.

        A graph is queued behind the flush, so that the device never waits for the host, and its
        time is divided by its calls. Any other call starts on an idle device, and its time includes
        what the device waits for the host between launches. There are as many rounds as fit into
        ``seconds``; in a dry run there is one.
        """
        event: Any = HostEvent if self.dry else lambda: torch.cuda.Event(enable_timing=True)
        events = {name: (event(), event()) for name in arms}
        found = {name: ([], []) for name in arms}
        readings = []
        for run, _ in () if self.dry else [*arms.values()] * WARMUP:
            run()
        self.synchronize()
        until = time.perf_counter() + seconds
        for turn in range(1 if self.dry else MOST):
            if turn >= LEAST and time.perf_counter() > until:
                break
            for name in shuffled(list(arms), turn):
                (run, calls), (start, end) = arms[name], events[name]
                if not self.dry:
                    # Write, and then read: a timed region must not pay for the write-back.
                    self._flush.zero_().max()
                if not calls:
                    self.synchronize()
                start.record()
                begun = time.perf_counter()
                run()
                found[name][1].append(time.perf_counter() - begun)
                end.record()
            # The GPU is still at work.
            readings += [] if self.dry else reading()
            self.synchronize()
            for name, (start, end) in events.items():
                found[name][0].append(1e-3 * start.elapsed_time(end) / max(1, arms[name][1]))
        return found, load(readings)

    def capture(self, runs: Sequence[Run], most: int = MOST_CALLS) -> Arm:
        """Capture calls of ``runs``, in turn, in one CUDA graph, after WARMUP calls of each outside
        it.

        ``runs`` do the same with other weights. Their tensors must have been made on the current
        stream.
        """
        if self.dry:
            return runs[-1], 1
        for run in [*runs] * WARMUP:
            run()
        self.synchronize()
        start = time.perf_counter()
        runs[0]()
        self.synchronize()
        calls = max(1, min(most, math.ceil(GRAPH_SECONDS / (time.perf_counter() - start))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            for call in range(calls):
                runs[call % len(runs)]()
        return graph.replay, calls

    def peak_bytes(self, run: Run) -> int:
        """Return the most memory that ``run`` holds at once, beyond what was allocated before it."""
        if self.dry:
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

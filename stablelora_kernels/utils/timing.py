"""Time several arms fairly on a machine that drifts, and describe the machine."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
PACKAGES = ("torch", "triton", "peft", "transformers")


def synchronize() -> None:
    """Wait for the GPU, if this process has used one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def shuffled(arms: Sequence[T], turn: int) -> list[T]:
    """``arms`` in an order that depends on ``turn`` alone.

    Not a rotation, in which each arm would always run after the same other arm, with its caches and
    its heap.
    """
    return random.Random(turn).sample(list(arms), len(arms))


def interleave(
    arms: dict[str, Callable[[], None]],
    *,
    warmup: int,
    iters: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each arm, ``iters`` samples each, after ``warmup`` untimed rounds.

    The arms alternate call by call in shuffled order, so that a drift of the machine hits all of
    them alike. ``clock``: ``time.process_time`` on a machine that others use, too; by default the
    usual ``time.perf_counter``.
    """
    clock = clock or time.perf_counter
    if iters < 1 or warmup < 0:
        raise ValueError(
            f"iters must be at least 1 and warmup at least 0, got {iters} and {warmup}"
        )
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-warmup, iters):
        for name in shuffled(list(arms), turn):
            synchronize()
            start = clock()
            arms[name]()
            synchronize()
            if turn >= 0:
                samples[name].append(clock() - start)
    return samples


class Interval(NamedTuple):
    """A median, and the ends of its 95 % confidence interval."""

    median: float
    low: float
    high: float


# Fewer samples have no 95 % interval: their whole range misses the median with 2 / 2^5 = 6 %.
MIN_SAMPLES_OF_INTERVAL = 6


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of independent samples, between two of them that enclose the true median with at
    least 95 %, whatever the distribution.

    The number of samples below the true median is binomial with probability 1/2. So the interval
    leaves out ``outside`` samples at either end, the most whose two tails have at most 5 %.
    """
    # Imported here: with decimals and fractions it would take time at every start.
    import statistics

    count = len(samples)
    if count < MIN_SAMPLES_OF_INTERVAL:
        raise ValueError(f"samples must be at least {MIN_SAMPLES_OF_INTERVAL}, got {count}")
    ordered = sorted(samples)
    outside = 0
    tail = 1 / 2**count
    while tail + math.comb(count, outside + 1) / 2**count <= 0.025:
        outside += 1
        tail += math.comb(count, outside) / 2**count
    return Interval(statistics.median(ordered), ordered[outside], ordered[count - 1 - outside])


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The conditions of a measurement: machine, versions, date and load."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }

"""Dropout's two kinds of masks on a CPU: bools, and positions of the dropped elements.

    python -m benchmarks.lab.masks [--rounds 40]

A row has microseconds, medians of rounds in which the four take turns, on one thread: to draw a
mask, and to apply it to bfloat16. The last column is what a layer takes with positions over what it
takes with bools: one draw, and a use in forward and in backward. Below 1, positions pay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch

from benchmarks.common.measure import environment
from stablelora_kernels.ops import dropout

SIZES = (1 << 15, 128 * 576, 128 * 1536, 1024 * 4096)
PROBABILITIES = (0.05, 0.1, 0.15, 0.2, 0.25)


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: 1e6 * statistics.median(of_call) for name, of_call in times.items()}


def row(size: int, p: float, rounds: int) -> dict[str, float]:
    """The times of masks of ``size`` elements."""
    x = torch.randn(size).bfloat16()
    share = dropout.drop_share(p)
    bools = dropout._draw_bools((size,), torch.device("cpu"), share, None)
    positions = dropout._draw_positions(size, share, None)
    took = microseconds(
        {
            "draw bools": lambda: dropout._draw_bools((size,), torch.device("cpu"), share, None),
            "draw positions": lambda: dropout._draw_positions(size, share, None),
            "apply bools": lambda: dropout.masked(x, bools),
            "apply positions": lambda: dropout.masked(x, positions),
        },
        rounds,
    )
    with_positions = took["draw positions"] + 2 * took["apply positions"]
    with_bools = took["draw bools"] + 2 * took["apply bools"]
    return {"elements": size, "p": p, **took, "positions over bools": with_positions / with_bools}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.masks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(environment())
    rows = [row(size, p, args.rounds) for size in SIZES for p in PROBABILITIES]
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()

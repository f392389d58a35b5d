"""What does a shrink cost: one step of fused AdamW alone, with a StableShrink, and of StableLoRAAdamW?

    python -m benchmarks.lab.shrink_cost [--rounds 60]      # 20 seconds

A CPU's time is that of one thread, so that another program beside it matters less. The arms take turns;
a ratio is of the steps of one round, and its quartiles are in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.common import optimizers
from stablelora_kernels.testing import make_pairs

# Pairs, rank and width.
SIZES = ((14, 16, 512), (64, 8, 2048), (224, 16, 576))
ARMS = (optimizers.ADAMW_FUSED, optimizers.SHRINK, optimizers.OURS)


def rows(sizes: tuple[tuple[int, int, int], ...], rounds: int) -> Iterator[str]:
    """A line a size, state and arm. A sixth of the rounds before them is not counted."""
    for pairs, r, width in sizes:
        for latched in (False, True):
            steps = {}
            for arm in ARMS:
                made = make_pairs(pairs, r, width, torch.device("cpu"), latched)
                steps[arm] = optimizers.build(arm, made, lr=optimizers.LR)
            seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for turn in range(-(rounds // 6), rounds):
                for arm, optimizer in steps.items():
                    before = time.thread_time()
                    optimizer.step()
                    if turn >= 0:
                        seconds[arm].append(time.thread_time() - before)
            base = seconds[optimizers.ADAMW_FUSED]
            state = "latched" if latched else "shrinking"
            for arm in ARMS:
                ratios = [one / other for one, other in zip(seconds[arm], base, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                yield (
                    f"{pairs} pairs r{r} width {width}, {state}: {arm} {1e3 * statistics.median(seconds[arm]):.2f} ms, "
                    f"{middle:.2f} ({low:.2f} to {high:.2f}) of {optimizers.ADAMW_FUSED}"
                )


def main() -> None:
    parser = argparse.ArgumentParser("shrink_cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(SIZES, options.rounds):
        print(row)


if __name__ == "__main__":
    main()

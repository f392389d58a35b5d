"""One optimizer step: Algorithm 1 written naively over torch.optim.AdamW, fused AdamW without it, and ours.

    python -m benchmarks.bench_stable_adamw [--pairs 64] [--r 8] [--width 2048] [--device cpu] [--json FILE]

Every arm has parameters, gradients and moments of its own; arms alternate call by call. Measured while every pair still
shrinks, and after all have latched. On a GPU times include the wait for it, and launches are counted elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measure import environment, interleave, store, summarize
from benchmarks.common.optimizers import SHRINK_RATIO, NaiveStableAdamW
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import make_pairs

OURS, FUSED = "StableLoRAAdamW", "AdamW fused, no Algorithm 1"
NAIVE = ("naive Algorithm 1 over AdamW", "naive Algorithm 1 over AdamW foreach")


def measure(
    count: int, r: int, width: int, device: str, latched: bool, warmup: int, iters: int
) -> dict[str, dict[str, float]]:
    """Milliseconds a step of every arm: median and quartiles."""

    def fresh() -> list[LoRAPair]:
        return make_pairs(count, r, width, device, latched)

    # So small that no pair latches within the measurement.
    lr = 1e-6
    plain = torch.optim.AdamW([p for pair in fresh() for p in (pair.A, pair.B)], lr=lr, fused=True)
    ours = StableLoRAAdamW(fresh(), lr=lr, shrink_ratio=SHRINK_RATIO)
    arms: dict[str, Callable[[], None]] = {
        # AdamW's own choice is a loop on a CPU and foreach on a GPU.
        NAIVE[0]: NaiveStableAdamW(fresh(), lr).step,
        NAIVE[1]: NaiveStableAdamW(fresh(), lr, foreach=True).step,
        FUSED: plain.step,
        OURS: ours.step,
    }
    samples = interleave(arms, warmup=warmup, iters=iters)
    if {pair.stable for pair in ours.stability()} != {latched}:
        raise RuntimeError(f"the pairs were to be {'latched' if latched else 'shrinking'} throughout")
    return {name: {k: v * 1e3 for k, v in summarize(values).items()} for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("pairs", "r", "width", "device", "warmup", "iters")}
    report: dict[str, Any] = {"settings": settings, "milliseconds": {}, "environment": environment()}
    for latched in (False, True):
        state = "latched" if latched else "shrinking"
        rows = measure(args.pairs, args.r, args.width, args.device, latched, args.warmup, args.iters)
        report["milliseconds"][state] = rows
        ours = rows[OURS]["median"]
        print(f"\n{args.pairs} pairs, r {args.r}, width {args.width}, {args.device}, every pair {state}; ms a step")
        print(f"{'':38} {'median':>8} {'q1':>8} {'q3':>8}   {'/ ours':>6}")
        for name, row in rows.items():
            print(f"{name:38} {row['median']:8.3f} {row['q1']:8.3f} {row['q3']:8.3f}   {row['median'] / ours:6.2f}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    store(args.json, report)


if __name__ == "__main__":
    main()

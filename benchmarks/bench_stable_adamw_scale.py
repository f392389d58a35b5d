"""How a step's cost grows with parameters and pairs, beside torch.optim.AdamW(fused=True): time, time on the host, memory.

    python -m benchmarks.bench_stable_adamw_scale [--device cpu] [--iters 20] [--json FILE]

Three tables. Time: whole steps, the two arms alternating call by call, every pair latched or every pair shrinking. Host: a
step's Python until the launch, or PyTorch's operator, which are left out; with gradients at the addresses of the step before
(``kept``), and elsewhere each time (``new``). Memory: what the Triton step keeps on the device beside parameters, gradients and
moments, against AdamW's step counters; ``allocated`` counts as CUDA's caching allocator does, in units of 512 bytes.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    # The launch is left out, yet the backend has to be one that could run here.
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.common.measure import environment, interleave, store, summarize
from benchmarks.common.optimizers import SHRINK_RATIO
from stablelora_kernels.dispatch.backend import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import make_pairs

PARAMETERS = (100_000, 1_000_000, 10_000_000, 100_000_000)
PAIRS = (8, 32, 128, 512, 2000)
ALLOCATED = 512
R = 8


def halves(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [p for pair in pairs for p in (pair.A, pair.B)]


def time_of(count: int, parameters: int, device: str, latched: bool, iters: int) -> dict[str, Any]:
    """Milliseconds a step of both arms, at ``count`` pairs of ``parameters`` elements in all."""
    width = max(1, round(parameters / count / 2 / R))
    backend = "auto" if device != "cpu" else "torch"
    fused = torch.optim.AdamW(halves(make_pairs(count, R, width, device, latched)), lr=1e-6, fused=True)
    ours = StableLoRAAdamW(make_pairs(count, R, width, device, latched), lr=1e-6, shrink_ratio=SHRINK_RATIO)
    with use_backend(backend):
        samples = interleave({"fused": fused.step, "ours": ours.step}, warmup=3, iters=iters)
    if {pair.stable for pair in ours.stability()} != {latched}:
        raise RuntimeError(f"the pairs were to be {'latched' if latched else 'shrinking'} throughout")
    elements = 2 * count * R * width
    row: dict[str, Any] = {"pairs": count, "parameters": elements, "latched": latched}
    for arm, values in samples.items():
        row |= {f"{arm}_{key}": 1e3 * value for key, value in summarize(values).items()}
    # Parameter, gradient and two moments are read, all but the gradient written.
    return row | {"ours_GB_per_s": 28 * elements / row["ours_median"] / 1e6}


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Neither arm gets to the device."""
    from stablelora_kernels.kernels.stable_adamw import norms
    from stablelora_kernels.kernels.stable_adamw import step as stable_adamw

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with (
        mock.patch.object(stable_adamw, "launch", nothing),
        mock.patch.object(norms, "launch", nothing),
        mock.patch.object(torch, "_fused_adamw_", nothing),
        # Of the fused step's counters, a launch or two of its own on a GPU.
        mock.patch.object(torch, "_foreach_add_", nothing),
    ):
        yield


def host_time_of(count: int, device: str, iters: int) -> dict[str, Any]:
    """Microseconds of the host a step, of ``count`` pairs."""
    arms: dict[str, Callable[[], None]] = {}
    for name in ("kept", "new"):
        for arm in ("fused", "ours"):
            pairs = make_pairs(count, 2, 8, device, False)
            made = torch.optim.AdamW(halves(pairs), fused=True) if arm == "fused" else StableLoRAAdamW(pairs)
            # Two sets in turn are never where the other was.
            sets = [[torch.zeros_like(p) for p in halves(pairs)] for _ in range(2)]
            arms[f"{arm}, {name}"] = made.step
            if name == "new":
                arms[f"{arm}, {name}"] = _with_others(made.step, halves(pairs), sets)
    with use_backend("triton"), nothing_launched():
        samples = interleave(arms, warmup=3, iters=iters)
        # Setting the gradients is not the step's.
        pairs = make_pairs(count, 2, 8, device, False)
        sets = [[torch.zeros_like(p) for p in halves(pairs)] for _ in range(2)]
        setting = interleave({"set": _with_others(lambda: None, halves(pairs), sets)}, warmup=1, iters=iters)["set"]
    row: dict[str, Any] = {"tensors": 2 * count}
    for arm, values in samples.items():
        spent = summarize(setting)["median"] if arm.endswith("new") else 0.0
        row |= {f"{arm}, {key}": 1e6 * (value - spent) for key, value in summarize(values).items()}
    return row


def _with_others(
    step: Callable[[], Any], params: list[torch.Tensor], sets: list[list[torch.Tensor]]
) -> Callable[[], None]:
    def run() -> None:
        sets.reverse()
        for p, grad in zip(params, sets[0], strict=True):
            p.grad = grad
        step()

    return run


def memory_of(count: int, r: int, width: int) -> dict[str, Any]:
    """Bytes of the Triton step's tables, counters and sums, as percents of the parameters' bytes; on any device alike."""
    pairs = make_pairs(count, r, width, "cpu", False)
    optimizer = StableLoRAAdamW(pairs)
    with use_backend("triton"), nothing_launched():
        optimizer.step()
    ((_, engine),) = optimizer._engines
    theirs = {p.data_ptr() for p in halves(pairs)} | {
        optimizer.state[p][name].data_ptr() for p in halves(pairs) for name in ("exp_avg", "exp_avg_sq")
    }
    tensors = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in [*vars(engine).values(), engine.latch_monitor.indices]
        if isinstance(value, torch.Tensor) and value.numel() and value.data_ptr() not in theirs
    }
    parameters = sum(p.nbytes for p in halves(pairs))
    steps = 4 * 2 * count
    allocated = sum(math.ceil(n / ALLOCATED) * ALLOCATED for n in tensors.values()) - ALLOCATED * 2 * count
    return {
        "pairs": count,
        "r": r,
        "width": width,
        "parameter_bytes": parameters,
        "ours": sum(tensors.values()),
        "fused": steps,
        "beyond_percent": 100 * (sum(tensors.values()) - steps) / parameters,
        "allocated_beyond_percent": 100 * allocated / parameters,
    }


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """The slope of log ``key`` against log parameters, from the two largest."""
    (x0, y0), (x1, y1) = [(math.log(row["parameters"]), math.log(row[key])) for row in rows[-2:]]
    return (y1 - y0) / (x1 - x0)


def show(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    print(f"\n{title}\n" + "".join(f"{head:>22}" for head in columns.values()))
    for row in rows:
        print("".join(f"{row[key]:22,.3f}" if isinstance(row[key], float) else f"{row[key]:22,}" for key in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--most", type=int, default=PARAMETERS[-1], help="the largest number of parameters")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment() | {"device": args.device}}
    times = {"fused_median": "AdamW fused, ms", "ours_median": "ours, ms", "ours_q1": "q1", "ours_q3": "q3"}
    for latched in (False, True):
        state = "latched" if latched else "shrinking"
        by_size = [time_of(64, size, args.device, latched, args.iters) for size in PARAMETERS if size <= args.most]
        columns = {"parameters": "parameters", **times, "ours_GB_per_s": "ours, GB/s"}
        show(f"Time by parameters: 64 pairs, r {R}, every pair {state}", by_size, columns)
        if len(by_size) > 1:
            both = " and ".join(f"{exponent(by_size, key):.2f}" for key in ("fused_median", "ours_median"))
            print(f"from the last but one to the last, time grows as parameters to the power of {both}")
        report[f"time_by_parameters_{state}"] = by_size
    size = min(args.most, 4_000_000)
    by_pairs = [time_of(count, size, args.device, True, args.iters) for count in PAIRS]
    show(f"Time by pairs: {size:,} parameters, every pair latched", by_pairs, {"pairs": "pairs", **times})
    host = [host_time_of(count, args.device, args.iters) for count in (*PAIRS[:3], 224, *PAIRS[3:])]
    arms = ("fused, kept", "ours, kept", "fused, new", "ours, new")
    show(
        "Host time until the launch, us",
        host,
        {"tensors": "tensors", **{f"{arm}, median": arm for arm in arms}},
    )
    memory = [memory_of(64, 8, 576), memory_of(224, 8, 4096), memory_of(224, 16, 4096), memory_of(224, 64, 4096)]
    columns = {"pairs": "pairs", "r": "r", "width": "width", "ours": "ours, bytes", "fused": "AdamW's counters"}
    beyond = {"beyond_percent": "beyond, %", "allocated_beyond_percent": "allocated, %"}
    show("Memory beyond AdamW's, % of the parameters' bytes", memory, {**columns, **beyond})
    report |= {"time_by_pairs": by_pairs, "host": host, "memory": memory}
    print("\n" + ", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    store(args.json, report)


if __name__ == "__main__":
    main()

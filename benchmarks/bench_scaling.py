"""How time and memory grow with width, rank, tokens and pairs, against the least that this machine could take.

    python -m benchmarks.bench_scaling [--axes width rank tokens pairs] [--iters 7] [--json FILE]

Layer: forward and backward of the frozen layer, PEFT and this library, all interleaved, and what each saves for its backward.
Step: torch's fused AdamW, and ours with pairs shrinking and latched. The floor is the longer of operations over the rate of the
fastest of some large products and bytes over the rate of a large copy, both measured here between the axes; of LoRA's overhead
it is that of the branch's own operations, and of one read of x and dY. Exponents are slopes of log time against log size over
the larger half of an axis, with a 95 % interval from the residuals.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.bench_lora_linear import build_arms
from benchmarks.bench_stable_adamw_scale import halves
from benchmarks.common.intervals import log_slope
from benchmarks.common.measure import environment, interleave, store, summarize
from benchmarks.common.memory import saved_for_backward
from benchmarks.common.optimizers import SHRINK_RATIO
from benchmarks.common.tables import aligned
from stablelora_kernels.ops import matmul
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.testing import forward_backward, make_pairs

LAYER_ARMS = ("frozen", "peft", "ours")
STEP_ARMS = ("AdamW fused", "shrinking", "latched")
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
PAIRS = (8, 32, 128, 512, 2000)
# What an axis leaves alone.
STILL = {
    "width": "512 tokens, r 16",
    "rank": "512 tokens, width 2048",
    "tokens": "width 1024, r 16",
    "pairs": "width 256, r 8",
}
FP32 = 4


class Machine(NamedTuple):
    """Operations and bytes a second, as measured."""

    flops: float
    bandwidth: float


def measure_machine(device: torch.device, iters: int = 7) -> Machine:
    """The best of some products, by the fastest library at hand, and copies, so that the floor is one."""
    size, length = 2048, 1 << 26
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source, target = (torch.zeros(length, device=device) for _ in range(2))
    samples = interleave(
        {"product": lambda: matmul.product(a, b), "copy": lambda: target.copy_(source)},  # type: ignore[arg-type,return-value]
        warmup=2,
        iters=iters,
    )
    return Machine(2 * size**3 / min(samples["product"]), 2 * FP32 * length / min(samples["copy"]))


def layer_floors(m: int, k: int, n: int, r: int, machine: Machine) -> dict[str, float]:
    """Milliseconds that the frozen layer, and LoRA on top of it, take at least, forward and backward in float32."""

    def longer(operations: float, elements: float) -> float:
        return 1e3 * max(operations / machine.flops, FP32 * elements / machine.bandwidth)

    # Y and dX; x, W and dY read, W once more for dX, Y and dX written.
    frozen = longer(4 * m * n * k, m * (2 * k + 2 * n) + 2 * n * k)
    # S, its product with B, dS, dX's part, dA and dB; x and dY read once more, A, B and their gradients.
    lora = longer(6 * m * r * (n + k), m * (n + k) + 3 * r * (n + k))
    return {"frozen": frozen, "overhead": lora}


def layer_row(m: int, width: int, r: int, machine: Machine, iters: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds and saved bytes of each arm."""
    # Built once: all arms have one W, or each would find it in the cache or not by what the others left there.
    built = build_arms(width, width, r, 0.0, torch.float32, device)
    modules: dict[str, nn.Module] = {name: built[name] for name in LAYER_ARMS}
    x = torch.randn(m, width, device=device, requires_grad=True)
    grad = torch.randn(m, width, device=device)
    arms = {name: forward_backward(module, x, grad) for name, module in modules.items()}
    samples = interleave(arms, warmup=2, iters=iters)
    row: dict[str, Any] = {"floor": layer_floors(m, width, width, r, machine)}
    for name, module in modules.items():
        over = [1e3 * (mine - frozen) for mine, frozen in zip(samples[name], samples["frozen"], strict=True)]
        saved = saved_for_backward(lambda module=module: module(x), [x, *module.parameters()])  # type: ignore[misc]
        row[name] = {
            "ms": summarize([1e3 * t for t in samples[name]]),
            "over_ms": summarize(over),
            "saved_bytes": saved,
        }
    return row


def step_row(pairs: int, machine: Machine, iters: int, device: torch.device) -> dict[str, Any]:
    width, r = 256, 8
    made = {arm: make_pairs(pairs, r, width, device, arm == "latched") for arm in STEP_ARMS}
    fused = torch.optim.AdamW(halves(made["AdamW fused"]), lr=1e-6, fused=True)
    ours = {arm: StableLoRAAdamW(made[arm], lr=1e-6, shrink_ratio=SHRINK_RATIO) for arm in STEP_ARMS[1:]}
    arms: dict[str, Callable[[], Any]] = {
        STEP_ARMS[0]: fused.step,
        **{arm: optimizer.step for arm, optimizer in ours.items()},
    }
    samples = interleave(arms, warmup=2, iters=iters)
    if {pair.stable for pair in ours["shrinking"].stability()} != {False}:
        raise RuntimeError("the pairs were to shrink throughout")
    # Parameter, gradient and two moments read, all but the gradient written.
    floor = 1e3 * 7 * FP32 * 2 * pairs * r * width / machine.bandwidth
    row: dict[str, Any] = {"floor": {"step": floor}}
    return row | {name: {"ms": summarize([1e3 * t for t in seconds])} for name, seconds in samples.items()}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float] | None:
    """The slope of log time against log size over the larger half, and half the width of its 95 % interval."""
    points = [(a, b) for a, b in zip(sizes, times, strict=True) if b > 0]
    points = points[len(points) // 2 :] if len(points) > 5 else points[-3:]
    return log_slope([size for size, _ in points], [time for _, time in points])


def axis(name: str, largest: int | None, iters: int, device: torch.device) -> dict[str, Any]:
    """All points of an axis, and the exponents."""
    machine = measure_machine(device)
    sizes = {"width": WIDTHS, "rank": RANKS, "tokens": TOKENS, "pairs": PAIRS}[name]
    sizes = tuple(size for size in sizes if largest is None or size <= largest)
    point: dict[str, Callable[[int], dict[str, Any]]] = {
        "width": lambda size: layer_row(512, size, 16, machine, iters, device),
        "rank": lambda size: layer_row(512, 2048, size, machine, iters, device),
        "tokens": lambda size: layer_row(size, 1024, 16, machine, iters, device),
        "pairs": lambda size: step_row(size, machine, iters, device),
    }
    rows = []
    for size in sizes:
        rows.append({"size": size, **point[name](size)})
        print(f"  {name} {size}", flush=True)
    arms = STEP_ARMS if name == "pairs" else LAYER_ARMS
    exponents = {arm: exponent(sizes, [row[arm]["ms"]["median"] for row in rows]) for arm in arms}
    if name != "pairs":
        over = {f"{arm}, overhead": [row[arm]["over_ms"]["median"] for row in rows] for arm in LAYER_ARMS[1:]}
        exponents |= {label: exponent(sizes, values) for label, values in over.items()}
    return {"axis": name, "still": STILL[name], "machine": machine._asdict(), "rows": rows, "exponents": exponents}


def table(found: dict[str, Any]) -> str:
    """The axis in numbers."""
    rows, cells = found["rows"], []
    if found["axis"] == "pairs":
        cells.append(
            ["pairs", *(f"{arm}, ms" for arm in STEP_ARMS), "floor, ms", "shrinking / AdamW", "latched / AdamW"]
        )
        for row in rows:
            times = [row[arm]["ms"]["median"] for arm in STEP_ARMS]
            ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
            cells.append([f"{row['size']}", *(f"{t:.3f}" for t in times), f"{row['floor']['step']:.3f}", *ratios])
    else:
        cells.append([found["axis"], "frozen, ms", "floor", "PEFT adds", "ours adds", "floor", "ours / PEFT"])
        cells[0] += ["saved by PEFT, MB", "by ours"]
        for row in rows:
            peft, ours = (row[arm]["over_ms"]["median"] for arm in LAYER_ARMS[1:])
            figures = [row["frozen"]["ms"]["median"], row["floor"]["frozen"], peft, ours, row["floor"]["overhead"]]
            saved = [f"{row[arm]['saved_bytes'] / 1e6:.3f}" for arm in LAYER_ARMS[1:]]
            cells.append([f"{row['size']}", *(f"{t:.3f}" for t in figures), f"{ours / peft:.2f}", *saved])
    fits = "; ".join(
        f"{label} {value[0]:.2f} ± {value[1]:.2f}" for label, value in found["exponents"].items() if value is not None
    )
    return "\n".join([*aligned(cells), f"exponents over the larger half: {fits}"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=tuple(STILL), default=list(STILL))
    parser.add_argument("--largest", type=int, help="leave out larger sizes (default: none)")
    parser.add_argument("--iters", type=int, default=7, help="timed rounds of each point")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if args.iters < 1:
        parser.error(f"--iters must be at least 1, got {args.iters}")
    found: dict[str, Any] = {"environment": environment(), "iters": args.iters, "axes": {}}
    print(found["environment"])
    for name in args.axes:
        found["axes"][name] = axis(name, args.largest, args.iters, torch.device(args.device))
        machine = found["axes"][name]["machine"]
        print(
            f"\n{name}: {STILL[name]}; float32; {machine['flops'] / 1e9:.0f} GFLOP/s "
            f"and {machine['bandwidth'] / 1e9:.1f} GB/s at most\n"
            f"{table(found['axes'][name])}\n",
            flush=True,
        )
    store(args.json, found)


if __name__ == "__main__":
    main()

"""What Python costs a call: layers so small that nothing else is left, all arms interleaved in one process.

    python -m benchmarks.bench_host [--rows 1 256] [--r 8] [--iters 200] [--json FILE]

"Triton" is everything from the layer to the point where Triton is asked to launch: checks, autograd, the op's dispatch, the
choice of kernels, outputs, grids. The launches themselves are left out, since they need a GPU. The last lines are the dispatch of
a registered op alone: the least that a torch.library op costs over a Python function that does the same.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.launch import base

# Before Triton is imported: only its interpreter takes tensors of a CPU, and it is never run here.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import stablelora_kernels as slk
from benchmarks.bench_lora_linear import build_arms
from benchmarks.common.measure import environment, interleave, store, summarize
from benchmarks.common.tables import aligned

WIDTH = 16
# So many calls are timed at once, since one is as short as reading the clock twice.
CALLS = 20
ARMS = {
    "linear": "nn.Linear",
    "eager": "LoRA by hand",
    "peft": "PEFT",
    "torch": "ours, PyTorch",
    "triton": "ours, Triton",
}
PHASES = ("forward, no gradient", "forward", "forward and backward")


@contextmanager
def without_launches() -> Iterator[None]:
    """Triton is not asked to launch; outputs stay as they were allocated."""

    real = base.launch
    base.launch = lambda *args, **meta: None  # type: ignore[assignment]
    try:
        yield
    finally:
        base.launch = real


@contextmanager
def without_collections() -> Iterator[None]:
    """As ``timeit`` does: a collection looks at every object of the process, of which PEFT's imports make a million."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def calls(module: nn.Module, x: Tensor, grad: Tensor, backend: str | None) -> dict[str, Callable[[], None]]:
    """The phases of one arm."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def no_gradient() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(grad)

    def on_backend(call: Callable[[], Any]) -> Callable[[], None]:
        run = repeated(call)
        if backend is None:
            return run

        def there() -> None:
            with slk.use_backend(backend):
                run()

        return there

    return dict(zip(PHASES, map(on_backend, (no_gradient, lambda: module(x), both)), strict=True))


def measure(rows: int, r: int, iters: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds a call of each arm, by phase."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(rows, WIDTH, device=device, requires_grad=True)
    grad = torch.randn(rows, WIDTH, device=device)
    modules = build_arms(WIDTH, WIDTH, r, 0.0, torch.float32, x.device)
    arms: dict[str, tuple[nn.Module, str | None]] = {
        "linear": (modules["frozen"], None), "eager": (modules["eager"], None), "peft": (modules["peft"], None),
        "torch": (modules["ours"], "torch"), "triton": (modules["ours"], "triton"),
    }  # fmt: skip
    result: dict[str, dict[str, dict[str, float]]] = {}
    with without_launches(), without_collections():
        run = {name: calls(module, x, grad, backend) for name, (module, backend) in arms.items()}
        for phase in PHASES:
            samples = interleave({name: run[name][phase] for name in arms}, warmup=5, iters=iters)
            result[phase] = {
                name: {key: 1e6 * value / CALLS for key, value in summarize(seconds).items()}
                for name, seconds in samples.items()
            }
    return result


def measure_dispatch(iters: int) -> dict[str, dict[str, float]]:
    """Microseconds a call of an op that does nothing, as a function and registered; and of a small torch.mm."""
    library = torch.library.Library("stablelora_host", "FRAGMENT")
    library.define("nothing(Tensor x) -> Tensor")
    empty = torch.empty(0)

    def nothing(x: Tensor) -> Tensor:
        return empty

    library.impl("nothing", nothing, "CompositeExplicitAutograd")
    op = torch.ops.stablelora_host.nothing.default
    x = torch.randn(WIDTH, WIDTH)
    arms = {
        "a Python function": lambda: nothing(x),
        "the same as a registered op": lambda: op(x),
        "torch.mm, 16 x 16": lambda: torch.mm(x, x),
    }
    with torch.no_grad():
        samples = interleave({name: repeated(arm) for name, arm in arms.items()}, warmup=5, iters=iters)
    return {name: {k: 1e6 * v / CALLS for k, v in summarize(seconds).items()} for name, seconds in samples.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_host", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--iters", type=int, default=200, help=f"timed rounds of {CALLS} calls")
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    if min(*args.rows, args.r, args.iters) < 1:
        parser.error(f"--rows, --r and --iters must be at least 1, got {args.rows}, {args.r} and {args.iters}")
    # Threads would only wait for each other.
    torch.set_num_threads(1)
    machine = environment()
    print(f"{machine}\nmicroseconds a call, median of {args.iters} (quartiles)\n")
    found: dict[str, Any] = {"environment": machine, "rows": {}}
    table = [["", *ARMS.values()]]
    for rows in args.rows:
        found["rows"][rows] = measure(rows, args.r, args.iters)
        for phase, arms in found["rows"][rows].items():
            cells = [f"{arms[arm]['median']:.1f} ({arms[arm]['q1']:.1f}-{arms[arm]['q3']:.1f})" for arm in ARMS]
            table.append([f"{rows} rows, {phase}", *cells])
    print("\n".join(aligned(table)), "\n")
    found["dispatch"] = measure_dispatch(args.iters)
    for name, value in found["dispatch"].items():
        print(f"{name:30} {value['median']:6.2f} ({value['q1']:.2f}-{value['q3']:.2f})")
    store(args.json, found)


if __name__ == "__main__":
    main()

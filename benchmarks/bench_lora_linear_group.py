"""Projections of one X, computed one by one and together: forward plus backward, arms interleaved in one process.

    python -m benchmarks.bench_lora_linear_group [--device cpu] [--dtype fp32 bf16] [--dropout 0 0.1] [--iters 60]
                                                 [--shapes 2048x576x576+192+192x8] [--json FILE]

An arm's overhead is its time less that of the frozen layers, which compute the same products. The last column is the overhead
together over that one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common.measure import environment, interleave, store, summarize
from stablelora_kernels.functional import lora_linear_group
from stablelora_kernels.testing import DTYPES

# (rows, in_features, out_features of each, rank): q, k, v and gate, up of SmolLM2-135M, and of something wider.
SHAPES = [
    (2048, 576, (576, 192, 192), 8),
    (2048, 576, (1536, 1536), 8),
    (512, 2048, (2048, 512, 512), 16),
    (128, 2048, (2048, 512, 512), 16),
    (8, 2048, (2048, 512, 512), 16),
]


def forward_backward(
    call: Callable[[Tensor], Sequence[Tensor]], x: Tensor, grads: Sequence[Tensor], pairs: Sequence[Tensor]
) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        for parameter in pairs:
            parameter.grad = None
        torch.autograd.backward(call(x), grads)

    return run


def measure(
    shape: tuple[int, int, tuple[int, ...], int], dropout: float, dtype: torch.dtype, device: torch.device, iters: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per forward plus backward of each arm, and its overhead over the frozen layers, turn by turn."""
    m, k, ns, r = shape
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    grads = [torch.randn(m, n, device=device, dtype=dtype) for n in ns]
    frozen = [nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False) for n in ns]
    layers = [
        slk.LoRALinear.from_linear(f, r=r, lora_alpha=2 * r, lora_dropout=dropout, lora_dtype=dtype) for f in frozen
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.02)
    weights, lora_As, lora_Bs = ([getattr(layer, name) for layer in layers] for name in ("weight", "lora_A", "lora_B"))
    scalings = [layer.scaling for layer in layers]

    def together(x: Tensor) -> Sequence[Tensor]:
        return lora_linear_group(x, weights, [None] * len(ns), lora_As, lora_Bs, scalings, dropout)

    calls: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
        "frozen": lambda x: [layer(x) for layer in frozen],
        "apart": lambda x: [layer(x) for layer in layers],
        "together": together,
    }
    arms = {name: forward_backward(call, x, grads, [*lora_As, *lora_Bs]) for name, call in calls.items()}
    samples = interleave(arms, warmup=10, iters=iters)
    result = {}
    for name, seconds in samples.items():
        overhead = [1e3 * (arm - base) for arm, base in zip(seconds, samples["frozen"], strict=True)]
        result[name] = {key: 1e3 * value for key, value in summarize(seconds).items()}
        result[name] |= {f"overhead_{key}": value for key, value in summarize(overhead).items()}
    ratio = [one / other for one, other in zip(samples["together"], samples["apart"], strict=True)]
    result["together"] |= {f"to_apart_{key}": value for key, value in summarize(ratio).items()}
    return result


def parse_shape(text: str) -> tuple[int, int, tuple[int, ...], int]:
    """Rows, in_features, each projection's out_features and the rank, as ``2048x576x576+192+192x8``."""
    sizes = text.split("x")
    ns = sizes[2].split("+") if len(sizes) == 4 else []
    numbers = [*sizes[:2], *sizes[3:], *ns]
    if not 2 <= len(ns) <= 3 or not all(size.isdigit() and int(size) > 0 for size in numbers):
        raise argparse.ArgumentTypeError(f"a shape must be MxKxN+N[+N]xR of positive integers, got {text!r}")
    return int(sizes[0]), int(sizes[1]), tuple(map(int, ns)), int(sizes[3])


def main(argv: Sequence[str] | None = None) -> None:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_lora_linear_group", description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="MxKxN+N[+N]xR")
    parser.add_argument("--iters", type=int, default=60, help="timed rounds for each shape")
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    device, machine, rows = torch.device(args.device), environment(), []
    print(f"{machine}\nmilliseconds, median of {args.iters} (quartiles); overhead is over the frozen layers")
    heads = ("frozen", "+apart", "+together")
    print(
        f"{'rows x in x out, r':28} {'dtype':5} {'drop':>4}",
        *(f"{t:>9}" for t in heads),
        f"{'all, together/apart':>22}",
    )
    for dtype in args.dtype:
        for dropout in args.dropout:
            for shape in args.shapes:
                result = measure(shape, dropout, DTYPES[dtype], device, args.iters)
                together = result["together"]
                rows.append({"shape": shape, "dtype": dtype, "dropout": dropout, "ms": result})
                m, k, ns, r = shape
                label = f"{m} x {k} x {'+'.join(map(str, ns))}, {r}"
                spread = f"({together['to_apart_q1']:.2f}-{together['to_apart_q3']:.2f})"
                print(
                    f"{label:28} {dtype:5} {dropout:4.2g} {result['frozen']['median']:9.2f} "
                    f"{result['apart']['overhead_median']:9.2f} {together['overhead_median']:9.2f} "
                    f"{together['to_apart_median']:10.2f} {spread}",
                    flush=True,
                )
    store(args.json, {"environment": machine, "results": rows})


if __name__ == "__main__":
    main()

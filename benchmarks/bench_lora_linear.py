"""The layer against the frozen nn.Linear, eager LoRA and PEFT: forward plus backward, all arms interleaved in one process.

    python -m benchmarks.bench_lora_linear [--device cpu] [--dtype fp32 bf16] [--dropout 0 0.1] [--iters 60]
                                           [--shapes 1024x1024x1024x8] [--json FILE]

An arm's overhead is its time less the frozen layer's, which computes the same two products. The last column is our overhead
over PEFT's: below 1 we add less.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.common.measure import environment, interleave, store, summarize
from stablelora_kernels.testing import DTYPES, forward_backward, layer_arms

# (rows, in_features, out_features, rank). The first two are the targets.
SHAPES = [
    (1024, 1024, 1024, 8),
    (512, 2048, 2048, 16),
    (2048, 576, 576, 8),
    (1024, 576, 192, 8),
    (128, 2048, 2048, 16),
    (1, 2048, 2048, 16),
]


def build_arms(
    k: int, n: int, r: int, dropout: float, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """The arms over one frozen weight, with equal A and non-zero B, all in ``dtype``."""
    frozen, eager, ours = layer_arms(k, n, r, dropout, dtype, device)
    holder = nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=dtype))
    holder[0].weight = nn.Parameter(frozen.weight.detach(), requires_grad=False)
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    peft = get_peft_model(holder, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours.lora_A if "lora_A" in name else ours.lora_B)
    return {"frozen": frozen, "eager": eager, "peft": peft.base_model.model[0], "ours": ours}


def measure(
    shape: tuple[int, int, int, int], dropout: float, dtype: torch.dtype, device: torch.device, iters: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per forward plus backward of each arm, and its overhead over the frozen layer, turn by turn."""
    m, k, n, r = shape
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(m, n, device=device, dtype=dtype)
    arms = build_arms(k, n, r, dropout, dtype, device)
    samples = interleave({name: forward_backward(arm, x, grad) for name, arm in arms.items()}, warmup=10, iters=iters)
    result = {}
    for name, seconds in samples.items():
        overhead = [1e3 * (arm - frozen) for arm, frozen in zip(seconds, samples["frozen"], strict=True)]
        result[name] = {**{key: 1e3 * value for key, value in summarize(seconds).items()}}
        result[name] |= {f"overhead_{key}": value for key, value in summarize(overhead).items()}
    return result


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Rows, in_features, out_features and rank, as ``512x2048x2048x16``."""
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape must be MxKxNxR of positive integers, got {text!r}")
    m, k, n, r = map(int, sizes)
    return m, k, n, r


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_lora_linear", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=sorted(DTYPES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="MxKxNxR")
    parser.add_argument("--iters", type=int, default=60, help="timed rounds for each shape")
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions here")
    args = parser.parse_args()
    device, machine, rows = torch.device(args.device), environment(), []
    print(f"{machine}\nmilliseconds, median of {args.iters} (quartiles); overhead is over the frozen layer")
    titles = ("frozen", "+eager", "+peft", "+ours")
    print(
        f"{'rows x in x out, r':24} {'dtype':5} {'drop':>4}",
        *(f"{t:>8}" for t in titles),
        f"{'(q1-q3)':>15} {'ours/peft':>9}",
    )
    for dtype in args.dtype:
        for dropout in args.dropout:
            for shape in args.shapes:
                result = measure(shape, dropout, DTYPES[dtype], device, args.iters)
                ours, peft = result["ours"], result["peft"]
                ratio = ours["overhead_median"] / peft["overhead_median"]
                rows.append({"shape": shape, "dtype": dtype, "dropout": dropout, "ours_over_peft": ratio, "ms": result})
                label = "{} x {} x {}, {}".format(*shape)
                spread = f"({ours['overhead_q1']:.2f}-{ours['overhead_q3']:.2f})"
                print(
                    f"{label:24} {dtype:5} {dropout:4.2g} {result['frozen']['median']:8.2f} "
                    f"{result['eager']['overhead_median']:8.2f} {peft['overhead_median']:8.2f} "
                    f"{ours['overhead_median']:8.2f} {spread:>15} {ratio:9.2f}",
                    flush=True,
                )
    store(args.json, {"environment": machine, "results": rows})


if __name__ == "__main__":
    main()

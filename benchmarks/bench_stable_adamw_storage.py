"""What fewer bits for moments and parameters cost in loss, and save in memory: a LoRA pair that learns a product of its rank.

    python -m benchmarks.bench_stable_adamw_storage [--width 256] [--r 16] [--steps 600] [--seeds 3]

Every row sees the same batches, and multiplies in float32, so that only the optimizer differs. The loss is the mean over
the last tenth of the steps, for each seed; bytes are for each element of A and B, gradients left out.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch

import stablelora_kernels as slk

FP32, BF16, UINT8 = torch.float32, torch.bfloat16, torch.uint8
NAMES = {FP32: "fp32", BF16: "bf16", UINT8: "8 bits"}
# The parameters' dtype, the moments', and whether there is a master.
ROWS = [(FP32, FP32, False), (FP32, BF16, False), (FP32, UINT8, False), (BF16, FP32, True), (BF16, FP32, False)]
ROWS += [(BF16, BF16, False), (BF16, UINT8, False), (BF16, UINT8, True)]


def run(
    dtype: torch.dtype, moments: torch.dtype, master: bool, width: int, r: int, steps: int, seed: int
) -> tuple[float, dict[str, float]]:
    """The last losses' mean, and bytes an element of parameters, moments and masters."""
    torch.manual_seed(seed)
    target = torch.randn(width, r) @ torch.randn(r, width) / width**0.5
    pair = slk.LoRAPair(
        "layer",
        (torch.randn(r, width) / width**0.5).to(dtype).requires_grad_(),
        torch.zeros(width, r, dtype=dtype, requires_grad=True),
    )
    optimizer = slk.StableLoRAAdamW([pair], lr=2e-3, moments_dtype=moments, master_weights=master, seed=seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, width)
        loss = (x @ pair.A.float().t() @ pair.B.float().t() - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    params = [pair.A, pair.B]
    kept = [(key, t) for p in params for key, t in optimizer.state[p].items()]
    parts = {
        "parameters": params,
        "moments": [t for key, t in kept if key.startswith("exp_avg")],
        "masters": [t for key, t in kept if key == "master"],
    }
    elements = sum(p.numel() for p in params)
    sizes = {name: sum(t.numel() * t.element_size() for t in group) / elements for name, group in parts.items()}
    return mean(losses[-max(steps // 10, 1) :]), sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("r", 16), ("steps", 600), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(
        f"{'parameters':10} {'moments':8} {'master':6} {'bytes: parameters':>18} {'moments':>8} {'masters':>8}   losses"
    )
    for dtype, moments, master in ROWS:
        results = [run(dtype, moments, master, args.width, args.r, args.steps, seed) for seed in range(args.seeds)]
        sizes = results[0][1]
        losses = " ".join(f"{loss:.2e}" for loss, _ in results)
        words = f"{NAMES[dtype]:10} {NAMES[moments]:8} {'yes' if master else 'no':6}"
        print(f"{words} {sizes['parameters']:18.2f} {sizes['moments']:8.3f} {sizes['masters']:8.2f}   {losses}")


if __name__ == "__main__":
    main()

"""What each optimizer adds to a training step of a real model: the paper's overhead table, and this library's row in it.

    python -m benchmarks.bench_optimizer_overhead [--model smollm2] [--targets all-linear] [--steps 40] [--json FILE]

Every arm trains adapters of its own over the same frozen weights, on the same batches, one step each in turn and in shuffled
order. The first arm is what one runs today: PEFT's layers and torch's fused AdamW. "Step" is an arm's whole step over the first
arm's on the same batch; forward and backward of two arms with equal layers differ by nothing but the machine's noise, so
"optimizer" compares the optimizers' parts alone and gives the difference as a share of the first arm's whole step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common import optimizers
from benchmarks.common.data import load_dataset, training_batches
from benchmarks.common.measure import environment, shuffled, store, summarize, synchronize
from benchmarks.common.models import autocast, linear_names, load_model, query_value_names
from benchmarks.common.tables import aligned
from benchmarks.finetuning.arms import PEFT, STABLE, Recipe, build_arm
from benchmarks.finetuning.train import to_device
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW

# Percent over AdamW's training time, 0.5B parameters, as the paper gives it (arXiv 2603.05204).
PAPER = {
    optimizers.ADAMW_FUSED: 0.0,
    optimizers.LORA_PLUS: 0.0,
    optimizers.OURS: 0.6,
    optimizers.RIEMANNIAN: 8.3,
    optimizers.RITE: 46.0,
}
SETTLING_STEPS = 3
OURS_WHOLE = "this library: layers and optimizer"
ARMS: dict[str, tuple[str, str]] = {
    f"PEFT, {name}": (PEFT, name)
    for name in (
        optimizers.ADAMW_FUSED,
        optimizers.LORA_PLUS,
        optimizers.RIEMANNIAN,
        optimizers.RITE,
        optimizers.NAIVE_FOREACH,
        optimizers.OURS,
    )
} | {OURS_WHOLE: (f"{STABLE}-{optimizers.SHRINK_RATIO:g}", optimizers.OURS)}
BASE = f"PEFT, {optimizers.ADAMW_FUSED}"


@dataclass
class Running:
    """An arm, and the seconds of its steps."""

    model: Any
    optimizer: Any
    forward_backward: list[float] = field(default_factory=list)
    optimizer_step: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        synchronize()
        start = time.perf_counter()
        with autocast(batch["input_ids"].device, dtype):
            logits, _ = self.model(batch["input_ids"], batch["attention_mask"])
        F.cross_entropy(logits, batch["labels"]).backward()
        synchronize()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        self.forward_backward.append(middle - start)
        self.optimizer_step.append(time.perf_counter() - middle)

    def state_bytes(self) -> int:
        """Bytes of tensors on the device that the optimizer keeps from one step to the next."""
        # PEFT's optimizers wrap torch's own.
        states = self.optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.dim())


def build(layers: str, optimizer: str, backbone: Any, classes: int, recipe: Recipe, device: torch.device) -> Running:
    """The arm with its own adapters, and a head that stays as it was drawn: only pairs are trained."""
    arm = build_arm(layers, backbone, classes, recipe, device)
    arm.model.head.requires_grad_(False)
    arm.model.train()
    return Running(arm.model, optimizers.build(optimizer, arm.pairs, lr=recipe.lr, weight_decay=recipe.weight_decay))


def run(
    running: dict[str, Running], batches: list[dict[str, torch.Tensor]], dtype: torch.dtype, say: Callable[[], Any]
) -> None:
    for turn, batch in enumerate(batches):
        for name in shuffled(list(running), turn):
            running[name].step(batch, dtype)
        say()


def summary(running: dict[str, Running]) -> dict[str, dict[str, Any]]:
    """Percent over the first arm, step by step, and state."""
    base = running[BASE]
    whole = [a + b for a, b in zip(base.forward_backward, base.optimizer_step, strict=True)][SETTLING_STEPS:]
    rows = {}
    for name, arm in running.items():
        mine = [a + b for a, b in zip(arm.forward_backward, arm.optimizer_step, strict=True)][SETTLING_STEPS:]
        parts = zip(arm.optimizer_step[SETTLING_STEPS:], base.optimizer_step[SETTLING_STEPS:], whole, strict=True)
        rows[name] = {
            "step_ms": summarize([1e3 * t for t in mine]),
            "optimizer_ms": summarize([1e3 * t for t in arm.optimizer_step[SETTLING_STEPS:]]),
            "step_percent": summarize([100 * (a / b - 1) for a, b in zip(mine, whole, strict=True)]),
            "optimizer_percent": summarize([100 * (own - adamw) / step for own, adamw, step in parts]),
            "state_bytes": arm.state_bytes(),
            "paper_percent": PAPER.get(ARMS[name][1]),
        }
        if isinstance(arm.optimizer, StableLoRAAdamW):
            rows[name]["latched"] = sum(pair.stable for pair in arm.optimizer.stability())
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:+.2f} ({value['q1']:+.2f} to {value['q3']:+.2f})"

    cells = [["over PEFT's layers with fused AdamW, %", "paper", "step", "optimizer", "optimizer, ms", "state, KiB"]]
    for name, row in rows.items():
        paper = "" if row["paper_percent"] is None else f"{row['paper_percent']:+.1f}"
        own = f"{row['optimizer_ms']['median']:.2f}"
        share, part = spread(row["step_percent"]), spread(row["optimizer_percent"])
        if name == BASE:
            share = part = "0"
        cells.append([name, paper, share, part, own, f"{row['state_bytes'] / 1024:,.0f}"])
    return "\n".join(aligned(cells))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_optimizer_overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, minilm, a local directory or a hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of autocast")
    parser.add_argument("--steps", type=int, default=40, help=f"timed steps, after {SETTLING_STEPS} that are not")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--targets", default="query-value", choices=("query-value", "all-linear"))
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument(
        "--lr", type=float, default=1e-4, help="so low that pairs go on shrinking, where the method costs most"
    )
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions here")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "r"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    device, dtype = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    machine = environment()
    dataset = load_dataset("sarcasm", seed=0, held_out=600)
    backbone, tokenizer = load_model(args.model)
    backbone.to(device)
    steps = args.steps + SETTLING_STEPS
    targets = linear_names(backbone) if args.targets == "all-linear" else query_value_names(backbone)
    recipe = Recipe(targets, r=args.r, lr=args.lr, steps=steps)
    batches = training_batches(dataset, tokenizer, batch_size=args.batch_size, seed=0)
    running, skipped = {}, {}
    for name, (layers, optimizer) in ARMS.items():
        try:
            running[name] = build(layers, optimizer, backbone, len(dataset.classes), recipe, device)
        except optimizers.Unavailable as reason:
            skipped[name] = str(reason)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        run(running, [to_device(batch, device) for batch in islice(batches, steps)], dtype, bar.update)
    rows = summary(running)
    pairs = len(running[OURS_WHOLE].optimizer.stability())
    print(
        f"{machine}\n{args.model}, {args.targets}, {pairs} pairs of r {args.r}, batch {args.batch_size}, {args.dtype}, "
        f"lr {args.lr:g}, {args.steps} steps; percent, medians (quartiles), taken step by step\n\n{table(rows)}"
    )
    for name, reason in skipped.items():
        print(f"not run: {name}: {reason}")
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    store(args.json, {"environment": machine, "settings": settings, "rows": rows, "skipped": skipped})


if __name__ == "__main__":
    main()

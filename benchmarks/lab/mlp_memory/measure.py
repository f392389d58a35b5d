"""A training step of a real model with every arm: bytes kept for backward, peak memory, losses.

Run as ``python -m benchmarks.lab.mlp_memory.measure`` it measures the arm that standard input names, in a process of its own,
since peak memory is a property of a process, and prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import optimizers
from benchmarks.common.arms import fill
from benchmarks.common.data import Batch, load_dataset, training_batches
from benchmarks.common.measure import environment
from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.models import Classifier, linear_names, load_model
from benchmarks.finetuning.arms import Arm, let_gradients_reach
from benchmarks.finetuning.footprint import peak_memory
from benchmarks.finetuning.train import forward, phases
from benchmarks.lab.mlp_memory.arms import COUNTED, adapt, counted
from benchmarks.lab.mlp_memory.formula import ACCELERATED, FROZEN
from benchmarks.suite.layers import Sizes, llama
from stablelora_kernels import lora_pairs
from stablelora_kernels.testing import DTYPES

STEPS = 2
ARMS = tuple(arm for arm in COUNTED if arm != ACCELERATED)
# Decoder layers, or 0 for all. A CPU without bfloat16 instructions takes a hundred times float32's time.
LAYERS = {"fp32": 0, "bf16": 6}
BATCH_SIZE = 32


@dataclass(frozen=True)
class Job:
    """One arm's step. ``dtype`` is that of the weights and activations; adapters are float32."""

    arm: str
    dtype: str
    dropout: float
    # "random" is a small Llama of random weights on random tokens: it needs no download.
    model: str = "smollm2"
    batch_size: int = BATCH_SIZE
    layers: int = 0
    r: int = 16


def jobs() -> Iterator[Job]:
    for dtype, dropout, arm in product(LAYERS, (0.0, 0.05), ARMS):
        yield Job(arm, dtype, dropout, layers=LAYERS[dtype])


def measure(job: Job) -> dict[str, Any]:
    """The figures of an arm that is alone in this process."""
    dtype = DTYPES[job.dtype]
    inner, batch = _model_and_batch(job)
    if job.layers:
        inner.layers = inner.layers[: job.layers]
    inner.to(dtype)
    targets = linear_names(inner)
    adapted = adapt(inner, job.arm, targets, job.r, job.dropout)
    if job.arm == FROZEN:
        let_gradients_reach(inner, targets)
    pairs = lora_pairs(adapted)
    # Equal numbers in all arms. A zero B would make losses equal whatever the branch computes.
    fill(adapted)
    model = Classifier(adapted, inner.config.hidden_size, 2, seed=0)
    # The arms differ by their layers alone. The frozen model trains its head.
    if pairs:
        optimizer = optimizers.build(optimizers.ADAMW_FUSED, pairs, lr=1e-3)
        model.head.requires_grad_(False)
    else:
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    arm = Arm(job.arm, model.train(), pairs, optimizer)
    torch.manual_seed(0)
    losses = []
    for phase, run in phases(arm, batch, torch.float32):
        result = run()
        if phase == "forward":
            losses.append(result.item())
    found: dict[str, Any] = peak_memory(arm, batch, torch.float32, torch.device("cpu"), STEPS - 1)

    def last_loss() -> torch.Tensor:
        loss = forward(arm, batch, torch.float32)
        losses.append(loss.item())
        return loss

    owned = [*model.parameters(), *model.buffers(), *batch.values()]
    found["saved_mib"] = round(saved_for_backward(last_loss, owned) / MIB, 2)
    tokens = batch["input_ids"].numel()
    layers = inner.layers
    found["mlps_saved_mib"] = round(len(layers) * counted(layers[0].mlp, tokens) / MIB, 2)
    return found | {"loss": losses[0], "loss_after_steps": losses[1], "tokens": tokens, "layers": len(layers)}


def _model_and_batch(job: Job) -> tuple[Any, Batch]:
    if job.model == "random":
        backbone = llama(Sizes(2, 64, 64), torch.device("cpu"), torch.float32).model
        ids = torch.randint(1, 64, (job.batch_size, 12), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(job.batch_size) % 2
        return backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    backbone, tokenizer = load_model(job.model)
    dataset = load_dataset("sarcasm", seed=0, held_out=600)
    return backbone, next(training_batches(dataset, tokenizer, batch_size=job.batch_size, seed=0))


def measure_all(todo: list[Job]) -> dict[str, Any]:
    """Each job in a process of its own, one after the other. Prints each as it is done."""
    root = Path(__file__).resolve().parents[3]
    found: dict[str, Any] = {"environment": environment(), "steps": STEPS, "rows": []}
    for job in todo:
        command = [sys.executable, "-m", "benchmarks.lab.mlp_memory.measure"]
        done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, cwd=root)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"{job}: {lines[-1]}")
        row = asdict(job) | json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        found["rows"].append(row)
    return found


def main() -> None:
    # Every arm's process holds the same packages, so that peaks differ by the arms alone.
    import peft  # noqa: F401

    print(json.dumps(measure(Job(**json.load(sys.stdin)))))


if __name__ == "__main__":
    main()

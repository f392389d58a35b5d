"""One fine-tuning run of ``benchmarks.research paper``."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.data import Batch
from benchmarks.common.models import autocast, linear_names, load_model, query_value_names, share
from benchmarks.research.tasks import Task, classes, plays

ADAMW, STABLE = "AdamW", "Stable-LoRA"
OPTIMIZERS = {
    ADAMW: optimizers.ADAMW_FUSED,
    "LoRA+": optimizers.LORA_PLUS,
    "Riemannian": optimizers.RIEMANNIAN,
    "LoRA-RITE": optimizers.RITE,
    STABLE: optimizers.OURS,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"}
# All runs train the head alike, so that a learning rate is the adapters' alone.
HEAD_LR, WARMUP = 3e-3, 10
COLUMNS = ("validation", "test", "shrinks", "latched", "a_left", "a_over_start", "optimizer_ms", "state_bytes")


class Run(NamedTuple):
    model: str
    task: str
    dtype: str
    steps: int
    batch_size: int
    optimizer: str
    lr: float
    shrink_ratio: float = 0.0
    seed: int = 0
    r: int = 8
    targets: str = "query-value"
    stop_condition: str = "norm"
    adapters: str = "fp32"
    rounding: str = "stochastic"


@cache
def _loaded(model: str) -> tuple[Any, Any]:
    backbone, tokenizer = load_model(model, causal=model == "smollm2")
    if model == "smollm2":
        # On a CPU, with this few tokens, the fused attention's backward is slower than the plain one's.
        backbone.set_attn_implementation("eager")
    return backbone, tokenizer


@cache
def _task(model: str, task: str) -> Task:
    tokenizer = _loaded(model)[1]
    return plays(tokenizer) if task == "plays" else classes(task, tokenizer)


def build(run: Run) -> tuple[nn.Module, list[slk.LoRAPair], list[torch.optim.Optimizer]]:
    """The model, its pairs, and their optimizer followed by that of a new head."""
    backbone = share(_loaded(run.model)[0])
    names = {*(query_value_names(backbone) if run.targets == "query-value" else linear_names(backbone))}
    if run.targets == "attention":
        names &= ATTENTION
    torch.manual_seed(run.seed)
    # The scaling is that of r 8 and alpha 16 at any rank.
    slk.apply_lora(backbone, slk.LoRAConfig(r=run.r, lora_alpha=2 * run.r, target_modules=sorted(names)))
    pairs = slk.lora_pairs(backbone)
    model = _task(run.model, run.task).model(backbone, run.seed)
    if run.adapters == "bf16":
        for half in (half for pair in pairs for half in (pair.A, pair.B)):
            half.data = half.data.bfloat16()
    name, options = OPTIMIZERS[run.optimizer], {}
    if run.optimizer == STABLE:
        options = {"shrink_ratio": run.shrink_ratio, "stop_condition": run.stop_condition, "seed": run.seed}
    if run.rounding == "nearest":
        # In the parameters' dtype, as the authors' code does.
        name, options = optimizers.NAIVE_FOREACH, {"shrink_ratio": run.shrink_ratio}
    every = [optimizers.build(name, pairs, lr=run.lr, weight_decay=1e-2, **options)]
    if isinstance(head := getattr(model, "head", None), nn.Module):
        every.append(torch.optim.AdamW(head.parameters(), lr=HEAD_LR, fused=True))
    return model, pairs, every


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, at a 0-based step."""
    return min(1.0, (step + 1) / WARMUP) * max(0.0, (steps - step) / steps)


@torch.no_grad()
def score(model: nn.Module, batches: Sequence[Batch], task: str) -> float:
    """The share of right labels; of the plays the negated loss, in nats a token. More is better."""
    total = count = 0.0
    for batch in batches:
        logits, labels = model(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        size = int((labels >= 0).sum())
        loss = F.cross_entropy(logits, labels).item()
        total += -size * loss if task == "plays" else int((logits.argmax(1) == labels).sum())
        count += size
    return total / count


def execute(run: Run) -> list[dict[str, Any]]:
    """Train and evaluate. Raises :class:`~benchmarks.common.optimizers.Unavailable` if the optimizer can't run here."""
    task = _task(run.model, run.task)
    model, pairs, every = build(run)
    precision = autocast(torch.device("cpu"), {"fp32": torch.float32, "bf16": torch.bfloat16}[run.dtype])
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: schedule(step, run.steps)) for each in every]
    # All arms draw the same masks if the backbone has dropout.
    torch.manual_seed(run.seed)
    start = [pair.A.detach().float().norm().item() for pair in pairs]
    last, seconds, batches = 0.0, [], task.batches(run.batch_size, run.seed)
    model.train()
    while len(seconds) < run.steps and math.isfinite(last):
        batch = next(batches)
        with precision:
            loss = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        loss.backward()
        began = time.perf_counter()
        for each in every:
            each.step()
        seconds.append(time.perf_counter() - began)
        for each in schedules:
            each.step()
        model.zero_grad(set_to_none=True)
        last = loss.item()
    model.eval()
    if math.isfinite(last):
        with precision:
            found = {split: score(model, getattr(task, split), run.task) for split in ("validation", "test")}
    else:
        # No right answer, or more nats than of a guess.
        found = dict.fromkeys(("validation", "test"), -20.0 if run.task == "plays" else 0.0)
    ratios = [pair.A.detach().float().norm().item() / before for pair, before in zip(pairs, start, strict=True)]
    state = [t for entry in every[0].state.values() for t in entry.values() if isinstance(t, torch.Tensor) and t.dim()]
    found |= {
        "a_over_start": statistics.fmean(ratios),
        "optimizer_ms": 1e3 * statistics.median(seconds),
        "state_bytes": sum(t.nbytes for t in state),
    }
    if isinstance(every[0], slk.StableLoRAAdamW) and math.isfinite(last):
        at = [pair.latched_at for pair in every[0].stability()]
        shrinks = [run.steps if step is None else step - 1 for step in at]
        found |= {"latched": sum(step is not None for step in at), "shrinks": statistics.fmean(shrinks)}
        found["a_left"] = statistics.fmean((1 - run.shrink_ratio) ** count for count in shrinks)
    return [found]

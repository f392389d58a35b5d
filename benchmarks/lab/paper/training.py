"""One fine-tuning run of ``benchmarks.lab.paper``: its identity, training, and record."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.models import autocast, linear_names, load_model, query_value_names, share
from benchmarks.lab.paper.tasks import Result, Task, make_task

ADAMW, LORA_PLUS, RIEMANNIAN, RITE, STABLE = "AdamW", "LoRA+", "Riemannian", "LoRA-RITE", "Stable-LoRA"
OPTIMIZERS = {
    ADAMW: optimizers.ADAMW_FUSED,
    LORA_PLUS: optimizers.LORA_PLUS,
    RIEMANNIAN: optimizers.RIEMANNIAN,
    RITE: optimizers.RITE,
    STABLE: optimizers.OURS,
}
TARGETS = ("query-value", "attention", "all-linear")
ROUNDINGS = ("stochastic", "nearest")
# All runs train the head alike, so that a learning rate is the adapters' alone.
HEAD_LR, WARMUP, LOSS_EVERY = 3e-3, 10, 10


def arm_of(optimizer: str, shrink_ratio: float) -> str:
    return f"{optimizer} {shrink_ratio:g}" if optimizer == STABLE else optimizer


@dataclass(frozen=True)
class Run:
    """A run's identity, from which its file name is made."""

    model: str
    task: str
    steps: int
    batch_size: int
    optimizer: str
    lr: float
    shrink_ratio: float = 0.0
    seed: int = 0
    r: int = 8
    targets: str = "query-value"
    dtype: str = "bf16"
    stop_condition: str = "norm"
    adapters: str = "fp32"
    rounding: str = "stochastic"

    @property
    def arm(self) -> str:
        return arm_of(self.optimizer, self.shrink_ratio)

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        arm = self.arm.replace(" ", "_").lower()
        return f"{self.model}_{self.task}_{arm}_lr{self.lr:g}_seed{self.seed}_{digest}.json"


@cache
def _loaded(model: str) -> tuple[Any, Any]:
    backbone, tokenizer = load_model(model)
    if model == "smollm2":
        # On a CPU, with this few tokens, the fused attention's backward is slower than the plain one's.
        backbone.set_attn_implementation("eager")
    return backbone, tokenizer


@cache
def _task(model: str, task: str) -> Task:
    return make_task(task, _loaded(model)[1], generative=model == "smollm2")


def _targets(run: Run, backbone: Any) -> list[str]:
    names = linear_names(backbone)
    if run.targets == "query-value":
        return [*query_value_names(backbone)]
    if run.targets == "attention":
        known = {"q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"}
        return [name for name in names if name in known]
    return [*names]


def build(run: Run) -> tuple[nn.Module, Any, list[slk.LoRAPair], list[torch.optim.Optimizer]]:
    """The model, the pairs' optimizer, the pairs, and all optimizers."""
    backbone = share(_loaded(run.model)[0])
    torch.manual_seed(run.seed)
    # The scaling is that of r 8 and alpha 16 at any rank.
    slk.apply_lora(backbone, slk.LoRAConfig(r=run.r, lora_alpha=2 * run.r, target_modules=_targets(run, backbone)))
    model = _task(run.model, run.task).model(backbone, run.seed)
    pairs = slk.lora_pairs(model)
    halves = {id(half) for pair in pairs for half in (pair.A, pair.B)}
    if run.adapters == "bf16":
        for pair in pairs:
            for half in (pair.A, pair.B):
                half.data = half.data.bfloat16()
    options: dict[str, Any] = {"lr": run.lr, "weight_decay": 1e-2}
    if run.optimizer == STABLE:
        options |= {"shrink_ratio": run.shrink_ratio, "stop_condition": run.stop_condition, "seed": run.seed}
    name = OPTIMIZERS[run.optimizer]
    if run.rounding == "nearest":
        # In the parameters' dtype, as the authors' code does.
        name, _ = optimizers.NAIVE_FOREACH, [options.pop(key, None) for key in ("stop_condition", "seed")]
    optimizer = optimizers.build(name, pairs, **options)
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in halves]
    others = [torch.optim.AdamW(head, lr=HEAD_LR, fused=True)] if head else []
    return model, optimizer, pairs, [optimizer, *others]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, at a 0-based step."""
    return min(1.0, (step + 1) / WARMUP) * max(0.0, (steps - step) / steps)


def execute(run: Run) -> dict[str, Any]:
    """Train and evaluate. Raises :class:`~benchmarks.common.optimizers.Unavailable` if the optimizer can't run here."""
    task = _task(run.model, run.task)
    model, optimizer, pairs, every = build(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.dtype]
    rates = [[group["lr"] for group in each.param_groups] for each in every]
    # All arms draw the same masks if the backbone has dropout.
    torch.manual_seed(run.seed)
    model.train()
    with torch.no_grad():
        start = [pair.A.float().norm().item() for pair in pairs]
    losses, seconds, curve = [], [], []
    began = time.perf_counter()
    batches = task.batches(run.batch_size, run.seed)
    for step in range(run.steps):
        for each, initial in zip(every, rates, strict=True):
            for group, lr in zip(each.param_groups, initial, strict=True):
                group["lr"] = lr * schedule(step, run.steps)
        batch = next(batches)
        with autocast(torch.device("cpu"), dtype):
            loss = task.loss(model, batch)
        loss.backward()
        stepping = time.perf_counter()
        for each in every:
            each.step()
        seconds.append(time.perf_counter() - stepping)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % LOSS_EVERY == 0:
            curve.append(statistics.fmean(losses[-LOSS_EVERY:]))
    trained = time.perf_counter() - began
    model.eval()
    diverged = not math.isfinite(losses[-1])
    found: dict[str, Result | None] = {"validation": None, "test": None}
    if not diverged:
        with autocast(torch.device("cpu"), dtype):
            found = {name: task.evaluate(model, getattr(task, name)) for name in found}
    return {
        "run": asdict(run),
        "diverged": diverged,
        **{name: None if result is None else asdict(result) for name, result in found.items()},
        "train_loss": curve,
        "seconds": trained,
        "optimizer_ms": 1e3 * statistics.median(seconds),
        "state_bytes": sum(
            t.nbytes
            for entry in optimizer.state.values()
            for t in entry.values()
            if isinstance(t, torch.Tensor) and t.dim()
        ),
        **_pairs(run, optimizer, pairs, start, len(losses)),
    }


@torch.no_grad()
def _pairs(run: Run, optimizer: Any, pairs: list[slk.LoRAPair], start: list[float], steps: int) -> dict[str, Any]:
    a, b = ([getattr(pair, half).float().norm().item() for pair in pairs] for half in "AB")
    ratios = [after / before for after, before in zip(a, start, strict=True)]
    record: dict[str, Any] = {"a_over_start": _mean(ratios), "b_norm": _mean(b), "pairs": len(pairs)}
    if run.optimizer == STABLE and hasattr(optimizer, "stability") and all(map(math.isfinite, a + b)):
        latched = [pair.latched_at for pair in optimizer.stability()]
        shrinks = [steps if at is None else at - 1 for at in latched]
        record |= {
            "latched": sum(at is not None for at in latched),
            "shrinks": _mean(shrinks),
            "a_left": _mean([(1 - run.shrink_ratio) ** count for count in shrinks]),
        }
    return record


def _mean(values: Any) -> float:
    return statistics.fmean(values)

"""Fine-tuning real models with the paper's optimizers: which runs, what is chosen from them, and
one run.

A study screens every optimizer, shrink ratio and learning rate with a few seeds, chooses on
validation examples, and spends further seeds on what was chosen.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.models import autocast, linear_names, load_model, query_value_names, share
from benchmarks.finetuning.arms import evaluate
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
COLUMNS = (
    "validation",
    "test",
    "shrinks",
    "latched",
    "a_left",
    "a_over_start",
    "optimizer_ms",
    "state_bytes",
)


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


SETTING, CHANGEABLE = [*Run._fields[:5]], [*Run._fields[9:]]
SCREENING = 2  # seeds that choose
EVERY, TWO, EXTREMES = tuple(OPTIMIZERS), (ADAMW, STABLE), (5e-4, 5e-3)
# One change of the best arms, of which optimizers, and its seeds. The effect of stopping, a claim
# of the paper, needs more.
STORAGE = [{"adapters": "bf16"}, {"adapters": "bf16", "rounding": "nearest"}]
ABLATIONS: list[tuple[dict[str, Any], tuple[str, ...], int]] = [
    *(({"r": r}, EVERY, 3) for r in (1, 4, 16, 64)),
    *(({"targets": targets}, TWO, 3) for targets in ("attention", "all-linear")),
    *((change, (STABLE,), 3) for change in STORAGE),
    ({"stop_condition": "never"}, (STABLE,), 10),
]
# The largest ratio that bfloat16 rounds away. It shows best at the smallest learning rate, at which
# A hardly grows.
VANISHING = 1e-3


class Study(NamedTuple):
    """A model on a task: every optimizer, rate and (of Stable-LoRA) ratio with ``screening`` seeds,
    the best with more.
    """

    model: str
    task: str
    dtype: str
    steps: int
    batch_size: int
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ratios: tuple[float, ...] = optimizers.SHRINK_RATIOS
    optimizers: tuple[str, ...] = EVERY
    screening: int = SCREENING
    headline_seeds: int = (
        10  # of the best of AdamW and Stable-LoRA: their difference is the paper's claim
    )
    seeds: int = 5  # of the others' best
    ablations: bool = False


MINILM = ("minilm", "sarcasm", "bf16")
PRESETS = {
    "quick": [Study(*MINILM, 150, 32, (3e-4, 3e-3), EXTREMES, TWO, headline_seeds=3)],
    # Reuters' texts are several times as long as headlines: with batches of 32 they would take
    # eight hours.
    "minilm": [Study(*MINILM, 300, 32), Study("minilm", "reuters-52", "bf16", 300, 16)],
    "ablations": [Study(*MINILM, 300, 32, ablations=True)],
    # The high rate, at which training breaks for some.
    "edge": [
        Study("minilm", "sarcasm", dtype, 300, 32, (1e-2,), EXTREMES, TWO, 10, 0)
        for dtype in ("bf16", "fp32")
    ],
    # Nearly two epochs: rates at which the method acts, and time for them to converge.
    "long": [Study(*MINILM, 1500, 32, (1e-4, 3e-4, 1e-3), EXTREMES, TWO, headline_seeds=5)],
    "smollm2-headlines": [Study("smollm2", "sarcasm", "bf16", 150, 16)],
    # At last a step at a learning rate of zero: what the language model has before any training.
    "smollm2": [
        Study("smollm2", "plays", "bf16", 100, 4, ratios=EXTREMES),
        Study("smollm2", "plays", "bf16", 1, 4, (0.0,), (), (ADAMW,), headline_seeds=0),
    ],
}


def parts(preset: str, records: pd.DataFrame) -> Iterator[list[Run]]:
    for study in PRESETS[preset]:
        # All arms get a seed before the next seed: an interrupted screening compares equals.
        yield [
            Run(*study[:5], name, lr, ratio, seed)
            for seed in range(study.screening)
            for lr in study.lrs
            for name in study.optimizers
            for ratio in (study.ratios if name == STABLE else (0.0,))
        ]
        chosen = {
            name: Run(*study[:5], name, lr, ratio)
            for name, (ratio, lr) in best(plain(records, study)).items()
        }
        seeds = {name: study.headline_seeds if name in TWO else study.seeds for name in chosen}
        yield [
            run._replace(seed=seed)
            for name, run in chosen.items()
            for seed in range(SCREENING, seeds[name])
        ]
        if study.ablations:
            changed = [
                (chosen[n], change, seeds)
                for change, names, seeds in ABLATIONS
                for n in names
                if n in chosen
            ]
            vanishing = Run(*study[:5], STABLE, min(study.lrs), VANISHING)
            changed += [(vanishing, change, SCREENING) for change in STORAGE]
            yield [
                run._replace(seed=seed, **change)
                for run, change, seeds in changed
                for seed in range(seeds)
            ]


def plain(records: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The study's runs without ablations."""
    wanted = dict(zip(SETTING, study, strict=False)) | {
        name: Run._field_defaults[name] for name in CHANGEABLE
    }
    return records[(records[[*wanted]] == pd.Series(wanted)).all(axis=1)]


def best(runs: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Each optimizer's ratio and learning rate with the best mean score on validation examples over
    the first seeds.

    Optimizers with an incomplete screening are left out: rates that have their seeds must not win
    because others have none yet.
    """
    screened = (
        runs[runs.seed < SCREENING]
        .groupby(["optimizer", "shrink_ratio", "lr"])
        .validation.agg(["mean", "size"])
    )
    whole = screened["mean"][screened.groupby("optimizer")["size"].transform("min") == SCREENING]
    return {name: key[1:] for name, key in whole.groupby("optimizer").idxmax().items()}


@cache
def _loaded(model: str) -> tuple[Any, Any]:
    backbone, tokenizer = load_model(model, causal=model == "smollm2")
    if model == "smollm2":
        # On a CPU, with this few tokens, the fused attention's backward is slower than the plain
        # one's.
        backbone.set_attn_implementation("eager")
    return backbone, tokenizer


@cache
def _task(model: str, task: str) -> Task:
    return plays(_loaded(model)[1]) if task == "plays" else classes(task, _loaded(model)[1])


def build(run: Run) -> tuple[nn.Module, list[slk.LoRAPair], list[torch.optim.Optimizer]]:
    """The model, its pairs, and their optimizer followed by that of a new head."""
    backbone = share(_loaded(run.model)[0])
    names = {
        *(query_value_names(backbone) if run.targets == "query-value" else linear_names(backbone))
    }
    if run.targets == "attention":
        names &= ATTENTION
    torch.manual_seed(run.seed)
    # The scaling is that of r 8 and alpha 16 at any rank.
    slk.apply_lora(backbone, sorted(names), r=run.r, lora_alpha=2 * run.r)
    pairs = slk.lora_pairs(backbone)
    model = _task(run.model, run.task).model(backbone, run.seed)
    if run.adapters == "bf16":
        for half in (half for pair in pairs for half in (pair.A, pair.B)):
            half.data = half.data.bfloat16()
    name, options = OPTIMIZERS[run.optimizer], {}
    if run.optimizer == STABLE:
        options = {
            "shrink_ratio": run.shrink_ratio,
            "stop_condition": run.stop_condition,
            "seed": run.seed,
        }
    if run.rounding == "nearest":
        # In the parameters' dtype, as the authors' code does.
        name, options = optimizers.NAIVE_FOREACH, {"shrink_ratio": run.shrink_ratio}
    every = [optimizers.build(name, pairs, lr=run.lr, weight_decay=1e-2, **options)]
    if isinstance(head := getattr(model, "head", None), nn.Module):
        every.append(torch.optim.AdamW(head.parameters(), lr=HEAD_LR, fused=True))
    return model, pairs, every


def execute(run: Run) -> list[dict[str, Any]]:
    """Train and evaluate. Raises :class:`~benchmarks.common.optimizers.Unavailable` if the
    optimizer can't run here.
    """
    task = _task(run.model, run.task)
    model, pairs, every = build(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.dtype]

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * max(0.0, (run.steps - step) / run.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, schedule) for each in every]
    # All arms draw the same masks if the backbone has dropout.
    torch.manual_seed(run.seed)
    start = [pair.A.detach().float().norm().item() for pair in pairs]
    last, seconds, batches = 0.0, [], task.batches(run.batch_size, run.seed)
    model.train()
    while len(seconds) < run.steps and math.isfinite(last):
        batch = next(batches)
        with autocast(torch.device("cpu"), dtype):
            loss = F.cross_entropy(
                model(batch["input_ids"], batch["attention_mask"]), batch["labels"]
            )
        loss.backward()
        began = time.perf_counter()
        for each in every:
            each.step()
        seconds.append(time.perf_counter() - began)
        for each in schedules:
            each.step()
        model.zero_grad(set_to_none=True)
        last = loss.item()
    # More is better: the share of right labels, or of the plays the negated loss, in nats a token.
    # If training diverged: no right answer, or more nats than of a guess.
    found: dict[str, float] = dict.fromkeys(
        ("validation", "test"), -20.0 if run.task == "plays" else 0.0
    )
    for split in found if math.isfinite(last) else ():
        reached = evaluate(model, getattr(task, split), dtype)
        found[split] = -reached["loss"] if run.task == "plays" else reached["accuracy"]
    ratios = [
        pair.A.detach().float().norm().item() / before
        for pair, before in zip(pairs, start, strict=True)
    ]
    state = [
        t
        for entry in every[0].state.values()
        for t in entry.values()
        if isinstance(t, torch.Tensor) and t.dim()
    ]
    found |= {
        "a_over_start": statistics.fmean(ratios),
        "optimizer_ms": 1e3 * statistics.median(seconds),
        "state_bytes": sum(t.nbytes for t in state),
    }
    if isinstance(every[0], slk.StableLoRAAdamW) and math.isfinite(last):
        at = [pair.latched_at for pair in every[0].stability()]
        shrinks = [run.steps if step is None else step - 1 for step in at]
        found |= {
            "latched": sum(step is not None for step in at),
            "shrinks": statistics.fmean(shrinks),
        }
        found["a_left"] = statistics.fmean((1 - run.shrink_ratio) ** count for count in shrinks)
    return [found]

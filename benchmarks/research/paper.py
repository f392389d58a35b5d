"""Fine-tuning real models with the paper's optimizers: which runs, and what is chosen from them.

A study screens every optimizer, shrink ratio and learning rate with a few seeds, chooses on validation examples, and spends
further seeds on what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.common.optimizers import SHRINK_RATIOS
from benchmarks.research.finetune import ADAMW, COLUMNS, OPTIMIZERS, STABLE, Run, execute

__all__ = ["COLUMNS", "PRESETS", "Run", "execute", "parts"]

SETTING = ["model", "task", "dtype", "steps", "batch_size"]
# Seeds that choose.
SCREENING = 2
EVERY, TWO, EXTREMES = tuple(OPTIMIZERS), (ADAMW, STABLE), (5e-4, 5e-3)
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# One change of the best arms, of which optimizers, and its seeds. The effect of stopping, a claim of the paper, needs more.
STORAGE = [{"adapters": "bf16"}, {"adapters": "bf16", "rounding": "nearest"}]
ABLATIONS: list[tuple[dict[str, Any], tuple[str, ...], int]] = [
    *(({"r": r}, EVERY, 3) for r in (1, 4, 16, 64)),
    *(({"targets": targets}, TWO, 3) for targets in ("attention", "all-linear")),
    *((change, (STABLE,), 3) for change in STORAGE),
    ({"stop_condition": "never"}, (STABLE,), 10),
]
# The largest ratio that bfloat16 rounds away. It shows best at the smallest learning rate, at which A hardly grows.
VANISHING = 1e-3


class Study(NamedTuple):
    """A model on a task: every optimizer, rate and (of Stable-LoRA) ratio with ``screening`` seeds, the best with more."""

    model: str
    task: str
    dtype: str
    steps: int
    batch_size: int
    lrs: tuple[float, ...] = LRS
    ratios: tuple[float, ...] = SHRINK_RATIOS
    optimizers: tuple[str, ...] = EVERY
    screening: int = SCREENING
    headline_seeds: int = 10  # of the best of AdamW and Stable-LoRA: their difference is the paper's claim
    seeds: int = 5  # of the others' best
    ablations: bool = False


MINILM, REUTERS = ("minilm", "sarcasm", "bf16"), ("minilm", "reuters-52", "bf16")
PRESETS = {
    "quick": [Study(*MINILM, 150, 32, (3e-4, 3e-3), EXTREMES, TWO, headline_seeds=3)],
    # Reuters' texts are several times as long as headlines: with batches of 32 they would take eight hours.
    "minilm": [Study(*MINILM, 300, 32), Study(*REUTERS, 300, 16)],
    "ablations": [Study(*MINILM, 300, 32, ablations=True)],
    # The high rate, at which training breaks for some.
    "edge": [Study("minilm", "sarcasm", dtype, 300, 32, (1e-2,), EXTREMES, TWO, 10, 0) for dtype in ("bf16", "fp32")],
    # Nearly two epochs: rates at which the method acts, and time for them to converge.
    "long": [Study(*MINILM, 1500, 32, (1e-4, 3e-4, 1e-3), EXTREMES, TWO, headline_seeds=5)],
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
        chosen = {name: Run(*study[:5], name, lr, ratio) for name, (ratio, lr) in best(plain(records, study)).items()}
        seeds = {name: study.headline_seeds if name in TWO else study.seeds for name in chosen}
        yield [run._replace(seed=seed) for name, run in chosen.items() for seed in range(SCREENING, seeds[name])]
        if study.ablations:
            changed = [(chosen[n], change, seeds) for change, names, seeds in ABLATIONS for n in names if n in chosen]
            vanishing = Run(*study[:5], STABLE, min(study.lrs), VANISHING)
            changed += [(vanishing, change, SCREENING) for change in STORAGE]
            yield [run._replace(seed=seed, **change) for run, change, seeds in changed for seed in range(seeds)]


def plain(records: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The study's runs without ablations."""
    wanted = dict(zip(SETTING, study, strict=False)) | {name: Run._field_defaults[name] for name in Run._fields[9:]}
    return records[(records[[*wanted]] == pd.Series(wanted)).all(axis=1)]


def best(runs: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Each optimizer's ratio and learning rate with the best mean score on validation examples over the first seeds.

    Optimizers with an incomplete screening are left out: rates that have their seeds must not win because others have none yet.
    """
    screened = runs[runs.seed < SCREENING].groupby(["optimizer", "shrink_ratio", "lr"]).validation.agg(["mean", "size"])
    whole = screened["mean"][screened.groupby("optimizer")["size"].transform("min") == SCREENING]
    return {name: key[1:] for name, key in whole.groupby("optimizer").idxmax().items()}

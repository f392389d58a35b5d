"""The studies: planning runs, training them, and loading stored ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import workers
from benchmarks.common.measure import environment
from benchmarks.common.optimizers import SHRINK_RATIOS
from benchmarks.common.tables import json_text, write_text
from benchmarks.lab.paper import report, scores, training
from benchmarks.lab.paper.scores import SCREENING, Setting
from benchmarks.lab.paper.training import ADAMW, OPTIMIZERS, STABLE, Run

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The largest ratio that bfloat16 rounds away. It shows best at the smallest learning rate, at which A hardly grows.
VANISHING = 1e-3


@dataclass(frozen=True)
class Study:
    """A model on a task: the screened arms, and the seeds of the chosen ones."""

    model: str
    task: str
    steps: int
    batch_size: int
    dtype: str = "bf16"
    lrs: tuple[float, ...] = LRS
    ratios: tuple[float, ...] = SHRINK_RATIOS
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    seeds: int = 5
    # Seeds of AdamW and Stable-LoRA, whose difference is the paper's claim.
    headline_seeds: int = 10
    # Rates at which training breaks for some arms, and the seeds to find out which.
    edge_lrs: tuple[float, ...] = LRS[-1:]
    edge_seeds: int = 0

    @property
    def setting(self) -> Setting:
        return Setting(self.model, self.task, self.dtype, self.steps, self.batch_size)

    def run(self, optimizer: str, lr: float, shrink_ratio: float, seed: int) -> Run:
        return Run(
            self.model, self.task, self.steps, self.batch_size, optimizer, lr, shrink_ratio, seed, dtype=self.dtype
        )

    def screen(self) -> list[Run]:
        arms = [(name, ratio) for name in self.optimizers for ratio in (self.ratios if name == STABLE else (0.0,))]
        # All arms get a seed before the next seed: an interrupted screening compares equals.
        return [self.run(name, lr, ratio, seed) for seed in range(SCREENING) for lr in self.lrs for name, ratio in arms]

    def decide(self, records: list[dict[str, Any]]) -> list[Run]:
        """Further seeds of the arms that the screening chose."""
        chosen = scores.best(scores.plain(records, self.setting))
        last = {name: self.headline_seeds if name in (ADAMW, STABLE) else self.seeds for name in chosen}
        return [
            self.run(name, lr, ratio, seed)
            for seed in range(SCREENING, max(last.values(), default=0))
            for name, (lr, ratio) in chosen.items()
            if seed < last[name]
        ]


def ablations(study: Study, records: list[dict[str, Any]], seeds: int) -> list[Run]:
    """Every optimizer's best at other ranks; AdamW's and Stable-LoRA's with one other thing changed at a time."""
    chosen = scores.best(scores.plain(records, study.setting))
    bases = {name: study.run(name, lr, ratio, 0) for name, (lr, ratio) in chosen.items()}
    runs = []
    for seed in range(seeds):
        for name, base in bases.items():
            changed = [replace(base, r=r) for r in (1, 4, 16, 64)]
            if name in (ADAMW, STABLE):
                changed += [replace(base, targets=targets) for targets in training.TARGETS[1:]]
            if name == STABLE:
                changed += [replace(base, adapters="bf16", rounding=rounding) for rounding in training.ROUNDINGS]
            runs += [replace(run, seed=seed) for run in changed]
    if STABLE in bases:
        # The effect of stopping, a claim of the paper, needs more seeds.
        runs += [replace(bases[STABLE], stop_condition="never", seed=seed) for seed in range(study.headline_seeds)]
        vanishing = replace(bases[STABLE], lr=min(study.lrs), shrink_ratio=VANISHING, adapters="bf16")
        runs += [
            replace(vanishing, rounding=rounding, seed=seed)
            for seed in range(SCREENING)
            for rounding in training.ROUNDINGS
        ]
    return runs


def edge(study: Study) -> list[Run]:
    """AdamW and the extremes of Stable-LoRA at the rates where training breaks, and at the highest of them in float32 too, with
    ``edge_seeds`` seeds."""
    arms = [(ADAMW, 0.0), (STABLE, min(study.ratios)), (STABLE, max(study.ratios))]
    return [
        replace(study.run(name, lr, ratio, seed), dtype=dtype)
        for dtype, lrs in (("bf16", study.edge_lrs), ("fp32", (max(study.edge_lrs),)))
        for seed in range(study.edge_seeds)
        for lr in lrs
        for name, ratio in arms
    ]


Part = list[Run]


def accuracy(study: Study, records: list[dict[str, Any]]) -> Iterator[Part]:
    """The screening, then further seeds of the chosen arms."""
    yield study.screen()
    yield study.decide(records)


def one_change(study: Study, records: list[dict[str, Any]]) -> Iterator[Part]:
    """Ablations of the best arms of :func:`accuracy`."""
    yield from accuracy(study, records)
    yield ablations(study, records, ABLATION_SEEDS)


def high_rates(study: Study, records: list[dict[str, Any]]) -> Iterator[Part]:
    """The edge, which needs no screening."""
    yield edge(study)


@dataclass(frozen=True)
class Preset:
    """Studies in order, and the parts of each: a part begins after the one before it is complete."""

    studies: tuple[Study, ...]
    parts: Callable[[Study, list[dict[str, Any]]], Iterator[Part]] = accuracy


ABLATION_SEEDS = 3
# Reuters-52's texts are several times as long as headlines: with batches of 32 its study would take eight hours.
MINILM = (Study("minilm", "sarcasm", 300, 32, edge_seeds=10), Study("minilm", "reuters-52", 300, 16))
# The smallest and the largest ratio only, to save time.
_EXTREMES = (5e-4, 5e-3)
SMOLLM2 = (
    Study("smollm2", "sarcasm", 150, 16, ratios=_EXTREMES, edge_lrs=LRS[-2:], edge_seeds=5),
    Study("smollm2", "plays", 100, 4, ratios=_EXTREMES),
    Study("smollm2", "reuters-52", 150, 16, ratios=_EXTREMES),
)
# AdamW and Stable-LoRA only.
_TWO = replace(MINILM[0], ratios=_EXTREMES, optimizers=(ADAMW, STABLE))
PRESETS = {
    "tiny": Preset((replace(_TWO, steps=3, lrs=(1e-3,), ratios=(5e-3,), seeds=2, headline_seeds=2),)),
    "quick": Preset((replace(_TWO, steps=150, lrs=(3e-4, 3e-3), seeds=3, headline_seeds=3),)),
    "minilm": Preset(MINILM),
    "smollm2": Preset(SMOLLM2),
    "ablations": Preset(MINILM[:1], one_change),
    "edge": Preset((MINILM[0], SMOLLM2[0]), high_rates),
    # Nearly two epochs: rates at which the method acts, and time for them to converge.
    "long": Preset((replace(_TWO, steps=1500, lrs=(1e-4, 3e-4, 1e-3), headline_seeds=5),)),
    # A step at a learning rate of zero. The same with every seed: the language model has no head that is drawn.
    "untrained": Preset(
        tuple(
            replace(study, steps=1, lrs=(0.0,), optimizers=(ADAMW,), seeds=0, headline_seeds=0) for study in SMOLLM2[:2]
        )
    ),
}


def missing(preset: str, records: list[dict[str, Any]]) -> list[Run]:
    """The runs to do next."""
    done = {scores.run_of(record) for record in records}
    for study in PRESETS[preset].studies:
        for part in PRESETS[preset].parts(study, records):
            if wanted := [run for run in part if run not in done]:
                return wanted
    return []


def work(run: Run, directory: Path) -> None:
    """Train in a worker, which keeps its loaded model."""
    record = {"environment": environment(), **training.execute(run)}
    write_text(directory / run.file_name, json_text(record))


def load(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(directory.glob("*.json"))]


def unpack(file: Path, directory: Path) -> None:
    """Write another call's records to ``directory``, but keep the runs that it holds."""
    for record in report.read_records(file):
        path = directory / scores.run_of(record).file_name
        if not path.exists():
            write_text(path, json_text(record))


def train_all(preset: str, directory: Path, processes: int, minutes: float | None) -> bool:
    """Train the preset's runs; return whether all are done."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with workers.pool(processes) as pool, tqdm(unit="run") as bar:
        while runs := missing(preset, load(directory)):
            bar.total = bar.n + len(runs)
            bar.refresh()
            queue, under_way = list(runs), set[Future[None]]()
            while queue or under_way:
                late = deadline is not None and time.monotonic() > deadline
                while queue and len(under_way) < processes and not late:
                    under_way.add(pool.submit(work, queue.pop(0), directory))
                if late and not under_way:
                    return False
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    bar.update()
    return True

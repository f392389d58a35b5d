"""One run: a recipe in, figures out. The arms learn the next token of a text, or a text's class."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.common import assets
from benchmarks.common.data import Batch, load_dataset, split_tokens, test_batches, training_batches
from benchmarks.common.measure import environment, others_cpus, waited_s
from benchmarks.common.models import linear_names, load_model
from benchmarks.common.workers import pool
from benchmarks.finetuning.arms import PHASES, Arm, build_arms, evaluate, footprint, train
from benchmarks.finetuning.recipe import LABELS, Recipe
from benchmarks.finetuning.report import Result, write_result

# A shorter schedule teaches too little to compare.
FEWEST_STEPS = 15
_REHEARSALS = 4
# Seconds to start a process that measures an arm's memory, beside loading the model.
_PROCESS_S = 8.0
_TEST_BATCH = 16
_say = partial(tqdm.write, file=sys.stderr)


class Task(NamedTuple):
    """Batches to train on and held-out batches. Each has input_ids, attention_mask and the labels
    of the model's logits.
    """

    held_out: list[Batch]
    # Endless batches in an order that the seed decides.
    batches: Callable[[int], Iterator[Batch]]
    # How many, and the held-out accuracy of always answering the most frequent one. None for next
    # tokens.
    classes: int | None = None
    majority: float | None = None


def open_task(recipe: Recipe, tokenizer: Any) -> Task:
    """The task on ``recipe.data``: "plays" or a text file for next tokens, "sarcasm" or
    "reuters-52" for classes.

    ``held_out`` is the number of pieces of text or of texts to test on. ``seed`` draws those of
    "sarcasm".

    Raises:
        AssetError: the data can't be had.
        ValueError: the text is too short, or there are fewer texts than ``held_out``.
    """
    size, length = recipe.batch_size, recipe.length
    if not recipe.causal:
        dataset = load_dataset(recipe.data, seed=recipe.seed, held_out=recipe.held_out)
        return Task(
            [*test_batches(dataset, tokenizer, batch_size=4 * _TEST_BATCH)],
            lambda seed: training_batches(dataset, tokenizer, batch_size=size, seed=seed),
            len(dataset.classes),
            dataset.majority,
        )
    own = recipe.data != "plays"
    text = (
        Path(recipe.data).expanduser().read_text(encoding="utf-8")
        if own
        else "\n".join(assets.plays())
    )
    tokens, rows = split_tokens(text, tokenizer, length + 1, recipe.held_out)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(tokens) - length, (size,), generator=generator).tolist()
            yield _next_tokens(
                torch.stack([tokens[start : start + length + 1] for start in starts])
            )

    return Task([_next_tokens(part) for part in rows.split(_TEST_BATCH)], batches)


def _next_tokens(rows: torch.Tensor) -> Batch:
    """Each token is to be predicted from those before it."""
    inputs = rows[:, :-1].contiguous()
    return {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "labels": rows[:, 1:].flatten(),
    }


def run(recipe: Recipe, started: float, out: Path) -> Result:
    """Train, evaluate and measure all arms. Writes the figures so far to ``out`` after each seed,
    and on Ctrl-C.

    ``started`` is when the command began, by ``time.perf_counter``: the time limit counts from
    there.
    """
    result = Result(
        {"status": "interrupted", "environment": environment(), "settings": asdict(recipe)}
    )
    try:
        for _ in _seeds(recipe, started, result):
            write_result(result, started, out)
        result.about["status"] = "complete"
    except KeyboardInterrupt:
        _say("Interrupted: writing what was measured.")
    finally:
        if result.steps:
            write_result(result, started, out)
    return result


def _seeds(recipe: Recipe, started: float, result: Result) -> Iterator[int]:
    device = torch.device(recipe.device)
    loading = time.perf_counter()
    with others_cpus() as others:
        backbone, tokenizer = load_model(recipe.model, recipe.causal)
        loading = time.perf_counter() - loading
        # As users load it: adapters are float32 all the same.
        backbone.to(device, getattr(torch, recipe.dtype))
        task = open_task(recipe, tokenizer)
    if others and (threads := free_threads(others[0])) < torch.get_num_threads():
        _say(
            f"Other programs keep {others[0]:.1f} of {os.cpu_count()} CPUs busy; this run takes fewer threads: {threads}."
        )
        torch.set_num_threads(threads)
    recipe = replace(recipe, targets=linear_names(backbone, recipe.targets))

    def build(recipe: Recipe, seed: int) -> list[Arm]:
        return build_arms(recipe.arms, backbone, task.classes, recipe, seed, device)

    first = [*islice(task.batches(recipe.seed), _REHEARSALS)]
    # One-time costs (choosing and compiling kernels, filling allocators) fall on the first step,
    # which does not count.
    short = replace(recipe, steps=_REHEARSALS)
    _, *rehearsed = train(build(short, recipe.seed), iter(first), short, recipe.seed)
    round_s = (
        sum(row[f"{phase}_ms"] for rows in rehearsed for row in rows for phase in PHASES)
        / 1e3
        / len(rehearsed)
    )
    # A held-out token costs about a third of a training token: no backward pass, and larger
    # batches.
    held_out = sum(len(batch["labels"]) for batch in task.held_out) / len(first[0]["labels"]) / 3
    memory_s = len(recipe.arms) * (loading + _PROCESS_S + 2 * round_s)
    left = recipe.time_limit_s and started + recipe.time_limit_s - time.perf_counter() - memory_s
    seeds, steps = plan(recipe, round_s, held_out, left)
    recipe = replace(recipe, steps=steps)
    minutes = (seeds * (steps + held_out) * round_s + memory_s) / 60
    _say(
        f"{seeds} seed{'s' * (seeds > 1)} x {steps} steps, {round_s:.1f} s a step of all arms: about {minutes:.0f} minutes more."
    )
    longest = max(first, key=lambda batch: batch["input_ids"].numel())
    result.about |= {
        "threads": torch.get_num_threads(),
        "task": {"metric": "loss" if recipe.causal else "accuracy", "majority": task.majority},
        # As it was run; the settings are as they were asked for.
        "recipe": asdict(recipe),
        "footprint_tokens": longest["input_ids"].numel(),
        "seeds_done": 0,
        "not_measured": {},
    }
    with tqdm(total=seeds * steps, desc="fine-tuning", unit="step", dynamic_ncols=True) as bar:
        for seed in range(recipe.seed, recipe.seed + seeds):
            _one_seed(build(recipe, seed), task, recipe, seed, result, bar)
            result.about["seeds_done"] += 1
            yield seed
    for name in tqdm(
        recipe.arms, desc="memory, one process an arm", unit="arm", dynamic_ncols=True
    ):
        try:
            # In a process of its own: peak memory is a property of a process.
            with pool(1) as process:
                job = process.submit(
                    footprint, name, task.classes, recipe, longest, torch.get_num_threads()
                )
                result.add(name, "step", job.result())
        # Whatever ends that process, as a lack of memory would, the rest was measured.
        except Exception as error:
            result.about["not_measured"][LABELS[name]] = (
                f"{type(error).__name__}: {error}".splitlines()[0]
            )


def free_threads(others: float) -> int:
    """How many threads to take beside programs that keep ``others`` CPUs busy.

    Threads of one operator spin while they wait for each other. With more threads than free CPUs
    every operator waits for the scheduler: a step then takes many times as long. Waiting without
    spinning doubles a step's time on an idle machine.
    """
    return min(torch.get_num_threads(), max(1, round((os.cpu_count() or 1) - others)))


def plan(recipe: Recipe, round_s: float, held_out: float, left_s: float | None) -> tuple[int, int]:
    """How many seeds and steps fit into ``left_s``, each seed with its whole schedule.

    ``round_s`` is the time of a step of all arms, and the held-out batches take as long as
    ``held_out`` steps. Fewer steps are planned before fewer seeds, and ``FEWEST_STEPS`` of one seed
    however long they take.
    """
    fewest = min(recipe.steps, FEWEST_STEPS)
    if left_s is None:
        return recipe.seeds, recipe.steps
    for seeds in (recipe.seeds, 1):
        steps = int(left_s / seeds / round_s - held_out)
        if steps >= fewest:
            return seeds, min(recipe.steps, steps)
    return 1, fewest


def _one_seed(
    arms: Sequence[Arm], task: Task, recipe: Recipe, seed: int, result: Result, bar: Any
) -> None:
    for arm in arms:
        trained = sum(p.numel() for p in arm.model.parameters() if p.requires_grad)
        result.add(arm.name, "start", {"trainable parameters": trained}, seed)
    wall, waited = time.perf_counter(), waited_s()
    for rows in train(arms, task.batches(seed), recipe, seed):
        result.steps += rows
        bar.set_postfix({LABELS[arm.name]: f"{arm.loss.item():.2f}" for arm in arms}, refresh=False)
        bar.update()
    if waited is not None:
        share = (
            ((waited_s() or 0.0) - waited) / (time.perf_counter() - wall) / torch.get_num_threads()
        )
        result.about["waited_share"] = max(result.about.get("waited_share", 0.0), round(share, 3))
    for arm in arms:
        result.add(
            arm.name,
            "held-out",
            evaluate(arm.model, task.held_out, getattr(torch, recipe.dtype)),
            seed,
        )
        if hasattr(arm.optimizer, "stability"):
            latched_at = [pair.latched_at for pair in arm.optimizer.stability()]
            shrinks = [recipe.steps if at is None else at - 1 for at in latched_at]
            stopped = {"pairs that stopped shrinking": len(latched_at) - latched_at.count(None)}
            result.add(
                arm.name, "end", stopped | {"shrinking steps": sum(shrinks) / len(shrinks)}, seed
            )

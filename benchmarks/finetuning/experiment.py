"""One run: settings in, a JSON-able result out. An interrupted run keeps what it measured."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from benchmarks.common.measure import environment, others_cpus, waited_s
from benchmarks.common.models import check_linear_names, linear_names, load_model
from benchmarks.finetuning.arms import LABELS, Arm, Recipe, build_arms
from benchmarks.finetuning.footprint import measure_in_subprocess
from benchmarks.finetuning.tasks import Task, is_causal, open_task
from benchmarks.finetuning.train import evaluate, rehearse, to_device, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A shorter schedule teaches too little to compare.
FEWEST_STEPS = 15
_REHEARSALS = 4
# Seconds to start a process that measures an arm's memory, beside loading the model.
_PROCESS_S = 8.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers, but for the machine."""

    model: str
    data: str
    device: str
    dtype: str
    arms: tuple[str, ...]
    # The last parts of the names of linear layers; empty for all linear layers.
    targets: tuple[str, ...]
    r: int
    lora_alpha: float
    lora_dropout: float
    lr: float
    head_lr: float
    shrink_ratio: float
    steps: int
    seeds: tuple[int, ...]
    batch_size: int
    length: int
    held_out: int
    # A run that would take longer has fewer steps or seeds; None: no limit.
    time_limit_s: float | None = None

    def recipe(self, backbone: PreTrainedModel) -> Recipe:
        """What all arms share.

        Raises:
            ValueError: ``backbone`` has no layers of these names.
        """
        check_linear_names(backbone, self.targets)
        shared = ("r", "lora_alpha", "lora_dropout", "lr", "head_lr", "shrink_ratio", "steps")
        return Recipe(self.targets or linear_names(backbone), **{name: getattr(self, name) for name in shared})


def run(settings: Settings, started: float, save: Callable[[Result], None]) -> Result:
    """Train, evaluate and measure all arms; ``save`` gets the result so far after each seed, and on Ctrl-C.

    ``started`` is when the process began, by ``time.perf_counter``: the time limit counts from there.
    """
    result: Result = {"status": "interrupted", "environment": environment(), "settings": asdict(settings)}
    try:
        _run(settings, started, result, save)
        result["status"] = "complete"
    except KeyboardInterrupt:
        _say("Interrupted: writing what was measured.")
    finally:
        result["wall_s"] = round(time.perf_counter() - started, 1)
        if "arms" in result:
            save(result)
    return result


def _run(settings: Settings, started: float, result: Result, save: Callable[[Result], None]) -> None:
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    loading = time.perf_counter()
    sizes = {name: getattr(settings, name) for name in ("batch_size", "length", "held_out")}
    with others_cpus() as others:
        backbone, tokenizer = load_model(settings.model, is_causal(settings.data))
        loading = time.perf_counter() - loading
        # As users load it: adapters are float32 all the same.
        backbone.to(device, dtype)
        task = open_task(settings.data, tokenizer, **sizes, seed=settings.seeds[0])
    if others and (threads := free_threads(others[0])) < torch.get_num_threads():
        _say(
            f"Other programs keep {others[0]:.1f} of {os.cpu_count()} CPUs busy, so this run takes fewer threads: {threads}."
        )
        torch.set_num_threads(threads)
    result["threads"] = torch.get_num_threads()
    recipe = settings.recipe(backbone)

    def build(seed: int) -> list[Arm]:
        return build_arms(settings.arms, backbone, task.head, recipe, seed, device)

    first = [to_device(batch, device) for batch in islice(task.batches(settings.seeds[0]), _REHEARSALS)]
    round_s = rehearse(build(settings.seeds[0]), first, dtype)
    # A held-out token costs about a third of a training token: no backward pass, and larger batches.
    held_out = sum(len(batch["labels"]) for batch in task.held_out) / len(first[0]["labels"]) / 3
    memory_s = len(settings.arms) * (loading + _PROCESS_S + 2 * round_s)
    limit = settings.time_limit_s
    left = None if limit is None else started + limit - time.perf_counter() - memory_s
    seeds, steps = plan(settings, round_s, held_out, left)
    recipe = replace(recipe, steps=steps)
    total_s = seeds * (steps + held_out) * round_s + memory_s
    what = f"{seeds} seed{'s' * (seeds > 1)} x {steps} steps, {round_s:.1f} s a step of all arms"
    _say(f"{what}: about {total_s / 60:.0f} minutes more.")
    result.update(
        task={"name": task.name, "metric": task.metric, "majority": task.majority},
        recipe=asdict(recipe),
        arms={name: {"label": LABELS[name], "runs": []} for name in settings.arms},
    )
    with tqdm(total=seeds * steps, desc="fine-tuning", unit="step", dynamic_ncols=True) as bar:
        for seed in settings.seeds[:seeds]:
            _one_seed(build(seed), task, recipe, seed, dtype, result, bar)
            save(result)
    longest = max(first, key=lambda batch: batch["input_ids"].numel())
    where = {"device": settings.device, "dtype": settings.dtype}
    for name in tqdm(settings.arms, desc="memory, one process an arm", unit="arm", dynamic_ncols=True):
        result["arms"][name]["footprint"] = measure_in_subprocess(
            name, settings.model, task.head, recipe, longest, **where
        )


def free_threads(others: float) -> int:
    """How many threads to take beside programs that keep ``others`` CPUs busy.

    Threads of one operator spin while they wait for each other. With more threads than free CPUs every operator waits for the
    scheduler: a step then takes many times as long. Waiting without spinning doubles a step's time on an idle machine.
    """
    return min(torch.get_num_threads(), max(1, round((os.cpu_count() or 1) - others)))


def plan(settings: Settings, round_s: float, held_out: float, left_s: float | None) -> tuple[int, int]:
    """How many seeds and steps fit into ``left_s``, each seed with its whole schedule.

    ``round_s`` is the time of a step of all arms, and the held-out batches take as long as ``held_out`` steps. Fewer steps are
    planned before fewer seeds, and ``FEWEST_STEPS`` of one seed however long they take.
    """
    fewest = min(settings.steps, FEWEST_STEPS)
    if left_s is None:
        return len(settings.seeds), settings.steps
    for seeds in (len(settings.seeds), 1):
        steps = int(left_s / seeds / round_s - held_out)
        if steps >= fewest:
            return seeds, min(settings.steps, steps)
    return 1, fewest


def _one_seed(
    arms: list[Arm], task: Task, recipe: Recipe, seed: int, dtype: torch.dtype, result: Result, bar: Any
) -> None:
    for arm in arms:
        record = result["arms"][arm.name]
        record["trainable"] = sum(p.numel() for p in arm.model.parameters() if p.requires_grad)
        # The dict of the arm's series is shared: an interrupted seed's steps are in the result.
        record["runs"].append(
            {"seed": seed, "series": vars(arm.series), **({"start": arm.norms()} if arm.pairs else {})}
        )
    wall, waited = time.perf_counter(), waited_s()
    for _ in train(arms, task.batches(seed), recipe.steps, seed, dtype):
        losses = {LABELS[arm.name]: f"{sum(arm.series.loss[-10:]) / len(arm.series.loss[-10:]):.2f}" for arm in arms}
        bar.set_postfix(losses, refresh=False)
        bar.update()
    if waited is not None:
        share = ((waited_s() or 0.0) - waited) / (time.perf_counter() - wall) / torch.get_num_threads()
        result["waited_share"] = max(result.get("waited_share", 0.0), round(share, 3))
    for arm in arms:
        found = result["arms"][arm.name]["runs"][-1]
        found["held_out"] = evaluate(arm, task.held_out, dtype)
        if arm.pairs:
            found["end"] = arm.norms()
        if hasattr(arm.optimizer, "stability"):
            latched_at = [item.latched_at for item in arm.optimizer.stability()]
            found["latched"] = sum(at is not None for at in latched_at)
            counts = [recipe.steps if at is None else at - 1 for at in latched_at]
            found["shrinks"] = sum(counts) / len(counts)


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)

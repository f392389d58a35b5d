"""One run: settings in, a JSON-able result out. An interrupted run leaves what it measured on disk."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from benchmarks.common.data import Batch, load_dataset, test_batches, training_batches
from benchmarks.common.measure import environment
from benchmarks.common.memory import status_mib
from benchmarks.common.models import check_linear_names, drop_pooler, linear_names, load_model, query_value_names
from benchmarks.finetuning.arms import (
    ACCELERATED,
    FROZEN,
    PEFT,
    STABLE,
    Arm,
    Recipe,
    arm_name,
    build_arms,
    earliest_latch,
    shrinkage,
)
from benchmarks.finetuning.footprint import measure_in_subprocess
from benchmarks.finetuning.train import evaluate, probe, rehearse, to_device, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR, QUERY_VALUE = "all-linear", "query-value"
FEWEST_STEPS = 40
_LEAST_BEFORE_STOP = 10
_REHEARSALS = 4
_TEST_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers, but for the machine."""

    model: str
    data: str
    device: str
    dtype: str
    lr: float
    steps: int
    batch_size: int
    seed: int
    held_out: int
    shrink_ratios: tuple[float, ...]
    # ALL_LINEAR, QUERY_VALUE or the last parts of the names of linear layers.
    targets: tuple[str, ...] | str
    r: int
    lora_alpha: float
    lora_dropout: float
    # The run takes fewer steps if it would need longer than this in all; None: no limit.
    time_limit_s: float | None = None
    footprint: bool = True

    @property
    def arms(self) -> list[str]:
        # accelerate_peft runs at the largest ratio alone: the ratio hardly changes the time of a step.
        accelerated = arm_name(ACCELERATED, max(self.shrink_ratios))
        return [FROZEN, PEFT, accelerated, *(arm_name(STABLE, ratio) for ratio in self.shrink_ratios)]

    def recipe(self, backbone: PreTrainedModel) -> Recipe:
        """What all arms share.

        Raises:
            ValueError: ``backbone`` has no layers of these names.
        """
        if self.targets == QUERY_VALUE:
            targets = query_value_names(backbone)
        elif self.targets == ALL_LINEAR:
            targets = linear_names(backbone)
        else:
            targets = tuple(self.targets)
        check_linear_names(backbone, targets)
        adapters = {"r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return Recipe(targets, **adapters, lr=self.lr, steps=self.steps, seed=self.seed)


def run(settings: Settings, started: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train, evaluate and measure all arms; ``save`` gets the result so far after each part, and on Ctrl-C.

    ``started`` is when the process began, by ``time.perf_counter``: the time limit counts from there.
    """
    result: dict[str, Any] = {"status": "interrupted", "environment": environment(), "settings": asdict(settings)}
    try:
        _run(settings, started, result, save)
        result["status"] = "complete"
    except KeyboardInterrupt:
        _say("Interrupted: writing what was measured.")
    finally:
        result["wall_s"] = round(time.perf_counter() - started, 1)
        result["peak_rss_mib"] = _peak_rss_mib()
        if "arms" in result:
            save(result)
    return result


def _run(settings: Settings, started: float, result: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    dataset = load_dataset(settings.data, seed=settings.seed, held_out=settings.held_out)
    loading = time.perf_counter()
    backbone, tokenizer = load_model(settings.model)
    loading = time.perf_counter() - loading
    backbone.to(device)
    drop_pooler(backbone)
    recipe = settings.recipe(backbone)
    classes = len(dataset.classes)

    def batches() -> Any:
        return training_batches(dataset, tokenizer, batch_size=settings.batch_size, seed=settings.seed)

    arms = build_arms(settings.arms, backbone, classes, recipe, device)
    first = [to_device(batch, device) for batch in islice(batches(), _REHEARSALS)]
    round_s = rehearse(arms, first, dtype)
    if settings.time_limit_s is not None:
        # Batches differ in length by a factor of two: estimate from the tokens of those that are to come.
        round_s *= _mean_tokens(islice(batches(), settings.steps)) / _mean_tokens(first[1:])
    deadline = _training_deadline(settings, started, round_s, loading)
    if deadline:
        steps = min(settings.steps, max(FEWEST_STEPS, int((deadline - time.perf_counter()) / round_s)))
        if steps != recipe.steps:
            _say(f"{steps} steps of {settings.steps} fit the time limit here ({round_s:.1f} s a step for all arms).")
            recipe = replace(recipe, steps=steps)
            arms = build_arms(settings.arms, backbone, classes, recipe, device)
    result.update(
        data={
            "name": dataset.name,
            "classes": classes,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "majority": dataset.majority,
        },
        recipe=asdict(recipe),
        # Share the dict of each arm's series: the result then has every appended value at once.
        arms={
            arm.name: {"label": arm.label, "shrink_ratio": arm.shrink_ratio, **arm.notes, "series": vars(arm.series)}
            for arm in arms
        },
    )
    features = _train(arms, batches(), recipe, dtype, deadline, result, save)
    held_out = list(test_batches(dataset, tokenizer, batch_size=_TEST_BATCH))
    _evaluate(arms, held_out, dtype, features, result)
    save(result)
    if settings.footprint:
        longest = max(first, key=lambda batch: batch["input_ids"].numel())
        _footprint(settings, classes, recipe, longest, result, started)


def _mean_tokens(batches: Iterable[Batch]) -> float:
    return statistics.fmean(batch["input_ids"].numel() for batch in batches)


def _train(
    arms: list[Arm], batches: Any, recipe: Recipe, dtype: torch.dtype, deadline: float | None, result: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Train; return the frozen arm's features and labels, also of an interrupted run's steps."""
    features: list[tuple[torch.Tensor, torch.Tensor]] = []
    with tqdm(total=recipe.steps, desc="fine-tuning", unit="step", dynamic_ncols=True) as bar:

        def after_step(step: int) -> bool:
            recent = {arm.label: arm.series.loss[-10:] for arm in arms}
            bar.set_postfix({label: f"{sum(loss) / len(loss):.3f}" for label, loss in recent.items()}, refresh=False)
            bar.update()
            if (step + 1) % 25 == 0:
                save(result)
            # The machine may have become slower since the rehearsal.
            return deadline is None or step + 1 < _LEAST_BEFORE_STOP or time.perf_counter() < deadline

        wall, cpu = time.perf_counter(), time.process_time()
        try:
            train(arms, batches, recipe, dtype, features, after_step)
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            result["cpu_share"] = round(cpu / wall / torch.get_num_threads(), 3)
            for arm in arms:
                if arm.shrink_ratio is not None:
                    result["arms"][arm.name]["latch"] = _latch(arm, recipe.lr)
    return features


def _latch(arm: Arm, lr: float) -> dict[str, Any]:
    latched_at = [item.latched_at for item in arm.optimizer.stability()]  # type: ignore[attr-defined]
    shrunk = shrinkage(latched_at, arm.shrink_ratio, len(arm.series.loss))
    return {"earliest": earliest_latch(arm.pairs, lr), "latched_at": latched_at, **shrunk}


def _evaluate(
    arms: list[Arm], held_out: list[Batch], dtype: torch.dtype, features: list[tuple[torch.Tensor, torch.Tensor]],
    result: dict[str, Any],
) -> None:  # fmt: skip
    data, outcomes = result["data"], {}
    with tqdm(total=data["test"] * len(arms), desc="held out", unit="text", dynamic_ncols=True) as bar:
        for arm in arms:
            outcomes[arm.name] = evaluate(arm, held_out, dtype, bar.update)
    for name, outcome in outcomes.items():
        correct = outcome["correct"].double()
        test = {**_mean_and_error(correct, "accuracy"), **_mean_and_error(outcome["loss"].double(), "loss")}
        if name not in (FROZEN, PEFT):
            # Both arms see the same texts: the error of the difference is much smaller than the two errors together.
            test |= _mean_and_error(correct - outcomes[PEFT]["correct"].double(), "difference")
        result["arms"][name]["test"] = test
    frozen = outcomes[FROZEN]
    pooled, labels = (torch.cat(parts).cpu() for parts in zip(*features, strict=True))
    hits = probe(pooled, labels, frozen["features"], frozen["labels"], data["classes"])
    result["probe"] = {"examples": len(labels), **_mean_and_error(hits.double(), "accuracy")}


def _mean_and_error(values: torch.Tensor, name: str) -> dict[str, float]:
    error = (values.std(correction=1) / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
    return {name: values.mean().item(), f"{name}_se": error}


def _footprint(
    settings: Settings, classes: int, recipe: Recipe, batch: Batch, result: dict[str, Any], started: float
) -> None:
    where = {"device": settings.device, "dtype": settings.dtype}
    for name in tqdm(settings.arms, desc="memory, one process an arm", unit="arm", dynamic_ncols=True):
        record = result["arms"][name]
        if settings.time_limit_s is not None and time.perf_counter() - started > settings.time_limit_s:
            record["footprint"] = {"error": "the time limit had passed"}
        else:
            record["footprint"] = measure_in_subprocess(name, settings.model, classes, recipe, batch, **where)


def _training_deadline(settings: Settings, started: float, round_s: float, loading: float) -> float | None:
    """When training must end to leave time for evaluation and the memory measurements, estimated from the rehearsal."""
    if settings.time_limit_s is None:
        return None
    # A held-out text costs about a third of a training text: no backward pass, and larger batches.
    evaluation = round_s / settings.batch_size * settings.held_out / 3
    # Importing, loading, and six steps that are slower than others.
    processes = len(settings.arms) * (loading + 8.0) + 8 * round_s if settings.footprint else 0.0
    return started + settings.time_limit_s - evaluation - processes


def _peak_rss_mib() -> float | None:
    """The job's peak memory: this process's peak, or its memory now plus the largest child's peak."""
    try:
        import resource
    except ImportError:
        return None
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    own, child = (resource.getrusage(who).ru_maxrss / scale for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(max(own, (status_mib("VmRSS") or own) + child), 1)


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)

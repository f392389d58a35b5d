"""A fine-tuning result as verdicts in words, tables and files."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval, ratio_of_totals
from benchmarks.common.measure import summarize
from benchmarks.common.tables import aligned, csv_text, json_text, write_files
from benchmarks.finetuning.arms import ACCELERATED, FROZEN, PEFT, STABLE
from benchmarks.finetuning.experiment import Result
from benchmarks.finetuning.train import PHASES

# Each seed's first steps allocate optimizer state and warm caches. Files have them, medians do not.
SETTLING_STEPS = 3
_LAST_LOSSES = 10
_NOTHING = "-"
# On an idle machine threads wait for a CPU during less than 1 % of a run.
MOST_WAITING = 0.05
# Characters before a verdict.
HEADING = 8
# Smaller differences in memory are called none.
_EQUAL_PERCENT = 0.5

Record = dict[str, Any]
Row = dict[str, Any]


def step_times(record: Record, phases: Sequence[str] = PHASES, steps: Sequence[int] | None = None) -> list[float]:
    """Milliseconds of each step's ``phases`` together, of all seeds, without each seed's first steps.

    ``steps`` says how many of each seed's steps count.
    """
    times: list[float] = []
    for number, run in enumerate(record["runs"]):
        columns = [run["series"][f"{phase}_ms"] for phase in phases]
        one = [sum(parts) for parts in zip(*columns, strict=False)][: steps[number] if steps else None]
        times += one[SETTLING_STEPS:] if len(one) > 2 * SETTLING_STEPS else one
    return times


def time_ratio(above: Record, below: Record, phases: Sequence[str] = PHASES) -> tuple[float, float] | None:
    """The time of all steps of ``above`` over that of the same steps of ``below``, and half its 95 % interval."""
    # Some arms lack an interrupted step.
    steps = [
        min(len(run["series"]["optimizer_ms"]) for run in runs)
        for runs in zip(above["runs"], below["runs"], strict=False)
    ]
    times = [step_times({"runs": record["runs"][: len(steps)]}, phases, steps) for record in (above, below)]
    return ratio_of_totals(*times) if times[0] else None


def overhead(record: Record, frozen: Record, phases: Sequence[str] = PHASES) -> tuple[float, float] | None:
    """Percent over the frozen model's time on the same batches, and half its 95 % interval."""
    ratio = time_ratio(record, frozen, phases)
    return None if ratio is None else (100 * ratio[0] - 100, 100 * ratio[1])


def summary(result: Result) -> dict[str, Row]:
    """The figures of all arms by name; None if not measured."""
    return {name: _row(result["arms"], name) for name in result["arms"]}


def _row(arms: dict[str, Record], name: str) -> Row:
    record, frozen, peft = arms[name], arms.get(FROZEN), arms.get(PEFT)
    runs = record["runs"]
    losses = [loss for run in runs for loss in run["series"]["loss"][-_LAST_LOSSES:]]
    row: Row = {
        "arm": name,
        "label": record["label"],
        "steps": sum(len(run["series"]["loss"]) for run in runs),
        "trainable": record.get("trainable"),
        "train_loss": _mean(losses),
    }
    for metric in ("loss", "accuracy"):
        mine = _held_out(record, metric)
        row[metric] = _mean(mine)
        others = _held_out(peft, metric) if peft and name not in (FROZEN, PEFT) else []
        differences = [x - y for x, y in zip(mine, others, strict=False)]
        row[f"{metric}_difference"], row[f"{metric}_difference_95"] = (
            interval(differences) if differences else (None, None)
        )
    for part, phases in (*((phase, (phase,)) for phase in PHASES), ("step", PHASES)):
        times = step_times(record, phases)
        for key, value in (summarize(times) if times else dict.fromkeys(("median", "q1", "q3"))).items():
            row[f"{part}_ms_{key}"] = value
    for part, phases in (("step", PHASES), ("layers", PHASES[:2])):
        over = overhead(record, frozen, phases) if frozen and name != FROZEN else None
        row[f"{part}_overhead_percent"], row[f"{part}_overhead_percent_95"] = over or (None, None)
    faster = time_ratio(peft, record) if peft and name != PEFT else None
    row["speedup_over_peft"], row["speedup_over_peft_95"] = faster or (None, None)
    footprint = record.get("footprint", {})
    row |= {key: footprint.get(key) for key in ("saved_mib", "peak_mib", "step_mib")}
    counted = footprint.get("launches") or footprint.get("operators") or {}
    row |= {f"{phase}_calls": counted.get(phase) for phase in PHASES}
    for when in ("start", "end"):
        for key in ("a_norm", "b_norm"):
            row[f"{key}_{when}"] = _mean([run[when][key] for run in runs if when in run])
    return row | {key: _mean([run[key] for run in runs if key in run]) for key in ("latched", "shrinks")}


def _held_out(record: Record, metric: str) -> list[float]:
    """The held-out figure of each finished seed."""
    return [run["held_out"][metric] for run in record["runs"] if "held_out" in run]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def verdicts(result: Result) -> list[str]:
    """Speed, memory and quality of both of this library's ways against PEFT, in words; then warnings."""
    rows = summary(result)
    ours = [rows[name] for name in (ACCELERATED, STABLE) if name in rows]
    lines: list[str] = []
    if PEFT in rows:
        for heading, say in (("Speed", _speed), ("Memory", _memory), ("Quality", _quality)):
            found = [sentence for row in ours if (sentence := say(row, rows[PEFT], result))]
            if heading == "Quality" and found:
                found.insert(0, _levels(rows, result))
            lines += [f"{heading if i == 0 else '':{HEADING}}{sentence}" for i, sentence in enumerate(found)]
    return [*lines, *_warnings(rows, result)]


def _speed(row: Row, peft: Row, _result: Result) -> str | None:
    ratio, half = row["speedup_over_peft"], row["speedup_over_peft_95"]
    if ratio is None:
        return None
    times = f"{row['label']}: {row['step_ms_median']:,.0f} ms a step, PEFT {peft['step_ms_median']:,.0f} ms"
    if math.isnan(half):
        return f"{times} (one step: shows nothing)"
    # Times differ only if the interval of their ratio leaves out 1.
    verdict = f"{change(1 / ratio)} time" if abs(ratio - 1) > half else "no difference shown"
    return f"{times}: {verdict}, {ratio:.2f}x as fast (95% interval {ratio - half:.2f} to {ratio + half:.2f})"


def _memory(row: Row, peft: Row, _result: Result) -> str | None:
    parts = []
    for what, key in (("saved for backward", "saved_mib"), ("at the peak", "peak_mib")):
        if row[key] and peft[key]:
            ratio = row[key] / peft[key]
            verdict = "the same" if abs(100 * ratio - 100) < _EQUAL_PERCENT else change(ratio)
            parts.append(f"{row[key]:,.0f} MiB {what}, PEFT {peft[key]:,.0f}: {verdict}")
    return f"{row['label']}: {'; '.join(parts)}" if parts else None


def _levels(rows: dict[str, Row], result: Result) -> str:
    metric, seeds = result["task"]["metric"], _finished(result)
    means = [
        f"{rows[name]['label']} {_figure(rows[name][metric], metric)}"
        for name in (FROZEN, PEFT)
        if rows.get(name, {}).get(metric) is not None
    ]
    if (majority := result["task"]["majority"]) is not None:
        means.append(f"largest class {_figure(majority, metric)}")
    return f"held-out {metric}{f', mean of {seeds} seeds' if seeds > 1 else ''}: {', '.join(means)}"


def _quality(row: Row, _peft: Row, result: Result) -> str | None:
    metric = result["task"]["metric"]
    value, difference, half = (row[key] for key in (metric, f"{metric}_difference", f"{metric}_difference_95"))
    if difference is None:
        return None
    text = f"{row['label']}: {_figure(value, metric)}, {_figure(difference, metric, '+')}"
    if math.isnan(half):
        return f"{text} against PEFT (one seed: shows nothing)"
    better = (difference > 0) == (metric == "accuracy")
    verdict = "no difference shown" if abs(difference) <= half else "better" if better else "worse"
    return f"{text} ± {_figure(half, metric)} against PEFT (95% interval over seeds): {verdict}"


def _figure(value: float, metric: str, sign: str = "") -> str:
    # Adding 0 makes no difference of -0.000.
    return f"{round(value, 3) + 0.0:{sign}.3f}" if metric == "loss" else f"{round(100 * value, 1) + 0.0:{sign}.1f} %"


def _warnings(rows: dict[str, Row], result: Result) -> list[str]:
    metric, majority = result["task"]["metric"], result["task"]["majority"]
    floors = [("the frozen model", rows[FROZEN][metric])] if FROZEN in rows else []
    floors += [("the largest class", majority)] if majority is not None else []
    lines = []
    for row in rows.values():
        for what, floor in floors:
            worse = None not in (row[metric], floor) and (
                row[metric] > floor if metric == "loss" else row[metric] < floor
            )
            if worse and row["arm"] != FROZEN:
                lines.append(
                    f"Warning: {row['label']} ended below {what} (held-out {metric} {_figure(row[metric], metric)} against "
                    f"{_figure(floor, metric)}): training broke or was too short, so its quality says nothing."
                )
    if disturbed(result):
        lines.append(
            f"Other programs ran beside this one: its threads waited for a CPU {100 * result['waited_share']:.0f} % of the time. "
            "Ratios of times are fair, since all arms waited, but less exact."
        )
    return lines


def disturbed(result: Result) -> bool:
    """Whether other programs took much of this one's time while it trained, as far as can be told."""
    return result.get("waited_share", 0.0) > MOST_WAITING


def change(ratio: float) -> str:
    """A ratio to something as "25% less" or "2.0% more"."""
    percent = 100 * ratio - 100
    size = abs(percent)
    return f"{size:.{0 if size >= 9.95 else 1}f}% {'less' if percent < 0 else 'more'}"


# Title and cell of each row; the second element says whether the short table has it.
_Line = tuple[str, bool, Callable[[Row], str]]


def _lines(result: Result) -> list[_Line]:
    launches = any("launches" in record.get("footprint", {}) for record in result["arms"].values())
    return [
        ("trainable parameters", False, lambda r: _number(r["trainable"], ",d")),
        (f"training loss, last {_LAST_LOSSES} steps", False, lambda r: _number(r["train_loss"], ".3f")),
        ("held-out loss", True, lambda r: _number(r["loss"], ".3f")),
        ("  minus PEFT's", False, loss_difference),
        ("held-out accuracy, %", result["task"]["metric"] == "accuracy", lambda r: _number(r["accuracy"], ".1f", 100)),
        ("  minus PEFT's, points", False, lambda r: _with_interval(r, "accuracy_difference", "+.1f", 100)),
        ("step, ms", True, lambda r: _quartiles(r, "step_ms")),
        *((f"  {phase}", False, lambda r, phase=phase: _quartiles(r, f"{phase}_ms")) for phase in PHASES),
        ("over the frozen model, %", True, lambda r: _with_interval(r, "step_overhead_percent", "+.1f")),
        ("  forward and backward alone", False, lambda r: _with_interval(r, "layers_overhead_percent", "+.1f")),
        ("PEFT's time over this arm's", False, lambda r: _with_interval(r, "speedup_over_peft", ".2f")),
        ("saved for backward, MiB", True, lambda r: _number(r["saved_mib"], ",.0f")),
        ("peak memory, MiB", True, lambda r: _number(r["peak_mib"], ",.0f")),
        ("  of that, above the idle process", False, lambda r: _number(r["step_mib"], ",.0f")),
        ("kernel launches a step" if launches else "operators a step (not launches)", False, _calls),
        ("||A||_F, start > end", False, lambda r: _from_to(r, "a_norm")),
        ("||B||_F, start > end", False, lambda r: _from_to(r, "b_norm")),
        ("pairs that stopped shrinking", False, lambda r: _number(r["latched"], ".0f")),
        ("shrinking steps, mean over pairs", False, lambda r: _number(r["shrinks"], ".1f")),
    ]  # fmt: skip


def table(result: Result, short: bool = False) -> str:
    """The figures with a column for each arm; ``short`` leaves out all but the most asked for."""
    rows = summary(result)
    cells = [["", *(row["label"] for row in rows.values())]]
    cells += [
        [title, *(render(row) for row in rows.values())]
        for title, asked, render in _lines(result)
        if asked or not short
    ]
    return "\n".join(aligned(cells))


def notes(result: Result) -> list[str]:
    """The conditions of the figures."""
    settings, recipe, environment = result["settings"], result["recipe"], result["environment"]
    where = environment["gpu"] if settings["device"].startswith("cuda") else environment["cpu"]
    size = f"{settings['batch_size']} x {settings['length']} tokens" if result["task"]["majority"] is None else (
        f"{settings['batch_size']} texts"
    )  # fmt: skip
    versions = [f"{key} {environment[key]}" for key in ("torch", "triton", "peft", "transformers") if environment[key]]
    lines = [
        f"{settings['model']} on {settings['data']}: {len(settings['seeds'])} seeds planned, {_finished(result)} done, of "
        f"{recipe['steps']} steps of {size}; {adapters(result)}, lr {recipe['lr']:g}, λ {recipe['shrink_ratio']:g}, gradients "
        f"clipped at {recipe['max_grad_norm']:g}, {settings['dtype']}.",
        "PEFT and PEFT + one line (accelerate_peft with fuse_mlp=True) train with torch.optim.AdamW(fused=True); our layers "
        "(apply_lora with fuse_mlp=True) with StableLoRAAdamW.",
        "Times are medians [quartiles], the arms taking each batch in turn; ratios are those of all steps together, ± half a 95% "
        "interval over steps. Differences of losses and accuracies are ± half a 95% interval over seeds.",
        "The frozen model's backward pass goes exactly as deep as LoRA's. Each arm draws dropout masks of its own.",
    ]
    footprints = {record["label"]: record.get("footprint", {}) for record in result["arms"].values()}
    if tokens := [found["tokens"] for found in footprints.values() if "tokens" in found]:
        lines.append(f"Memory is of a step of {tokens[0]} tokens, padding included, each arm in a process of its own.")
    lines += [
        f"Memory of {label} was not measured: {found['error']}"
        for label, found in footprints.items()
        if "error" in found
    ]
    lines.append(
        f"{where}, {environment['cores']} cores, {result['threads']} threads, load {environment['load_average']} at "
        f"the start; Python {environment['python']}, {', '.join(versions)}; commit {environment['commit']}; "
        f"{result['status']} after {_number(result.get('wall_s'), '.0f')} s."
    )
    return lines


def wrapped(lines: Sequence[str]) -> list[str]:
    """Lines of at most 120 characters."""
    return [part for line in lines for part in textwrap.wrap(line, 120)]


def _finished(result: Result) -> int:
    return min(len(_held_out(record, "loss")) for record in result["arms"].values())


def adapters(result: Result) -> str:
    """The recipe's adapters in words."""
    recipe = result["recipe"]
    layers = "/".join(result["settings"]["targets"]) or "all linear layers"
    return f"r {recipe['r']}, alpha {recipe['lora_alpha']:g}, dropout {recipe['lora_dropout']:g} on {layers}"


def loss_difference(row: Row) -> str:
    """The held-out loss minus PEFT's, and half its interval over seeds."""
    if row["loss_difference"] is None:
        return _NOTHING
    text, half = _figure(row["loss_difference"], "loss", "+"), _number(row["loss_difference_95"], ".3f")
    return text if half == _NOTHING else f"{text} ± {half}"


def _number(value: float | None, spec: str, factor: float = 1) -> str:
    return _NOTHING if value is None or math.isnan(value) else format(factor * value if factor != 1 else value, spec)


def _with_interval(row: Row, key: str, spec: str, factor: float = 1) -> str:
    text, half = _number(row[key], spec, factor), _number(row[f"{key}_95"], spec.lstrip("+"), factor)
    return text if half == _NOTHING else f"{text} ± {half}"


def _quartiles(row: Row, key: str) -> str:
    if row[f"{key}_median"] is None:
        return _NOTHING
    median, q1, q3 = (f"{row[f'{key}_{part}']:.1f}" for part in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def _from_to(row: Row, key: str) -> str:
    start, end = (_number(row[f"{key}_{when}"], ".3f") for when in ("start", "end"))
    return _NOTHING if start == _NOTHING else f"{start} > {end}"


def _calls(row: Row) -> str:
    parts = [row[f"{phase}_calls"] for phase in PHASES]
    return "not counted" if None in parts else f"{sum(parts):,} ({' + '.join(str(part) for part in parts)})"


def write_result(result: Result, directory: Path) -> list[Path]:
    """Write result.json (``result`` with its summary and verdicts), steps.csv (a row a step) and table.txt (every figure)."""
    steps = [
        {"arm": name, "seed": run["seed"], "step": step, **dict(zip(run["series"], values, strict=True))}
        for name, record in result["arms"].items()
        for run in record["runs"]
        # After an interrupt one list may be a step ahead; rows stop with the shortest list.
        for step, values in enumerate(zip(*run["series"].values(), strict=False), start=1)
    ]
    found = verdicts(result)
    files = {
        "result.json": json_text(result | {"summary": summary(result), "verdicts": found}),
        "steps.csv": csv_text(steps),
        "table.txt": "\n".join([*found, "", table(result), "", *wrapped(notes(result))]) + "\n",
    }
    return write_files(directory, files)

"""A fine-tuning result as an aligned table, CSV and JSON files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import ratio_of_totals
from benchmarks.common.measure import summarize
from benchmarks.common.tables import aligned, csv_text, json_text, write_files
from benchmarks.finetuning.arms import FROZEN, PEFT
from benchmarks.finetuning.headline import headlines
from benchmarks.finetuning.train import PHASES

# The first steps allocate optimizer state and warm caches. Files have them, medians do not.
SETTLING_STEPS = 3
_LAST_LOSSES = 20
_NOTHING = "-"
# Alone on two cores, training keeps its threads busy for 93 to 99% of the time.
QUIET_SHARE = 0.9

Result = dict[str, Any]
Record = dict[str, Any]


def step_times(record: Record, phases: Sequence[str] = PHASES) -> list[float]:
    """Milliseconds of each step's ``phases`` together, without the first steps."""
    return _settled(_all_times(record, phases))


def _all_times(record: Record, phases: Sequence[str]) -> list[float]:
    columns = [record["series"][f"{phase}_ms"] for phase in phases]
    return [sum(parts) for parts in zip(*columns, strict=False)]


def _settled(times: list[float]) -> list[float]:
    return times[SETTLING_STEPS:] if len(times) > 2 * SETTLING_STEPS else times


def time_ratio(above: Record, below: Record, phases: Sequence[str] = PHASES) -> tuple[float, float] | None:
    """The time of all steps of ``above`` over that of the same steps of ``below``, and half its 95 % interval."""
    times = _all_times(above, phases), _all_times(below, phases)
    # An interrupted step has times of some arms only.
    common = min(map(len, times))
    return ratio_of_totals(*(_settled(each[:common]) for each in times)) if common else None


def overhead(record: Record, frozen: Record, phases: Sequence[str] = PHASES) -> tuple[float, float] | None:
    """Percent over the frozen model's time on the same batches, and half its 95 % interval."""
    ratio = time_ratio(record, frozen, phases)
    return None if ratio is None else (100 * ratio[0] - 100, 100 * ratio[1])


def summary(result: Result) -> dict[str, Record]:
    """The figures of all arms by name: what a figure or a headline is made from."""
    return {name: flat_summary(result, name) for name in result["arms"]}


def flat_summary(result: Result, name: str) -> dict[str, Any]:
    """One arm's figures as a flat record, a row of summary.csv; None if not measured."""
    record, frozen, peft = result["arms"][name], result["arms"].get(FROZEN), result["arms"].get(PEFT)
    series, test = record["series"], record.get("test", {})
    latch, footprint = record.get("latch", {}), record.get("footprint", {})
    losses = series["loss"][-_LAST_LOSSES:]
    row: dict[str, Any] = {
        "arm": name,
        "label": record["label"],
        "steps": len(series["loss"]),
        "trainable": record.get("trainable"),
        "train_loss": statistics.fmean(losses) if losses else None,
        **{key: test.get(key) for key in ("loss", "accuracy", "accuracy_se", "difference", "difference_se")},
    }
    for part, phases in (*((phase, (phase,)) for phase in PHASES), ("step", PHASES)):
        times = step_times(record, phases)
        for key, value in (summarize(times) if times else dict.fromkeys(("median", "q1", "q3"))).items():
            row[f"{part}_ms_{key}"] = value
    for part, phases in (("step", PHASES), ("layers", PHASES[:2])):
        over = overhead(record, frozen, phases) if frozen and name != FROZEN else None
        row[f"{part}_overhead_percent"], row[f"{part}_overhead_percent_95"] = over or (None, None)
    faster = time_ratio(peft, record) if peft and name != PEFT else None
    row["speedup_over_peft"], row["speedup_over_peft_95"] = faster or (None, None)
    counted = footprint.get("launches") or footprint.get("operators") or {}
    row |= {key: footprint.get(key) for key in ("saved_mib", "peak_mib", "step_mib")}
    row |= {f"{phase}_calls": counted.get(phase) for phase in PHASES}
    for key in ("a_norm", "b_norm"):
        row[f"{key}_first"] = series["norms"][0][key] if series["norms"] else None
        row[f"{key}_last"] = series["norms"][-1][key] if series["norms"] else None
    keys = ("latched", "shrinks_mean", "shrinks_min", "shrinks_max", "a_factor", "earliest")
    return row | {key: latch.get(key) for key in keys}


def table(result: Result) -> str:
    """The answer in words, the run's figures with a column for each arm, and notes underneath."""
    rows = summary(result)
    pairs = max((len(record.get("latch", {}).get("latched_at", [])) for record in result["arms"].values()), default=0)
    launches = any("launches" in record.get("footprint", {}) for record in result["arms"].values())
    calls = "kernel launches a step" if launches else "operators a step (not launches)"
    lines: list[tuple[str, Callable[[Record], str]]] = [
        ("trainable parameters", lambda r: _number(r["trainable"], ",d")),
        (f"training loss, last {_LAST_LOSSES} steps", lambda r: _number(r["train_loss"], ".3f")),
        ("held-out loss", lambda r: _number(r["loss"], ".3f")),
        ("held-out accuracy, %", lambda r: _with_error(r["accuracy"], r["accuracy_se"])),
        ("  minus PEFT's, points", lambda r: _with_error(r["difference"], r["difference_se"], "+.1f")),
        ("step, ms", lambda r: _quartiles(r, "step_ms")),
        *((f"  {phase}", lambda r, phase=phase: _quartiles(r, f"{phase}_ms")) for phase in PHASES),
        ("over the frozen model, %", lambda r: _with_interval(r, "step_overhead_percent", "+.1f")),
        ("  forward and backward alone", lambda r: _with_interval(r, "layers_overhead_percent", "+.1f")),
        ("PEFT's time over this arm's", lambda r: _with_interval(r, "speedup_over_peft", ".2f")),
        ("saved for backward, MiB", lambda r: _number(r["saved_mib"], ".1f")),
        ("peak memory, MiB", lambda r: _number(r["peak_mib"], ".0f")),
        ("  of that, above the idle process", lambda r: _number(r["step_mib"], ".0f")),
        (calls, lambda r: _calls(r)),
        ("||A||_F, start > end", lambda r: _from_to(r, "a_norm")),
        ("||B||_F, start > end", lambda r: _from_to(r, "b_norm")),
        (f"pairs that stopped shrinking, of {pairs}", lambda r: _number(r["latched"], "d")),
        ("shrinking steps, mean (min-max)", _shrinks),
        ("||A||_F left by them, %", lambda r: _number(_percent(r["a_factor"]), ".1f")),
    ]
    cells = [["", *(row["label"] for row in rows.values())]]
    cells += [[title, *(render(row) for row in rows.values())] for title, render in lines]
    answer = [*headlines(rows), *_disturbance(result)]
    if answer:
        answer.append("")
    return "\n".join([*answer, *aligned(cells), "", *_notes(result)])


def _notes(result: Result) -> list[str]:
    settings, data, environment = result["settings"], result["data"], result["environment"]
    recipe = result["recipe"]
    where = environment["gpu"] if settings["device"].startswith("cuda") else environment["cpu"]
    notes = [
        f"{settings['model']} on {data['name']}: {recipe['steps']} steps of {settings['batch_size']}, lr {recipe['lr']:g}, "
        f"{adapters(result)}, {settings['dtype']}, seed {settings['seed']}; "
        f"{data['test']} texts held out, of which the largest class is {100 * data['majority']:.1f}%.",
    ]
    if "probe" in result:
        probe = result["probe"]
        notes.append(
            f"A logistic regression on the frozen features of the {probe['examples']} training texts seen gets "
            f"{_with_error(probe['accuracy'], probe['accuracy_se'])}%."
        )
    taken = min(len(record["series"]["loss"]) for record in result["arms"].values())
    if taken < recipe["steps"]:
        notes.append(
            f"Training stopped after {taken} of {recipe['steps']} steps, before the learning rate had decayed."
        )
    notes += [
        "Accuracies are ± one standard error; times are medians [quartiles], the arms taking each batch in turn.",
        "Ratios of times are those of all steps together, ± half a 95% interval over steps.",
        "The frozen model trains its head, and its backward pass goes exactly as deep as LoRA's.",
    ]
    if recipe["lora_dropout"]:
        notes.append(
            "Each arm draws dropout masks of its own: losses and accuracies of equal methods agree only statistically, and "
            "the standard errors leave this out."
        )
    for record in result["arms"].values():
        if (latch := record.get("latch")) and record["shrink_ratio"]:
            notes.append(
                f"{record['label']}: at lr {recipe['lr']:g} and these widths the stop comes at about step "
                f"{latch['earliest']} or later; {_stop(latch)}, which "
                f"alone took {100 * (1 - latch['a_factor']):.1f}% off ||A||."
            )
        if record.get("fused") is not None and record["label"].startswith("PEFT"):
            kind = "one fused call" if record["fused"] else "foreach, as fused=True is not available here"
            notes.append(f"torch.optim.AdamW ran as {kind}.")
    tokens = [r["footprint"]["tokens"] for r in result["arms"].values() if "tokens" in r.get("footprint", {})]
    if tokens:
        notes.append(f"Memory is of a step of {tokens[0]} tokens, padding included, each arm in a process of its own.")
    errors = {r["label"]: r["footprint"]["error"] for r in result["arms"].values() if "error" in r.get("footprint", {})}
    notes += [f"Memory of {label} was not measured: {error}" for label, error in errors.items()]
    versions = ", ".join(
        f"{key} {environment[key]}" for key in ("torch", "triton", "peft", "transformers") if environment[key]
    )
    notes.append(
        f"{where}, {environment['cores']} cores, {environment['torch_threads']} threads, load {environment['load_average']} "
        f"at the start; Python {environment['python']}, {versions}; commit {environment['commit']}."
    )
    wall, peak = result.get("wall_s"), result.get("peak_rss_mib")
    notes.append(f"{result['status']}: {_number(wall, '.0f')} s wall, {_number(peak, '.0f')} MiB at most in memory.")
    return notes


def disturbed(result: Result) -> bool:
    """Whether other programs took much of this one's time while it trained, as far as can be told."""
    share = result.get("cpu_share")
    return share is not None and result["settings"]["device"] == "cpu" and share < QUIET_SHARE


def _disturbance(result: Result) -> list[str]:
    if not disturbed(result):
        return []
    return [
        f"Other programs ran beside this one, which had only {100 * result['cpu_share']:.0f}% of its threads' time while "
        "training: do not trust these times."
    ]


def adapters(result: Result) -> str:
    """The recipe's adapters in words."""
    recipe, targets = result["recipe"], result["settings"]["targets"]
    layers = "all linear layers" if targets == "all-linear" else "/".join(recipe["target_modules"])
    return f"r {recipe['r']}, alpha {recipe['lora_alpha']:g}, dropout {recipe['lora_dropout']:g} on {layers}"


def _number(value: float | None, spec: str) -> str:
    return _NOTHING if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, spec)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _with_error(value: float | None, error: float | None, spec: str = ".1f") -> str:
    return _NOTHING if value is None else f"{_number(_percent(value), spec)} ± {_number(_percent(error), '.1f')}"


def _with_interval(row: Record, key: str, spec: str) -> str:
    return _NOTHING if row[key] is None else f"{row[key]:{spec}} ± {row[f'{key}_95']:{spec.lstrip('+')}}"


def _quartiles(row: Record, key: str, spec: str = ".1f") -> str:
    if row[f"{key}_median"] is None:
        return _NOTHING
    median, q1, q3 = (format(row[f"{key}_{part}"], spec) for part in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def _from_to(row: Record, key: str) -> str:
    if row[f"{key}_first"] is None:
        return _NOTHING
    return f"{row[f'{key}_first']:.3f} > {row[f'{key}_last']:.3f}"


def _calls(row: Record) -> str:
    parts = [row[f"{phase}_calls"] for phase in PHASES]
    if None in parts:
        return "not counted"
    return f"{sum(parts):,} ({' + '.join(str(part) for part in parts)})"


def _stop(latch: Record) -> str:
    """How many shrinking steps the pairs took, and whether they stopped."""
    stopped, pairs = sum(at is not None for at in latch["latched_at"]), len(latch["latched_at"])
    if not stopped:
        return f"none of the {pairs} pairs stopped: {latch['shrinks_mean']:.1f} shrinking steps on average"
    if stopped < pairs:
        return f"{stopped} of {pairs} pairs stopped: {latch['shrinks_mean']:.1f} shrinking steps on average"
    return f"it came after {latch['shrinks_mean']:.1f} shrinking steps on average"


def _shrinks(row: Record) -> str:
    if row["shrinks_mean"] is None:
        return _NOTHING
    return f"{row['shrinks_mean']:.1f} ({row['shrinks_min']}-{row['shrinks_max']})"


def write_result(result: Result, directory: Path) -> list[Path]:
    """Write result.json (``result`` with its summary and headlines), summary.csv, steps.csv, norms.csv and table.txt.

    In summary.csv a row is an arm; steps.csv and norms.csv go over time.
    """
    arms = result["arms"]
    # After an interrupt one list may be a step ahead; rows stop with the shortest list.
    steps = [
        {"arm": name, "step": step, "loss": loss, **{f"{p}_ms": t for p, t in zip(PHASES, times, strict=True)}}
        for name, record in arms.items()
        for step, (loss, *times) in enumerate(
            zip(*(record["series"][key] for key in ("loss", *(f"{phase}_ms" for phase in PHASES))), strict=False),
            start=1,
        )
    ]
    norms = [{"arm": name, **norm} for name, record in arms.items() for norm in record["series"]["norms"]]
    rows = summary(result)
    files = {
        "result.json": json_text(result | {"summary": rows, "headlines": headlines(rows)}),
        "summary.csv": csv_text([*rows.values()]),
        "steps.csv": csv_text(steps),
        "norms.csv": csv_text(norms),
        "table.txt": table(result) + "\n",
    }
    return write_files(directory, files)

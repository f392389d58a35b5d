"""A fine-tuning run as records, and made of those: verdicts in words, a table, plots and files."""

from __future__ import annotations

import math
import textwrap
import time
from collections import defaultdict, namedtuple
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.intervals import interval, ratio_of_totals
from benchmarks.common.plot_style import BLUE, GREY, ORANGE, RED, STYLE, plt, save
from benchmarks.common.records import record, write_records
from benchmarks.common.tables import write_text
from benchmarks.finetuning.arms import PEAK, PHASES, SAVED
from benchmarks.finetuning.recipe import ACCELERATED, FROZEN, LABELS, PEFT, STABLE

# Each seed's first steps allocate optimizer state and warm caches. Files have them, medians do not.
SETTLING_STEPS = 3
# On an idle machine threads wait for a CPU during less than 1 % of a run.
MOST_WAITING = 0.05
# Characters before a verdict.
HEADING = 8
# Smaller differences in memory are called none.
_EQUAL_PERCENT = 0.5
SPEEDUP = "speedup over PEFT"

Header = dict[str, Any]
# A median with its quartiles, or a mean with half the width of its 95 % interval; nan for what was
# not measured.
Figure = namedtuple("Figure", ("value", "q1", "q3", "half", "n"), defaults=(*4 * (math.nan,), 0))
Figures = defaultdict[tuple[str, str, str], Figure]  # by arm, phase and metric


@dataclass
class Result:
    """What was measured: ``about`` describes the run, ``steps`` has a row for each arm's step,
    ``figures`` one for all else.
    """

    about: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, arm: str, phase: str, found: dict[str, float], seed: int | None = None) -> None:
        rows = [
            {"arm": arm, "phase": phase, "metric": name, "seed": seed, "value": x}
            for name, x in found.items()
        ]
        self.figures += rows


def records(result: Result) -> pd.DataFrame:
    """The run in the format of :mod:`benchmarks.common.records`, with ``half_95`` as a further
    column.

    Times are medians over steps. All else is a mean over seeds, in the column ``median``.
    """
    settings, rows = result.about["settings"], []
    arms, case = settings["arms"], f"{settings['model']} on {settings['data']}"

    def add(arm: str, phase: str, metric: str, samples: Iterable[float], **more: float) -> None:
        role = {FROZEN: "base", PEFT: "rival"}.get(arm, "ours")
        rows.append(record(case, phase, arm, metric, [*samples], role) | more)

    steps = pd.DataFrame(result.steps)
    steps["layers_ms"] = steps["forward_ms"] + steps["backward_ms"]
    steps["step_ms"] = steps["layers_ms"] + steps["optimizer_ms"]
    taken = steps.groupby("seed").step.transform("max")
    settled = steps[(steps.step > SETTLING_STEPS) | (taken <= 2 * SETTLING_STEPS)]
    times = settled.pivot(index=["seed", "step"], columns="arm")
    for phase, arm in product(("step", *PHASES), arms):
        add(arm, phase, "ms", times[f"{phase}_ms", arm])
    for phase, arm in product(("step", "layers"), arms):
        if FROZEN in arms and arm != FROZEN:
            ratio, half = ratio_of_totals(times[f"{phase}_ms", arm], times[f"{phase}_ms", FROZEN])
            add(arm, phase, "% over frozen", [100 * ratio - 100], half_95=100 * half, n=len(times))
    for arm in arms:
        if PEFT in arms and arm != PEFT:
            ratio, half = ratio_of_totals(times["step_ms", PEFT], times["step_ms", arm])
            add(arm, "step", SPEEDUP, [ratio], half_95=half, n=len(times))
    for (phase, metric), figures in pd.DataFrame(result.figures).groupby(
        ["phase", "metric"], sort=False
    ):
        values = figures.pivot(index="seed", columns="arm", values="value")
        for arm in values:
            add(arm, phase, metric, [values[arm].mean()], n=values[arm].count())
        for arm in values if phase == "held-out" and PEFT in values else ():
            differences = (values[arm] - values[PEFT]).dropna()
            if arm not in (FROZEN, PEFT) and len(differences):
                mean, half = interval(differences)
                add(arm, phase, f"{metric} minus PEFT", [mean], half_95=half, n=len(differences))
    return pd.DataFrame(rows)


def look_up(rows: pd.DataFrame) -> Figures:
    """The figures of :func:`records`, as they came or from a file."""
    columns = ["arm", "phase", "metric", "median", "q1", "q3", "half_95", "n"]
    found = rows.reindex(columns=columns).itertuples(index=False, name=None)
    return defaultdict(Figure, {row[:3]: Figure(*row[3:]) for row in found})


def verdicts(header: Header, found: Figures) -> list[str]:
    """Speed, memory and quality of both of this library's ways against PEFT, in words; then
    warnings.
    """
    metric = header["task"]["metric"]
    ours = [arm for arm in (ACCELERATED, STABLE) if found[arm, "step", SPEEDUP].n]
    said = {
        "Speed": [_speed(arm, found) for arm in ours],
        "Memory": [_memory(arm, found) for arm in ours if found[arm, "step", SAVED].n],
        "Quality": [
            _quality(arm, metric, found)
            for arm in ours
            if found[arm, "held-out", f"{metric} minus PEFT"].n
        ],
    }
    if said["Quality"]:
        said["Quality"].insert(0, _levels(header, found))
    lines = [
        (heading * (i == 0), line)
        for heading, these in said.items()
        for i, line in enumerate(these)
    ]
    return [f"{heading:{HEADING}}{line}" for heading, line in lines] + _warnings(header, found)


def _speed(arm: str, found: Figures) -> str:
    faster = found[arm, "step", SPEEDUP]
    mine = found[arm, "step", "ms"]
    peft = found[PEFT, "step", "ms"]
    times = f"{LABELS[arm]}: {mine.value:,.0f} ms a step, PEFT {peft.value:,.0f} ms"
    if math.isnan(faster.half):
        return f"{times} (one step: shows nothing)"
    low, high = faster.value - faster.half, faster.value + faster.half
    # Times differ only if the interval of their ratio leaves out 1.
    verdict = "no difference shown" if low <= 1 <= high else f"{change(1 / faster.value)} time"
    return f"{times}: {verdict}, {faster.value:.2f}x as fast (95% interval {low:.2f} to {high:.2f})"


def _memory(arm: str, found: Figures) -> str:
    parts = []
    for what, metric in (("saved for backward", SAVED), ("at the peak", PEAK)):
        mine, peft = found[arm, "step", metric].value, found[PEFT, "step", metric].value
        if not math.isnan(mine / peft):
            same = abs(100 * mine / peft - 100) < _EQUAL_PERCENT
            parts.append(
                f"{mine:,.0f} MiB {what}, PEFT {peft:,.0f}: {'the same' if same else change(mine / peft)}"
            )
    return f"{LABELS[arm]}: {'; '.join(parts)}"


def _levels(header: Header, found: Figures) -> str:
    metric = header["task"]["metric"]
    majority = header["task"]["majority"]
    seeds = header["seeds_done"]
    means = {LABELS[arm]: found[arm, "held-out", metric].value for arm in (FROZEN, PEFT)} | {
        "largest class": majority
    }
    told = [
        f"{label} {_quantity(x, metric)}"
        for label, x in means.items()
        if x is not None and not math.isnan(x)
    ]
    return f"held-out {metric}{f', mean of {seeds} seeds' if seeds > 1 else ''}: {', '.join(told)}"


def _quality(arm: str, metric: str, found: Figures) -> str:
    difference = found[arm, "held-out", f"{metric} minus PEFT"]
    value = _quantity(found[arm, "held-out", metric].value, metric)
    text = f"{LABELS[arm]}: {value}, {_quantity(difference.value, metric, '+')}"
    if math.isnan(difference.half):
        return f"{text} against PEFT (one seed: shows nothing)"
    better = (difference.value > 0) == (metric == "accuracy")
    verdict = (
        "no difference shown"
        if abs(difference.value) <= difference.half
        else "better"
        if better
        else "worse"
    )
    return f"{text} ± {_quantity(difference.half, metric)} against PEFT (95% interval over seeds): {verdict}"


def _quantity(value: float, metric: str, sign: str = "") -> str:
    # Adding 0 makes no difference of -0.000.
    if metric == "loss":
        return f"{round(value, 3) + 0.0:{sign}.3f}"
    return f"{round(100 * value, 1) + 0.0:{sign}.1f} %"


def _warnings(header: Header, found: Figures) -> list[str]:
    metric, majority, lines = header["task"]["metric"], header["task"]["majority"], []
    floors = {
        "the frozen model": found[FROZEN, "held-out", metric].value,
        "the largest class": majority,
    }
    for arm, (what, floor) in product(LABELS, floors.items()):
        value = found[arm, "held-out", metric].value
        # A comparison with nan is false.
        if (
            arm != FROZEN
            and floor is not None
            and (value > floor if metric == "loss" else value < floor)
        ):
            lines.append(
                f"Warning: {LABELS[arm]} ended below {what} (held-out {metric} {_quantity(value, metric)} against "
                f"{_quantity(floor, metric)}): training broke or was too short, so its quality says nothing."
            )
    if disturbed(header):
        lines.append(
            f"Other programs ran beside this one: its threads waited for a CPU {100 * header['waited_share']:.0f} % of the time. "
            "Ratios of times are fair, since all arms waited, but less exact."
        )
    return lines


def disturbed(header: Header) -> bool:
    """Whether other programs took much of this one's time while it trained, as far as can be told."""
    return header.get("waited_share", 0.0) > MOST_WAITING


def change(ratio: float) -> str:
    """A ratio to something as "25% less" or "2.0% more"."""
    size = abs(100 * ratio - 100)
    return f"{size:.{0 if size >= 9.95 else 1}f}% {'less' if ratio < 1 else 'more'}"


def table(rows: pd.DataFrame) -> str:
    """All figures of :func:`records`, with a column for each arm."""
    lines = rows.phase + ": " + rows.metric
    cells = pd.DataFrame(
        {"line": lines, "arm": rows.arm.map(LABELS), "shown": map(shown, look_up(rows).values())}
    )
    wide = cells.pivot(index="line", columns="arm", values="shown").rename_axis(
        index=None, columns=None
    )
    return wide.loc[lines.unique(), cells.arm.unique()].to_string(na_rep="-")


def shown(figure: Figure) -> str:
    """A figure with its quartiles or with half its interval, as far as there are any."""
    value, q1, q3 = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}" for x in figure[:3])
    return (
        f"{value} [{q1}, {q3}]"
        if q1 != "nan"
        else value + (f" ± {figure.half:.2g}" if figure.half >= 0 else "")
    )


def adapters(header: Header) -> str:
    """The recipe's adapters in words."""
    recipe = header["recipe"]
    layers = "/".join(header["settings"]["targets"]) or "all linear layers"
    return f"r {recipe['r']}, alpha {recipe['lora_alpha']:g}, dropout {recipe['lora_dropout']:g} on {layers}"


def conditions(header: Header) -> list[str]:
    """What was trained, and where; a line for each."""
    settings, recipe, environment = header["settings"], header["recipe"], header["environment"]
    size = f"x {settings['length']} tokens" if header["task"]["majority"] is None else "texts"
    where = ", ".join(
        f"{name.replace('_', ' ')} {found}"
        for name, found in environment.items()
        if found is not None
    )
    return [
        f"{settings['model']} on {settings['data']}: {settings['seeds']} seeds planned, {header['seeds_done']} done, of "
        f"{recipe['steps']} steps of {settings['batch_size']} {size}; {adapters(header)}, lr {recipe['lr']:g}, "
        f"λ {recipe['shrink_ratio']:g}, gradients clipped at {recipe['max_grad_norm']:g}, {settings['dtype']}.",
        f"{where}; {header['threads']} threads taken, {header['status']} after {header['wall_s']:.0f} s.",
    ]


def text(header: Header, rows: pd.DataFrame) -> str:
    """table.txt: the verdicts, the table, and the conditions of its figures."""
    found = look_up(rows)
    notes = [
        "Times are medians [quartiles] over steps, all else means over seeds; ± is half a 95% interval over these. Memory is of "
        f"a step of {header['footprint_tokens']} tokens, padding included, each arm in a process of its own.",
        *(
            f"Memory of {label} was not measured: {error}"
            for label, error in header["not_measured"].items()
        ),
    ]
    lines = [line for note in conditions(header) + notes for line in textwrap.wrap(note, 120)]
    return "\n".join([*verdicts(header, found), "", table(rows), "", *lines]) + "\n"


def write_result(result: Result, started: float, directory: Path) -> None:
    """Write result.csv (the records, with the verdicts in the header), steps.csv (a row a step) and
    table.txt (every figure).
    """
    result.about["wall_s"] = round(time.perf_counter() - started, 1)
    rows = records(result)
    result.about["verdicts"] = verdicts(result.about, look_up(rows))
    # Numbers of parameters have up to nine digits.
    write_records(directory / "result.csv", rows, result.about, digits=9)
    write_text(
        directory / "steps.csv", pd.DataFrame(result.steps).to_csv(index=False, lineterminator="\n")
    )
    write_text(directory / "table.txt", text(result.about, rows))


def draw(result: Result, file: Path) -> Path:
    """Draw time, memory, held-out loss and training loss side by side, with the conditions beneath."""
    header, found = result.about, look_up(records(result))
    arms, metric = header["settings"]["arms"], header["task"]["metric"]
    looks = {
        FROZEN: (GREY, "-"),
        PEFT: (BLUE, "-"),
        ACCELERATED: (RED, ":"),
        STABLE: (ORANGE, "--"),
    }
    colors, styles = zip(*(looks[arm] for arm in arms), strict=True)
    panels = {
        "Time of a training step, ms": ("step", "ms", ",.0f"),
        "Saved for backward, MiB": ("step", SAVED, ",.0f"),
        "Peak memory, MiB": ("step", PEAK, ",.0f"),
        f"Held-out {metric}": ("held-out", metric, ".3f"),
    }
    with plt.rc_context(STYLE | {"axes.titlesize": 10.5, "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(1, 5, figsize=(17, 1.7 + 0.6 * len(arms)), layout="constrained")
        for axis, (title, (phase, name, spec)) in zip(axes, panels.items(), strict=False):
            figures = [found[arm, phase, name] for arm in arms]
            values = [figure.value if figure.n else 0 for figure in figures]
            bars = axis.barh([LABELS[arm] for arm in arms], values, color=colors, height=0.62)
            labels = [
                format(figure.value, spec) if figure.n else "not measured" for figure in figures
            ]
            for i, arm in enumerate(arms):
                # As the verdict has it, a ratio of times is that of all steps together.
                speedup = found[arm, "step", SPEEDUP].value
                ratio = 1 / speedup if name == "ms" else values[i] / found[PEFT, phase, name].value
                if arm in (ACCELERATED, STABLE) and phase == "step" and ratio > 0:
                    labels[i] += f"\n{change(ratio)} than PEFT"
            axis.bar_label(bars, labels, padding=4, fontsize=9)
            axis.set(
                title=title,
                xlim=(0, 1.8 * max(*values, 1e-9)),
                ylim=(len(arms) - 0.5, -0.5),
                xticks=[],
            )
            axis.tick_params(labelleft=axis is axes[0])
            axis.grid(visible=False)
        losses = pd.DataFrame(result.steps).pivot_table(index="step", columns="arm", values="loss")[
            [*arms]
        ]
        # The bars are its legend.
        losses.plot(
            ax=axes[4],
            color=colors,
            style=[*styles],
            legend=False,
            title="Training loss, mean over seeds",
        )
        about = " ".join(conditions(header)) + " DISTURBED by other programs." * disturbed(header)
        figure.supxlabel("\n".join(textwrap.wrap(about, 210)), fontsize=8, color="#555555")
        return save(figure, file)

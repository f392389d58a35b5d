"""PNG plots of a result."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.measure import summarize
from benchmarks.common.plot_style import STYLE, colors, plt, save
from benchmarks.finetuning.arms import FROZEN, PEFT, STABLE
from benchmarks.finetuning.headline import change, headlines
from benchmarks.finetuning.result import Record, Result, adapters, disturbed, overhead, step_times, summary
from benchmarks.finetuning.train import PHASES

_PHASE_SHADES = (1.0, 0.65, 0.35)


def draw(result: Result, directory: Path) -> list[Path]:
    """Draw all plots whose figures were measured."""
    arms = result["arms"]
    paths = []
    with plt.rc_context(STYLE):
        if all(len(record["series"]["loss"]) > 1 for record in arms.values()):
            paths += [
                save(_summary(result), directory / "summary.png"),
                save(_loss(result), directory / "loss.png"),
                save(_step_time(result), directory / "step_time.png"),
            ]
        if any(len(record["series"]["norms"]) > 1 for record in arms.values()):
            paths.append(save(_norms(result), directory / "norms.png"))
        if all("test" in record for record in arms.values()):
            paths.append(save(_accuracy(result), directory / "accuracy.png"))
    return paths


def _subtitle(result: Result) -> str:
    settings, recipe, environment = result["settings"], result["recipe"], result["environment"]
    machine = (
        environment["gpu"]
        if settings["device"].startswith("cuda")
        else f"{environment['cpu']}, {environment['cores']} cores"
    )
    ratios = ", ".join(f"{ratio:g}" for ratio in sorted(_shrink_ratios(result)))
    if disturbed(result):
        machine += ", DISTURBED by other programs"
    versions = f"torch {environment['torch']}, PEFT {environment['peft']}, commit {environment['commit']}"
    return (
        f"{settings['model']} on {settings['data']}, batch {settings['batch_size']}, {adapters(result)}, "
        f"lr {recipe['lr']:g}, λ {ratios}, seed {settings['seed']}, {settings['dtype']}, {machine}, {versions}"
    )


def _figure(result: Result, title: str, columns: int = 1, width: float = 7.5, height: float = 4.2) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    conditions = "\n".join(textwrap.wrap(_subtitle(result), int(14 * width)))
    figure.supxlabel(conditions, fontsize=8, color="#555555")
    return figure, axes


def _summary(result: Result) -> Any:
    """Time and memory side by side, with the answer above and the conditions beneath."""
    rows = summary(result)
    panels = [("Time of a training step", "step_ms_median", "ms")]
    if any(row["saved_mib"] for row in rows.values()):
        panels += [
            ("Memory kept for backward", "saved_mib", "MiB"),
            ("Peak memory (pale: held between steps)", "peak_mib", "MiB"),
        ]
    width = 3 + 3.2 * len(panels)
    title = "\n".join(textwrap.wrap(next(iter(headlines(rows)), "A training step"), int(9.4 * width)))
    figure, axes = _figure(result, title, len(panels), width=width, height=2.1 + 0.55 * len(rows))
    palette = colors(list(rows))
    for axis, (head, key, unit) in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        widest = max(row[key] or 0 for row in rows.values())
        for position, (name, row) in enumerate(rows.items()):
            if row[key] is None:
                axis.text(0, position, " not measured", va="center", fontsize=9)
                continue
            axis.barh(position, row[key], color=palette[name], height=0.62)
            if key == "peak_mib" and row["step_mib"] is not None:
                axis.barh(position, row[key] - row["step_mib"], color="white", alpha=0.55, height=0.62)
            # At a fixed place, so that the labels can be read as a column.
            text = "\n".join([f"{row[key]:,.0f} {unit}", *_against(row, rows, key)])
            axis.text(1.05 * widest, position, text, va="center", fontsize=9)
        axis.set_title(head, fontsize=10.5, loc="left")
        axis.set_yticks(range(len(rows)), _arm_labels(result) if axis is figure.axes[0] else [])
        # Also where a bar is missing.
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 1.75 * widest)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.grid(visible=False)
    return figure


def _against(row: Record, rows: dict[str, Record], key: str) -> list[str]:
    """What stands under a bar's figure: the same against the frozen model and against PEFT."""
    ours, peft = row["arm"] not in (FROZEN, PEFT), rows.get(PEFT, {}).get(key)
    if key != "step_ms_median":
        return [f"{change(row[key] / peft)} than PEFT"] if ours and peft else []
    lines = []
    if row["step_overhead_percent"] is not None:
        lines.append(f"{row['step_overhead_percent']:+.0f}% over frozen")
    if ours and row["speedup_over_peft"] is not None:
        lines.append(f"{row['speedup_over_peft']:.2f}x as fast as PEFT")
    return lines


def _arm_labels(result: Result) -> list[str]:
    """The arms' labels; the shrink ratio stands beneath the plot if all have the same."""
    labels = [record["label"] for record in result["arms"].values()]
    return [label.partition(" λ")[0] for label in labels] if len(_shrink_ratios(result)) == 1 else labels


def _shrink_ratios(result: Result) -> set[float]:
    return {record["shrink_ratio"] for record in result["arms"].values() if record["shrink_ratio"] is not None}


def _line(name: str) -> dict[str, Any]:
    # Our arms often coincide with PEFT's and with each other; dots and dashes on a wider line show all.
    if name in (FROZEN, PEFT):
        return {"linewidth": 2.4, "alpha": 0.8}
    return {"linewidth": 1.6, "linestyle": (0, (4, 2)) if name.startswith(STABLE) else (0, (1, 1.5))}


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """An exponential mean with Adam's bias correction."""
    mean, smoothed = 0.0, []
    for step, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**step))
    return smoothed


def _loss(result: Result) -> Any:
    figure, axis = _figure(result, "Training loss")
    for name, color in colors(list(result["arms"])).items():
        record = result["arms"][name]
        loss = record["series"]["loss"]
        steps = range(1, len(loss) + 1)
        axis.plot(steps, loss, color=color, alpha=0.15, linewidth=0.8)
        axis.plot(steps, _smooth(loss), color=color, label=record["label"], **_line(name))
    axis.set(xlabel="step", ylabel="cross entropy (line: running mean)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def _norms(result: Result) -> Any:
    figure, (left, right) = _figure(result, "Norms of the adapters, mean over pairs", columns=2, width=10)
    palette = colors(list(result["arms"]))
    for axis, key, title in ((left, "a_norm", r"$\|A\|_F$"), (right, "b_norm", r"$\|B\|_F$")):
        for name, record in result["arms"].items():
            norms = record["series"]["norms"]
            if norms:
                x, y = ([norm[column] for norm in norms] for column in ("step", key))
                axis.plot(x, y, color=palette[name], label=record["label"], **_line(name))
        axis.set(xlabel="step", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for name, record in result["arms"].items():
        stops = sorted(at for at in record.get("latch", {}).get("latched_at", []) if at is not None)
        if stops and record["shrink_ratio"] and name.startswith(STABLE):
            for axis in (left, right):
                axis.axvspan(stops[0], stops[-1], color=palette[name], alpha=0.10, linewidth=0)
                axis.axvline(stops[len(stops) // 2], color=palette[name], linestyle=":", linewidth=1.2)
            left.plot([], [], color=palette[name], linestyle=":", label="A stops shrinking (median, range)")
    left.legend(loc="upper left")
    left.margins(y=0.25)
    return figure


def _step_time(result: Result) -> Any:
    figure, axis = _figure(
        result, "A training step: median of each part, arms interleaved", height=1.6 + 0.62 * len(result["arms"])
    )
    palette = colors(list(result["arms"]))
    for row, (name, record) in enumerate(result["arms"].items()):
        left = 0.0
        for phase, shade in zip(PHASES, _PHASE_SHADES, strict=True):
            width = summarize(step_times(record, (phase,)))["median"]
            axis.barh(row, width, left=left, color=palette[name], alpha=shade, height=0.62)
            if width > 0.06 * summarize(step_times(record))["median"]:
                color = "white" if shade > 0.9 else "black"
                axis.text(
                    left + width / 2, row, f"{phase} {width:.0f}", ha="center", va="center", fontsize=8, color=color
                )
            left += width
        total = f"{summarize(step_times(record))['median']:.0f} ms"
        if name != FROZEN and "frozen" in result["arms"]:
            over = overhead(record, result["arms"]["frozen"])
            total += f", {over[0]:+.1f}%" if over else ""
        axis.text(left, row, f"  {total}", va="center", fontsize=9).set_in_layout(False)
    axis.set_yticks(range(len(result["arms"])), [record["label"] for record in result["arms"].values()])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds: forward, backward, optimizer")
    axis.set_xlim(0, 1.36 * max(summarize(step_times(record))["median"] for record in result["arms"].values()))
    axis.grid(axis="y", visible=False)
    return figure


def _accuracy(result: Result) -> Any:
    title = f"Held-out accuracy on {result['data']['test']} texts, with standard error"
    figure, axis = _figure(result, title, width=max(7.5, 1.4 * (1 + len(result["arms"]))))
    palette = colors(list(result["arms"]))
    bars = [
        (record["label"].replace(" λ", "\nλ"), record["test"], palette[name]) for name, record in result["arms"].items()
    ]
    if "probe" in result:
        bars.insert(1, ("frozen, probe\nto convergence", result["probe"], "#b9bec6"))
    for position, (_, test, color) in enumerate(bars):
        axis.bar(position, 100 * test["accuracy"], yerr=100 * test["accuracy_se"], color=color, width=0.62, capsize=4)
        top = 100 * (test["accuracy"] + test["accuracy_se"])
        axis.text(position, top + 0.4, f"{100 * test['accuracy']:.1f}", ha="center", va="bottom", fontsize=10)
    majority = 100 * result["data"]["majority"]
    axis.axhline(majority, color="black", linestyle="--", linewidth=0.9, label=f"largest class, {majority:.1f}")
    axis.legend(loc="upper left")
    low = min([majority, *(100 * test["accuracy"] for _, test, _ in bars)])
    # The axis does not start at zero, and its label says so.
    axis.set_ylim(max(0, low - 5), min(100, 8 + max(100 * test["accuracy"] for _, test, _ in bars)))
    axis.set_ylabel("accuracy, % (axis does not start at 0)")
    axis.set_xticks(range(len(bars)), [label for label, _, _ in bars])
    axis.grid(axis="x", visible=False)
    return figure

"""docs/benchmarks.md, from the results stored in benchmarks/results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.optimizers import OURS
from benchmarks.common.tables import RESULTS, markdown
from benchmarks.suite.pretrained import BASE, OURS_WHOLE
from stablelora_kernels.utils.timing import PACKAGES

PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
# Our targets: at most this many percent of a real training step over torch's fused AdamW; a step that shrinks, as a ratio.
WANTED_PERCENT, WANTED_RATIO = 0.2, 1.25
Cells = list[list[str]]


@dataclass
class Section:
    """An answer: a question, the command, where and when it ran, and the figures."""

    question: str
    command: str
    environment: dict[str, Any]
    parts: list[str]
    # Sentences that say where this library is slower or larger.
    losses: list[str] = field(default_factory=list)
    # The script that made the stored figures, if the suite's command has replaced it.
    replaced: str = ""


def spread(value: dict[str, float], spec: str = ".2f") -> str:
    """A median with its quartiles."""
    median, q1, q3 = (format(value[key], spec) for key in ("median", "q1", "q3"))
    return f"{median} ({q1} to {q3})"


def where(environment: dict[str, Any]) -> str:
    """The machine, the versions and the day, in a sentence."""
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"
    versions = ", ".join(f"{key} {environment[key]}" for key in PACKAGES if environment.get(key))
    load = environment.get("load_average_at_start", environment.get("load_average")) or 0.0
    text = (
        f"{machine}, load {load} at the start; Python {environment['python']}, {versions}; "
        f"commit {environment.get('commit')}, {environment['date'][:10]}."
    )
    if load > environment["cores"] / 2:
        text += " **Other programs ran beside this one: compare within the table, and trust no small difference.**"
    return text


def layer(directory: Path) -> Iterator[Section]:
    if (found := _read(directory / "lora_linear.json")) is None:
        return
    cells, losses = (
        [["rows x in x out, r", "dtype, dropout", "frozen, ms", "PEFT adds", "ours adds", "ours / PEFT"]],
        [],
    )
    for row in found["results"]:
        label, kind = "{} x {} x {}, {}".format(*row["shape"]), f"{row['dtype']}, {row['dropout']:g}"
        peft, ours, ratio = *(row["ms"][arm]["overhead_median"] for arm in ("peft", "ours")), row["ours_over_peft"]
        share = f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"
        cells.append([label, kind, f"{row['ms']['frozen']['median']:.2f}", f"{peft:.2f}", f"{ours:.2f}", share])
        if ratio > 1:
            losses.append(f"layer {label}, {kind}: adds {ratio:.2f} of what PEFT adds")
    question = "What does one layer add to the frozen layer, forward and backward?"
    command = "python -m pytest benchmarks --suite full -k layer --benchmark-json=FILE"
    yield Section(question, command, found["environment"], [markdown(cells, 2)], losses, "bench_lora_linear")


def suite(directory: Path) -> Iterator[Section]:
    """``pytest benchmarks``, one section a file."""
    for file in sorted(directory.glob("suite*.json")):
        found = _read(file)
        cells, losses, reasons = [["case", "arm", "ms", "over its base", "overhead, of the rival's"]], [], []
        for entry in found["benchmarks"]:
            info = entry["extra_info"]
            case = f"{info['case']}, {info['phase']}"
            reasons += [f"{arm} ({reason})" for arm, reason in info["skipped"].items()]
            for arm, figures in info["arms"].items():
                share, over = figures.get("overhead_over_rival"), figures.get("over_rival")
                shown = "" if share is None or arm == info["base"] else f"{share:.2f}"
                cells.append([case, arm, f"{figures['ms']['median']:.2f}", spread(figures["over_base"]), shown])
                if figures["ours"] and over and over["q1"] > 1:
                    losses.append(f"{case}: {arm} takes {spread(over)} of {info['rival']}'s time")
        parts = [markdown(cells, 2)]
        if reasons:
            parts.append(f"Skipped: {'; '.join(dict.fromkeys(reasons))}.")
        command = f"python -m pytest benchmarks --benchmark-json={file.name}"
        environment = found["machine_info"]["stablelora_kernels"]
        yield Section(f"The suite: every arm in turns ({file.stem})", command, environment, parts, losses)


def overhead(directory: Path) -> Iterator[Section]:
    """The paper's table and ours."""
    for file in sorted(directory.glob("optimizer_overhead*.json")):
        found = _read(file)
        settings, losses = found["settings"], []
        targets = settings["targets"]
        what = f"{settings['model']}, {targets}, {settings['dtype']}"
        cells = [
            [
                "over PEFT with fused AdamW, %",
                "paper",
                "whole step",
                "optimizer's part",
                "optimizer, ms",
                "state, KiB",
            ]
        ]
        for name, row in found["rows"].items():
            paper = "" if row["paper_percent"] is None else f"{row['paper_percent']:+.1f}"
            shares = [spread(row[kind], "+.2f") for kind in ("step_percent", "optimizer_percent")]
            own = [f"{row['optimizer_ms']['median']:.2f}", f"{row['state_bytes'] / 1024:,.0f}"]
            cells.append([name, paper, *(["0", "0"] if name == BASE else shares), *own])
            # Layers that are the base's differ by noise alone; by the optimizer's part, then.
            over = row["step_percent" if name == OURS_WHOLE else "optimizer_percent"]["median"]
            if OURS in name + OURS * (name == OURS_WHOLE) and over > WANTED_PERCENT:
                losses.append(f"{what}, {name}: {over:+.2f} % of a step, where at most +{WANTED_PERCENT} was wanted")
        text = (
            f"{settings['model']}, {targets}, batch {settings['batch_size']}, r {settings['r']}, {settings['dtype']}, "
            f"lr {settings['lr']:g}, {settings['steps']} steps. The paper's column is training time over AdamW's, "
            "of a model of 0.5 billion parameters on its authors' machine."
        )
        question = f"What does each optimizer add to a training step of a real model? ({what})"
        dtype = "bf16-autocast" if settings["dtype"] == "bf16" else settings["dtype"]
        words = f"{targets} and {dtype}"
        command = f'python -m pytest benchmarks -m pretrained -k "{words}" --rounds 25 --benchmark-json=FILE'
        shown = [text, markdown(cells)]
        yield Section(question, command, found["environment"], shown, losses, "bench_optimizer_overhead")


def step(directory: Path) -> Iterator[Section]:
    if (found := _read(directory / "stable_adamw.json")) is None:
        return
    settings, states = found["settings"], found["milliseconds"]
    cells, losses = [["ms", "every pair shrinking", "every pair latched"]], []
    for arm in states["shrinking"]:
        cells.append([arm, *(spread(states[state][arm]) for state in ("shrinking", "latched"))])
        for state, times in states.items():
            if (ratio := times[OURS]["median"] / times[arm]["median"]) > 1:
                losses.append(f"step of {settings['pairs']} pairs, {state}: {ratio:.2f} times {arm}")
    question = f"What does a step take? ({settings['pairs']} pairs, r {settings['r']}, width {settings['width']})"
    command = "python -m pytest benchmarks --suite full -k 'optimizer and 64' --benchmark-json=FILE"
    yield Section(question, command, found["environment"], [markdown(cells)], losses, "bench_stable_adamw")


def host(directory: Path) -> Iterator[Section]:
    if (found := _read(directory / "host.json")) is None:
        return
    arms = {
        "linear": "nn.Linear",
        "eager": "LoRA by hand",
        "peft": "PEFT",
        "torch": "ours, PyTorch",
        "triton": "ours, Triton",
    }
    cells, losses = [["microseconds", *arms.values()]], []
    for rows, phases in found["rows"].items():
        for phase, times in phases.items():
            cells.append([f"{rows} rows, {phase}", *(spread(times[arm], ".1f") for arm in arms)])
            for arm in ("torch", "triton"):
                if times[arm]["q1"] > times["peft"]["q3"]:
                    ratio = times[arm]["median"] / times["peft"]["median"]
                    losses.append(f"the host's time, {rows} rows, {phase}: {arms[arm]} takes {ratio:.2f} of PEFT's")
    text = "Of layers so small that nothing but Python is left. Triton's column stops where Triton is asked to launch."
    question = "What does a call cost on the host?"
    command = "TRITON_INTERPRET=1 python -m pytest benchmarks -m host --rounds 200 --benchmark-json=FILE"
    yield Section(question, command, found["environment"], [markdown(cells), text], losses, "bench_host")


def plot_of(directory: Path, axis: str) -> str:
    """The plot of an axis, relative to the page."""
    return f"_static/benchmarks/{directory.name}/scaling_{axis}.png"


def scaling(directory: Path) -> Iterator[Section]:
    if (found := _read(directory / "scaling.json")) is None:
        return
    parts, losses = [], []
    for name, axis in found["axes"].items():
        cells = _step_cells(axis) if name == "pairs" else _layer_cells(axis)
        fits = ", ".join(f"{arm} {fit[0]:.2f} ± {fit[1]:.2f}" for arm, fit in axis["exponents"].items() if fit)
        machine = axis["machine"]
        rates = f"{machine['flops'] / 1e9:.0f} GFLOP/s and {machine['bandwidth'] / 1e9:.0f} GB/s"
        parts += [f"**Against {name}** ({axis['still']}; float32; floor at {rates}):", markdown(cells)]
        parts.append(f"Exponents over the larger half, with 95 % intervals: {fits}.")
        parts.append(f"![time against {name}]({plot_of(directory, name)})")
        losses += _axis_losses(name, axis)
    parts.append(
        "The floor is the longer of operations over the rate of a large product and bytes over the rate of a large copy. "
        "What fits a cache can be faster than the second."
    )
    question = "How do time and memory grow?"
    command = "python -m pytest benchmarks -m scaling --rounds 7 --benchmark-json=FILE"
    yield Section(question, command, found["environment"], parts, losses, "bench_scaling")


def _layer_cells(axis: dict[str, Any]) -> Cells:
    head = [axis["axis"], "frozen, ms", "floor", "PEFT adds", "ours adds", "floor", "ours / PEFT"]
    cells = [[*head, "saved by PEFT, MB", "by ours"]]
    for row in axis["rows"]:
        over = [row[arm]["over_ms"] for arm in ("peft", "ours")]
        frozen = [f"{t:.2f}" for t in (row["frozen"]["ms"]["median"], row["floor"]["frozen"])]
        added = [*map(spread, over), f"{row['floor']['overhead']:.2f}", f"{over[1]['median'] / over[0]['median']:.2f}"]
        saved = [f"{row[arm]['saved_bytes'] / 1e6:.2f}" for arm in ("peft", "ours")]
        cells.append([f"{row['size']:,}", *frozen, *added, *saved])
    return cells


def _step_cells(axis: dict[str, Any]) -> Cells:
    cells = [["pairs", "AdamW fused, ms", "shrinking", "latched", "floor", "shrinking / AdamW", "latched / AdamW"]]
    for row in axis["rows"]:
        times = [row[arm]["ms"]["median"] for arm in ("AdamW fused", "shrinking", "latched")]
        ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
        cells.append([f"{row['size']:,}", *(f"{t:.2f}" for t in times), f"{row['floor']['step']:.2f}", *ratios])
    return cells


def _axis_losses(name: str, axis: dict[str, Any]) -> list[str]:
    losses = []
    for row in axis["rows"]:
        if name == "pairs":
            ratio = row["shrinking"]["ms"]["median"] / row["AdamW fused"]["ms"]["median"]
            if ratio > WANTED_RATIO:
                what = f"{ratio:.2f} times fused AdamW, where at most {WANTED_RATIO} was wanted"
                losses.append(f"step of {row['size']:,} pairs, shrinking: {what}")
            continue
        peft, ours = (row[arm]["over_ms"]["median"] for arm in ("peft", "ours"))
        if ours > peft:
            losses.append(f"layer, {name} {row['size']:,} ({axis['still']}): adds {ours / peft:.2f} of what PEFT adds")
    return losses


def finetune(directory: Path) -> Iterator[Section]:
    """``python -m benchmarks``."""
    if (found := _read(directory / "quick" / "result.json")) is None:
        return
    text = (directory / "quick" / "table.txt").read_text(encoding="utf-8").rstrip()
    question = "Fine-tuning a real model: speed, memory and accuracy together"
    yield Section(question, "python -m benchmarks", found["environment"], [f"```text\n{text}\n```"])


def sections(directory: Path) -> list[Section]:
    """Everything stored of a machine."""
    makers: Sequence[Callable[[Path], Iterator[Section]]] = (layer, suite, step, overhead, host, scaling, finetune)
    return [section for maker in makers for section in maker(directory)]


def page(results: Path) -> str:
    """The page's text."""
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by python -m benchmarks.lab.page, which overwrites every change made here. -->",
        "",
        "Every figure here comes from a stored result (`benchmarks/results/`). Each section has the command that measures it.",
        "Arms take turns in one process. Figures are medians, with quartiles in brackets; ratios are taken round by round. See",
        "[Benchmarking](benchmarking.md) for the method, and [here](measured.md) for what was counted and predicted for GPUs.",
    ]
    machines = {d: found for d in sorted(results.iterdir()) if d.is_dir() and (found := sections(d))}
    if not machines:
        raise ValueError(f"results must hold a machine's directory with something measured, got {results} without one")
    if not any(section.environment.get("gpu") for made in machines.values() for section in made):
        lines += ["", "**No GPU has measured anything yet.** All of this is from CPUs, on PyTorch's operators."]
    for directory, made in machines.items():
        lines += ["", f"## {directory.name}", "", "### Where it loses", ""]
        lines += [f"- {loss}" for section in made for loss in section.losses] or ["Nowhere in what is stored."]
        for section in made:
            lines += ["", f"### {section.question}", "", "```bash", section.command, "```", ""]
            if section.replaced:
                lines += [f"Measured by `benchmarks.{section.replaced}`, which this command has replaced since.", ""]
            lines.append(where(section.environment))
            for part in section.parts:
                lines += ["", part]
    return "\n".join(lines) + "\n"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

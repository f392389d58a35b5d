"""docs/results/benchmarks.md, from the results stored in benchmarks/results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.tables import RESULTS, markdown
from benchmarks.finetuning.result import QUIET_SHARE
from benchmarks.lab.page.answers import answers, main_jobs
from stablelora_kernels.utils.timing import PACKAGES

PAGE = RESULTS.parents[1] / "docs" / "results" / "benchmarks.md"
# Sections as the page had them when single scripts measured, before the suite: losses, a blank line, the sections. The JSON files
# beside it hold the same figures; no command makes such files any more.
BEFORE = "before_the_suite.md"
_HOW_TO_READ = """\
Below 1 this library is faster. A cell is the median over the cases, with the lowest and the highest case in brackets. It is
bold if a case is above 1. Cases that are slower in three of four rounds are listed under [Where it loses](#where-it-loses).
In float32 on AMD's processors much of the gain is oneDNN's, which multiplies in place of MKL: compare the arm "frozen, by
oneDNN".
"""
_METHOD = """\
Every figure on this page comes from a stored result (`benchmarks/results/`), and each section has the command that measures
it. Arms take turns in one process. Figures are medians, with quartiles in brackets; ratios are taken round by round.
[Benchmarking](../internals/lab.md) explains the method. [Performance](performance.md) has what was counted and predicted for
GPUs.
"""


@dataclass
class Section:
    """An answer: a question, the command, where and when it ran, and the figures."""

    question: str
    command: str
    environment: dict[str, Any]
    parts: list[str]
    # Sentences that say where this library is slower or larger.
    losses: list[str] = field(default_factory=list)
    # Whether other programs took time from this one; None if only the load tells.
    disturbed: bool | None = None


def spread(value: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.2f} ({value['q1']:.2f} to {value['q3']:.2f})"


def machine(environment: dict[str, Any]) -> str:
    return environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"


def where(environment: dict[str, Any], disturbed: bool | None = None) -> str:
    """The machine, the versions and the day, in a sentence."""
    versions = ", ".join(f"{key} {environment[key]}" for key in PACKAGES if environment.get(key))
    load = environment.get("load_average_at_start", environment.get("load_average")) or 0.0
    text = (
        f"{machine(environment)}, load {load} at the start; Python {environment['python']}, {versions}; "
        f"commit {environment.get('commit')}, {environment['date'][:10]}."
    )
    if disturbed is None:
        disturbed = load > environment["cores"] / 2
    if disturbed:
        text += " **Other programs ran beside this one: compare within the table, and trust no small difference.**"
    return text


def suite(file: Path) -> Section:
    """A file that ``pytest benchmarks --benchmark-json`` has written: suite.json, or suite_MARK.json with ``-m MARK``."""
    found = json.loads(file.read_text(encoding="utf-8"))
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
    for axis, fits in found["exponents"].items():
        shown = ", ".join(f"{arm} {slope:.2f} ± {half:.2f}" for arm, (slope, half) in fits.items())
        parts.append(f"Time against {axis}, exponents over the larger half, with 95 % intervals: {shown}.")
        parts.append(f"![time against {axis}]({plot_of(file, axis)})")
    mark = file.stem.partition("_")[2]
    command = f"python -m pytest benchmarks{f' -m {mark}' if mark else ''} --benchmark-json={file.name}"
    environment = found["machine_info"]["stablelora_kernels"]
    return Section(f"The suite: every arm in turns ({file.stem})", command, environment, parts, losses)


def plot_of(file: Path, axis: str) -> str:
    """The plot of an axis of a suite's file, relative to the page."""
    return f"../_static/benchmarks/{file.parent.name}/{file.stem}_{axis.replace(', ', '_')}.png"


def sections(directory: Path) -> Iterator[Section]:
    """Everything measured on a machine, but for ``BEFORE``."""
    for file in sorted(directory.glob("suite*.json")):
        yield suite(file)
    for file in main_jobs(directory):
        text = file.with_name("table.txt").read_text(encoding="utf-8").rstrip()
        found = json.loads(file.read_text(encoding="utf-8"))
        command, conditions = _command_of(found.get("settings", {}))
        question = f"Fine-tuning a real model{conditions}: speed, memory and accuracy together"
        # The last line has the first one's figures.
        losses = [line for line in found.get("headlines", [])[:-1] if " more " in line]
        share = found.get("cpu_share")
        disturbed = None if share is None else share < QUIET_SHARE
        yield Section(question, command, found["environment"], [f"```text\n{text}\n```"], losses, disturbed)


def _command_of(settings: dict[str, Any]) -> tuple[str, str]:
    """The main job's command for these settings, and what tells it from the default, in words."""
    # Runs of before there were recipes.
    if "target_modules" in settings:
        return "python -m benchmarks --recipe paper --batch-size 16 --held-out 600", " by the paper's recipe"
    # The default is bfloat16 where the hardware has it.
    command = "python -m benchmarks" + " --dtype fp32" * (settings.get("dtype") == "float32")
    if settings.get("lora_dropout") == 0:
        return f"{command} --dropout 0", " without dropout"
    return command, ""


def page(results: Path) -> str:
    """The page's text: the answers first, then every stored figure."""
    machines = {d: made for d in sorted(results.iterdir()) if d.is_dir() and (made := [*sections(d)])}
    if not machines:
        raise ValueError(f"results must hold a machine's directory with something measured, got {results} without one")
    lines = [
        "# Benchmarks",
        "",
        "<!-- Written by python -m benchmarks.lab.page, which overwrites every change made here. -->",
        "",
        "## In short",
    ]
    for directory, made in machines.items():
        lines += ["", f"On {machine(made[0].environment)} (`{directory.name}`):"]
        for part in filter(None, answers(directory)):
            lines += ["", part]
    lines += [
        "",
        *_HOW_TO_READ.splitlines(),
    ]
    if not any(section.environment.get("gpu") for made in machines.values() for section in made):
        lines += ["", "**No GPU has measured anything yet.** All of this is from CPUs, on PyTorch's operators."]
    lines += [
        "",
        *_METHOD.splitlines(),
    ]
    for directory, made in machines.items():
        file = directory / BEFORE
        losses, _, before = file.read_text(encoding="utf-8").partition("\n\n") if file.is_file() else ("", "", "")
        lines += [
            "",
            f"## All figures: {machine(made[0].environment)} ({directory.name})",
            "",
            "### Where it loses",
            "",
        ]
        found = [f"- {loss}" for section in made for loss in section.losses] + losses.splitlines()
        lines += found or ["Nowhere in what is stored."]
        for section in made:
            lines += [
                "",
                f"### {section.question}",
                "",
                "```bash",
                section.command,
                "```",
                "",
                where(section.environment, section.disturbed),
            ]
            for part in section.parts:
                lines += ["", part]
        lines += ["", before.rstrip()] if before else []
    return "\n".join(lines) + "\n"

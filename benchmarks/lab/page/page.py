"""docs/results/benchmarks.md, from the results stored in benchmarks/results and nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.tables import RESULTS, csv_text, markdown
from benchmarks.finetuning.report import HEADING, MOST_WAITING, adapters
from stablelora_kernels.utils.timing import PACKAGES

PAGE = RESULTS.parents[1] / "docs" / "results" / "benchmarks.md"
# A case's first word and its phase, and the question that they answer.
QUESTIONS = {
    ("training", "step"): "a whole training step",
    ("layer", "both"): "one layer, forward and backward",
    ("mlp", "both"): "a gated MLP, forward and backward",
    ("optimizer", "step"): "an optimizer step",
    ("adapter", "save"): "saving an adapter",
    ("adapter", "load"): "loading an adapter",
}
# The column of an arm. If two arms share a column, the later one counts: on a GPU that is ours on Triton.
COLUMNS = {
    "ours, PyTorch": 0, "ours": 0, "ours, Triton": 0, "StableLoRAAdamW": 0, "accelerated PEFT": 1, "ours compiled": 2,
    "ours, MLP fused": 0, "accelerated PEFT, MLP fused": 1,
}  # fmt: skip
# Rows of the host-time table: each has the cases of host.json whose names match, as ranges.
HOST_ROWS = {
    "one layer": ("host layer", "autocast"),
    "one layer under autocast": ("autocast", None),
    "96 layers in turn": ("host 96 layers", None),
    "three projections (`fuse_projections`)": ("host group", None),
    "a gated MLP (`fuse_mlp`)": ("host mlp", None),
    "a branch on another layer's output": ("host branch", None),
}
_INTRODUCTION = """\
# Benchmarks

<!-- Written by python -m benchmarks.lab.page, which overwrites every change made here. -->

Where this library wins and loses in the stored measurements, and the files that hold every figure.
[Performance](performance.md) explains the main ones. [Measuring](../internals/lab.md) has the commands and the method.

- A ratio is our time over the rival's, from paired rounds. Below 1 this library is faster.
- A cell has the median over the cases, then the lowest and the highest case. It is bold if a case is above 1.
- In float32 on AMD's processors much of the gain is oneDNN's: it multiplies in place of MKL. The arm "frozen, by oneDNN" in the
  CSV files shows how much.
"""
_NO_GPU = "- **All of this is from CPUs, on PyTorch's operators.** No GPU has measured anything yet.\n"


def page(results: Path) -> str:
    """The page's text: answers by machine, then every loss, then the files."""
    directories = [d for d in sorted(results.iterdir()) if d.is_dir() and (suites(d) or main_jobs(d))]
    if not directories:
        raise ValueError(f"results must hold a machine's directory with something measured, got {results} without one")
    environments = [environment for d in directories for _, _, environment in measured(d)]
    parts = [_INTRODUCTION + ("" if any(e.get("gpu") for e in environments) else _NO_GPU)]
    for directory in directories:
        found = next(environment for _, _, environment in measured(directory))
        parts.append(f"## {found.get('gpu') or found['cpu']}, {found['cores']} cores (`{directory.name}`)")
        parts += answers(directory)
    parts += ["## Where it loses", _losses(directories), "## Every figure", _files(directories)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def suites(directory: Path) -> list[Path]:
    """Files that ``pytest benchmarks --benchmark-json`` has written: suite.json, or suite_MARK.json with ``-m MARK``."""
    return sorted(directory.glob("suite*.json"))


def main_jobs(directory: Path) -> list[Path]:
    """The stored results of ``python -m benchmarks``."""
    return sorted(directory.glob("main*/result.json"))


def measured(directory: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Each file of figures, the command that measures it, and the environment of its run."""
    for file in suites(directory):
        mark = file.stem.partition("_")[2]
        environment = _read(file)["machine_info"]["stablelora_kernels"]
        command = f"python -m pytest benchmarks{f' -m {mark}' if mark else ''} --benchmark-json={file.name}"
        yield file.with_suffix(".csv"), command, environment
    for file in main_jobs(directory):
        found = _read(file)
        waited = {"waited_share": found.get("waited_share", 0.0)}
        yield file.with_name("table.txt"), _command_of(found["settings"]), found["environment"] | waited


def answers(directory: Path) -> list[str]:
    """A machine's tables: our time over the rivals', a fine-tuning run's first lines, host time."""
    parts = [_ratios(file) for file in suites(directory)]
    # The first is the default's. The verdicts of the others are in their tables, under "Every figure".
    for file in main_jobs(directory)[:1]:
        found = _read(file)
        about = f"{found['settings']['model']} on {found['settings']['data']}, {adapters(found)}, {found['settings']['dtype']}"
        parts.append("\n".join([f"Fine-tuning {about}:", "", "```text", *found["verdicts"], "```"]))
    if (file := directory / "host.json").is_file():
        parts.append("Host time of a call on Triton over PEFT's, [without a GPU](../internals/host-time.md):")
        parts.append(host_table(_read(file)["cases"]))
    return parts


def _ratios(file: Path) -> str:
    found: dict[tuple[int, str, str], list[list[float]]] = {}
    for info in _entries(file):
        kind = info["case"].split()[0]
        if (question := QUESTIONS.get((kind, info["phase"]))) is None or info.get("axis"):
            continue
        dtype = next((word for word in info["case"].split() if word.startswith(("fp32", "bf16"))), "")
        place = list(QUESTIONS.values()).index(question)
        row = found.setdefault((place, f"{question}, {dtype}".rstrip(", "), info["rival"]), [[], [], []])
        best = {COLUMNS[arm]: arm for arm in COLUMNS if info["arms"].get(arm, {}).get("over_rival")}
        for column, arm in best.items():
            row[column].append(info["arms"][arm]["over_rival"]["median"])
    rows = sorted(found.items(), key=lambda item: item[0][0])
    head = ["our time over the rival's", "the rival", "ours", "`accelerate_peft`", "ours, compiled"]
    return markdown([head, *([what, rival, *map(_cell, row)] for (_, what, rival), row in rows)], 2)


def host_table(cases: dict[str, Any]) -> str:
    """Host time over PEFT's by kind of call, on Triton: ranges of medians over rows and dropout."""
    cells = [
        ["call", "`LoRALinear`, forward", "forward and backward", "`accelerate_peft`, forward", "forward and backward"]
    ]
    for name, (within, without) in HOST_ROWS.items():
        chosen = [case for key, case in cases.items() if within in key and (without is None or without not in key)]
        row = [name]
        for arm in ("ours, Triton", "accelerated PEFT"):
            for phase in ("forward", "forward and backward"):
                row.append(_cell([case[phase][arm]["over_rival"]["median"] for case in chosen]))
        cells.append(row)
    return markdown(cells)


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return ""
    text = f"{statistics.median(ratios):.2f}"
    if len(ratios) > 1:
        text += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"**{text}**" if max(ratios) > 1 else text


def _losses(directories: list[Path]) -> str:
    """Every case in which three of four rounds are slower than the rival: of its phases the worst."""
    worst: dict[tuple[str, str, str], tuple[float, list[str]]] = {}
    lines = []
    for directory in directories:
        for info in (info for file in suites(directory) for info in _entries(file)):
            for arm, figures in info["arms"].items():
                over = figures.get("over_rival")
                if not (figures["ours"] and over and over["q1"] > 1):
                    continue
                row = [directory.name, f"{info['case']}, {info['phase']}", arm, info["rival"], spread(over)]
                key = (directory.name, info["case"], arm)
                if over["median"] > worst.get(key, (0.0,))[0]:
                    worst[key] = over["median"], row
        for file in main_jobs(directory):
            found = [verdict[HEADING:] for verdict in _read(file)["verdicts"]]
            lost = [line for line in found if "% more" in line or line.endswith(": worse")]
            lines += [f"- {line} (`{directory.name}/{file.parent.name}`)" for line in lost]
    table = markdown([["machine", "case", "arm", "the rival", "of its time"], *(row for _, row in worst.values())], 4)
    return "\n\n".join(filter(None, [table if worst else "", "\n".join(lines)])) or "Nowhere in what is stored."


def _files(directories: list[Path]) -> str:
    cells, kept = [["figures", "measured by", "when, commit"]], ""
    for directory in directories:
        for file, command, environment in measured(directory):
            name = file.relative_to(directory.parent)
            link = f"[{name}](../../benchmarks/results/{name})"
            # Versions once, as long as they stay.
            also = "" if versions(environment) == kept else f"; {versions(environment)}"
            kept = versions(environment)
            cells.append([link, f"`{command}`", where(environment) + also])
    return markdown(cells, 3)


def versions(environment: dict[str, Any]) -> str:
    return ", ".join(f"{key} {environment[key]}" for key in PACKAGES if environment.get(key))


def where(environment: dict[str, Any]) -> str:
    """The day and commit of a run, and whether other programs took time from it."""
    load = environment.get("load_average_at_start", environment.get("load_average")) or 0.0
    text = f"{environment['date'][:10]}, {environment.get('commit')}"
    waited = environment.get("waited_share")
    disturbed = load > environment["cores"] / 2 if waited is None else waited > MOST_WAITING
    # Only paired ratios of such a run mean something.
    return f"{text}, **other programs ran beside it**" if disturbed else text


def spread(value: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.2f} ({value['q1']:.2f} to {value['q3']:.2f})"


def suite_csv(file: Path) -> str:
    """A suite's file as rows: a case's phase and arm, with medians and quartiles."""
    rows = []
    for info in _entries(file):
        for arm, figures in info["arms"].items():
            row = {
                "case": info["case"],
                "phase": info["phase"],
                "arm": arm,
                "base": info["base"],
                "rival": info["rival"],
            }
            for key in ("ms", "over_base", "over_rival"):
                for end in ("median", "q1", "q3"):
                    row[f"{key} {end}"] = f"{figures[key][end]:.4g}" if figures.get(key) else ""
            rows.append(row)
    return csv_text(rows)


def _command_of(settings: dict[str, Any]) -> str:
    """The main job's command for these settings."""
    # The default is bfloat16 where the hardware has it.
    command = "python -m benchmarks" + " --dtype fp32" * (settings["dtype"] == "float32")
    return f"{command} --dropout 0" if settings["lora_dropout"] == 0 else command


def _entries(file: Path) -> list[dict[str, Any]]:
    return [entry["extra_info"] for entry in _read(file)["benchmarks"]]


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))

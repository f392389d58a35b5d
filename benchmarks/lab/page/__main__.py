"""docs/results/benchmarks.md, a table of performance.md and the README's figure, from the results stored in benchmarks/results
and nothing else.

    python -m benchmarks.lab.page [--check]

``--check`` says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS, markdown, write_text
from benchmarks.finetuning.recipe import Recipe
from benchmarks.finetuning.report import HEADING, MOST_WAITING
from benchmarks.lab.page import headline
from stablelora_kernels.utils.timing import PACKAGES

PAGE = RESULTS.parents[1] / "docs" / "results" / "benchmarks.md"
# A case's first word and its phase, and the question that they answer.
QUESTIONS = {
    "training step": "a whole training step",
    "layer both": "one layer, forward and backward",
    "mlp both": "a gated MLP, forward and backward",
    "optimizer step": "an optimizer step",
    "adapter save": "saving an adapter",
    "adapter load": "loading an adapter",
}
# The column of an arm. If two arms share a column, the later one counts: on a GPU that is ours on
# Triton.
COLUMNS = {
    "ours, PyTorch": "ours", "ours": "ours", "ours, Triton": "ours", "StableLoRAAdamW": "ours",
    "accelerated PEFT": "`accelerate_peft`", "ours compiled": "ours, compiled", "ours, MLP fused": "ours",
    "accelerated PEFT, MLP fused": "`accelerate_peft`",
}  # fmt: skip
# Rows of the host-time table, and how the names of their cases begin.
HOST_ROWS = {
    "one layer": r"host layer (?!.*autocast)",
    "one layer under autocast": r"host .*autocast",
    "96 layers in turn": "host 96 layers",
    "three projections (`fuse_projections`)": "host group",
    "a gated MLP (`fuse_mlp`)": "host mlp",
    "a branch on another layer's output": "host branch",
}
_INTRODUCTION = """\
# Where does it win and lose?

<!-- Written by python -m benchmarks.lab.page, which overwrites every change made here. -->

The stored comparisons of the suite (`python -m pytest benchmarks`), summed up by machine; the CSV files have every case.
[Performance](performance.md) has the table of the fine-tuning run and explains the main results,
[Measuring](measuring.md) the commands and the method.

- A ratio is our time over the rival's, from paired rounds. Below 1 this library is faster.
- A cell has the median over the cases, then the lowest and the highest case. It is bold if a case is above 1.
- In float32 on AMD's processors much of the gain is [oneDNN's](performance.md#how-fast-is-one-layer).
"""
# The last sentence goes once suite_host.csv is measured anew.
_HOST = """\
### Host time

Python's time for a call over PEFT's, on the Triton backend, r 16. The CUDA driver under it does nothing, so the
driver's and the allocator's time are not included. Since this run, a single layer's call has become a few percent slower.
"""
_LOSES = (
    "A case is here if three of four rounds are slower than the rival's. "
    "A cell has the median and the quartiles of the rounds."
)
_NO_GPU = (
    "- **All of this is from CPUs, on PyTorch's operators**, but for the host time on Triton. "
    "No GPU has measured anything yet.\n"
)


def read(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What ``pytest benchmarks --records`` (suite.csv, or suite_MARK.csv) and ``python -m
    benchmarks`` have written.

    Returns the suite's ratios of our time to that of the rival ``arm_of_rival``, and a row for each
    file: its machine, its name, the command, the environment of its run, and what a main job says
    of its run.
    """
    ratios, files = [], []
    for path in sorted(results.glob("*/suite*.csv")):
        rows = read_records(path)
        rivals = rows[rows["role"].str.contains("rival")].drop_duplicates(["case", "phase"])[
            ["case", "phase", "arm"]
        ]
        ours = rows[(rows["metric"] == "over_rival") & (rows["role"] == "ours")].assign(
            machine=path.parent.name
        )
        ratios.append(ours.merge(rivals, on=["case", "phase"], suffixes=("", "_of_rival")))
        mark = path.stem.partition("_")[2]
        command = (
            f"python -m pytest benchmarks{f' -m {mark}' if mark else ''} --records={path.name}"
        )
        environment = rows.attrs["environment"]
        files.append(
            (path.parent.name, path.name, environment.get("command", command), environment, None)
        )
    for path in sorted(results.glob("*/main*/result.csv")):
        run = read_records(path).attrs["environment"]
        # The default is bfloat16 where the hardware has it.
        command = "python -m benchmarks" + " --dtype fp32" * (run["settings"]["dtype"] == "float32")
        command += " --dropout 0" * (run["settings"]["lora_dropout"] == 0)
        steps = run["settings"]["steps"]
        command += f" --steps {steps}" * (steps != Recipe.steps)
        environment = run["environment"] | {"waited_share": run.get("waited_share", 0.0)}
        files.append(
            (path.parents[1].name, f"{path.parent.name}/table.txt", command, environment, run)
        )
    table = pd.DataFrame(files, columns=["machine", "name", "command", "environment", "run"])
    return pd.concat(ratios, ignore_index=True), table.sort_values("machine", kind="stable")


# What the table of main jobs has of each: columns, and their arm, metric and format.
_MAIN = (
    ("times PEFT's speed: one line", "accelerated", "speedup over PEFT", ".2f"),
    ("times PEFT's speed: our layers, StableLoRAAdamW", "stable", "speedup over PEFT", ".2f"),
    ("% over the frozen step: PEFT", "peft", "% over frozen", ".0f"),
    ("% over the frozen step: one line", "accelerated", "% over frozen", ".0f"),
    ("kept, MiB: PEFT", "peft", "MiB saved for backward", ",.0f"),
    ("kept, MiB: one line", "accelerated", "MiB saved for backward", ",.0f"),
    ("peak, MiB: PEFT", "peft", "MiB at the peak", ",.0f"),
    ("peak, MiB: one line", "accelerated", "MiB at the peak", ",.0f"),
    ("held-out loss minus PEFT's: one line", "accelerated", "loss minus PEFT", "+.3f"),
)


def main_table(results: Path) -> str:
    """A row for each stored run of ``python -m benchmarks``; a figure with an interval has its half."""
    cells = [["machine, dtype, dropout", *(head for head, *_ in _MAIN)]]
    for file in sorted(results.glob("*/main*/result.csv")):
        rows = read_records(file)
        settings = rows.attrs["environment"]["settings"]
        by = rows[rows["phase"].isin(("step", "held-out"))].set_index(["arm", "metric"])
        row = [f"{file.parts[-3]}, {settings['dtype']}, {settings['lora_dropout']:g}"]
        for _, arm, metric, form in _MAIN:
            median, half = by.loc[(arm, metric), ["median", "half_95"]]
            spread = f" ± {half:{form.strip('+')}}" if half == half else ""
            row.append(f"{round(median, 3) + 0.0:{form}}{spread}")
        cells.append(row)
    return markdown(cells)


def page(results: Path) -> str:
    """The page's text: answers by machine, then every loss, then the files."""
    ratios, files = read(results)
    of_host = ratios["case"].str.startswith("host ")
    parts = [
        _INTRODUCTION + ("" if any(each.get("gpu") for each in files["environment"]) else _NO_GPU)
    ]
    for machine, mine in files.groupby("machine"):
        found, here = mine["environment"].iloc[0], ratios["machine"] == machine
        parts.append(f"## {found.get('gpu') or found['cpu']}, {found['cores']} cores (`{machine}`)")
        if (here & ~of_host).any():
            parts.append(ratio_table(ratios[here & ~of_host]))
        if (here & of_host).any():
            parts += [_HOST, host_table(ratios[here & of_host]), host_steps(ratios[here & of_host])]
    losses = "\n\n".join(
        filter(None, [_slower(ratios[~of_host]), _lost(files.dropna(subset="run"))])
    )
    parts += [
        "## Where it loses",
        _LOSES,
        losses or "Nowhere in what is stored.",
        "## Commands of these figures",
        _files(files),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def ratio_table(rows: pd.DataFrame) -> str:
    """Our time over the rivals': a row for each question, dtype and rival. Cases that differ by a
    size alone are left out.
    """
    rows = rows.assign(
        key=rows["case"].str.split().str[0] + " " + rows["phase"],
        dtype=rows["case"].str.extract(r" ((?:fp32|bf16)\S*)", expand=False).fillna(""),
        place=range(len(rows)),
    )
    rows = rows[rows["axis"].isna()] if "axis" in rows else rows
    # Merging leaves out other arms and phases, and keeps the left side's order.
    arms, questions = (pd.DataFrame(each.items()) for each in (COLUMNS, QUESTIONS))
    rows = arms.set_axis(["arm", "column"], axis=1).merge(rows, on="arm")
    rows = rows.drop_duplicates(["case", "phase", "column"], keep="last").sort_values("place")
    rows = questions.set_axis(["key", "question"], axis=1).merge(rows, on="key")
    columns = [*dict.fromkeys(COLUMNS.values())]
    cells = [["our time over the rival's", "the rival", *columns]]
    for (question, dtype, rival), group in rows.groupby(
        ["question", "dtype", "arm_of_rival"], sort=False
    ):
        medians = (group.loc[group["column"] == column, "median"] for column in columns)
        cells.append([f"{question}, {dtype}".rstrip(", "), rival, *map(_cell, medians)])
    return markdown(cells, 2)


def host_table(rows: pd.DataFrame) -> str:
    """Host time over PEFT's by kind of call, on Triton: ranges of medians over rows and dropout."""
    cells = [
        [
            "call",
            "`LoRALinear`, forward",
            "forward and backward",
            "`accelerate_peft`, forward",
            "forward and backward",
        ]
    ]
    places = [*product(("ours, Triton", "accelerated PEFT"), ("forward", "forward and backward"))]
    for name, pattern in HOST_ROWS.items():
        medians = rows[rows["case"].str.match(pattern)].groupby(["arm", "phase"])["median"]
        cells.append([name, *(_cell(medians.get_group(place)) for place in places)])
    return markdown(cells)


def host_steps(rows: pd.DataFrame) -> str:
    """Host time of an optimizer step over fused AdamW's, by whether gradients stayed in place."""
    medians = rows.set_index("case")["median"]
    name = "host step {} tensors r2 width 8, gradients {}"
    counts = rows["case"].str.extract(r"host step (\d+) tensors", expand=False).dropna().unique()
    heads = (
        "gradients in their old memory",
        "in new memory, as after `zero_grad(set_to_none=True)`",
    )
    cells = [["an optimizer step over fused AdamW's", *heads]]
    for count in counts:
        found = (medians[[name.format(count, way)]] for way in ("kept", "moved"))
        cells.append([f"{count} tensors", *map(_cell, found)])
    return markdown(cells)


def _cell(ratios: pd.Series) -> str:
    if ratios.empty:
        return ""
    text = f"{ratios.median():.2f}"
    if len(ratios) > 1:
        text += f" ({ratios.min():.2f} to {ratios.max():.2f})"
    return f"**{text}**" if ratios.max() > 1 else text


def _slower(ratios: pd.DataFrame) -> str:
    """Every case in which three of four rounds are slower than the rival: of its phases the worst."""
    rows = ratios[ratios["q1"] > 1]
    cells = [
        [row.machine, f"{row.case}, {row.phase}", row.arm, row.arm_of_rival,
         f"{row.median:.2f} ({row.q1:.2f} to {row.q3:.2f})"]
        for row in rows.loc[rows.groupby(["machine", "case", "arm"], sort=False)["median"].idxmax()].itertuples()
    ]  # fmt: skip
    return (
        markdown([["machine", "case", "ours", "the rival", "of its time"], *cells], 4)
        if cells
        else ""
    )


def _lost(files: pd.DataFrame) -> str:
    """The main jobs' verdicts of more time, more memory or worse quality."""
    names = files["machine"] + "/" + files["name"].str.removesuffix("/table.txt")
    said = (
        (name, line[HEADING:])
        for name, run in zip(names, files["run"], strict=True)
        for line in run["verdicts"]
    )
    return "\n".join(
        f"- {line} (`{name}`)"
        for name, line in said
        if "% more" in line or line.endswith(": worse")
    )


def _files(files: pd.DataFrame) -> str:
    cells, kept = [["figures", "measured by", "when, commit"]], ""
    for machine, name, command, environment, _ in files.itertuples(index=False):
        # Versions once, as long as they stay.
        versions = ", ".join(
            f"{key} {environment[key]}" for key in PACKAGES if environment.get(key)
        )
        also, kept = "" if versions == kept else f"; {versions}", versions
        link = f"[{machine}/{name}](../../benchmarks/results/{machine}/{name})"
        cells.append([link, f"`{command}`", where(environment) + also])
    return markdown(cells, 3)


def where(environment: dict[str, Any]) -> str:
    """The day and commit of a run, and whether other programs took time from it."""
    load = environment.get("load_average_at_start", environment.get("load_average")) or 0.0
    text = f"{environment['date'][:10]}, {environment.get('commit')}"
    waited = environment.get("waited_share")
    disturbed = load > environment["cores"] / 2 if waited is None else waited > MOST_WAITING
    # Only paired ratios of such a run mean something.
    return f"{text}, **other programs ran beside it**" if disturbed else text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.page", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if the page is not up to date",
    )
    args = parser.parse_args(argv)
    text = page(RESULTS)
    if args.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE} is {'' if same else 'not '}up to date")
        return int(not same)
    for written in (write_text(PAGE, text), *headline.draw(RESULTS)):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

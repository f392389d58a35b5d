"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and operations. Nothing is measured.

    python -m benchmarks.lab.cost_model [--gpu h100] [--dropout 0.1] [--efficiency 0.85] [--out DIRECTORY]

A launch is predicted to take its launch cost and the longest of: bytes from memory over the bandwidth, bytes issued over L2's,
operations over the matrix units' rate, and bytes over what its programs can keep in flight. Ceilings and their sources are in
the files of gpus/. Our launches are the ones that dispatch picks, with their bytes by the formula that the traffic report
tests; the rivals' are in rivals.py. Only a GPU can tell which share of the vendor's matrix rate Triton's products
reach. Our times are therefore a band, from ``--efficiency`` of that rate to all of it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common.tables import RESULTS, aligned, csv_text, read_csv, write_text
from benchmarks.lab.cost_model.predict import (
    RANKS,
    ROWS,
    SIZES,
    Gpu,
    load_gpu,
    ours,
    predicted,
    regret,
    rival_seconds,
    without_overlap,
)
from benchmarks.lab.cost_model.rivals import RIVALS, WITHOUT_DROPOUT, Shape

# The suffix of columns at the slow end of the band.
SLOW = " (slow)"


def against_measured(gpu: Gpu, name: str, results: Path = RESULTS) -> list[str]:
    """How far predictions are from the device times that ``benchmarks.lab.gpu`` measured on such a GPU."""
    errors: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for path in sorted(results.glob("*/layer.csv")):
        if name not in path.parent.name.split("-"):
            continue
        for row in read_csv(path):
            if row["status"] != "ok" or row["dry"] or row["mode"] != "graph":
                continue
            m, n, k, r = (int(row[key]) for key in ("m", "n", "k", "r"))
            seconds = predicted(gpu, Shape(m, n, k, r, float(row["dropout"]) > 0), row["direction"], row["arm"])
            if seconds is not None:
                error = seconds * 1e6 / float(row["us"]) - 1
                shape = f"M {m} N {n} K {k} r {r} dropout {row['dropout']}"
                errors.setdefault((row["arm"], row["direction"]), []).append((error, shape))
    if not errors:
        return [f"No measurements of an {gpu.name} to compare with: python -m benchmarks.lab.gpu makes them."]
    cells = [["arm", "direction", "shapes", "predicted over measured, median", "worst", "at"]]
    for (arm, direction), found in sorted(errors.items()):
        worst, shape = max(found, key=lambda pair: abs(pair[0]))
        middle = statistics.median(error for error, _ in found)
        cells.append([arm, direction, f"{len(found)}", f"{middle:+.0%}", f"{worst:+.0%}", shape])
    return ["Predicted against measured, the device alone:", *aligned(cells, left=2)]


def check_published(gpu: Gpu) -> list[str]:
    """The prediction for a published figure, which the model must reproduce to be believed."""
    ratios = []
    for m in (2048, 4096, 8192, 16384):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            s = Shape(m, n, k, 16, True)
            totals = [
                sum(rival_seconds(gpu, works) for works in RIVALS[name](s)) for name in ("eager (PEFT)", "LoRAFusion")
            ]
            ratios.append(totals[0] / totals[1])
    mean, published = statistics.mean(ratios), 1.27
    off = mean / published - 1
    verdict = "within 15%" if abs(off) <= 0.15 else "NOT within 15%: the model is not to be believed"
    return [
        f"LoRAFusion over eager LoRA, r 16, dropout 0.1, 2k to 16k rows of an 8B model: predicted {mean:.2f}x mean, "
        f"{max(ratios):.2f}x best; published 1.27x mean, 1.39x best ({off:+.0%}: {verdict})"
    ]


def table(gpu: Gpu, dropout: bool, efficiency: float) -> list[dict[str, Any]]:
    """A row for each shape: predicted microseconds of every arm, forward and backward.

    Ours stand twice: at the vendor's matrix rate, and at ``efficiency`` of it.
    """
    ends = {"": 1.0, SLOW: efficiency}
    rows = []
    for (n, k), m, r in product(SIZES, ROWS, RANKS):
        s = Shape(m, n, k, r, dropout)
        row: dict[str, Any] = {"gpu": gpu.name, "m": m, "n": n, "k": k, "r": r, "dropout": 0.1 * dropout}
        for name, sequence in RIVALS.items():
            if not (dropout and name in WITHOUT_DROPOUT):
                for direction, works in zip(("forward", "backward"), sequence(s), strict=True):
                    row[f"{name} {direction}"] = round(rival_seconds(gpu, works) * 1e6, 2)
        for end, rate in ends.items():
            for direction, seconds in zip(("forward", "backward"), ours(gpu, s, rate), strict=True):
                chosen, fastest, more = regret(gpu, s, direction, rate)
                row[f"ours {direction}{end}"] = round(seconds * 1e6, 2)
                row |= {f"{direction} kernel": chosen, f"{direction} fastest{end}": fastest}
                row[f"{direction} regret{end}"] = round(more, 3)
        rows.append(row)
    return rows


def _whole(row: dict[str, Any], name: str, end: str = "") -> float:
    return row[f"{name} forward{end}"] + row[f"{name} backward{end}"]


def band(row: dict[str, Any]) -> tuple[float, float]:
    """Our time over the frozen layer's, at the vendor's rate and at the slow end."""
    frozen = _whole(row, "frozen")
    return _whole(row, "ours") / frozen, _whole(row, "ours", SLOW) / frozen


def show(rows: list[dict[str, Any]], n: int, k: int) -> list[str]:
    """The rows of one layer, as times over the frozen layer's."""
    names = [name for name in RIVALS if name != "frozen" and f"{name} forward" in rows[0]]
    cells = [["M", "r", "frozen, us", *(f"{name}, x" for name in names), "ours, x", "kernels", "regret at most, %"]]
    for row in rows:
        if (row["n"], row["k"]) == (n, k):
            whole = {name: _whole(row, name) for name in ("frozen", *names)}
            worst = [max(row[f"{way} regret"], row[f"{way} regret{SLOW}"]) for way in ("forward", "backward")]
            cells.append([
                f"{row['m']}", f"{row['r']}", f"{whole['frozen']:.1f}",
                *(f"{whole[name] / whole['frozen']:.2f}" for name in names),
                "{:.2f}-{:.2f}".format(*band(row)),
                f"{row['forward kernel']}/{row['backward kernel']}",
                "{:.0f}/{:.0f}".format(*(100 * more for more in worst)),
            ])  # fmt: skip
    return aligned(cells, left=0)


def worst_case(gpu: Gpu, rows: list[dict[str, Any]]) -> list[str]:
    """Our time for shapes bound by products, as predicted and without any overlap."""
    lines = []
    for row in rows:
        if (row["n"], row["k"], row["r"]) == (4096, 4096, 16) and row["m"] >= 2048:
            frozen = _whole(row, "frozen")
            bare = without_overlap(gpu, Shape(row["m"], 4096, 4096, 16, row["dropout"] > 0)) * 1e6
            lines.append(f"M {row['m']}: {bare / frozen:.2f} instead of {_whole(row, 'ours') / frozen:.2f}")
    return lines


def plot(rows: list[dict[str, Any]], gpu: Gpu, directory: Path) -> list[Path]:
    """Predicted time over the frozen layer's against M and against r."""

    from benchmarks.common.plot_style import RIVALS as COLORS
    from benchmarks.common.plot_style import STYLE, plt, save

    n, k = 4096, 4096
    mine = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    names = [name for name in RIVALS if name != "frozen" and f"{name} forward" in mine[0]] + ["ours"]
    paths = []
    with plt.rc_context(STYLE):
        for axis, fixed, label in (("m", ("r", 16), "rows"), ("r", ("m", 8192), "rank")):
            chosen = [row for row in mine if row[fixed[0]] == fixed[1]]
            figure, ax = plt.subplots(figsize=(7.2, 4), layout="constrained")
            for name in names:
                over = [_whole(row, name) / _whole(row, "frozen") for row in chosen]
                xs = [row[axis] for row in chosen]
                width = 2 if name == "ours" else 1.3
                ax.plot(xs, over, marker="o", markersize=3.5, color=COLORS[name], label=name, linewidth=width)
            ax.fill_between(xs, *zip(*map(band, chosen), strict=True), color=COLORS["ours"], alpha=0.18, linewidth=0)
            ax.axhline(1, color="#444444", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xticks(xs, [f"{x // 1024}k" if x >= 1024 else f"{x}" for x in xs])
            ax.set_xlabel(f"{label} ({fixed[0] if fixed[0] == 'r' else 'M'} = {fixed[1]})")
            ax.set_ylabel("forward + backward, over the frozen layer")
            p = chosen[0]["dropout"]
            ax.set_title(f"Predicted, not measured: {gpu.name}, {n} x {k}, bf16, dropout {p:g}", fontsize=10)
            ax.legend()
            paths.append(save(figure, directory / f"time_against_{label}_dropout_{p:g}.png"))
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpu", default="h100", help="a file's name in benchmarks/lab/cost_model/gpus (default: %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.1, choices=(0.0, 0.1), help="default: %(default)s")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.85,
        help="the slow end of Triton's share of the vendor's rate (default: 0.85)",
    )
    parser.add_argument("--out", type=Path, help="where to write a CSV and plots (default: nowhere)")
    options = parser.parse_args(arguments)
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency must be in (0, 1], got {options.efficiency}")
    gpu = load_gpu(options.gpu)
    rows = table(gpu, options.dropout > 0, options.efficiency)
    print(f"All times are PREDICTED for an {gpu.name} in bf16, dropout {options.dropout:g}; none is measured.\n")
    for n, k in SIZES:
        print(f"N {n}, K {k}: forward + backward over the frozen layer's", *show(rows, n, k), "", sep="\n")
    for line in (*check_published(load_gpu("h100")), *against_measured(gpu, options.gpu)):
        print(line)
    print(
        "Should nothing overlap as planned, 4096 x 4096, r 16, over the frozen layer's:",
        *worst_case(gpu, rows),
        sep="\n  ",
    )
    for end, rate in (("", 1.0), (SLOW, options.efficiency)):
        regrets = [row[f"{direction} regret{end}"] for row in rows for direction in ("forward", "backward")]
        print(
            f"dispatch against the fastest predicted kernel, at {rate:g} of the vendor's rate: "
            f"{statistics.mean(regrets):.1%} longer on average, {max(regrets):.1%} at worst, over {len(rows)} shapes"
        )
    if options.out:
        path = options.out / f"predicted_dropout_{options.dropout:g}.csv"
        write_text(path, csv_text(rows))
        for written in (path, *plot(rows, gpu, options.out)):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()

"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and operations. Nothing is measured.

    python -m benchmarks.lab.cost_model [--gpu h100] [--dropout 0.1] [--efficiency 0.85] [--out DIRECTORY]

A launch is predicted to take its launch cost and the longest of: bytes from memory over the bandwidth, bytes issued over L2's,
operations over the matrix units' rate, and bytes over what its programs can keep in flight; its busiest processor counts.
Ceilings and their sources are in the files of gpus/. Our launches are the ones that dispatch picks, with their bytes by the
formula that the traffic report tests; the rivals' are in rivals.py. Only a GPU can tell which share of the vendor's matrix rate
Triton's products reach, and sources differ about L2's rate. So times are a band: from all of the vendor's rate and the highest
rate of L2 to ``--efficiency`` of the one and the lowest of the other. Regret is how much longer dispatch's kernel takes than
the fastest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common.tables import RESULTS, aligned, csv_text, read_csv, write_text
from benchmarks.lab.cost_model import mlp
from benchmarks.lab.cost_model.gpu import Gpu, band_ends, load_gpu
from benchmarks.lab.cost_model.predict import (
    RANKS,
    ROWS,
    SIZES,
    SLOWEST,
    ours,
    predicted,
    regret,
    rival_seconds,
    without_overlap,
)
from benchmarks.lab.cost_model.rivals import RIVALS, WITHOUT_DROPOUT, Shape

# The suffix of columns at the slow end of the band.
SLOW = " (slow)"
DIRECTIONS = ("forward", "backward")


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
            seconds = predicted(gpu, Shape(m, n, k, r, float(row["dropout"]) > 0, False), row["direction"], row["arm"])
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
    """A row for each shape: predicted microseconds of every arm, forward and backward, at both ends of the band."""
    ends = dict(zip(("", SLOW), band_ends(gpu, efficiency), strict=True))
    rows = []
    for (n, k), m, r in product(SIZES, ROWS, RANKS):
        s = Shape(m, n, k, r, dropout)
        row: dict[str, Any] = {"gpu": gpu.name, "m": m, "n": n, "k": k, "r": r, "dropout": 0.1 * dropout}
        for name, sequence in RIVALS.items():
            if not (dropout and name in WITHOUT_DROPOUT):
                for (end, at), (direction, works) in product(ends.items(), zip(DIRECTIONS, sequence(s), strict=True)):
                    row[f"{name} {direction}{end}"] = round(rival_seconds(at.gpu, works) * 1e6, 2)
        for end, at in ends.items():
            for direction, seconds in zip(DIRECTIONS, ours(at.gpu, s, at.efficiency), strict=True):
                row[f"ours {direction}{end}"] = round(seconds * 1e6, 2)
        for direction in DIRECTIONS:
            found = regret(gpu, s, direction, efficiency)
            row |= {f"{direction} kernel": found.kernel, f"{direction} minimax": found.minimax}
            row[f"{direction} least regret"] = round(found.least, 3)
            for end, fastest, more in zip(ends, found.fastest, found.at_ends, strict=True):
                row |= {f"{direction} fastest{end}": fastest, f"{direction} regret{end}": round(more, 3)}
        rows.append(row)
    return rows


def _whole(row: dict[str, Any], name: str, end: str = "") -> float:
    return row[f"{name} forward{end}"] + row[f"{name} backward{end}"]


def band(row: dict[str, Any]) -> tuple[float, float]:
    """Our time over the frozen layer's, at the fast end and at the slow one."""
    fast, slow = (_whole(row, "ours", end) / _whole(row, "frozen", end) for end in ("", SLOW))
    return fast, slow


def show(rows: list[dict[str, Any]], n: int, k: int) -> list[str]:
    """The rows of one layer, as times over the frozen layer's."""
    names = [name for name in RIVALS if name != "frozen" and f"{name} forward" in rows[0]]
    cells = [["M", "r", "frozen, us", *(f"{name}, x" for name in names), "ours, x", "kernels", "regret at most, %"]]
    for row in rows:
        if (row["n"], row["k"]) == (n, k):
            whole = {name: _whole(row, name) for name in ("frozen", *names)}
            worst = [max(row[f"{way} regret"], row[f"{way} regret{SLOW}"]) for way in DIRECTIONS]
            cells.append([
                f"{row['m']}", f"{row['r']}", f"{whole['frozen']:.1f}",
                *(f"{whole[name] / whole['frozen']:.2f}" for name in names),
                "{:.2f}-{:.2f}".format(*band(row)),
                f"{row['forward kernel']}/{row['backward kernel']}",
                "{:.0f}/{:.0f}".format(*(100 * more for more in worst)),
            ])  # fmt: skip
    return aligned(cells, left=0)


def regret_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The regret of dispatch's table over the band, and that of a table that minimized the worst regret of every shape."""
    ways = [(row, direction) for row in rows for direction in DIRECTIONS]
    worst = [max(row[f"{way} regret"], row[f"{way} regret{SLOW}"]) for row, way in ways]
    least = [row[f"{way} least regret"] for row, way in ways]
    at, way = ways[worst.index(max(worst))]
    shape = f"{way} M {at['m']} N {at['n']} K {at['k']} r {at['r']}"
    kernels = f"{at[f'{way} kernel']}, not {at[f'{way} minimax']}"
    return [
        f"Regret over the band, the worse end of each of {len(ways)} calls: {statistics.mean(worst):.1%} on average, "
        f"{max(worst):.1%} at most ({shape}: {kernels})",
        f"No table has less than {statistics.mean(least):.1%} on average and {max(least):.1%} at most: the ends disagree.",
    ]


def worst_case(gpu: Gpu, rows: list[dict[str, Any]]) -> list[str]:
    """Our time for shapes bound by products, as predicted and without any overlap."""
    lines = []
    for row in rows:
        if (row["n"], row["k"], row["r"]) == (4096, 4096, 16) and row["m"] >= 2048:
            frozen = _whole(row, "frozen")
            bare = (
                without_overlap(band_ends(gpu, 1.0)[0].gpu, Shape(row["m"], 4096, 4096, 16, row["dropout"] > 0)) * 1e6
            )
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
        default=SLOWEST,
        help="the slow end of Triton's share of the vendor's rate (default: %(default)s)",
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
    of_mlp = mlp.rows(gpu, options.dropout > 0, options.efficiency)
    print(
        "A gated MLP, K 4096, F 14336: forward + backward over the frozen MLP's",
        *aligned(mlp.cells(of_mlp), left=0),
        "",
        sep="\n",
    )
    for line in (*check_published(load_gpu("h100")), *against_measured(gpu, options.gpu)):
        print(line)
    print(
        "Should nothing overlap as planned, 4096 x 4096, r 16, over the frozen layer's:",
        *worst_case(gpu, rows),
        sep="\n  ",
    )
    print(*regret_lines(rows), sep="\n")
    if options.out:
        path, mlp_path = (
            options.out / f"{name}_dropout_{options.dropout:g}.csv" for name in ("predicted", "predicted_mlp")
        )
        write_text(path, csv_text(rows))
        write_text(mlp_path, csv_text(of_mlp))
        for written in (path, mlp_path, *plot(rows, gpu, options.out)):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()

"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and
operations. Nothing is measured.

    python -m benchmarks.lab.predict [--gpu h100] [--dropout 0.1] [--out DIRECTORY]
    python -m benchmarks.lab.predict --weights nf4

docs/internals/predictions.md explains the model, and gpus/ has the ceilings with their sources.
Figures are ranges with a middle, see ``ceilings.points``. Regret is how much longer dispatch's
kernel takes than the fastest one at the worst point; least regret is that of the best kernel.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab.predict import layer_time, quantized
from benchmarks.lab.predict.ceilings import Gpu, Range, load_gpu, points, range_over
from benchmarks.lab.predict.instructions import counted_archs
from benchmarks.lab.predict.layer_time import DIRECTIONS, MLPS, OURS, seconds, table
from benchmarks.lab.predict.rivals import FROZEN, MLP, PEFT, Shape


def ranges_of(rows: pd.DataFrame, arm: str) -> list[Range]:
    """Of each row of a table: over the frozen layer's or MLP's; the frozen one's in
    microseconds.
    """
    return [Range(*ends) for ends in rows[[f"{arm} {end}" for end in Range._fields]].to_numpy()]


def whole_range(rows: pd.DataFrame, arm: str) -> Range:
    """Of all rows together: the lowest, the mean of their middles, and the highest."""
    lows, middles, highs = zip(*ranges_of(rows, arm), strict=True)
    return Range(min(lows), statistics.mean(middles), max(highs))


def shown(rows: pd.DataFrame) -> str:
    """A table as text, with times over the frozen layer's or MLP's: low, middle, high."""
    text = rows[["m", "r"]].copy()
    text["frozen, us"] = [known.text("{:.1f}") for known in ranges_of(rows, FROZEN)]
    arms = [name.removesuffix(" middle") for name in rows if name.endswith(" middle")]
    for arm in arms:
        if arm != FROZEN:
            text[f"{arm}, x"] = [known.text() for known in ranges_of(rows, arm)]
    for direction in DIRECTIONS if "forward kernel" in rows else ():
        regrets = rows[f"{direction} regret at most"].map(" ({:.0%})".format)
        text[f"{direction} by (regret)"] = rows[f"{direction} kernel"] + regrets
    return text.to_string(index=False)


def against_measured(gpu: Gpu, name: str, results: Path = RESULTS) -> str:
    """How far predictions are from the device times that ``benchmarks.lab.gpu`` measured on such a
    GPU.
    """
    paths = [
        path for path in sorted(results.glob("*/layer.csv")) if name in path.parent.name.split("-")
    ]
    arms = {"frozen nn.Linear": FROZEN, "eager LoRA": PEFT, "PEFT": PEFT, OURS: OURS}
    if not paths:
        none = f"No measurements of an {gpu.name} to compare with"
        return f"{none}: python -m benchmarks.lab.gpu makes them."
    rows = pd.concat(map(read_records, paths))
    rows = rows[(rows["metric"] == "us") & (rows["mode"] == "graph") & rows["arm"].isin(arms)]
    off = []
    inside = []
    for row in rows.itertuples():
        shape = Shape(row.m, row.n_out, row.k, row.r, row.dropout > 0, False)
        ways = [seconds(point, shape, arms[row.arm]) for point in points(gpu)]
        if row.phase == "both":
            times = [1e6 * sum(way) for way in ways]
        else:
            times = [1e6 * way[DIRECTIONS.index(row.phase)] for way in ways]
        known = range_over(times)
        off.append(known.middle / row.median - 1)
        inside.append(known.low <= row.median <= known.high)
    groups = rows.assign(off=off, inside=inside).set_index("case").groupby(["arm", "phase"])
    compared = (
        groups["off"]
        .describe()[["count", "min", "50%", "max"]]
        .astype({"count": int})
        .assign(inside=groups["inside"].mean(), farthest=groups["off"].apply(_farthest))
    )
    text = compared.to_string(float_format="{:+.0%}".format)
    return (
        f"Predicted middle over measured, less 1, the device alone; inside: in the range:\n{text}"
    )


def _farthest(off: pd.Series) -> str:
    return str(off.abs().idxmax())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--gpu",
        default="h100",
        help="a file's name in benchmarks/lab/predict/gpus (default: %(default)s)",
    )
    add("--dropout", type=float, default=0.1, choices=(0.0, 0.1), help="default: %(default)s")
    add(
        "--weights",
        choices=quantized.BITS,
        help="the layer's weight, instead of bf16; without dropout",
    )
    add("--out", type=Path, help="where to write the tables as CSV files (default: nowhere)")
    options = parser.parse_args(arguments)
    gpu = load_gpu(options.gpu)
    if gpu.arch not in counted_archs():
        command = f"python -m benchmarks.lab.predict.count --gpu {options.gpu}"
        parser.error(f"no launch is counted for the {gpu.name} yet: {command}")
    whole = layer_time.is_counted_in_full(gpu.device)
    if options.weights and not whole:
        parser.error(f"--weights is counted for the H100 alone, not for the {gpu.name}")
    print(f"PREDICTED for the {gpu.name} in bf16, none measured: low, middle, high.\n")
    if options.weights:
        print(quantized.table(gpu, options.weights).to_string(index=False))
        return
    layers = table(gpu, layer_time.layers(gpu.device, options.dropout > 0))
    tables = {"predicted": layers}
    if whole:
        tables["predicted_mlp"] = table(gpu, [MLP(*sizes, options.dropout > 0) for sizes in MLPS])
    for (n, k), rows in layers.groupby(["n", "k"], sort=False):
        title = (
            f"N {n}, K {k}, dropout {options.dropout:g}: forward + backward over the frozen layer's"
        )
        print(f"{title}\n{shown(rows)}\n")
    if whole:
        title = "A gated MLP, K 4096, F 14336: forward + backward over the frozen MLP's"
        print(f"{title}\n{shown(tables['predicted_mlp'])}\n")
    for name in ("regret at most", "least regret"):
        regrets = layers[[f"{way} {name}" for way in DIRECTIONS]].stack()
        figures = f"{regrets.mean():.1%} on average, {regrets.max():.1%} at most"
        print(f"{name.capitalize()}, at the worst point of {len(regrets)} calls: {figures}")
    print(against_measured(gpu, options.gpu))
    for name, rows in tables.items() if options.out else ():
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}_dropout_{options.dropout:g}.csv"
        rows.to_csv(path, index=False, lineterminator="\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and
operations. Nothing is measured.

    python -m benchmarks.lab.predict [--gpu h100] [--dropout 0.1] [--out DIRECTORY]
    python -m benchmarks.lab.predict --weights nf4

docs/internals/predictions.md explains the model, and gpus/ has the ceilings with their sources.
Ratios are bands, see ``launch_time.band_ends``. Regret is how much longer dispatch's kernel takes
than the fastest one at the worse end; least regret is that of the best kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab.predict import layer_time, quantized
from benchmarks.lab.predict.launch_time import SLOW, Gpu, load_gpu
from benchmarks.lab.predict.layer_time import DIRECTIONS, MLPS, OURS, seconds, table
from benchmarks.lab.predict.rivals import FROZEN, MLP, PEFT, Shape


def over_frozen(table: pd.DataFrame, arm: str, end: str = "") -> pd.Series:
    """Forward and backward together, over the frozen layer's or MLP's."""
    ours, frozen = (
        sum(table[f"{name} {way}{end}"] for way in DIRECTIONS) for name in (arm, FROZEN)
    )
    return ours / frozen


def band(table: pd.DataFrame, arm: str, form: str = "{:.2f}-{:.2f}") -> pd.Series:
    """:func:`over_frozen` at both ends, as text."""
    ends = pd.concat([over_frozen(table, arm, end) for end in ("", SLOW)], axis=1)
    return pd.Series([form.format(*sorted(each)) for each in ends.to_numpy()], table.index)


def shown(table: pd.DataFrame) -> str:
    """Rows as times over the frozen layer's or MLP's."""
    text = table[["m", "r"]].copy()
    text["frozen, us"] = [
        f"{min(each):.1f}-{max(each):.1f}"
        for each in zip(
            *(sum(table[f"{FROZEN} {way}{end}"] for way in DIRECTIONS) for end in ("", SLOW)),
            strict=True,
        )
    ]
    for arm in dict.fromkeys(
        name.removesuffix(" forward") for name in table if name.endswith(" forward")
    ):
        if arm != FROZEN:
            text[f"{arm}, x"] = band(table, arm)
    for way in DIRECTIONS if "forward kernel" in table else ():
        text[f"{way} by (regret)"] = table[f"{way} kernel"] + table[f"{way} regret at most"].map(
            " ({:.0%})".format
        )
    return text.to_string(index=False)


def against_measured(gpu: Gpu, name: str, results: Path = RESULTS) -> str:
    """How far predictions are from the device times that ``benchmarks.lab.gpu`` measured on such a
    GPU.
    """
    paths = [
        path for path in sorted(results.glob("*/layer.csv")) if name in path.parent.name.split("-")
    ]
    names = {"frozen nn.Linear": FROZEN, "eager LoRA": PEFT, "PEFT": PEFT, OURS: OURS}
    if not paths:
        return f"No measurements of an {gpu.name} to compare with: python -m benchmarks.lab.gpu makes them."
    rows = pd.concat(map(read_records, paths))
    rows, off = (
        rows[(rows["metric"] == "us") & (rows["mode"] == "graph") & rows["arm"].isin(names)],
        [],
    )
    for row in rows.itertuples():
        times = seconds(
            gpu, Shape(row.m, row.n_out, row.k, row.r, row.dropout > 0, False), names[row.arm]
        )
        predicted = sum(times) if row.phase == "both" else times[DIRECTIONS.index(row.phase)]
        off.append(1e6 * predicted / row.median - 1)
    arms = rows.assign(off=off).set_index("case").groupby(["arm", "phase"])["off"]
    table = (
        arms.describe()[["count", "min", "50%", "max"]]
        .astype({"count": int})
        .assign(farthest=arms.apply(lambda each: each.abs().idxmax()))
    )
    return f"Predicted over measured, less 1, the device alone:\n{table.to_string(float_format='{:+.0%}'.format)}"


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
    print(f"All times are PREDICTED for an {gpu.name} in bf16; none is measured.\n")
    if options.weights:
        print(quantized.table(gpu, options.weights).to_string(index=False))
        return
    layers = table(gpu, layer_time.layers(options.dropout > 0))
    mlps = table(gpu, [MLP(*sizes, options.dropout > 0) for sizes in MLPS])
    for (n, k), rows in layers.groupby(["n", "k"], sort=False):
        print(
            f"N {n}, K {k}, dropout {options.dropout:g}: forward + backward over the frozen layer's\n{shown(rows)}\n"
        )
    print(
        f"A gated MLP, K 4096, F 14336: forward + backward over the frozen MLP's\n{shown(mlps)}\n"
    )
    for name in ("regret at most", "least regret"):
        found = layers[[f"{way} {name}" for way in DIRECTIONS]].stack()
        print(
            f"{name.capitalize()}, the worse end of {len(found)} calls: {found.mean():.1%} on average, {found.max():.1%} at most"
        )
    print(against_measured(gpu, options.gpu))
    for name, rows in {"predicted": layers, "predicted_mlp": mlps}.items() if options.out else ():
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}_dropout_{options.dropout:g}.csv"
        rows.to_csv(path, index=False, lineterminator="\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and operations. Nothing is measured.

    python -m benchmarks.lab.predict [--gpu h100] [--dropout 0.1] [--efficiency 0.85] [--out DIRECTORY]

A launch is predicted to take its launch cost and the longest of: bytes from memory over the bandwidth, bytes issued over L2's,
operations over the matrix units' rate, and bytes over what its programs can keep in flight; its busiest processor counts.
Ceilings and their sources are in the files of gpus/. Our launches are the ones that dispatch picks, with their bytes by the
formula that benchmarks.lab.predict.bytes_moved tests; the rivals' are in rivals.py. Only a GPU can tell which share of the
vendor's matrix rate Triton's products reach, and sources differ about L2's rate. So times are a band: from all of the vendor's
rate and the highest rate of L2 to ``--efficiency`` of the one and the lowest of the other. Regret is how much longer dispatch's
kernel takes than the fastest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.tables import RESULTS
from benchmarks.lab.predict.ceilings import SLOW, SLOWEST, Gpu, band_ends, load_gpu
from benchmarks.lab.predict.layer_time import (
    DIRECTIONS,
    MLP_ARMS,
    RANKS,
    ROWS,
    SIZES,
    mlp_seconds,
    ours,
    predicted,
    regret,
    without_overlap,
)
from benchmarks.lab.predict.rivals import (
    ACTIVATION,
    MLP,
    PEFT,
    RIVALS,
    WITHOUT_DROPOUT,
    Shape,
    rival_mlp,
    rival_seconds,
)

# Rows, K, F and ranks of gated MLPs in Llama 3.1 8B.
MLPS = tuple((m, 4096, 14336, r) for r in (16, 64) for m in (2048, 8192, 16384))


def _times(name: str, seconds: Sequence[float], end: str = "", digits: int = 2) -> dict[str, float]:
    return {f"{name} {way}{end}": round(1e6 * s, digits) for way, s in zip(DIRECTIONS, seconds, strict=True)}


def layer_table(gpu: Gpu, dropout: bool, efficiency: float = SLOWEST) -> pd.DataFrame:
    """A row for each shape: predicted microseconds of every arm, forward and backward, at both ends of the band."""
    ends = dict(zip(("", SLOW), band_ends(gpu, efficiency), strict=True))
    rows = []
    for (n, k), m, r in product(SIZES, ROWS, RANKS):
        s = Shape(m, n, k, r, dropout)
        row: dict[str, Any] = {"gpu": gpu.name, "m": m, "n": n, "k": k, "r": r, "dropout": s.p}
        for name, sequence in RIVALS.items():
            if not (dropout and name in WITHOUT_DROPOUT):
                for end, at in ends.items():
                    row |= _times(name, [rival_seconds(at, works) for works in sequence(s)], end)
        for end, at in ends.items():
            row |= _times("ours", ours(at, s), end)
        for way in DIRECTIONS:
            found = regret(gpu, s, way, efficiency)
            row |= {f"{way} kernel": found.kernel, f"{way} minimax": found.minimax}
            row[f"{way} least regret"] = round(found.least, 3)
            for end, fastest, more in zip(ends, found.fastest, found.at_ends, strict=True):
                row |= {f"{way} fastest{end}": fastest, f"{way} regret{end}": round(more, 3)}
        rows.append(row)
    return pd.DataFrame(rows)


def mlp_table(gpu: Gpu, dropout: bool, efficiency: float = SLOWEST) -> pd.DataFrame:
    """As :func:`layer_table`, for a gated MLP; the rivals' times are at the fast end alone."""
    rows = []
    for mlp in (MLP(*shape, dropout) for shape in MLPS):
        row: dict[str, Any] = {"gpu": gpu.name, **mlp._asdict(), "dropout": mlp.layers()[0].p}
        for name in ACTIVATION:
            if not (dropout and name in WITHOUT_DROPOUT):
                row |= _times(name, [rival_seconds(gpu, works) for works in rival_mlp(name, mlp)], digits=1)
        for end, at in zip(("", SLOW), band_ends(gpu, efficiency), strict=True):
            for arm in MLP_ARMS:
                row |= _times(arm, mlp_seconds(at, mlp, arm), end, digits=1)
        rows.append(row)
    return pd.DataFrame(rows)


def whole(table: pd.DataFrame, name: str, end: str = "") -> pd.Series:
    """Forward and backward together."""
    return table[f"{name} forward{end}"] + table[f"{name} backward{end}"]


def over_frozen(table: pd.DataFrame, name: str, end: str = "") -> pd.Series:
    return whole(table, name, end) / whole(table, "frozen", end if f"frozen forward{end}" in table else "")


def worst_regret(table: pd.DataFrame, way: str) -> pd.Series:
    return table[[f"{way} regret", f"{way} regret{SLOW}"]].max(axis=1)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Rows as times over the frozen layer's or MLP's, ours as a band."""
    text = table[["m", "r"]].assign(**{"frozen, us": whole(table, "frozen").round(1)})
    for name in (*RIVALS, "ours", *MLP_ARMS):
        if f"{name} forward" in table and name != "frozen":
            text[f"{name}, x"] = over_frozen(table, name).map("{:.2f}".format)
            if name not in RIVALS:
                text[f"{name}, x"] += over_frozen(table, name, SLOW).map("-{:.2f}".format)
    if "forward kernel" in table:
        text["kernels"] = table["forward kernel"] + "/" + table["backward kernel"]
        percent = [worst_regret(table, way).map("{:.0%}".format) for way in DIRECTIONS]
        text["regret at most"] = percent[0] + "/" + percent[1]
    return text


def regret_lines(table: pd.DataFrame) -> list[str]:
    """The regret of dispatch's table over the band, and that of a table that minimized the worst regret of every shape."""
    worst = pd.concat({way: worst_regret(table, way) for way in DIRECTIONS})
    least = pd.concat({way: table[f"{way} least regret"] for way in DIRECTIONS})
    way, index = worst.idxmax()
    at = table.loc[index]
    return [
        f"Regret over the band, the worse end of each of {len(worst)} calls: {worst.mean():.1%} on average, {worst.max():.1%} "
        f"at most ({way} M {at.m} N {at.n} K {at.k} r {at.r}: {at[f'{way} kernel']}, not {at[f'{way} minimax']})",
        f"No table has less than {least.mean():.1%} on average and {least.max():.1%} at most: the ends disagree.",
    ]


def overlap_lines(gpu: Gpu, table: pd.DataFrame) -> list[str]:
    """Our time for shapes bound by products, as predicted and without any overlap, at the fast end."""
    rows = table.query("n == 4096 and k == 4096 and r == 16 and m >= 2048")
    fast, dropout = band_ends(gpu)[0], table.dropout.iloc[0] > 0
    bare = [1e6 * without_overlap(fast, Shape(m, 4096, 4096, 16, dropout)) for m in rows.m]
    return [
        f"  M {m}: {worse:.2f} instead of {planned:.2f}"
        for m, worse, planned in zip(rows.m, bare / whole(rows, "frozen"), over_frozen(rows, "ours"), strict=True)
    ]


def check_published(gpu: Gpu) -> str:
    """The prediction for a published figure, which the model must reproduce to be believed."""
    ratios = []
    for m, (n, k) in product((2048, 4096, 8192, 16384), ((4096, 4096), (14336, 4096), (4096, 14336))):
        s = Shape(m, n, k, 16, True)
        peft, fused = (sum(rival_seconds(gpu, works) for works in RIVALS[name](s)) for name in (PEFT, "LoRAFusion"))
        ratios.append(peft / fused)
    mean, published = statistics.mean(ratios), 1.27
    off = mean / published - 1
    verdict = "within 15%" if abs(off) <= 0.15 else "NOT within 15%: the model is not to be believed"
    return (
        f"LoRAFusion over eager LoRA, r 16, dropout 0.1, 2k to 16k rows of an 8B model: predicted {mean:.2f}x mean, "
        f"{max(ratios):.2f}x best; published 1.27x mean, 1.39x best ({off:+.0%}: {verdict})"
    )


def against_measured(gpu: Gpu, name: str, results: Path = RESULTS) -> str:
    """How far predictions are from the device times that ``benchmarks.lab.gpu`` measured on such a GPU."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("*/layer.csv")):
        if name not in path.parent.name.split("-"):
            continue
        measured = pd.read_csv(path).query("status == 'ok' and dry.isna() and mode == 'graph'")
        for row in measured.itertuples():
            s = Shape(row.m, row.n, row.k, row.r, row.dropout > 0, False)
            if (seconds := predicted(gpu, s, row.direction, row.arm)) is not None:
                shape = f"M {s.m} N {s.n} K {s.k} r {s.r} dropout {row.dropout:g}"
                off = 1e6 * seconds / row.us - 1
                rows.append({"arm": row.arm, "direction": row.direction, "at": shape, "off": off, "far": abs(off)})
    if not rows:
        return f"No measurements of an {gpu.name} to compare with: python -m benchmarks.lab.gpu makes them."
    frame = pd.DataFrame(rows)
    arms = frame.groupby(["arm", "direction"])
    worst = frame.loc[arms.far.idxmax()].set_index(["arm", "direction"])
    table = pd.DataFrame({"shapes": arms.size(), "median": arms.off.median(), "worst": worst.off, "at": worst["at"]})
    text = table.reset_index().to_string(index=False, float_format="{:+.0%}".format)
    return f"Predicted over measured, less 1, the device alone:\n{text}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpu", default="h100", help="a file's name in benchmarks/lab/predict/gpus (default: %(default)s)")
    add("--dropout", type=float, default=0.1, choices=(0.0, 0.1), help="default: %(default)s")
    add("--efficiency", type=float, default=SLOWEST,
        help="the slow end of Triton's share of the vendor's rate (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, help="where to write the tables as CSV files (default: nowhere)")
    options = parser.parse_args(arguments)
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency must be in (0, 1], got {options.efficiency}")
    gpu = load_gpu(options.gpu)
    layers, mlps = (of(gpu, options.dropout > 0, options.efficiency) for of in (layer_table, mlp_table))
    print(f"All times are PREDICTED for an {gpu.name} in bf16, dropout {options.dropout:g}; none is measured.\n")
    for (n, k), rows in layers.groupby(["n", "k"], sort=False):
        print(f"N {n}, K {k}: forward + backward over the frozen layer's\n{shown(rows).to_string(index=False)}\n")
    print(
        f"A gated MLP, K 4096, F 14336: forward + backward over the frozen MLP's\n{shown(mlps).to_string(index=False)}\n"
    )
    print(check_published(load_gpu("h100")), against_measured(gpu, options.gpu), sep="\n")
    print("Should nothing overlap as planned, 4096 x 4096, r 16, over the frozen layer's:")
    print(*overlap_lines(gpu, layers), *regret_lines(layers), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, table in (("predicted", layers), ("predicted_mlp", mlps)):
            path = options.out / f"{name}_dropout_{options.dropout:g}.csv"
            table.to_csv(path, index=False, lineterminator="\n")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()

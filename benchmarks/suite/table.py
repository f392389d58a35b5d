"""The suite's tables: the arms of each case and phase, and where this library is slower than its
rival.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from benchmarks.common.intervals import log_slope
from benchmarks.suite.rivals import REASONS, Row

TIMES = ("ms", "over_base", "overhead_ms", "over_rival")
# The figures that grow with an axis of sizes.
GROWING = ("ms", "overhead_ms", "saved_bytes")


def write(line: Callable[[str], None], rows: Sequence[Row], load_at_start: float) -> None:
    records = pd.DataFrame(rows)
    judged = records["metric"].eq("over_rival") & records["role"].str.contains("ours")
    # Only if three of four rounds say so.
    verdicts = np.select([records["q3"] < 1, records["q1"] > 1], ["faster", "SLOWER"], "level")
    records["verdict"] = np.where(judged, verdicts, "")
    records["spread"] = [
        f"{row.median:.2f} ({row.q1:.2f}-{row.q3:.2f})" for row in records.itertuples()
    ]
    losses = []
    line(
        f"Load average {load_at_start:.2f} at the start, {os.getloadavg()[0]:.2f} now, on {os.cpu_count()} cores."
    )
    line(
        "Medians; quartiles in brackets; ratios are taken round by round. The overhead is what an arm adds to its base."
    )
    for (case, phase), found in records.groupby(["case", "phase"], sort=False):
        base, rival = (
            found.loc[found["role"].str.contains(role), "arm"].iloc[0] for role in ("base", "rival")
        )
        line(f"\n{case}, {phase}")
        line(arms(found[~found["metric"].isin(REASONS)], base, rival).to_string(na_rep=""))
        for row in found[found["metric"].isin(REASONS)].itertuples():
            line(f"  {row.metric}: {row.arm}: {row.reason}")
        for row in found[found["verdict"] == "SLOWER"].itertuples():
            losses.append(f"  {case}, {phase}: {row.arm} takes {row.spread} of {rival}'s time")
    if "axis" in records and len(fits := exponents(records)):
        line("\nExponents of the sizes over their larger half, with 95 % intervals:")
        line(fits.to_string(na_rep=""))
    line(
        "\nSlower than the rival in three of four rounds:"
        if losses
        else "\nNowhere slower than the rival."
    )
    for text in losses:
        line(text)


def arms(found: pd.DataFrame, base: str, rival: str) -> pd.DataFrame:
    """The arms of a case's phase: what each adds to the base first, then time, ratio, parts, notes
    and verdict.
    """
    medians = found.pivot(index="arm", columns="metric", values="median").reindex(
        found["arm"].unique()
    )
    table = pd.DataFrame(index=medians.index.rename(None))
    if base != rival:
        overhead = medians["overhead_ms"].drop(base)
        table["overhead, ms"] = overhead.map("{:.4g}".format)
        # Medians: the overhead of a single round comes near zero.
        if overhead.get(rival, 0) > 0:
            table[f"/ {rival}'s"] = (overhead / overhead[rival]).map("{:.2f}".format)
    table["ms"] = medians["ms"].map("{:.4g}".format)
    by_metric = found.set_index("arm").groupby("metric")
    table[f"/ {base}"] = by_metric.get_group("over_base")["spread"]
    for metric in found["metric"].unique():
        if metric not in TIMES and not metric.endswith(" ms"):
            figures = medians[metric].dropna()
            table[metric] = figures.map(
                "{:,.0f}".format if figures.abs().max() > 1000 else "{:.4g}".format
            )
    if "over_rival" in medians:
        table[""] = by_metric.get_group("over_rival")["verdict"]
    return table


def exponents(records: pd.DataFrame) -> pd.DataFrame:
    """By axis and arm the exponents of time, of what the arm adds to the base and of saved bytes,
    each with half its interval.
    """
    points = records[
        records["axis"].notna() & records["metric"].isin(GROWING) & (records["median"] > 0)
    ]
    found = {}
    for key, group in points.groupby(["axis", "arm", "metric"], sort=False):
        larger = group.nlargest(max(3, (len(group) + 1) // 2), "size")
        if fit := log_slope(larger["size"], larger["median"]):
            found[key] = "{:.2f} ± {:.2f}".format(*fit)
    return pd.Series(found, dtype=str).unstack() if found else pd.DataFrame()

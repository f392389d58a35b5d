"""The suite's tables: the arms of each case and phase, and where this library is slower than its rival."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pandas as pd

from benchmarks.common.intervals import log_slope
from benchmarks.suite.rivals import REASONS, Row

# The figures that grow with an axis of sizes.
GROWING = ("ms", "overhead_ms", "saved_bytes")


def write(line: Callable[[str], None], rows: Sequence[Row], load_at_start: float) -> None:
    records = pd.DataFrame(rows)
    line(f"Load average {load_at_start:.2f} at the start, {os.getloadavg()[0]:.2f} now, on {os.cpu_count()} cores.")
    line("Medians; quartiles in brackets; ratios are taken round by round. The overhead is what an arm adds to its base.")
    for (case, phase), found in records.groupby(["case", "phase"], sort=False):
        line(f"\n{case}, {phase}")
        line(arms(found).to_string(na_rep=""))
        for row in found[found["metric"].isin(REASONS)].itertuples():
            line(f"  {row.metric}: {row.arm}: {row.reason}")
    if "axis" in records and len(fits := exponents(records)):
        line("\nExponents of the sizes over their larger half, with 95 % intervals:")
        line(fits.to_string(na_rep=""))
    slower = [text for (case, phase), found in records.groupby(["case", "phase"], sort=False) for text in losses(found)]
    line("\nSlower than the rival in three of four rounds:" if slower else "\nNowhere slower than the rival.")
    for text in slower:
        line(f"  {text}")


def arms(found: pd.DataFrame) -> pd.DataFrame:
    """The arms of a case's phase: their overhead over the base first, then time, ratio, parts, notes and verdict."""
    base, rival = arm_of(found, "base"), arm_of(found, "rival")
    found = found[~found["metric"].isin(REASONS)]
    medians = found.pivot(index="arm", columns="metric", values="median").reindex(found["arm"].unique())
    table = pd.DataFrame(index=medians.index.rename(None))
    if base != rival:
        overhead = medians["overhead_ms"].drop(base)
        table["overhead, ms"] = overhead.map("{:.4g}".format)
        # Medians: the overhead of a single round comes near zero.
        if overhead.get(rival, 0) > 0:
            table[f"/ {rival}'s"] = (overhead / overhead[rival]).map("{:.2f}".format)
    table["ms"] = medians["ms"].map("{:.4g}".format)
    ratios = found[found["metric"] == "over_base"].set_index("arm")
    table[f"/ {base}"] = ratios.apply(spread, axis=1)
    for metric in found["metric"].unique():
        if metric not in ("ms", "over_base", "overhead_ms", "over_rival") and not metric.endswith(" ms"):
            table[metric] = medians[metric].dropna().map("{:,.6g}".format)
    over = found[found["metric"].eq("over_rival") & found["role"].str.contains("ours")].set_index("arm")
    table[""] = pd.Series({arm: verdict(row) for arm, row in over.iterrows()}, dtype=str)
    return table


def verdict(over_rival: pd.Series) -> str:
    """Faster or slower only if three of four rounds say so."""
    if over_rival["q3"] < 1:
        return "faster"
    return "SLOWER" if over_rival["q1"] > 1 else "level"


def losses(found: pd.DataFrame) -> list[str]:
    """A sentence for each of our arms that is slower than the rival."""
    over = found[found["metric"].eq("over_rival") & found["role"].str.contains("ours")]
    return [
        f"{row['case']}, {row['phase']}: {row['arm']} takes {spread(row)} of {arm_of(found, 'rival')}'s time"
        for _, row in over.iterrows()
        if verdict(row) == "SLOWER"
    ]


def exponents(records: pd.DataFrame) -> pd.DataFrame:
    """By axis and arm the exponents of time, of what the arm adds to the base and of saved bytes, each with half its interval."""
    points = records[records["axis"].notna() & records["metric"].isin(GROWING) & (records["median"] > 0)]
    found = {}
    for key, group in points.groupby(["axis", "arm", "metric"], sort=False):
        larger = group.nlargest(max(3, (len(group) + 1) // 2), "size")
        if fit := log_slope(larger["size"], larger["median"]):
            found[key] = "{:.2f} ± {:.2f}".format(*fit)
    return pd.Series(found, dtype=str).unstack() if found else pd.DataFrame()


def arm_of(found: pd.DataFrame, role: str) -> str:
    return found.loc[found["role"].str.contains(role), "arm"].iloc[0]


def spread(row: pd.Series) -> str:
    return f"{row['median']:.2f} ({row['q1']:.2f}-{row['q3']:.2f})"

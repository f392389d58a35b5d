"""The one format of stored measurements: a line that describes the machine, and a CSV table with a
row for each figure.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.tables import write_text

# ``role`` is "base", "rival" or "ours", or both of the first with a space between; ``n`` the number
# of samples.
COLUMNS = ("case", "phase", "arm", "role", "metric", "median", "q1", "q3", "n")
# Significant digits, unless a caller needs more.
DIGITS = 4


def record(
    case: str, phase: str, arm: str, metric: str, samples: Sequence[float], role: str = ""
) -> dict[str, Any]:
    """A row: the median and the quartiles of ``samples``, which a single figure has none of."""
    named = {"case": case, "phase": phase, "arm": arm, "role": role, "metric": metric}
    found = {"median": samples[0]}
    if len(samples) > 1:
        # A shared machine's outliers hardly move these.
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        found = {"median": median, "q1": q1, "q3": q3}
    return {**named, **found, "n": len(samples)}


def write_records(
    path: Path, rows: Iterable[dict[str, Any]], environment: dict[str, Any], digits: int = DIGITS
) -> Path:
    """Write ``rows``, which may have further columns, whole or not at all."""
    frame = pd.DataFrame(rows)
    table = frame.reindex(columns=[*COLUMNS, *frame.columns.difference(COLUMNS, sort=False)])
    # A missing value makes floats of a column's integers, which ``digits`` would round.
    whole = [name for name in table.select_dtypes("float") if (table[name].dropna() % 1 == 0).all()]
    body = table.astype(dict.fromkeys(whole, "Int64")).to_csv(
        index=False, lineterminator="\n", float_format=f"%.{digits}g"
    )
    return write_text(path, f"# {json.dumps(environment)}\n{body}")


def read_records(path: Path) -> pd.DataFrame:
    """The rows; ``attrs["environment"]`` describes the machine."""
    head, _, body = path.read_text(encoding="utf-8").partition("\n")
    frame = pd.read_csv(io.StringIO(body), dtype={"role": str})
    frame["role"] = frame["role"].fillna("")
    frame.attrs["environment"] = json.loads(head.removeprefix("# "))
    return frame

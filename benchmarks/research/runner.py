"""Runs of a study, each done once: finished ones are rows of a CSV file, from which the next call
goes on.

A study is a module with ``Run`` (a NamedTuple that identifies a run), ``COLUMNS`` (of its results),
``parts(preset, records)`` (the runs that a preset wants; a part begins once the part before it is
complete) and ``execute(run)`` (the rows of a run).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks.common import workers

RECORDS = "runs.csv"


def load(file: Path) -> pd.DataFrame:
    # Older parsers change a float's last digit, but a run's learning rate must compare equal.
    return pd.read_csv(file, converters=dict.fromkeys(("lr", "shrink_ratio"), float))


def missing(study: Any, preset: str, file: Path) -> list[Any]:
    """The runs to do next."""
    records = (
        load(file) if file.exists() else pd.DataFrame(columns=[*study.Run._fields, *study.COLUMNS])
    )
    done = set(records[[*study.Run._fields]].itertuples(index=False, name=None))
    for part in study.parts(preset, records):
        if wanted := [run for run in part if run not in done]:
            return wanted
    return []


def finish(study: Any, preset: str, file: Path, processes: int) -> None:
    """Do the runs that ``file`` lacks."""
    with workers.pool(processes) as pool:
        while runs := missing(study, preset, file):
            for run, rows in zip(
                runs, tqdm(pool.map(study.execute, runs), total=len(runs), unit="run"), strict=True
            ):
                frame = pd.DataFrame(
                    [run._asdict() | row for row in rows], columns=[*run._fields, *study.COLUMNS]
                )
                frame.to_csv(file, mode="a", header=not file.exists(), index=False)

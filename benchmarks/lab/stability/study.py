"""The presets' units of work, and the code that runs them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import workers
from benchmarks.common.measure import environment
from benchmarks.common.tables import json_text, write_text
from benchmarks.lab.stability import planted_task, training
from benchmarks.lab.stability.report import PLANTED, TRANSFORMERS
from benchmarks.lab.stability.training import Arm


@dataclass(frozen=True)
class Preset:
    widths: tuple[int, ...]
    seeds: int
    lrs: tuple[float, ...]
    steps: int
    family: str = PLANTED


PRESETS = {
    "tiny": Preset((16, 32, 64), 2, (1e-3, 1e-2), 5),
    "quick": Preset((64, 128, 256, 512, 1024), 3, (1e-4, 1e-3, 1e-2), 300),
    "full": Preset((64, 128, 256, 512, 1024, 2048, 4096), 10, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 300),
    "transformers": Preset((64, 128, 256, 512), 5, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 100, TRANSFORMERS),
}


def runs_of(preset: Preset, width: int, seed: int, out: Path) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    laws = training.LAWS
    if preset.family == PLANTED:
        task = planted_task.plant(width, seed)

        def train(arm: Arm, lr: float, probe: bool) -> tuple[dict[str, Any], list[Any]]:
            return training.train(task, seed, arm, lr, preset.steps, probe)
    else:
        from benchmarks.lab.stability import small_transformers

        laws = {name: laws[name] for name in ("fixed", "n^-1/2")}
        model = small_transformers.base(width, out / "bases")

        def train(arm: Arm, lr: float, probe: bool) -> tuple[dict[str, Any], list[Any]]:
            return small_transformers.train(model, seed, arm, lr, preset.steps, probe)

    return training.unit(width, seed, laws, preset.lrs, train)


def prepare(width: int, out: Path) -> None:
    """The base that all seeds of a width share."""
    from benchmarks.lab.stability import small_transformers

    small_transformers.base(width, out / "bases")


def run_unit(preset: Preset, width: int, seed: int, out: Path) -> Path:
    runs, deltas = [], []
    for run, records in runs_of(preset, width, seed, out):
        runs.append(run)
        deltas += records
    found = {"environment": environment(), **made_with(preset), "runs": runs, "deltas": deltas}
    return write_text(unit_file(out, width, seed), json_text(found))


def made_with(preset: Preset) -> dict[str, Any]:
    """The settings that a unit of this preset was made with."""
    arms = [arm.name for arm in training.ARMS]
    return {"family": preset.family, "steps": preset.steps, "lrs": list(preset.lrs), "arms": arms}


def unit_file(out: Path, width: int, seed: int) -> Path:
    return out / "units" / f"width{width}_seed{seed}.json"


def is_done(file: Path, preset: Preset) -> bool:
    """Whether ``file`` is this preset's unit.

    Raises:
        ValueError: it is another's.
    """
    if not file.exists():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, wanted in made_with(preset).items():
        if found.get(name) != wanted:
            raise ValueError(f"{file} was made with {name} {found.get(name)}, not {wanted}; give another --out")
    return True


def run(preset: Preset, out: Path, processes: int) -> None:
    # Wide ones take longest and go first.
    units = [(width, seed) for width in sorted(preset.widths, reverse=True) for seed in range(preset.seeds)]
    missing = [unit for unit in units if not is_done(unit_file(out, *unit), preset)]
    print(f"{len(units)} units (a width and a seed), {len(units) - len(missing)} done already", flush=True)
    with workers.pool(processes) as pool, tqdm(total=len(missing), unit="unit") as bar:
        if preset.family == TRANSFORMERS:
            for future in [
                pool.submit(prepare, width, out) for width in sorted({width for width, _ in missing}, reverse=True)
            ]:
                future.result()
        futures = [pool.submit(run_unit, preset, *unit, out) for unit in missing]
        for future in as_completed(futures):
            future.result()
            bar.update()


def collect(files: Iterable[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": [], "deltas": []}
    for file in files:
        part = json.loads(file.read_text(encoding="utf-8"))
        found |= {name: part[name] for name in ("environment", "steps", "family")}
        for name in ("runs", "deltas"):
            found[name] += part[name]
    return found

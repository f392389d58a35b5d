"""How stable each pair is: its norms over its widths, and whether it has latched. A log of that,
and its plot.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.tensors import local
from stablelora_kernels.utils.validation import check_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW

COLUMNS = ("step", "pair", "a_norm", "b_norm", "stable", "latched_at")


@dataclass(frozen=True)
class PairStability:
    """The stability of one pair A [r, n], B [m, r].

    Attributes:
        name: the name of its :class:`~stablelora_kernels.LoRAPair`.
        a_norm: ``||A||_F / n``.
        b_norm: ``||B||_F / m``.
        latched: whether the pair has latched, so that A shrinks no more.
        latched_at: A's step, counted from one, at which the pair latched, or None.
        experts: how many experts' pairs PEFT has stacked in it, for which one latch stands, if the
            optimizer was made :meth:`~stablelora_kernels.StableLoRAAdamW.from_model`; else 1.
    """

    name: str
    a_norm: float
    b_norm: float
    latched: bool
    latched_at: int | None
    experts: int = 1

    @property
    def stable(self) -> bool:
        """Another name of ``latched``. The command ``inspect``, which sees no latch, calls a pair
        stable by its norms alone.
        """
        return self.latched


def stability_of(
    pairs: Sequence[LoRAPair],
    norms: Sequence[tuple[float, float]],
    state: Mapping[Any, Any],
    experts: Mapping[str, int],
) -> list[PairStability]:
    """The stability of each pair, from ||A||_F and ||B||_F, the optimizer's state, and by name how
    many experts it stacks.
    """
    found = []
    for pair, (a, b) in zip(pairs, norms, strict=True):
        step = int(state.get(pair.A, {}).get("latched_at", 0))
        per_width = a / max(pair.A.shape[1], 1), b / max(pair.B.shape[0], 1)
        found.append(
            PairStability(pair.name, *per_width, step > 0, step or None, experts.get(pair.name, 1))
        )
    return found


# Where float32 holds the squares that make a norm: a GPU decides the latch by sums of squares in
# float32.
SMALLEST_NORM, LARGEST_NORM = 1e-15, 1e19


def finite_norms(
    pairs: Sequence[LoRAPair], float32_squares: bool, local_only: bool = False
) -> list[tuple[float, float]]:
    """||A||_F and ||B||_F of every pair, computed in float64.

    The norms of sharded pairs take a collective, so all ranks must call this together;
    ``local_only`` takes those of this process's shards instead. A warning names pairs whose squares
    float32 does not hold, if the latch goes by ``float32_squares``.

    Raises:
        RuntimeError: a norm is not finite.
    """
    halves = [p for pair in pairs for p in (pair.A, pair.B)]
    norms_on_device = [local(p.detach()).norm(dtype=torch.float64) for p in halves]
    if sums := ShardSums([] if local_only else halves):
        norms_on_device = list(sums.all_reduce_sum_(torch.stack(norms_on_device).square_()).sqrt_())
    norms = torch.stack([norm.cpu() for norm in norms_on_device]).view(-1, 2).tolist()
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise RuntimeError(
                f"pair {pair.name!r} holds values that are not finite: ||A||_F = {a}, ||B||_F = {b}. "
                "It has not shrunk or latched since; training diverged earlier"
            )
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if float32_squares and (max(a, b) > LARGEST_NORM or 0 < a < SMALLEST_NORM):
            warnings.warn(
                f"pair {pair.name!r}: ||A||_F = {a:.3g} and ||B||_F = {b:.3g} are outside {SMALLEST_NORM:g} to {LARGEST_NORM:g}, "
                "where float32 holds the sums of squares that decide the latch on a GPU: it may shrink or latch wrongly",
                RuntimeWarning,
                stacklevel=5,
            )
    return norms


class StabilityLogger:
    """Logs the stability of every pair at every ``every``-th step of ``optimizer``.

    It hooks into the optimizer, so it works in any training loop or trainer::

        with slk.StabilityLogger(optimizer, "stability.csv", every=50):
            trainer.train()

    Each record waits for the device (:meth:`~stablelora_kernels.StableLoRAAdamW.stability`): choose
    ``every`` accordingly.

    Args:
        optimizer: the optimizer itself, not a trainer's or accelerate's wrapper of it.
        target: one of:

            - the path of a CSV file with the columns step, pair, a_norm (``||A||_F/n``), b_norm
              (``||B||_F/m``), stable (1 once the pair has latched, else 0) and latched_at (a step,
              or empty). Missing directories are made, and records are appended to an existing file,
              as after a resume;
            - a TensorBoard ``SummaryWriter`` or any object with ``add_scalar(tag, value, step)``;
              the tags are ``stability/<pair>/a_norm``, ``stability/<pair>/b_norm`` and
              ``stability/latched``, the number of latched pairs.
        every: optimizer steps between two records.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``every`` is below 1, or the file exists and is no stability log.
    """

    def __init__(self, optimizer: StableLoRAAdamW, target: Any, *, every: int = 10) -> None:
        # By its method, since its class imports this file.
        if not callable(getattr(optimizer, "stability", None)):
            raise TypeError(f"optimizer must be a StableLoRAAdamW, got {type(optimizer).__name__}")
        check_int("every", every, minimum=1)
        if not (isinstance(target, (str, Path)) or callable(getattr(target, "add_scalar", None))):
            raise TypeError(
                f"target must be a path or have add_scalar, got {type(target).__name__}"
            )
        self.optimizer, self.every, self._calls = optimizer, every, 0
        self._writer = None if isinstance(target, (str, Path)) else target
        self._file = None if self._writer is not None else _open(Path(target))
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._calls += 1
        if self._calls % self.every == 0:
            self.log()

    def log(self) -> None:
        """Write a record now.

        Raises:
            ValueError: the logger is closed.
        """
        found = self.optimizer.stability()
        steps = [
            int(self.optimizer.state.get(pair.A, {}).get("step", 0))
            for pair in self.optimizer.pairs
        ]
        if self._writer is not None:
            for step, pair in zip(steps, found, strict=True):
                self._writer.add_scalar(f"stability/{pair.name}/a_norm", pair.a_norm, step)
                self._writer.add_scalar(f"stability/{pair.name}/b_norm", pair.b_norm, step)
            self._writer.add_scalar(
                "stability/latched", sum(pair.latched for pair in found), max(steps)
            )
        elif self._file is not None:
            writer = csv.writer(self._file, lineterminator="\n")
            for step, pair in zip(steps, found, strict=True):
                norms = f"{pair.a_norm:.9g}", f"{pair.b_norm:.9g}"
                writer.writerow([step, pair.name, *norms, int(pair.latched), pair.latched_at])
            self._file.flush()
        else:
            raise ValueError("this StabilityLogger is closed")

    def close(self) -> None:
        """Stop logging and close the file; a TensorBoard writer stays open."""
        self._handle.remove()
        self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> StabilityLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> Any:
    """Open the CSV file to append to; a new one gets its header."""
    header = ",".join(COLUMNS)
    exists = path.exists() and path.stat().st_size > 0
    if exists:
        with path.open(encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
        if first != header:
            raise ValueError(
                f"target {path} is no stability log: its first line must be {header!r}, got {first[:100]!r}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", newline="", encoding="utf-8")
    if not exists:
        file.write(f"{header}\n")
        file.flush()
    return file


def plot_stability(
    path: str | Path, out: str | Path | None = None, pairs: Iterable[str] | None = None
) -> Figure:
    """Plot a CSV file of :class:`StabilityLogger`; needs the extra "plot" (matplotlib).

    The left panel plots each pair's ``||A||_F/n`` against ``||B||_F/m``. A pair starts above the
    diagonal and stops shrinking on or below it. The right panel plots the ratio of the two over the
    steps, with a mark at the latch.

    Args:
        path: the CSV file. If it holds a step twice, as around a resume, the later record counts.
        out: the path to save the figure to, or None.
        pairs: the names of the pairs to plot; default: all.

    Returns:
        The figure, in no window.

    Raises:
        ValueError: the file holds no records, or none of one of ``pairs``.
        ImportError: matplotlib is not installed.
    """
    series = _read(Path(path))
    if pairs is not None:
        wanted = list(pairs)
        missing = [name for name in wanted if name not in series]
        if missing:
            raise ValueError(
                f"{path} has no pair {missing[0]!r}; it has {', '.join(map(repr, series))}"
            )
        series = {name: series[name] for name in wanted}
    np = import_extra("numpy", "plot", "plot_stability")
    figure = import_extra("matplotlib.figure", "plot", "plot_stability").Figure(
        figsize=(9, 4), layout="constrained"
    )
    plane, ratio = figure.subplots(1, 2)
    few = len(series) <= 8
    for name, records in series.items():
        steps = sorted(records)
        a, b = [records[step][0] for step in steps], [records[step][1] for step in steps]
        style = {"linewidth": 1.4, "label": name} if few else {"linewidth": 0.8, "alpha": 0.5}
        (line,) = plane.plot(b, a, marker="." if few else None, markersize=4, **style)
        over = [y / x if x else float("nan") for x, y in zip(a, b, strict=True)]
        ratio.plot(steps, over, color=line.get_color(), **style)
        latched = next(
            (records[step][2] for step in reversed(steps) if records[step][2] is not None), None
        )
        if latched is not None:
            # No record need fall on the latch's step: put the mark on the drawn line.
            ratio.plot(
                [latched],
                [np.interp(latched, steps, over)],
                "v",
                color=line.get_color(),
                markersize=6,
            )
    top = max(max(record[:2]) for records in series.values() for record in records.values())
    plane.plot([0, top], [0, top], color="#444444", linewidth=0.8, linestyle="--")
    plane.set_xlabel("||B|| / m")
    plane.set_ylabel("||A|| / n")
    plane.set_title("A shrinks above the dashed line", fontsize=10)
    ratio.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
    ratio.set_xlabel("step")
    ratio.set_ylabel("(||B|| / m) / (||A|| / n)")
    count = sum(
        any(record[2] is not None for record in records.values()) for records in series.values()
    )
    ratio.set_title(f"{count} of {len(series)} pairs have latched (triangles)", fontsize=10)
    if few:
        plane.legend(fontsize=7)
    for axes in (plane, ratio):
        axes.grid(alpha=0.25)
    if out is not None:
        figure.savefig(out, dpi=130)
    return figure


def _read(path: Path) -> dict[str, dict[int, tuple[float, float, int | None]]]:
    """Of every pair, by step: ||A||_F / n, ||B||_F / m and the latch."""
    series: dict[str, dict[int, tuple[float, float, int | None]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            latched = int(row["latched_at"]) if row["latched_at"] else None
            record = float(row["a_norm"]), float(row["b_norm"]), latched
            series.setdefault(row["pair"], {})[int(row["step"])] = record
    if not series:
        raise ValueError(f"{path} holds no records")
    return series

"""The stability of each pair: its norms over its widths, whether they are stable now, and when the
pair latched. A log of that.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

import torch
from torch import Tensor

from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.pairs import LoRAPair, full_shape, is_stable
from stablelora_kernels.utils.validation import check_int

if TYPE_CHECKING:
    from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
    from stablelora_kernels.optim.stable_shrink import StableShrink

COLUMNS = ("step", "pair", "a_norm", "b_norm", "stable", "latched_at")


@dataclass(frozen=True)
class PairStability:
    """The stability of one pair A [r, n], B [m, r].

    Attributes:
        name: the name of its :class:`~stablelora_kernels.LoRAPair`.
        a_norm: ``||A||_F / n``.
        b_norm: ``||B||_F / m``.
        stable: whether ``a_norm <= b_norm`` now, as in the column of the log.
        latched_at: A's step, counted from one, at which the pair latched, or None.
        experts: how many experts' pairs PEFT has stacked in it, for which one latch stands, if the
            optimizer was made by :meth:`~stablelora_kernels.StableLoRAAdamW.from_model`, or the
            :class:`~stablelora_kernels.StableShrink` of a model; else 1.
        steps: the steps that A has taken.
    """

    name: str
    a_norm: float
    b_norm: float
    stable: bool
    latched_at: int | None
    experts: int = 1
    steps: int = 0

    @property
    def latched(self) -> bool:
        """Whether the pair has latched, so that A shrinks no more. That is permanent, even if A
        grows until the pair is no longer ``stable``.
        """
        return self.latched_at is not None


class PairNorms(NamedTuple):
    """||A||_F and ||B||_F of a pair."""

    a: float
    b: float


class PairCounts(NamedTuple):
    """The steps that a pair's A has taken, and the one at which the pair latched, 0 for not yet."""

    steps: int
    latched_at: int


def stability_of(
    pairs: Sequence[LoRAPair],
    norms: Sequence[PairNorms],
    counts: Sequence[PairCounts],
    experts: Mapping[str, int],
) -> list[PairStability]:
    """The stability of each pair, from its norms and counts, and by name how many experts it
    stacks.
    """
    stability = []
    for pair, (a, b), count in zip(pairs, norms, counts, strict=True):
        a_norm = a / max(full_shape(pair.A)[1], 1)
        b_norm = b / max(full_shape(pair.B)[0], 1)
        stability.append(
            PairStability(
                name=pair.name,
                a_norm=a_norm,
                b_norm=b_norm,
                stable=is_stable(a_norm, b_norm),
                latched_at=count.latched_at or None,
                experts=experts.get(pair.name, 1),
                steps=count.steps,
            )
        )
    return stability


# Where float32 holds the squares that make a norm: a GPU decides the latch by sums of squares in
# float32.
SMALLEST_NORM, LARGEST_NORM = 1e-15, 1e19


def finite_norms(
    pairs: Sequence[LoRAPair],
    halves: Sequence[Tensor],
    sums: ShardSums | None,
    float32_squares: bool,
) -> list[PairNorms]:
    """||A||_F and ||B||_F of every pair, computed in float64.

    A warning names pairs whose squares float32 does not hold, if the latch goes by
    ``float32_squares``.

    Args:
        halves: this process's parts of all A's, then of all B's.
        sums: over the processes, which must all call this together; None for the parts' own norms.

    Raises:
        RuntimeError: a norm is not finite.
    """
    on_device = [half.norm(dtype=torch.float64) for half in halves]
    if sums:
        on_device = list(sums.all_reduce_sum_(torch.stack(on_device).square_()).sqrt_())
    values = torch.stack([norm.cpu() for norm in on_device]).view(2, -1).t().tolist()
    norms = [PairNorms(a, b) for a, b in values]
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise RuntimeError(
                f"pair {pair.name!r} holds values that are not finite: ||A||_F = {a}, ||B||_F = {b}. "
                "It has not shrunk or latched since. Load a checkpoint from before the step that stored them, and lower lr; "
                "StableLoRAAdamW's max_grad_norm skips steps whose gradients are not finite"
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


def warn_of_skipped(count: int) -> None:
    """Warn of ``count`` steps that clipping has skipped since the last warning."""
    skipped = "1 step was" if count == 1 else f"{count} steps were"
    their = "its" if count == 1 else "their"
    warnings.warn(
        f"{skipped} skipped because the norm of {their} gradients was not finite",
        RuntimeWarning,
        stacklevel=5,
    )


class ScalarWriter(Protocol):
    """What the log needs of a TensorBoard ``SummaryWriter``, whose package has no types."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


class StabilityLogger:
    """Logs the stability of every pair at every ``every``-th step of ``optimizer``.

    It hooks into the optimizer, so it works in any training loop or trainer::

        with slk.StabilityLogger(optimizer, "stability.csv", every=50):
            trainer.train()

    Each record waits for the device (:meth:`~stablelora_kernels.StableLoRAAdamW.stability`): choose
    ``every`` accordingly.

    Args:
        optimizer: the optimizer itself, not a trainer's or accelerate's wrapper of it; or the
            :class:`~stablelora_kernels.StableShrink` of another optimizer.
        target: one of:

            - the path of a CSV file with the columns step, pair, a_norm (``||A||_F/n``), b_norm
              (``||B||_F/m``), stable (1 if ``a_norm <= b_norm`` in this record, else 0) and
              latched_at (the step of the latch, which is permanent, or empty). Missing directories
              are made, and records are appended to an existing file, as after a resume;
            - a TensorBoard ``SummaryWriter`` or any object with ``add_scalar(tag, value, step)``;
              the tags are ``stability/<pair>/a_norm``, ``stability/<pair>/b_norm`` and
              ``stability/latched``, the number of latched pairs.
        every: optimizer steps between two records.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``every`` is below 1, or the file exists and is no stability log.
    """

    def __init__(
        self, optimizer: StableLoRAAdamW | StableShrink, target: Any, *, every: int = 10
    ) -> None:
        # By its method, since its class imports this file.
        if not callable(getattr(optimizer, "stability", None)):
            raise TypeError(
                f"optimizer must be a StableLoRAAdamW or a StableShrink, got {type(optimizer).__name__}"
            )
        check_int("every", every, minimum=1)
        self.optimizer = optimizer
        self.every = every
        self._calls = 0
        self._writer: ScalarWriter | None = None
        self._file: TextIO | None = None
        if isinstance(target, (str, Path)):
            self._file = _open(Path(target))
        elif callable(getattr(target, "add_scalar", None)):
            self._writer = target
        else:
            raise TypeError(
                f"target must be a path or have add_scalar, got {type(target).__name__}"
            )
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Count a step; log every ``every``-th. The arguments are those of a step's hook."""
        self._calls += 1
        if self._calls % self.every == 0:
            self.log()

    def log(self) -> None:
        """Write a record now.

        Raises:
            ValueError: the logger is closed.
        """
        stability = self.optimizer.stability()
        if self._writer is not None:
            for pair in stability:
                self._writer.add_scalar(f"stability/{pair.name}/a_norm", pair.a_norm, pair.steps)
                self._writer.add_scalar(f"stability/{pair.name}/b_norm", pair.b_norm, pair.steps)
            count = sum(pair.latched for pair in stability)
            self._writer.add_scalar(
                "stability/latched", count, max(pair.steps for pair in stability)
            )
        elif self._file is not None:
            writer = csv.writer(self._file, lineterminator="\n")
            for pair in stability:
                norms = f"{pair.a_norm:.9g}", f"{pair.b_norm:.9g}"
                writer.writerow([pair.steps, pair.name, *norms, int(pair.stable), pair.latched_at])
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


def _open(path: Path) -> TextIO:
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

"""Rounds of tiles in a product's launch while a collective holds some of the GPU's processors.

    python -m benchmarks.lab.predict.rounds [--gpu h100]

A round is the time of one tile. ``fixed``: each program has its tiles from the beginning; ``by
ticket``: it takes the next tile when it is free, as the kernels do. ``least``: no order of the same
programs and tiles takes less.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.lab.predict.ceilings import Gpu, load_gpu
from benchmarks.lab.predict.launch_time import Facts, facts
from benchmarks.lab.predict.layer_time import DIRECTIONS, by_kernel
from benchmarks.lab.predict.rivals import Shape
from stablelora_kernels.dispatch.problem import cdiv

ROWS = (2048, 4096, 8192, 16384)
KERNELS = ("chained", "split")
# Processors that a collective holds from the beginning to the end: NCCL takes one for each of its
# channels, of which it has up to 32.
HELD = (0, 8, 16, 32)


class Launch(NamedTuple):
    """What a launch's programs do, in the order in which they begin."""

    # Programs of S and dB, and the rounds that each of them takes.
    programs_ahead: int
    rounds_ahead: float
    programs: int
    tiles: int

    def least(self, processors: int) -> float:
        """The fewest rounds that this much work can take."""
        work = self.programs_ahead * self.rounds_ahead + self.tiles
        return max(cdiv(self.tiles, processors), work / processors)

    def rounds(self, processors: int, by_ticket: bool) -> float:
        """Rounds until the last program ends; each begins on the processor that is free first."""
        undrawn = self.tiles - self.programs if by_ticket else 0
        waiting = self._programs(by_ticket)
        # When a processor is free, and whether its program may draw another tile.
        events = [(0.0, False)] * processors
        end = 0.0
        while events:
            end, draws = heappop(events)
            if draws and undrawn:
                undrawn -= 1
                heappush(events, (end + 1, True))
            elif (program := next(waiting, None)) is not None:
                heappush(events, (end + program.rounds, program.draws))
        return end

    def _programs(self, by_ticket: bool) -> Iterator[_Program]:
        for _ in range(self.programs_ahead):
            yield _Program(self.rounds_ahead, draws=False)
        for first in range(self.programs):
            fixed = 1 if by_ticket else len(range(first, self.tiles, self.programs))
            yield _Program(fixed, draws=by_ticket)


class _Program(NamedTuple):
    """A program that begins: the rounds that it takes at least, and whether it draws more tiles."""

    rounds: float
    draws: bool


def launch_of(gpu: Gpu, launch: Any) -> Launch:
    """The programs of a product's launch, with the times that the model has for them."""
    known = facts(launch, gpu.arch, gpu.narrow_columns)
    assert isinstance(known, Facts)
    a_tile = known.busy(gpu) / cdiv(known.units, gpu.processors)
    if known.ahead is None:
        return Launch(0, 0.0, known.programs, known.units)
    ahead = known.ahead
    a_program = ahead.busy(gpu) / cdiv(ahead.programs, gpu.processors)
    return Launch(ahead.programs, a_program / a_tile, known.programs, known.units)


def products(gpu: Gpu, kernel: str, dropout: bool) -> Iterator[tuple[str, int, Any]]:
    """Direction, rows and launch of the products of 4096 by 4096 whose programs stay."""
    for rows in ROWS:
        shape = Shape(rows, 4096, 4096, 16, dropout)
        for direction, launches in zip(
            DIRECTIONS, by_kernel(gpu.device, shape, kernel), strict=True
        ):
            for launch in launches:
                if "tickets" in getattr(launch, "arguments", {}):
                    yield direction, rows, launch


def table(gpu: Gpu) -> pd.DataFrame:
    """A row for each product and number of held processors."""
    rows = []
    for kernel, dropout in product(KERNELS, (False, True)):
        for direction, m, launch in products(gpu, kernel, dropout):
            known = launch_of(gpu, launch)
            for held in HELD:
                free = gpu.processors - held
                least = known.least(free)
                fixed = known.rounds(free, by_ticket=False)
                by_ticket = known.rounds(free, by_ticket=True)
                rows.append(
                    {
                        "kernel": kernel,
                        "dropout": dropout,
                        "direction": direction,
                        "rows": m,
                        "tiles": known.tiles,
                        "held": held,
                        "least": least,
                        "fixed": fixed,
                        "by ticket": by_ticket,
                        "fixed over least": fixed / least,
                        "by ticket over least": by_ticket / least,
                    }
                )
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lab.predict.rounds", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--gpu", default="h100", help="a file's name in gpus/ (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    print(table(load_gpu(options.gpu)).round(2).to_string(index=False))


if __name__ == "__main__":
    main()

"""Rounds of a product's launch beside a collective: small launches by hand, and the target."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from benchmarks.lab.predict.ceilings import load_gpu
from benchmarks.lab.predict.rounds import HELD, Launch, table


@pytest.mark.parametrize(
    ("launch", "processors", "fixed", "by_ticket"),
    [
        # Four programs of three tiles each: the fourth begins when the others have ended.
        (Launch(0, 0.0, 4, 12), 4, 3, 3),
        (Launch(0, 0.0, 4, 12), 3, 6, 4),
        (Launch(0, 0.0, 4, 12), 2, 6, 6),
        # Two programs of S take half a round; one processor has none of them.
        (Launch(2, 0.5, 3, 6), 3, 2.5, 2.5),
        (Launch(2, 0.5, 3, 6), 2, 4.5, 3.5),
        # One tile for each program.
        (Launch(0, 0.0, 5, 5), 4, 2, 2),
    ],
)
def test_rounds_by_hand(launch: Launch, processors: int, fixed: float, by_ticket: float) -> None:
    assert launch.rounds(processors, by_ticket=False) == fixed
    assert launch.rounds(processors, by_ticket=True) == by_ticket


def test_tiles_by_ticket_alone_take_the_least_rounds() -> None:
    for tiles, programs, processors in product(range(1, 60, 7), (1, 3, 8), range(1, 9)):
        launch = Launch(0, 0.0, min(programs, tiles), tiles)
        least = launch.least(min(processors, launch.programs))
        assert launch.rounds(processors, by_ticket=True) == least


def test_a_collective_delays_no_launch_by_more_than_a_tenth() -> None:
    """Of the H100's products in the table, whichever number of processors is held."""
    rows = table(load_gpu("h100"))
    assert {*rows["held"]} == {*HELD} and {*rows["kernel"]} == {"chained", "split"}
    assert rows["by ticket over least"].max() <= 1.1
    assert rows["by ticket over least"].min() >= 1
    alone = rows[(rows["kernel"] == "split") & (rows["held"] > 0)]
    assert (alone["by ticket over least"] == 1).all()
    # What fixed tiles would take.
    assert rows[rows["held"] == 16]["fixed over least"].min() >= 1.3

"""The command that measures what a shrink costs."""

from __future__ import annotations

from benchmarks.lab import shrink_cost


def test_it_has_a_line_for_each_size_state_and_arm() -> None:
    lines = [*shrink_cost.rows(((2, 4, 64),), 3)]
    assert len(lines) == 2 * len(shrink_cost.ARMS)
    for arm in shrink_cost.ARMS:
        assert sum(f": {arm} " in line for line in lines) == 2
    assert lines[0].startswith("2 pairs r4 width 64, shrinking: AdamW fused ")

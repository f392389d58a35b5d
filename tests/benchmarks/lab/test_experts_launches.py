"""The counted operators of a module of experts on a GPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks.lab import experts_launches
from benchmarks.lab.experts_launches import Launch, Sizes, as_it_is, of_our_own

PAGE = Path(__file__).parents[3] / "docs" / "internals" / "predictions.md"
SMALL = Sizes(tokens=32, experts=4, width=64, inner=32, top_k=2, rank=8)


def test_the_meta_device_has_the_operators_of_a_real_run():
    assert as_it_is(SMALL) == as_it_is(SMALL, "cpu")


def test_products_and_bytes_are_counted():
    now = as_it_is(SMALL)
    # Of up and of down: the base, S and the branch.
    assert [launch.name for launch in now.forward].count("_grouped_mm") == 6
    # Down's S; of both: dS, the base of dX, its branch, dA and dB.
    assert [launch.name for launch in now.backward].count("_grouped_mm") == 11
    slots, row = SMALL.slots, 2 * SMALL.width
    gather = Launch("index.Tensor", SMALL.tokens * row + 8 * slots + slots * row)
    assert gather in now.forward
    up = 2 * SMALL.experts * SMALL.width * 2 * SMALL.inner
    product = slots * row + up + 4 * SMALL.experts + 2 * slots * 2 * SMALL.inner
    assert Launch("_grouped_mm", product) in now.forward


def test_launches_of_our_own_move_less():
    now, ours = as_it_is(SMALL), of_our_own(SMALL)
    for before, after in zip(now, ours, strict=True):
        assert len(after) < len(before)
        assert sum(launch.size for launch in after) < sum(launch.size for launch in before)


def test_the_table_is_that_of_the_page(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experts_launches"])
    experts_launches.main()
    text = PAGE.read_text(encoding="utf-8")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 3 and all(row in text for row in rows)

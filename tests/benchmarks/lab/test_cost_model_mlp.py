"""Predicted times of a gated MLP: the sequences' passes, and that one op is never dearer than three layers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.lab.cost_model import mlp
from benchmarks.lab.cost_model.gpu import band_ends, load_gpu
from benchmarks.lab.cost_model.mlp import MLP
from benchmarks.lab.cost_model.predict import SLOWEST

H100 = load_gpu("h100")


def test_rivals_make_the_activations_passes():
    """Beyond three layers: PEFT passes over [M, F] 14 times and Unsloth 9 times, and both add dX of [M, K] up."""
    m, k, f = 2**12, 2**10, 2**14
    for name, passes in (("frozen", 8), ("eager (PEFT)", 14), ("Unsloth", 9)):
        shape = MLP(m, k, f, 16)
        found = [work for way in mlp.rival(name, shape) for work in way if work.name in ("activation", "both dX")]
        assert sum(work.bytes for work in found) == 2 * (passes * m * f + 3 * m * k)


@pytest.mark.parametrize("gpu", ["h100", "a100", "b200"])
@pytest.mark.parametrize("dropout", [False, True])
def test_one_op_takes_less_than_three_layers(gpu, dropout):
    """At both ends of the band, forward and backward together."""
    loaded = load_gpu(gpu)
    for shape in mlp.SHAPES:
        for end in band_ends(loaded, SLOWEST):
            one, three = (of(end.gpu, MLP(*shape, dropout), end.efficiency) for of in (mlp.fused, mlp.apart))
            assert sum(one) < sum(three), shape


def test_the_table_shows_every_arm():
    rows = mlp.rows(H100, dropout=False)
    table = mlp.cells(rows)
    assert len(table) == 1 + len(mlp.SHAPES) and all(len(cells) == len(table[0]) for cells in table)
    assert all(row["one op forward"] <= row["one op forward (slow)"] for row in rows)
    # Unsloth has no dropout.
    assert {cells[5] for cells in mlp.cells(mlp.rows(H100, dropout=True))[1:]} == {"-"}


def test_the_guide_has_these_figures():
    """Ranges over the frozen MLP's time, of every shape, with dropout and without."""
    rows = [row for dropout in (False, True) for row in mlp.rows(H100, dropout)]
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "fusing.md").read_text(encoding="utf-8").replace("\n", " ")
    for name, ends in (
        ("one op", ("", " (slow)")),
        ("three layers", ("", " (slow)")),
        ("Unsloth", ("",)),
        ("eager (PEFT)", ("",)),
    ):
        found = [
            sum(row[f"{name} {way}{end}"] for way in ("forward", "backward"))
            / (row["frozen forward"] + row["frozen backward"])
            for row in rows
            for end in ends
            if f"{name} forward" in row
        ]
        assert f"{min(found):.2f} to {max(found):.2f}" in guide, (name, min(found), max(found))

"""The record of every pair's norms: CSV, TensorBoard, resuming, and the plot."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.optimizers import make_pairs


def make_optimizer(count: int = 3, **kwargs) -> slk.StableLoRAAdamW:
    pairs = make_pairs([(2, 4, 6)] * count, seed=3)
    return slk.StableLoRAAdamW(pairs, **{"lr": 0.3, "shrink_ratio": 0.1, **kwargs})


def steps(optimizer, count: int) -> None:
    for _ in range(count):
        for pair in optimizer.pairs:
            pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        optimizer.step()


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_records_are_what_stability_says(tmp_path):
    optimizer, path = make_optimizer(), tmp_path / "deep" / "log.csv"
    with slk.StabilityLogger(optimizer, path, every=2):
        steps(optimizer, 5)
        # Written as they come, not at the end.
        assert [row["step"] for row in read(path)] == ["2"] * 3 + ["4"] * 3
        steps(optimizer, 1)
        for row, pair in zip(read(path)[-3:], optimizer.stability(), strict=True):
            assert row["step"] == "6" and row["pair"] == pair.name
            assert float(row["a_norm"]) == pytest.approx(pair.a_norm, rel=1e-8)
            assert float(row["b_norm"]) == pytest.approx(pair.b_norm, rel=1e-8)
            assert (row["stable"], row["latched_at"]) == (str(int(pair.latched)), str(pair.latched_at or ""))
    assert any(row["latched_at"] for row in read(path)) and not all(row["latched_at"] for row in read(path))
    # It no longer watches.
    steps(optimizer, 2)
    assert len(read(path)) == 9


def test_a_resumed_run_continues_the_file(tmp_path):
    optimizer, path = make_optimizer(), tmp_path / "log.csv"
    with slk.StabilityLogger(optimizer, path, every=1):
        steps(optimizer, 2)
    again = make_optimizer()
    again.load_state_dict(optimizer.state_dict())
    with slk.StabilityLogger(again, str(path), every=1):
        steps(again, 1)
    assert [row["step"] for row in read(path)] == [str(step) for step in (1, 2, 3) for _ in range(3)]


def test_tensorboard(tmp_path):
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag, step] = value

    optimizer, writer = make_optimizer(2), Writer()
    with slk.StabilityLogger(optimizer, writer, every=3) as log:
        steps(optimizer, 3)
        found = optimizer.stability()
        for pair in found:
            assert writer.scalars[f"stability/{pair.name}/a_norm", 3] == pair.a_norm
            assert writer.scalars[f"stability/{pair.name}/b_norm", 3] == pair.b_norm
        assert writer.scalars["stability/latched", 3] == sum(pair.latched for pair in found)
        assert len(writer.scalars) == 5
        steps(optimizer, 1)
        log.log()
        assert ("stability/latched", 4) in writer.scalars


def test_bad_arguments_change_nothing(tmp_path):
    optimizer, other = make_optimizer(), tmp_path / "other.csv"
    other.write_text("loss,step\n1,2\n")
    for arguments, error, message in (
        ((torch.optim.SGD([torch.zeros(1)], lr=1), tmp_path / "x.csv"), TypeError, "StableLoRAAdamW, got SGD"),
        ((optimizer, 5), TypeError, "target must be a path or have add_scalar, got int"),
        ((optimizer, other), ValueError, "its first line must be 'step,pair,.*', got 'loss,step'"),
    ):
        with pytest.raises(error, match=message):
            slk.StabilityLogger(*arguments)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        slk.StabilityLogger(optimizer, tmp_path / "x.csv", every=0)
    assert other.read_text() == "loss,step\n1,2\n" and not (tmp_path / "x.csv").exists()
    steps(optimizer, 1)
    log = slk.StabilityLogger(optimizer, tmp_path / "x.csv")
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.log()


@pytest.mark.parametrize("missing", ["numpy", "matplotlib.figure"])
def test_without_matplotlib(missing, tmp_path, monkeypatch):
    optimizer, path = make_optimizer(), tmp_path / "log.csv"
    with slk.StabilityLogger(optimizer, path, every=1):
        steps(optimizer, 1)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"plot_stability needs .*: pip install 'stablelora-kernels\[plot\]'"):
        slk.plot_stability(path, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install .[test])")
    optimizer, path = make_optimizer(), tmp_path / "log.csv"
    with slk.StabilityLogger(optimizer, path, every=1):
        steps(optimizer, 8)
    figure = slk.plot_stability(path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    plane, ratio = figure.axes
    latches = [pair.latched_at for pair in optimizer.stability()]
    assert ratio.get_title() == f"{sum(at is not None for at in latches)} of 3 pairs have latched (triangles)"
    marks = [line.get_xdata()[0] for line in ratio.lines if line.get_marker() == "v"]
    assert marks == [at for at in latches if at is not None] and marks
    rows = [row for row in read(path) if row["pair"] == "layer1"]
    (way,) = (line for line in plane.lines if line.get_label() == "layer1")
    assert list(way.get_xdata()) == [float(row["b_norm"]) for row in rows]
    assert list(way.get_ydata()) == [float(row["a_norm"]) for row in rows]
    one = slk.plot_stability(path, pairs=["layer2"])
    assert one.axes[1].get_title().endswith("of 1 pairs have latched (triangles)")
    with pytest.raises(ValueError, match=r"has no pair 'nothing'; it has 'layer0'"):
        slk.plot_stability(path, pairs=["nothing"])
    path.write_text("step,pair,a_norm,b_norm,stable,latched_at\n")
    with pytest.raises(ValueError, match="holds no records"):
        slk.plot_stability(path)

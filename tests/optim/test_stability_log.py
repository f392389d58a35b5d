"""The record of every pair's norms: CSV, TensorBoard, resuming."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.optimizers import make_pairs, params_of


def make_optimizer() -> slk.StableLoRAAdamW:
    return slk.StableLoRAAdamW(make_pairs([(2, 4, 6)] * 3, seed=3), lr=0.3, shrink_ratio=0.1)


def steps(optimizer: slk.StableLoRAAdamW, count: int) -> None:
    for _ in range(count):
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()


def read(path: Path) -> list[dict[str, str]]:
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
            assert (row["stable"], row["latched_at"]) == (
                str(int(pair.stable)),
                str(pair.latched_at or ""),
            )
    assert any(row["latched_at"] for row in read(path)) and not all(
        row["latched_at"] for row in read(path)
    )
    # It no longer watches. A resumed run goes on in the file.
    steps(optimizer, 1)
    again = make_optimizer()
    again.load_state_dict(optimizer.state_dict())
    with slk.StabilityLogger(again, str(path), every=1):
        steps(again, 1)
    assert [row["step"] for row in read(path)[6:]] == ["6"] * 3 + ["8"] * 3


def test_tensorboard():
    optimizer, scalars = make_optimizer(), {}
    writer = SimpleNamespace(
        add_scalar=lambda tag, value, step: scalars.update({(tag, step): value})
    )
    with slk.StabilityLogger(optimizer, writer, every=3):
        steps(optimizer, 3)
        expected = {("stability/latched", 3): sum(pair.latched for pair in optimizer.stability())}
        for pair in optimizer.stability():
            expected[f"stability/{pair.name}/a_norm", 3] = pair.a_norm
            expected[f"stability/{pair.name}/b_norm", 3] = pair.b_norm
        assert scalars == expected


def test_bad_arguments_change_nothing(tmp_path):
    optimizer, path, other = make_optimizer(), tmp_path / "x.csv", tmp_path / "other.csv"
    other.write_text("loss,step\n1,2\n")
    for target, every, error, message in (
        (5, 1, TypeError, "target must be a path or have add_scalar, got int"),
        (other, 1, ValueError, "its first line must be 'step,pair,.*', got 'loss,step'"),
        (path, 0, ValueError, "every must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            slk.StabilityLogger(optimizer, target, every=every)
    with pytest.raises(TypeError, match="StableLoRAAdamW or a StableShrink, got SGD"):
        slk.StabilityLogger(torch.optim.SGD([torch.zeros(1)], lr=1), path)
    assert other.read_text() == "loss,step\n1,2\n" and not path.exists()
    steps(optimizer, 1)
    log = slk.StabilityLogger(optimizer, path)
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.log()

"""The stability benchmark: the planted task, a step's parts, exponents of known power laws, and the command on tiny widths."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from benchmarks.common import workers
from benchmarks.common.intervals import interval, log_slope, student95
from benchmarks.common.tables import RESULTS
from benchmarks.lab.stability import __main__, planted_task, report, study, training
from benchmarks.lab.stability.training import ADAMW, LAWS, NEAR_ZERO, STABLE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("width", [16, 200])
def test_the_planted_task_starts_at_one_and_can_be_learned(width):
    task = planted_task.plant(width, seed=1, samples=256, held_out=64)
    everything, held_out = slice(None), slice(256, None)
    a, b = planted_task.start(width, seed=1)
    assert task.loss(a, b, everything).item() == pytest.approx(1.0, rel=1e-4)
    assert a.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.2)
    run, records = training.train(task, 1, STABLE[0], 3e-3, 150, probe=False)
    assert run["loss"] < 0.2 and not records
    assert task.loss(a, b, held_out).item() > 0.5


def test_a_steps_parts_add_up_to_its_change():
    generator = torch.Generator().manual_seed(0)
    z, a, b, d_a, d_b = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((7, 12), (3, 12), (9, 3), (3, 12), (9, 3))
    )
    shrunk = 0.9 * a
    found = training.parts(z, (a, b), shrunk, (shrunk + d_a, b + d_b))
    whole = found.pop("delta")
    torch.testing.assert_close(sum(found.values()), whole)
    torch.testing.assert_close(whole, planted_task.SCALING * z @ ((b + d_b) @ (shrunk + d_a) - b @ a).t())
    assert all(part.abs().max() > 0 for part in found.values())


def test_a_pair_that_has_not_latched_shrank_and_one_that_has_did_not():
    task = planted_task.plant(64, seed=0, samples=128, held_out=64)
    # So large a ratio that the latch comes soon.
    arm = replace(STABLE[-1], shrink_ratio=0.2)
    run, records = training.train(task, 0, arm, 1e-2, 60, probe=True)
    assert 2 < run["latched_at"] <= 50 and run["shrinks"] == run["latched_at"] - 1
    assert run["a_left"] == pytest.approx(0.8 ** run["shrinks"])
    for record in records:
        assert record["stable"] == (record["step"] >= run["latched_at"])
        # B is zero at the first step, of which there is nothing to shrink the product of.
        assert (record["delta_shrink"] > 0) == (1 < record["step"] < run["latched_at"])
    start = training.train(task, 0, NEAR_ZERO, 1e-3, 1, probe=True)[1][0]["a_z"]
    assert start == pytest.approx(1e-3 * records[0]["a_z"], rel=1e-4)


def test_slopes_and_intervals():
    sizes = [8, 16, 32, 64]
    slope, half = log_slope(sizes, [3 * size**-1.25 for size in sizes])
    assert slope == pytest.approx(-1.25) and half == pytest.approx(0, abs=1e-6)
    assert log_slope(sizes, [0.0, 1.0, 2.0, 0.0]) is None
    assert log_slope([8, 8, 8, 16], [1.0, 2.0, 3.0, 0.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 12.706))
    assert student95(30) == pytest.approx(2.042, abs=0.002)


def power_law(**powers):
    """Records of parts that go with n exactly so, with a seed's factor that is the same at every width."""
    return [
        {"width": n, "seed": seed, "arm": arm.name, "law": law, "step": step, "stable": 0, "a_norm": 1.0, "b_norm": 1.0}
        | {name: (1 + seed / 10) * n**power for name, power in powers.items()}
        for n in (64, 128, 256) for seed in (0, 1) for arm in training.ARMS for law in LAWS for step in (1, 100)
    ]  # fmt: skip


def test_exponents_of_exact_power_laws():
    powers = {"delta_1": -0.5, "delta_2": 0.0, "delta_3": 0.25, "delta_shrink": -1.0, "delta": 1.0, "a_z": 0.5}
    for row in report.gamma_rows(power_law(**powers), 100):
        for name, power in powers.items():
            assert row[name] == pytest.approx(power, abs=0.05)
            assert 0 < row[f"{name}_95"] < 0.3
    law = LAWS["n^-1/2"]
    assert law.at(256) == pytest.approx(law.at(64) / 2)
    assert (report.FIRST["n^-1/2"], report.LATER["n^-1/2"]) == (-0.5, 0.0)


def test_the_command_goes_on_from_units_and_reports(tmp_path, monkeypatch, capsys):
    preset = study.Preset((16, 32, 64), 2, (1e-3, 1e-2), 5)
    monkeypatch.setitem(study.PRESETS, "tiny", preset)
    for width in preset.widths:
        for seed in range(preset.seeds):
            file = study.unit_file(tmp_path, width, seed)
            assert study.run_unit(preset, width, seed, tmp_path) == file
            assert study.is_done(file, preset)
    # All is there, so nothing is run: a pool would be a surprise.
    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", None)
    assert __main__.main(["--preset", "tiny", "--out", str(tmp_path), "--processes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "6 done already" in shown and "Exponents found at step 5" in shown
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(runs) == 3 * 2 * len(training.ARMS) * (len(LAWS) + 2)
    for name in ("latch", "exponents", "sizes", "norms", "learning_rates"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    found = json.loads(study.unit_file(tmp_path, 16, 0).read_text())
    assert found["environment"]["torch"] and len(found["deltas"]) == len(training.ARMS) * len(LAWS) * 3
    with pytest.raises(SystemExit):
        __main__.main(["--out", str(tmp_path / "empty"), "--report"])
    monkeypatch.setitem(study.PRESETS, "tiny", study.Preset((16,), 1, (1e-3,), 5))
    with pytest.raises(SystemExit):
        __main__.main(["--preset", "tiny", "--out", str(tmp_path)])
    assert "was made with lrs [0.001, 0.01], not [0.001]" in capsys.readouterr().err
    monkeypatch.setitem(study.PRESETS, "tiny", preset)
    monkeypatch.setattr(training, "ARMS", training.ARMS[:-1])
    with pytest.raises(SystemExit):
        __main__.main(["--preset", "tiny", "--out", str(tmp_path)])
    assert "was made with arms ['AdamW', " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "family"),
    [("stability", report.PLANTED), ("stability-transformers", report.TRANSFORMERS)],
)
def test_the_stored_table_is_that_of_the_stored_runs(folder, family):
    place = RESULTS / "epyc-avx512-2core" / folder
    found = report.read(place)
    assert found["family"] == family
    assert report.table(found) == (place / "table.txt").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_stored_results_are_drawn_again(tmp_path, capsys):
    place = RESULTS / "epyc-avx512-2core" / "stability-transformers"
    assert __main__.main(["--stored", str(place), "--out", str(tmp_path / "plots")]) == 0
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == sorted(
        f"{name}.png" for name in ("latch", "exponents", "sizes", "norms", "learning_rates")
    )
    with pytest.raises(SystemExit):
        __main__.main(["--stored", str(tmp_path)])
    assert "--stored must hold a study's CSV files" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "text"), [(1.003, "1.0030 (1.0030-1.0030)"), (0.9, "0.90 (0.90-0.90)")])
def test_ratios_near_one_have_more_digits(factor, text):
    runs = [
        {"width": 64, "seed": seed, "arm": arm.name, "law": "grid", "lr": 1e-3, "loss": (2 + seed) * size}
        for seed in (0, 1) for arm, size in ((ADAMW, 1.0), (NEAR_ZERO, factor))
    ]  # fmt: skip
    *_, row = report.ratio_table(runs)
    assert row.split(maxsplit=4)[4] == text


def test_small_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.lab.stability import small_transformers as family

    text = "the quick brown fox jumps over the lazy dog. " * 60
    monkeypatch.setattr(family.assets, "plays", lambda: [text])
    monkeypatch.setattr(family, "headlines", lambda: (family.blocks(text), family.blocks(text)[:8]))
    model = family.base(32, tmp_path, 3)
    family.base.cache_clear()
    # Read again, not trained again.
    for name, value in family.base(32, tmp_path, 3).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    arm = replace(STABLE[-1], shrink_ratio=0.2)
    run, records = family.train(model, 0, arm, 1e-2, 40, probe=True)
    assert run["shrinks"] < 40 and run["loss"] < family.loss_of(model, family.blocks(text)[:8]).item()
    assert [record["step"] for record in records] == [1, 2, 5, 10, 20]
    assert records[0]["delta"] > 0 and records[0]["delta_shrink"] == 0 < records[1]["delta_shrink"]
    # The base is shared and stays as it was.
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.nightly
def test_transformers_are_reported_with_what_was_run_of_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.lab.stability import small_transformers as family

    data = family.blocks("the quick brown fox jumps over the lazy dog. " * 60)
    monkeypatch.setattr(family, "headlines", lambda: (data, data[:32]))
    monkeypatch.setattr(family, "base", lambda width, _: family.new_model(width).requires_grad_(False).eval())
    preset = study.Preset((32, 64, 96), 2, (1e-3, 1e-2), 2, study.TRANSFORMERS)
    monkeypatch.setitem(study.PRESETS, "tiny", preset)
    for width in preset.widths:
        for seed in range(preset.seeds):
            study.run_unit(preset, width, seed, tmp_path)
    assert __main__.main(["--preset", "tiny", "--out", str(tmp_path), "--report"]) == 0
    shown = capsys.readouterr().out
    assert "nats a character" in shown and "n^-5/4" not in shown and all(arm.name in shown for arm in STABLE)
    runs = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(runs) == 3 * 2 * len(training.ARMS) * (2 + 2)
    assert {run["law"] for run in runs} == {"fixed", "n^-1/2", "grid"}

"""The paper's two studies: what they plan, choose and conclude from given runs, tiny real runs, and stored results."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.common.intervals import interval, log_slope
from benchmarks.common.tables import RESULTS
from benchmarks.research import __main__, paper, report, runner, stability, widths
from benchmarks.research.paper import ADAMW, STABLE, Run, Study

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

STORED = RESULTS / "epyc-avx512-2core"
SETTING = ("m", "sarcasm", "bf16", 9, 4)
STUDY = Study(*SETTING, (1e-3, 1e-2), (5e-4, 5e-3), (ADAMW, "LoRA+", STABLE), headline_seeds=4, seeds=3, ablations=True)


def frame(rows):
    """Runs with their results: a run and its test score, or also its validation score."""
    found = []
    for run, test, *validation in rows:
        scores = {"test": test, "validation": validation[0] if validation else test}
        found.append(dict.fromkeys(paper.COLUMNS, 1.0) | run._asdict() | scores)
    return pd.DataFrame(found, columns=[*Run._fields, *paper.COLUMNS])


def rows_of(make, runs, **columns):
    """The rows of a report's table, keyed by arm, rate and change."""
    rows = pd.DataFrame(make(report.described(runs)))
    return {(row["arm"], row["lr"], row.get("changed")): row for row in rows.to_dict("records")}


def test_a_study_screens_chooses_on_validation_scores_and_changes_one_thing(monkeypatch, tmp_path):
    def validation(run):
        return {ADAMW: 0.9 if run.lr == 1e-3 else 0.8, STABLE: 0.8 + run.shrink_ratio + run.lr}.get(
            run.optimizer, run.lr
        )

    monkeypatch.setitem(paper.PRESETS, "test", [STUDY])
    file = tmp_path / "runs.csv"
    screening = runner.missing(paper, "test", file)
    assert len(screening) == len(set(screening)) == 2 * 2 * (2 + 2)
    assert [run.seed for run in screening] == sorted(run.seed for run in screening)
    records = frame((run, 0.5, validation(run)) for run in screening)
    assert paper.best(records) == {ADAMW: (0.0, 1e-3), "LoRA+": (0.0, 1e-2), STABLE: (5e-3, 1e-2)}
    # A screening that is not whole decides nothing of its optimizer.
    assert STABLE not in paper.best(records[:-1]) and ADAMW in paper.best(records[:-1])
    records[:-1].to_csv(file, index=False)
    assert runner.missing(paper, "test", file) == screening[-1:]
    records.to_csv(file, index=False)
    seeds = runner.missing(paper, "test", file)
    assert {(run.optimizer, run.seed) for run in seeds} == {
        (ADAMW, 2),
        (ADAMW, 3),
        ("LoRA+", 2),
        (STABLE, 2),
        (STABLE, 3),
    }
    frame((run, 0.5, 0.5) for run in seeds).to_csv(file, mode="a", header=False, index=False)
    ablations = runner.missing(paper, "test", file)
    vanishing = [run for run in ablations if run.shrink_ratio == paper.VANISHING]
    assert {(run.lr, run.adapters, run.rounding, run.seed) for run in vanishing} == {
        (1e-3, "bf16", rounding, seed) for rounding in ("stochastic", "nearest") for seed in (0, 1)
    }
    others = [run for run in ablations if run not in vanishing]
    for run in others:
        differing = {name for name in paper.CHANGEABLE if getattr(run, name) != Run._field_defaults[name]}
        assert differing in ({"r"}, {"targets"}, {"stop_condition"}, {"adapters"}, {"adapters", "rounding"})
        assert (run.shrink_ratio, run.lr) == paper.best(records)[run.optimizer]
    assert len(others) == 3 * (3 * 4 + 2 * 2 + 2) + 10
    # Runs of another batch size are not compared.
    other = frame((run._replace(batch_size=8), 0.9) for run in screening)
    assert paper.best(paper.plain(pd.concat([records, other]), STUDY)) == paper.best(records)


def test_differences_are_taken_seed_by_seed():
    base, stable = Run(*SETTING, ADAMW, 1e-3), Run(*SETTING, STABLE, 1e-3, 5e-3)
    rows = [(base._replace(seed=seed), 0.6 + 0.1 * seed) for seed in range(3)]
    rows += [(stable._replace(seed=seed), 0.62 + 0.1 * seed) for seed in range(3)]
    # A rate that AdamW has not been run at has nothing to be compared with.
    rows += [(stable._replace(lr=1e-2, seed=seed), 0.9, 0.4) for seed in range(2)]
    found = rows_of(report.rates, frame(rows))
    same = found["Stable-LoRA 0.005", 1e-3, None]
    assert same["minus_adamw"] == pytest.approx(2) and same["minus_adamw_95"] == pytest.approx(0, abs=1e-6)
    assert same["minus_adamw_p"] == pytest.approx(2 / 8)
    assert math.isnan(found["Stable-LoRA 0.005", 1e-2, None]["minus_adamw"])
    assert rows_of(report.headline, frame(rows))["Stable-LoRA 0.005", 1e-3, None]["minus_adamw"] == pytest.approx(2)
    # Of a single rate none was chosen, and of two seeds an interval says nothing.
    assert rows_of(report.headline, frame(rows[:6])) == {}
    assert "minus_adamw_95" not in rows_of(report.rates, frame(rows[:2] + rows[3:5]))["Stable-LoRA 0.005", 1e-3, None]


def test_runs_that_broke_are_counted_with_fishers_p():
    runs = [Run(*SETTING, name, 1e-2, seed=seed) for name in (ADAMW, "LoRA+") for seed in range(10)]
    scores = [0.5] * 4 + [0.8] * 6 + [0.5] * 2 + [0.8] * 8
    row = rows_of(report.rates, frame(zip(runs, scores, strict=True)))["LoRA+", 1e-2, None]
    # 2 (210 * 45 + 252 * 10 + 210) / C(20, 6)
    assert row["fell"] == 2 and row["fell_p"] == pytest.approx(24360 / 38760)


@pytest.mark.parametrize("width", [16, 200])
def test_the_planted_task_starts_at_one_and_can_be_learned(width):
    task, problem = widths.plant(width, 1), widths.planted(width, 1, 1.0)
    (pair,) = problem.pairs
    assert task.loss(pair.A, pair.B, slice(None)).item() == pytest.approx(1.0, rel=1e-4)
    assert pair.A.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.2)
    assert problem.held_out_loss() > 0.5
    (run,) = stability.fit(problem, stability.ARMS["Stable-LoRA 0.0005"], 3e-3, 200, ())
    assert run["loss"] < 0.2


def test_a_steps_parts_add_up_to_its_change():
    generator = torch.Generator().manual_seed(0)
    z, a, b, d_a, d_b = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((7, 12), (3, 12), (9, 3), (3, 12), (9, 3))
    )
    found = stability.changes(z, a, b, 0.9 * a, 0.9 * a + d_a, b + d_b)
    torch.testing.assert_close(found.pop("a_z"), z @ a.t())
    whole = found.pop("delta")
    torch.testing.assert_close(sum(found.values()), whole)
    torch.testing.assert_close(whole, widths.SCALING * z @ ((b + d_b) @ (0.9 * a + d_a) - b @ a).t())
    assert all(part.abs().max() > 0 for part in found.values())


def test_a_pair_that_has_not_latched_shrank_and_one_that_has_did_not():
    # So large a ratio that the latch comes soon.
    arm = stability.ARMS["Stable-LoRA 0.005"]._replace(shrink_ratio=0.2)
    *steps, run = stability.fit(widths.planted(64, 0, 1.0), arm, 1e-2, 60, stability.PROBES)
    assert 1 < run["shrinks"] < 50 and run["latched"] == 1
    for record in steps:
        # B is zero at the first step, so there is nothing to shrink the product of.
        assert (record["delta_shrink"] > 0) == (1 < record["step"] <= run["shrinks"])
    near_zero = stability.execute(stability.Run("planted", 1, 64, 0, stability.NEAR_ZERO, "fixed", 1e-3))
    assert near_zero[0]["a_z"] == pytest.approx(1e-3 * steps[0]["a_z"], rel=1e-4)


def test_slopes_and_intervals():
    sizes = [8, 16, 32, 64]
    slope, half = log_slope(sizes, [3 * size**-1.25 for size in sizes])
    assert slope == pytest.approx(-1.25) and half == pytest.approx(0, abs=1e-6)
    assert log_slope(sizes, [0.0, 1.0, 2.0, 0.0]) is None
    assert log_slope([8, 8, 8, 16], [1.0, 2.0, 3.0, 0.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), rel=1e-4)
    # t(30 degrees, 97.5%) = 2.042.
    values = [float(i) for i in range(31)]
    assert interval(values)[1] == pytest.approx(2.042 * statistics.stdev(values) / 31**0.5, rel=2e-4)


@pytest.mark.nightly
@pytest.mark.download
def test_the_paper_command_learns_repeats_and_goes_on(tmp_path):
    """Tens of steps of a real model. A lost row is run again, and is what it was."""
    file, command = tmp_path / "runs.csv", ["paper", "--out", str(tmp_path), "--processes", "1"]
    assert __main__.main(command) == 0
    runs = runner.load(file)
    assert len(runs) == 12 and (runs.test > 0.55).all() and runs.shrinks.dropna().between(1, 150).all()
    made = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 100}
    assert made >= {"table.txt", "headline.csv", "rates.csv", "environment.json", "minilm_sarcasm_bf16_150_32.png"}
    runs[:-1].to_csv(file, index=False)
    assert __main__.main(command) == 0
    last, again = (each.iloc[-1][["lr", "seed", "test", "shrinks"]] for each in (runs, runner.load(file)))
    pd.testing.assert_series_equal(last, again)


@pytest.mark.nightly
def test_the_stability_command_runs_goes_on_and_reports_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(stability.PRESETS, "quick", stability.Preset((16, 32, 64), 2, (1e-3, 1e-2), 5))
    command = ["stability", "--out", str(tmp_path / "a"), "--processes", "1"]
    assert __main__.main(command) == 0
    shown = capsys.readouterr().out
    assert "Exponents at step 5" in shown and all(arm in shown for arm in stability.ARMS)
    runs = runner.load(tmp_path / "a" / "runs.csv")
    # A row a run, and three of each run with probes.
    assert runs.loss.notna().sum() == 3 * 2 * 7 * 5 and runs.step.notna().sum() == 3 * 2 * 7 * 3 * 3
    for name in ("latch", "learning_rates"):
        assert (tmp_path / "a" / f"planted_{name}.png").stat().st_size > 10_000
    # All is there, so nothing is run.
    monkeypatch.setattr(runner.workers.ProcessPoolExecutor, "submit", None)
    assert __main__.main(command) == 0 and capsys.readouterr().out == shown
    (tmp_path / "a" / "runs.csv").unlink()
    assert __main__.main(["stability", "--stored", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        __main__.main(["stability", "--stored", str(tmp_path), "--out", str(tmp_path / "b")])
    assert "--stored must hold the CSV files of stability" in capsys.readouterr().err


def test_stored_tables_are_those_of_the_stored_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "panels", lambda *_, **__: None)
    report.write_paper(STORED / "paper", tmp_path)
    for name in ("headline", "rates", "ablations"):
        found, stored = (pd.read_csv(place / f"{name}.csv") for place in (tmp_path, STORED / "paper"))
        pd.testing.assert_frame_equal(found, stored, rtol=1e-4)
    for folder in ("stability", "stability-transformers"):
        assert report.write_stability(STORED / folder, tmp_path) == (STORED / folder / "table.txt").read_text(
            encoding="utf-8"
        )
    runs = runner.load(STORED / "paper" / "runs.csv")
    (untrained,) = {*runs.test[(runs.lr == 0) & (runs.task == "plays")]}
    assert report.FALLEN["plays"] == pytest.approx(untrained, abs=5e-4)


def test_figures_of_the_page_are_those_of_the_stored_runs():
    paper_runs = report.described(runner.load(STORED / "paper" / "runs.csv"))
    headlines = paper_runs[(paper_runs.model == "minilm") & (paper_runs.task == "sarcasm") & (paper_runs.steps == 300)]
    rows = rows_of(report.ablations, headlines[headlines.dtype == "bf16"])
    never = rows["Stable-LoRA 0.005", 0.003, "stop_condition never"]
    assert np.round([never["minus_unchanged"], never["minus_unchanged_95"]], 2).tolist() == [-1.13, 0.40]
    attention = rows["Stable-LoRA 0.005", 0.003, "targets attention"]
    assert np.round([attention["minus_adamw"], attention["minus_adamw_95"]], 2).tolist() == [-0.17, 1.27]

"""The paper's two studies: tiny real runs, and tables that are those of the stored runs."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks.common.tables import RESULTS
from benchmarks.research import __main__, report, runner, stability, widths

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[test]"
)
pytestmark = pytest.mark.usefixtures("one_thread")

STORED = RESULTS / "epyc-avx512-2core"


def test_a_steps_parts_add_up_to_its_change():
    sizes = (7, 12), (3, 12), (9, 3), (3, 12), (9, 3)
    generator = torch.Generator().manual_seed(0)
    z, a, b, d_a, d_b = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes
    )
    found = stability.changes(z, a, b, 0.9 * a, 0.9 * a + d_a, b + d_b)
    torch.testing.assert_close(found.pop("a_z"), z @ a.t())
    whole = found.pop("delta")
    torch.testing.assert_close(sum(found.values()), whole)
    torch.testing.assert_close(
        whole, widths.SCALING * z @ ((b + d_b) @ (0.9 * a + d_a) - b @ a).t()
    )
    assert all(part.abs().max() > 0 for part in found.values())


def test_the_planted_task_is_learned_and_a_latched_pair_no_longer_shrinks():
    problem = widths.planted(64, 0, 1.0)
    assert problem.held_out_loss() > 0.5
    # So large a ratio that the latch comes soon.
    arm = stability.ARMS["Stable-LoRA 0.005"]._replace(shrink_ratio=0.2)
    *steps, run = stability.fit(problem, arm, 1e-2, 60, stability.PROBES)
    assert run["loss"] < 0.2 and 1 < run["shrinks"] < 50 and run["latched"] == 1
    for record in steps:
        # B is zero at the first step, so there is nothing to shrink the product of.
        assert (record["delta_shrink"] > 0) == (1 < record["step"] <= run["shrinks"])
    near_zero = stability.execute(
        stability.Run("planted", 1, 64, 0, stability.NEAR_ZERO, "fixed", 1e-3)
    )
    assert near_zero[0]["a_z"] == pytest.approx(1e-3 * steps[0]["a_z"], rel=1e-4)


@pytest.mark.nightly
@pytest.mark.download
def test_the_paper_command_learns_repeats_and_goes_on(tmp_path):
    """Tens of steps of a real model. A lost row is run again, and is what it was."""
    file, command = tmp_path / "runs.csv", ["paper", "--out", str(tmp_path), "--processes", "1"]
    assert __main__.main(command) == 0
    runs = runner.load(file)
    # AdamW and two ratios of Stable-LoRA, at two rates, with two seeds; then the best of each with a
    # third.
    assert len(runs) == 3 * 2 * 2 + 2
    assert (runs.test > 0.55).all() and runs.shrinks.dropna().between(1, 150).all()
    made = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 100}
    assert made >= {
        "table.txt",
        "headline.csv",
        "rates.csv",
        "environment.json",
        "minilm_sarcasm_bf16_150_32.png",
    }
    runs[:-1].to_csv(file, index=False)
    assert __main__.main(command) == 0
    last, again = (
        each.iloc[-1][["lr", "seed", "test", "shrinks"]] for each in (runs, runner.load(file))
    )
    pd.testing.assert_series_equal(last, again)


@pytest.mark.nightly
def test_the_stability_command_runs_and_reports_what_is_stored(tmp_path, monkeypatch, capsys):
    small = stability.Preset((16, 32, 64), 2, (1e-3, 1e-2), 5)
    monkeypatch.setitem(stability.PRESETS, "quick", small)
    made, again = tmp_path / "made", tmp_path / "again"
    assert __main__.main(["stability", "--out", str(made), "--processes", "1"]) == 0
    shown, runs = capsys.readouterr().out, runner.load(made / "runs.csv")
    assert "Exponents at step 5" in shown and all(arm in shown for arm in stability.ARMS)
    # A row a run, and three of each run with probes.
    assert runs.loss.notna().sum() == 3 * 2 * 7 * 5 and runs.step.notna().sum() == 3 * 2 * 7 * 3 * 3
    (made / "runs.csv").unlink()
    assert __main__.main(["stability", "--stored", str(made), "--out", str(again)]) == 0
    assert capsys.readouterr().out == shown


def test_stored_tables_are_those_of_the_stored_runs(tmp_path, monkeypatch):
    """Means, differences seed by seed, their intervals, and p by flips of signs and by Fisher."""
    monkeypatch.setattr(report, "panels", lambda *_, **__: None)
    report.write_paper(STORED / "paper", tmp_path)
    for name in ("headline", "rates", "ablations"):
        found, stored = (
            pd.read_csv(place / f"{name}.csv") for place in (tmp_path, STORED / "paper")
        )
        pd.testing.assert_frame_equal(found, stored, rtol=1e-4)
    for folder in ("stability", "stability-transformers"):
        shown = (STORED / folder / "table.txt").read_text(encoding="utf-8")
        assert report.write_stability(STORED / folder, tmp_path) == shown
    # What a guide says of the method's stop is of these, too.
    found = (
        pd.read_csv(STORED / "paper" / "ablations.csv")
        .query("changed == 'stop_condition never'")
        .iloc[-1]
    )
    said = (
        f"Never stopping costs {-found.minus_unchanged:.2f} ± {found.minus_unchanged_95:.2f} points"
    )
    assert said in (RESULTS.parents[1] / "docs" / "guides" / "optimizer.md").read_text(
        encoding="utf-8"
    )
    page = (RESULTS.parents[1] / "docs" / "results" / "reproduction.md").read_text(encoding="utf-8")
    best = pd.read_csv(STORED / "paper" / "headline.csv").query("steps < 1500")
    for arm in ("LoRA+", "Riemannian", "LoRA-RITE", "Stable-LoRA"):
        row = "|"
        for model, task in (
            ("minilm", "sarcasm"),
            ("minilm", "reuters-52"),
            ("smollm2", "sarcasm"),
        ):
            (cell,) = best[
                best.arm.str.startswith(arm) & (best.model == model) & (best.task == task)
            ].itertuples()
            row += f" {cell.minus_adamw:+.2f} ± {cell.minus_adamw_95:.2f} |"
        assert row in page, arm
    runs = runner.load(STORED / "paper" / "runs.csv")
    (untrained,) = {*runs.test[(runs.lr == 0) & (runs.task == "plays")]}
    assert report.FALLEN["plays"] == pytest.approx(untrained, abs=5e-4)

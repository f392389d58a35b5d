"""The benchmarks' tables, files, plots and sweeps, from a stored result."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.finetuning import plots, sweep, train
from benchmarks.finetuning import result as report


def stored_result():
    def record(label, ms, loss, **more):
        series = {
            "loss": [loss] * 10,
            "forward_ms": [ms] * 10,
            "backward_ms": [2 * ms] * 10,
            "optimizer_ms": [1.0] * 10,
        }
        return {"label": label, "shrink_ratio": None, "trainable": 1000, "series": {**series, "norms": []}, **more}

    latch = {"earliest": 4, "latched_at": [3, None], "latched": 1, "a_factor": 0.95}
    latch |= {"shrinks_mean": 6.0, "shrinks_min": 2, "shrinks_max": 10}
    operators = {"forward": 10, "backward": 20, "optimizer": 3}
    counted = {"saved_mib": 5.0, "peak_mib": 900.0, "step_mib": 9.0, "operators": operators}
    stable = record("Stable-LoRA 0.005", 11.0, 0.4, latch=latch, footprint=counted)
    stable["shrink_ratio"] = 0.005
    stable["series"]["norms"] = [{"step": 0, "a_norm": 2.0, "b_norm": 0.0}, {"step": 10, "a_norm": 1.5, "b_norm": 0.5}]
    stable["test"] = {"accuracy": 0.84, "accuracy_se": 0.012, "loss": 0.4, "difference": 0.01, "difference_se": 0.004}
    environment = {
        "cpu": "Some CPU",
        "cores": 2,
        "torch_threads": 2,
        "load_average": 0.1,
        "python": "3.11",
        "commit": "abc",
    }
    environment |= {"gpu": None, "torch": "2.13", "triton": None, "peft": "0.21", "transformers": "5.24"}
    settings = {
        "model": "smollm2",
        "data": "sarcasm",
        "device": "cpu",
        "dtype": "bfloat16",
        "batch_size": 16,
        "seed": 0,
    }
    return {
        "status": "complete",
        "environment": environment,
        "settings": settings | {"steps": 10},
        "data": {"name": "sarcasm", "classes": 2, "train": 10, "test": 1000, "majority": 0.52},
        "recipe": {"steps": 10, "lr": 0.003, "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "arms": {
            "frozen": record("frozen", 10.0, 0.6),
            "peft": record("PEFT + AdamW", 15.0, 0.4),
            "stable-0.005": stable,
        },
        "wall_s": 300.0,
        "peak_rss_mib": 2000.0,
    }


def line(text: str, title: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(title))


def test_overhead_is_taken_step_by_step():
    frozen, stable = (stored_result()["arms"][name] for name in ("frozen", "stable-0.005"))
    # Both twice as slow in the second half, as when the machine is: the overhead is not touched.
    for record in (frozen, stable):
        for phase in train.PHASES:
            record["series"][f"{phase}_ms"][5:] = [2 * t for t in record["series"][f"{phase}_ms"][5:]]
    over = report.overhead(stable, frozen)
    assert over == pytest.approx(dict.fromkeys(("median", "q1", "q3"), 100 * (34 / 31 - 1)))
    assert report.overhead(stable, frozen, train.PHASES[:2])["median"] == pytest.approx(10.0)


def test_the_first_steps_are_not_in_the_times():
    record = stored_result()["arms"]["frozen"]
    record["series"]["optimizer_ms"][:3] = [500.0] * 3
    assert report.step_times(record, ("optimizer",)) == [1.0] * 7


def test_table_has_the_figures_and_says_what_is_missing():
    text = report.table(stored_result())
    assert "84.0 ± 1.2" in line(text, "held-out accuracy") and "+1.0 ± 0.4" in line(text, "  minus PEFT's")
    assert "31.0 [31.0, 31.0]" in line(text, "step, ms") and "34.0 [34.0, 34.0]" in line(text, "step, ms")
    assert "+10.0 [+10.0, +10.0]" in line(text, "  forward and backward alone")
    assert line(text, "operators a step (not launches)").split()[-6:] == ["33", "(10", "+", "20", "+", "3)"]
    assert line(text, "operators a step (not launches)").count("not counted") == 2
    assert "6.0 (2-10)" in line(text, "shrinking steps") and "2.000 > 1.500" in line(text, "||A||_F, start")
    assert line(text, "pairs that stopped shrinking, of 2").endswith(" 1")
    assert "Some CPU, 2 cores" in text and "commit abc" in text
    assert len({len(row) for row in text.splitlines()[2:20]}) == 1


def test_launches_are_called_launches():
    result = stored_result()
    footprint_record = result["arms"]["stable-0.005"]["footprint"]
    footprint_record["launches"] = footprint_record.pop("operators")
    assert "33 (10 + 20 + 3)" in line(report.table(result), "kernel launches a step")


def test_files_are_written_and_read_back(tmp_path):
    result = stored_result()
    paths = report.write_result(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert rows["stable-0.005"]["accuracy"] == "0.84" and rows["peft"]["accuracy"] == ""
    assert float(rows["peft"]["step_overhead_percent_median"]) == pytest.approx(100 * (46 / 31 - 1))
    assert all(path.exists() for path in paths)
    drawn = {path.name for path in plots.draw(result, tmp_path)}
    assert drawn == {"loss.png", "step_time.png", "norms.png"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_pairs_seeds_and_gives_students_interval(tmp_path):
    results = []
    for seed, difference in enumerate((0.01, 0.02, 0.03)):
        result = stored_result()
        result["settings"]["seed"] = seed
        result["arms"]["stable-0.005"]["test"]["difference"] = difference
        results.append(result)
    row = sweep.sweep_rows(results)[-1]
    assert (row["arm"], row["runs"]) == ("stable-0.005", 3)
    assert row["difference"] == pytest.approx(0.02)
    # t(2 degrees, 97.5%) = 4.303, s = 0.01, n = 3
    assert row["difference_95"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert "+2.00 ± 2.48" in sweep.sweep_table(results)
    assert all(path.exists() for path in (*sweep.write_sweep(results, tmp_path), *sweep.draw_sweep(results, tmp_path)))

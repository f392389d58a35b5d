"""The benchmarks' tables, files, plots and sweeps, from a stored result."""

from __future__ import annotations

import copy
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
    stable = record("apply_lora λ=0.005", 11.0, 0.4, latch=latch, footprint=counted)
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
    accelerated = copy.deepcopy(stable) | {"label": "accelerate_peft λ=0.005"}
    accelerated["footprint"] |= {"saved_mib": 6.0, "peak_mib": 950.0}
    peft = record("PEFT + AdamW", 15.0, 0.4, footprint={"saved_mib": 8.0, "peak_mib": 1000.0, "step_mib": 60.0})
    return {
        "status": "complete",
        "environment": environment,
        "settings": settings | {"steps": 10, "targets": "all-linear"},
        "data": {"name": "sarcasm", "classes": 2, "train": 10, "test": 1000, "majority": 0.52},
        "recipe": {
            "steps": 10,
            "lr": 0.003,
            "r": 8,
            "lora_alpha": 16.0,
            "lora_dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"],
        },
        "arms": {
            "frozen": record("frozen", 10.0, 0.6),
            "peft": peft,
            "accelerated-0.005": accelerated,
            "stable-0.005": stable,
        },
        "wall_s": 300.0,
        "peak_rss_mib": 2000.0,
    }


def line(text: str, title: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(title))


def test_overhead_is_taken_on_the_same_steps():
    frozen, stable = (stored_result()["arms"][name] for name in ("frozen", "stable-0.005"))
    # Both twice as slow in the second half, as when the machine is: the overhead is not touched.
    for record in (frozen, stable):
        for phase in train.PHASES:
            record["series"][f"{phase}_ms"][5:] = [2 * t for t in record["series"][f"{phase}_ms"][5:]]
    over = report.overhead(stable, frozen)
    assert over == pytest.approx((100 * (34 / 31 - 1), 0.0))
    assert report.overhead(stable, frozen, train.PHASES[:2]) == pytest.approx((10.0, 0.0))


def test_the_first_steps_are_not_in_the_times():
    record = stored_result()["arms"]["frozen"]
    record["series"]["optimizer_ms"][:3] = [500.0] * 3
    assert report.step_times(record, ("optimizer",)) == [1.0] * 7


def test_table_has_the_figures_and_says_what_is_missing():
    text = report.table(stored_result())
    assert "84.0 ± 1.2" in line(text, "held-out accuracy") and "+1.0 ± 0.4" in line(text, "  minus PEFT's")
    assert "31.0 [31.0, 31.0]" in line(text, "step, ms") and "34.0 [34.0, 34.0]" in line(text, "step, ms")
    assert "+10.0 ± 0.0" in line(text, "  forward and backward alone")
    assert line(text, "operators a step (not launches)").split()[-6:] == ["33", "(10", "+", "20", "+", "3)"]
    assert line(text, "operators a step (not launches)").count("not counted") == 2
    assert "6.0 (2-10)" in line(text, "shrinking steps") and "2.000 > 1.500" in line(text, "||A||_F, start")
    assert line(text, "pairs that stopped shrinking, of 2").endswith(" 1")
    assert "Some CPU, 2 cores" in text and "commit abc" in text
    rows = text.splitlines()
    start = next(number for number, row in enumerate(rows) if row.startswith("---"))
    figures = rows[start + 1 : rows.index("", start)]
    assert len(figures) == 21 and len({len(row) for row in figures}) == 1


def with_times(peft_ms: float, ours_ms: float):
    """A result whose steps take PEFT and both our arms so long."""
    result = stored_result()
    for name, record in result["arms"].items():
        record["series"]["optimizer_ms"] = [0.0] * 10
        record["series"]["backward_ms"] = [0.0] * 10
        record["series"]["forward_ms"] = [peft_ms if name == "peft" else ours_ms] * 10
    return result


@pytest.mark.parametrize(
    ("peft_ms", "ours_ms", "said"),
    [
        (140.0, 100.0, "a training step took 29% less time than PEFT's (1.40x as fast, 95% interval 1.40x to 1.40x)"),
        (100.0, 125.0, "a training step took 25% more time than PEFT's (0.80x as fast, 95% interval 0.80x to 0.80x)"),
        (100.0, 102.0, "a training step took 2.0% more time than PEFT's (0.98x as fast, 95% interval 0.98x to 0.98x)"),
        (
            100.0,
            100.0,
            "a training step took about as much time as PEFT's (1.00x as fast, 95% interval 1.00x to 1.00x)",
        ),
    ],
)
def test_the_first_line_says_what_was_saved_or_lost(peft_ms, ours_ms, said):
    result = with_times(peft_ms, ours_ms)
    rows = report.table(result).splitlines()
    memory = "kept 25% less memory for backward and needed 5.0% less memory at its peak."
    assert rows[0] == f"accelerate_peft: {said}, {memory}"
    assert rows[1].startswith(
        f"apply_lora: {said}, kept 38% less memory for backward and needed 10% less memory at its peak."
    )
    assert rows[2] == (
        f"In figures, accelerate_peft: a step took {ours_ms:.0f} ms, PEFT's {peft_ms:.0f} ms; kept 6 MiB of memory for backward, "
        "PEFT's 8 MiB; needed 950 MiB of memory at its peak, PEFT's 1,000 MiB."
    )


def test_the_first_line_calls_more_memory_more_and_equal_memory_equal():
    result = with_times(140.0, 100.0)
    result["arms"]["accelerated-0.005"]["footprint"] |= {"saved_mib": 10.0, "peak_mib": 1001.0}
    first = report.table(result).splitlines()[0]
    assert first.endswith("kept 25% more memory for backward and needed the same memory at its peak.")


def test_a_spread_on_both_sides_of_one_is_no_difference():
    result = with_times(100.0, 100.0)
    # Half of the steps 10% faster, the other half slower by less.
    result["arms"]["accelerated-0.005"]["series"]["forward_ms"] = [90.0, 105.0] * 5
    first = report.table(result).splitlines()[0]
    assert first.startswith(
        "accelerate_peft: a training step took about as much time as PEFT's (1.01x as fast, 95% interval 0.94x to 1.09x)"
    )


def test_ratios_are_of_all_steps_together_and_agree_with_each_other():
    """Long batches and short ones: equal ratios have no spread, and PEFT's overhead over ours' is the speedup."""
    result = with_times(140.0, 100.0)
    for record in result["arms"].values():
        record["series"]["forward_ms"][5:] = [3 * time for time in record["series"]["forward_ms"][5:]]
    rows = report.summary(result)
    ours, peft = rows["accelerated-0.005"], rows["peft"]
    assert (ours["speedup_over_peft"], ours["speedup_over_peft_95"]) == pytest.approx((1.4, 0.0))
    assert (100 + peft["step_overhead_percent"]) / (100 + ours["step_overhead_percent"]) == pytest.approx(1.4)
    assert peft["speedup_over_peft"] is None


def test_an_interrupted_step_does_not_shift_the_pairs():
    """One arm has a step more than the other, so that by itself it would lose its first ones."""
    result = with_times(100.0, 100.0)
    for name, record in result["arms"].items():
        for key in ("forward_ms", "backward_ms", "optimizer_ms"):
            steps = [900.0, 50.0, 50.0, 100.0, 100.0, 100.0, 100.0] if key == "forward_ms" else [0.0] * 7
            record["series"][key] = steps[: 6 + (name == "peft")]
    assert report.summary(result)["accelerated-0.005"]["speedup_over_peft"] == pytest.approx(1.0)


def test_without_timed_steps_there_is_no_headline_and_the_table_comes_first():
    result = stored_result()
    for record in result["arms"].values():
        record["series"] = {key: [] for key in ("loss", "forward_ms", "backward_ms", "optimizer_ms", "norms")}
    assert report.table(result).splitlines()[1].startswith("---")


def test_a_disturbed_run_says_so_under_the_first_lines():
    result = stored_result() | {"cpu_share": 0.5}
    assert "Other programs ran beside this one" in report.table(result).splitlines()[3]


def test_dropout_is_said_to_make_losses_equal_only_statistically():
    result = stored_result()
    assert "dropout masks of its own" in report.table(result)
    result["recipe"]["lora_dropout"] = 0.0
    assert "dropout masks of its own" not in report.table(result)


def test_launches_are_called_launches():
    result = stored_result()
    footprint_record = result["arms"]["stable-0.005"]["footprint"]
    footprint_record["launches"] = footprint_record.pop("operators")
    assert "33 (10 + 20 + 3)" in line(report.table(result), "kernel launches a step")


def test_files_are_written_and_read_back(tmp_path):
    result = stored_result()
    paths = report.write_result(result, tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert {key: stored[key] for key in result} == result
    assert stored["summary"] == report.summary(result) and stored["headlines"]
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert rows["stable-0.005"]["accuracy"] == "0.84" and rows["peft"]["accuracy"] == ""
    assert float(rows["peft"]["step_overhead_percent"]) == pytest.approx(100 * (46 / 31 - 1))
    assert all(path.exists() for path in paths)
    drawn = {path.name for path in plots.draw(result, tmp_path)}
    assert drawn == {"summary.png", "loss.png", "step_time.png", "norms.png"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_pairs_seeds_and_gives_students_interval(tmp_path):
    results = []
    for seed, difference in enumerate((0.01, 0.02, 0.03)):
        result = stored_result()
        result["settings"]["seed"] = seed
        result["arms"]["stable-0.005"]["test"]["difference"] = difference
        results.append(result)
    text = sweep.sweep_table(results)
    assert text.startswith("accelerate_peft: a training step took 26% less time than PEFT's (1.35x as fast")
    row = sweep.sweep_rows(results)[-1]
    assert (row["arm"], row["runs"]) == ("stable-0.005", 3)
    assert row["difference"] == pytest.approx(0.02)
    # t(2 degrees, 97.5%) = 4.303, s = 0.01, n = 3
    assert row["difference_95"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert "+2.00 ± 2.48" in text
    assert all(path.exists() for path in (*sweep.write_sweep(results, tmp_path), *sweep.draw_sweep(results, tmp_path)))

"""The main job's verdicts, tables and files, from a stored result."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks.finetuning import report

LABELS = {"frozen": "frozen", "peft": "PEFT", "accelerated": "PEFT + one line", "stable": "our layers, Stable-LoRA"}


def stored_result(peft_ms: float = 100.0, ours_ms: float = 100.0):
    """A result of three seeds, whose steps take PEFT and both our arms so long."""
    forward = {"frozen": 50.0, "peft": peft_ms, "accelerated": ours_ms, "stable": ours_ms}
    losses = {"frozen": 5.0, "peft": 4.0, "accelerated": 4.0, "stable": 4.0}
    footprints = {
        "peft": {"saved_mib": 8.0, "peak_mib": 1000.0, "step_mib": 60.0, "tokens": 128},
        "accelerated": {"saved_mib": 6.0, "peak_mib": 950.0, "step_mib": 9.0, "tokens": 128},
        "stable": {"saved_mib": 10.0, "peak_mib": 1001.0, "operators": {"forward": 10, "backward": 20, "optimizer": 3}},
    }

    def seed(name, number):
        times = {"forward_ms": [forward[name]] * 10, "backward_ms": [0.0] * 10, "optimizer_ms": [0.0] * 10}
        run = {"seed": number, "series": {"loss": [losses[name]] * 10, **times}}
        run["held_out"] = {"loss": losses[name], "accuracy": 0.5}
        if name != "frozen":
            run |= {"start": {"a_norm": 2.0, "b_norm": 0.0}, "end": {"a_norm": 1.5, "b_norm": 0.5}}
        return run | ({"latched": 1, "shrinks": 6.5} if name == "stable" else {})

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
        "data": "plays",
        "device": "cpu",
        "dtype": "bfloat16",
        "batch_size": 4,
        "length": 32,
    }
    recipe = {"steps": 10, "lr": 1e-3, "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05, "shrink_ratio": 5e-4}
    return {
        "status": "complete",
        "environment": environment,
        "settings": settings | {"seeds": [0, 1, 2], "targets": []},
        "task": {"name": "plays", "metric": "loss", "majority": None},
        "recipe": recipe | {"max_grad_norm": 1.0},
        "arms": {
            name: {"label": label, "trainable": 1000, "runs": [seed(name, number) for number in range(3)]}
            | ({"footprint": footprints[name]} if name in footprints else {})
            for name, label in LABELS.items()
        },
        "wall_s": 300.0,
        "threads": 2,
    }


def set_held_out(result, name, values, metric="loss"):
    for run, value in zip(result["arms"][name]["runs"], values, strict=True):
        run["held_out"][metric] = value


def line(text: str, title: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(title))


@pytest.mark.parametrize(
    ("peft_ms", "ours_ms", "said"),
    [
        (140.0, 100.0, "100 ms a step, PEFT 140 ms: 29% less time, 1.40x as fast (95% interval 1.40 to 1.40)"),
        (100.0, 125.0, "125 ms a step, PEFT 100 ms: 25% more time, 0.80x as fast (95% interval 0.80 to 0.80)"),
        (100.0, 102.0, "102 ms a step, PEFT 100 ms: 2.0% more time, 0.98x as fast (95% interval 0.98 to 0.98)"),
        (100.0, 100.0, "100 ms a step, PEFT 100 ms: no difference shown, 1.00x as fast (95% interval 1.00 to 1.00)"),
    ],
)
def test_the_verdicts_come_first_gains_and_losses_in_the_same_words(peft_ms, ours_ms, said):
    found = report.verdicts(stored_result(peft_ms, ours_ms))
    assert found == [
        f"Speed   PEFT + one line: {said}",
        f"        our layers, Stable-LoRA: {said}",
        "Memory  PEFT + one line: 6 MiB saved for backward, PEFT 8: 25% less; 950 MiB at the peak, PEFT 1,000: 5.0% less",
        "        our layers, Stable-LoRA: 10 MiB saved for backward, PEFT 8: 25% more; "
        "1,001 MiB at the peak, PEFT 1,000: the same",
        "Quality held-out loss, mean of 3 seeds: frozen 5.000, PEFT 4.000",
        "        PEFT + one line: 4.000, +0.000 ± 0.000 against PEFT (95% interval over seeds): no difference shown",
        "        our layers, Stable-LoRA: 4.000, +0.000 ± 0.000 against PEFT (95% interval over seeds): no difference shown",
    ]


def test_a_spread_on_both_sides_of_one_is_no_difference():
    result = stored_result()
    for run in result["arms"]["accelerated"]["runs"]:
        # Half of the steps 10% faster, the other half slower by less.
        run["series"]["forward_ms"] = [90.0, 105.0] * 5
    assert "no difference shown, 1.01x as fast (95% interval 0.98 to 1.05)" in report.verdicts(result)[0]


def test_quality_pairs_seeds_and_has_students_interval():
    result = stored_result()
    set_held_out(result, "peft", (4.0, 4.1, 4.2))
    set_held_out(result, "accelerated", (3.91, 4.02, 4.09))
    set_held_out(result, "stable", (4.01, 4.12, 4.19))
    row = report.summary(result)["accelerated"]
    assert row["loss_difference"] == pytest.approx(-0.28 / 3)
    # t(2 degrees, 97.5%) = 4.30265, n = 3; the differences are -0.09, -0.08 and -0.11.
    assert row["loss_difference_95"] == pytest.approx(4.30265 * statistics.stdev((-0.09, -0.08, -0.11)) / 3**0.5)
    quality = report.verdicts(result)[4:]
    assert quality[1].endswith("4.007, -0.093 ± 0.038 against PEFT (95% interval over seeds): better")
    assert quality[2].endswith("4.107, +0.007 ± 0.038 against PEFT (95% interval over seeds): no difference shown")


def test_accuracy_is_better_when_higher():
    result = stored_result() | {"task": {"name": "sarcasm", "metric": "accuracy", "majority": 0.45}}
    for name, values in {"frozen": (0.5,) * 3, "peft": (0.7, 0.7, 0.7), "stable": (0.8, 0.81, 0.8)}.items():
        set_held_out(result, name, values, "accuracy")
    quality = report.verdicts(result)[4:]
    assert quality[0] == "Quality held-out accuracy, mean of 3 seeds: frozen 50.0 %, PEFT 70.0 %, largest class 45.0 %"
    assert quality[2].endswith("80.3 %, +10.3 % ± 1.4 % against PEFT (95% interval over seeds): better")


def test_one_seed_shows_nothing():
    result = stored_result()
    for record in result["arms"].values():
        del record["runs"][1:]
    assert [row for row in report.verdicts(result) if "(one seed: shows nothing)" in row] == report.verdicts(result)[
        -2:
    ]
    assert "nan" not in report.table(result)


def test_an_arm_below_the_frozen_model_or_the_largest_class_is_warned_of():
    result = stored_result()
    assert not [row for row in report.verdicts(result) if row.startswith("Warning")]
    set_held_out(result, "stable", (5.1, 5.2, 5.3))
    (warning,) = [row for row in report.verdicts(result) if row.startswith("Warning")]
    assert warning.startswith(
        "Warning: our layers, Stable-LoRA ended below the frozen model (held-out loss 5.200 against 5.000)"
    )
    result["task"] = {"name": "sarcasm", "metric": "accuracy", "majority": 0.6}
    warnings = [row for row in report.verdicts(result) if row.startswith("Warning")]
    assert len(warnings) == 3 and all(
        "below the largest class (held-out accuracy 50.0 % against 60.0 %)" in row for row in warnings
    )


def test_a_disturbed_run_says_so_once():
    result = stored_result() | {"waited_share": 0.01}
    assert not any("Other programs" in row for row in report.verdicts(result))
    result["waited_share"] = 0.4
    assert "waited for a CPU 40 % of the time" in report.verdicts(result)[-1]


def test_overhead_is_taken_on_the_same_steps():
    frozen, stable = (stored_result()["arms"][name] for name in ("frozen", "stable"))
    # Both twice as slow in the second half, as when the machine is: the overhead is not touched.
    for record in (frozen, stable):
        for run in record["runs"]:
            run["series"]["forward_ms"][5:] = [2 * time for time in run["series"]["forward_ms"][5:]]
    assert report.overhead(stable, frozen) == pytest.approx((100.0, 0.0))


def test_the_first_steps_of_each_seed_are_not_in_the_times():
    record = stored_result()["arms"]["frozen"]
    for run in record["runs"]:
        run["series"]["optimizer_ms"][:3] = [500.0] * 3
    assert report.step_times(record, ("optimizer",)) == [0.0] * 21


def test_ratios_are_of_all_steps_together_and_agree_with_each_other():
    """Long batches and short ones: equal ratios have no spread, and PEFT's overhead over ours' is the speedup."""
    result = stored_result(140.0, 100.0)
    for record in result["arms"].values():
        for run in record["runs"]:
            run["series"]["forward_ms"][5:] = [3 * time for time in run["series"]["forward_ms"][5:]]
    rows = report.summary(result)
    ours, peft = rows["accelerated"], rows["peft"]
    assert (ours["speedup_over_peft"], ours["speedup_over_peft_95"]) == pytest.approx((1.4, 0.0))
    assert (100 + peft["step_overhead_percent"]) / (100 + ours["step_overhead_percent"]) == pytest.approx(1.4)
    assert peft["speedup_over_peft"] is None


def test_an_interrupted_step_does_not_shift_the_pairs():
    """One arm has a step more than the other, so that by itself it would lose its first ones."""
    result = stored_result()
    for name, record in result["arms"].items():
        del record["runs"][1:]
        for key in ("forward_ms", "backward_ms", "optimizer_ms"):
            steps = [900.0, 50.0, 50.0, 100.0, 100.0, 100.0, 100.0] if key == "forward_ms" else [0.0] * 7
            record["runs"][0]["series"][key] = steps[: 6 + (name == "peft")]
    # A second seed that one arm alone has begun.
    result["arms"]["peft"]["runs"].append(
        {"seed": 1, "series": {"loss": [], "forward_ms": [], "backward_ms": [], "optimizer_ms": []}}
    )
    assert report.summary(result)["accelerated"]["speedup_over_peft"] == pytest.approx(1.0)


def test_the_tables_have_the_figures_and_say_what_is_missing():
    result = stored_result(140.0, 100.0)
    text = report.table(result)
    assert "140.0 [140.0, 140.0]" in line(text, "step, ms") and "1.40 ± 0.00" in line(
        text, "PEFT's time over this arm's"
    )
    operators = line(text, "operators a step (not launches)")
    assert operators.endswith("33 (10 + 20 + 3)") and operators.count("not counted") == 3
    assert "2.000 > 1.500" in line(text, "||A||_F, start") and line(text, "shrinking steps").endswith(" 6.5")
    rows = text.splitlines()
    assert len(rows) == 2 + 21 and len({len(row) for row in rows[2:]}) == 1
    assert len(report.table(result, short=True).splitlines()) == 2 + 5
    assert "Some CPU, 2 cores" in report.notes(result)[-1] and "commit abc" in report.notes(result)[-1]
    result["arms"]["stable"]["footprint"] = {"launches": {"forward": 1, "backward": 2, "optimizer": 3}}
    assert "6 (1 + 2 + 3)" in line(report.table(result), "kernel launches a step")
    result["arms"]["peft"]["footprint"] = {"error": "no memory"}
    assert "Memory of PEFT was not measured: no memory" in report.notes(result)


def test_files_are_written_and_read_back(tmp_path):
    result = stored_result()
    paths = report.write_result(result, tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert {key: stored[key] for key in result} == result
    assert stored["summary"] == report.summary(result) and stored["verdicts"] == report.verdicts(result)
    assert [path.name for path in paths] == ["result.json", "steps.csv", "table.txt"]
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 1 + 4 * 3 * 10

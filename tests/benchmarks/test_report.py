"""What a run's figures are told as: verdicts in words, from made-up runs; the table, from the stored ones."""

from __future__ import annotations

import pytest

from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.finetuning import report
from benchmarks.finetuning.arms import PEAK, SAVED

MIB = {"peft": (8.0, 1000.0), "accelerated": (6.0, 950.0), "stable": (10.0, 1001.0)}


def run(metric="loss", seeds=3, held_out=(), majority=None, waited=0.0, **ms):
    """A run of ten steps a seed. ``ms`` are an arm's times of these, ``held_out`` what arms reach with each seed."""
    held_out = {"frozen": [5.0] * 3, "peft": [4.0] * 3, "accelerated": [4.0] * 3, "stable": [4.0] * 3} | dict(held_out)
    about = {"settings": {"model": "m", "data": "d", "arms": [*held_out]}, "seeds_done": seeds, "waited_share": waited}
    result = report.Result(about | {"task": {"metric": metric, "majority": majority}})
    for arm, values in held_out.items():
        for seed, value in enumerate(values[:seeds]):
            result.add(arm, "held-out", {metric: value}, seed)
            times = {"backward_ms": 0.0, "optimizer_ms": 0.0, "loss": 4.0, "arm": arm, "seed": seed}
            result.steps += [{"step": i + 1, "forward_ms": x, **times} for i, x in enumerate(ms.get(arm, [100.0] * 10))]
        result.add(arm, "step", dict(zip((SAVED, PEAK), MIB.get(arm, ()), strict=False)))
    found = report.look_up(report.records(result))
    return found, report.verdicts(result.about, found)


HELD_OUT = {arm: [0.5] * 3 for arm in ("frozen", *MIB)}
FLOORS = {"metric": "accuracy", "majority": 0.6, "held_out": HELD_OUT}
OURS, BROKEN = "our layers, Stable-LoRA: ", "training broke or was too short, so its quality says nothing."
ONE_STEP = {arm: [100.0] for arm in ("frozen", *MIB)}
# What is made, and what a line of its verdicts ends with; what the stored runs have been told is not repeated here.
SAID = [
    ({"stable": [102.0] * 10}, 1, f"{OURS}102 ms a step, PEFT 100 ms: 2.0% more time, 0.98x as fast (95% interval 0.98 to 0.98)"),
    # Half of the steps are faster, the other half slower by less.
    ({"stable": [90.0, 105.0] * 5}, 1, "no difference shown, 1.01x as fast (95% interval 0.98 to 1.05)"),
    ({"seeds": 1} | ONE_STEP, 0, "100 ms a step, PEFT 100 ms (one step: shows nothing)"),
    ({}, 3, "10 MiB saved for backward, PEFT 8: 25% more; 1,001 MiB at the peak, PEFT 1,000: the same"),
    # Student's t with two degrees of freedom is 4.30.
    ({"held_out": {"stable": [3.91, 3.92, 3.89]}}, 6, "3.907, -0.093 ± 0.038 against PEFT (95% interval over seeds): better"),
    ({"held_out": {"stable": [4.09, 4.08, 4.11]}}, 6, "4.093, +0.093 ± 0.038 against PEFT (95% interval over seeds): worse"),
    ({"seeds": 1}, 6, "4.000, +0.000 against PEFT (one seed: shows nothing)"),
    (FLOORS, 4, "held-out accuracy, mean of 3 seeds: frozen 50.0 %, PEFT 50.0 %, largest class 60.0 %"),
    (FLOORS, 7, f"Warning: PEFT ended below the largest class (held-out accuracy 50.0 % against 60.0 %): {BROKEN}"),
    ({"held_out": {"stable": [5.1, 5.2, 5.3]}}, 7, f"below the frozen model (held-out loss 5.200 against 5.000): {BROKEN}"),
    ({"waited": 0.4}, 7, "waited for a CPU 40 % of the time. Ratios of times are fair, since all arms waited, but less exact."),
]  # fmt: skip


@pytest.mark.parametrize(("made", "line", "said"), SAID)
def test_gains_and_losses_are_told_in_the_same_words(made, line, said):
    _, verdicts = run(**made)
    assert verdicts[line].endswith(said)
    # Warnings come after the seven verdicts, and only where there is something to warn of.
    assert (len(verdicts) > 7) == (line == 7 or "majority" in made)


def test_ratios_are_of_the_same_steps_and_settling_steps_do_not_count():
    """The machine is half as fast from the sixth step on, and slow at first: ratios are not touched, and agree."""
    slow = [900.0] * 3 + [100.0] * 2 + [200.0] * 5
    found, _ = run(peft=[1.4 * x for x in slow], accelerated=slow, frozen=[x / 2 for x in slow], stable=slow)
    assert found["accelerated", "step", report.SPEEDUP][::3] == pytest.approx((1.4, 0.0))
    assert found["accelerated", "step", "% over frozen"][::3] == pytest.approx((100.0, 0.0))
    assert found["peft", "layers", "% over frozen"].value == pytest.approx(180.0)
    assert found["frozen", "step", "ms"][:3] == (100.0, 50.0, 100.0) and found["frozen", "step", "ms"].n == 21


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/main*/result.csv")), ids=lambda file: file.parent.name)
def test_a_stored_runs_text_is_made_of_its_records(file):
    rows = read_records(file)
    header, text = rows.attrs["environment"], file.with_name("table.txt").read_text(encoding="utf-8")
    assert report.text(header, rows) == text and text.splitlines()[: len(header["verdicts"])] == header["verdicts"]
    assert "nan" not in text and report.adapters(header).startswith("r 16, alpha 32, dropout 0")

"""The page that is made from stored results alone."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="draws the README's figure; the bench extra brings it")
pytest.importorskip("transformers", reason="counts memory; the bench extra brings it")

from benchmarks.common.records import read_records, record, write_records
from benchmarks.lab.page import __main__ as page

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05",
    "load_average_at_start": 3.0,
}  # fmt: skip


def test_the_page_answers_first_and_has_every_loss_and_the_files(tmp_path, monkeypatch):
    def ratio(case, phase, value, **more):
        rival = record(case, phase, "PEFT", "ms", [2.0], "base rival") | more
        return [rival, record(case, phase, "ours", "over_rival", [value - 0.1, value, value + 0.1], "ours") | more]

    rows = ratio("training fp32", "step", 1.2) + ratio("layer 1", "forward", 1.5) + ratio("layer 1", "both", 3.0)
    rows += ratio("layer 4", "both", 0.5, axis="rank") + ratio("layer 2", "both", 0.9) + ratio("layer 3", "both", 1.04)
    write_records(tmp_path / "machine" / "suite_scaling.csv", rows, ENVIRONMENT)
    won, lost = "Speed   one line: 10% less time", "        our layers: 2.0% more time"
    run = {
        "environment": ENVIRONMENT, "waited_share": 0.0, "verdicts": [won, lost],
        "recipe": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        "settings": {"model": "m", "data": "plays", "targets": [], "lora_dropout": 0.0, "dtype": "float32"},
    }  # fmt: skip
    write_records(tmp_path / "machine" / "main" / "result.csv", rows[:1], run)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    assert page.main(["--check"]) == 1 and page.main([]) == 0 and page.main(["--check"]) == 0
    text = page.PAGE.read_text()
    assert "No GPU has measured anything yet" in text and f"```text\n{won}\n{lost}\n```" in text
    answers, rest = text.split("## Where it loses")
    losses, files = rest.split("## Every figure")
    # A loss is bold. Of a case's phases the worst is listed. An axis of sizes is no answer to a question.
    assert "| a whole training step, fp32 | PEFT | **1.20** |  |  |" in answers
    assert "| one layer, forward and backward | PEFT | **1.04 (0.90 to 3.00)** |  |  |" in answers
    assert (
        "| machine | layer 1, both | ours | PEFT | 3.00 (2.95 to 3.05) |" in losses and "layer 1, forward" not in losses
    )
    assert "| training fp32, step | ours | PEFT | 1.20 (1.15 to 1.25) |" in losses and "layer 3" not in losses
    assert "- our layers: 2.0% more time (`machine/main`)" in losses and "10% less" not in losses
    assert "`python -m pytest benchmarks -m scaling --records=suite_scaling.csv`" in files
    assert (
        "`python -m benchmarks --dtype fp32 --dropout 0`" in files and files.count("other programs ran beside it") == 1
    )


def test_the_committed_page_is_of_the_committed_results(capsys):
    assert page.main(["--check"]) == 0, capsys.readouterr().out
    assert not re.search(r"\bnan\b", page.PAGE.read_text())


def test_the_host_time_page_has_the_stored_figures():
    """The table, and each figure of the text as a median over PEFT's or AdamW's."""
    text = (page.PAGE.parents[1] / "internals" / "host-time.md").read_text(encoding="utf-8")
    rows = read_records(page.RESULTS / "epyc-avx2-2core" / "suite_host.csv")
    rows = rows[(rows["metric"] == "over_rival") & (rows["role"] == "ours")]
    assert page.host_table(rows) in text
    medians = rows.set_index("case")["median"]
    shown = re.findall(r"^\| (\d+) tensors \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(shown) > 4
    for tensors, *cells in shown:
        found = [medians[f"host step {tensors} tensors r2 width 8, gradients {way}"] for way in ("kept", "moved")]
        assert [f"{value:.2f}" for value in found] == cells


def test_the_performance_page_has_the_figures_of_the_main_jobs():
    text = page.PAGE.with_name("performance.md").read_text(encoding="utf-8")
    forms = {"% over frozen": ".1f", "speedup over PEFT": ".2f", "loss minus PEFT": "+.3f", "MiB at the peak": ",.0f"}
    files = sorted(page.RESULTS.glob("*/main*/result.csv"))
    assert files
    for file in files:
        rows = read_records(file)
        rows = rows[rows["phase"].isin(("step", "held-out")) & rows["metric"].isin(forms)]
        assert {*rows["metric"]} == {*forms}
        for row in rows[(rows["role"] == "ours") | (rows["metric"] == "MiB at the peak")].itertuples():
            value = f"{round(row.median, 3) + 0.0:{forms[row.metric]}}"
            spread = f" ± {row.half_95:{forms[row.metric].strip('+')}} |" if row.half_95 == row.half_95 else " |"
            assert value + spread in text, (file, row)

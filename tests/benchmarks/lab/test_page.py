"""The page that is made from stored results alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from benchmarks.lab.page import __main__, answers

pytest.importorskip("matplotlib", reason="draws the plots; the bench extra brings it")

from benchmarks.lab.page import page as report_page
from benchmarks.lab.page import plots

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "python": "3.11", "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05",
    "load_average": 0.1,
}  # fmt: skip


def fill(directory):
    """A suite's file with an axis, and sections from before the suite."""
    times = {"median": 2.0, "q1": 1.9, "q3": 2.1}
    base = {"ours": False, "ms": times, "over_base": dict.fromkeys(times, 1.0)}
    ours = {"ours": True, "ms": times, "over_base": times, "over_rival": times, "overhead_over_rival": 0.5}
    info = {"base": "frozen", "rival": "PEFT", "arms": {"frozen": base, "ours": ours}}
    step = info | {"case": "training", "phase": "step", "skipped": {"ours, Triton": "there is no GPU"}}
    points = [
        info | {"case": f"layer {size}", "phase": "both", "skipped": {}, "axis": {"name": "rank, fp32", "size": size},
                "floor_ms": {"frozen": 1.0}}
        for size in (1, 2, 4)
    ]  # fmt: skip
    suite = {
        "machine_info": {"stablelora_kernels": {**ENVIRONMENT, "load_average": 3.0}},
        "benchmarks": [{"extra_info": report} for report in (step, step, *points)],
        "exponents": {"rank, fp32": {"ours": [2.0, 0.1]}},
    }
    directory.mkdir(parents=True)
    (directory / "suite.json").write_text(json.dumps(suite))
    (directory / report_page.BEFORE).write_text("- once 1.50 times as long\n\n### What was asked before?\n\nA table.\n")


def test_the_page_has_what_is_stored_and_says_where_it_loses(tmp_path, monkeypatch):
    fill(tmp_path / "results" / "machine")
    page_file = tmp_path / "docs" / "results" / "benchmarks.md"
    page_file.parent.mkdir(parents=True)
    monkeypatch.setattr(report_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report_page, "PAGE", page_file)
    monkeypatch.setattr(plots, "PAGE", page_file)
    assert __main__.main([]) == 0
    text = page_file.read_text()
    assert "No GPU has measured anything yet" in text and "A CPU, 2 cores, load 3.0 at the start" in text
    # The answers come before any machine's figures, and a loss is bold in them.
    opening = text.split("## All figures")[0]
    assert "| a whole training step | PEFT | **2.00 (2.00 to 2.00)** |  |  |" in opening
    assert text.index("## In short") < text.index("A CPU")
    losses = text.split("### Where it loses")[1].split("###")[0]
    for loss in ("training, step: ours takes 2.00 (1.90 to 2.10) of PEFT's time", "once 1.50 times as long"):
        assert f"- {loss}\n" in losses, loss
    assert text.count("Other programs ran beside this one") == 1
    assert text.count("ours, Triton (there is no GPU)") == 1
    assert "| training, step | ours | 2.00 | 2.00 (1.90 to 2.10) | 0.50 |" in text
    assert "Time against rank, fp32, exponents over the larger half, with 95 % intervals: ours 2.00 ± 0.10." in text
    assert text.endswith("### What was asked before?\n\nA table.\n")
    (plot,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (page_file.parent / plot).stat().st_size > 1000

    assert __main__.main(["--check"]) == 0
    page_file.write_text(text.replace("1.50", "0.50"))
    assert __main__.main(["--check"]) == 1
    page_file.write_text(text)
    (page_file.parent / plot).unlink()
    assert __main__.main(["--check"]) == 1
    shutil.rmtree(tmp_path / "results" / "machine")
    with pytest.raises(ValueError, match="with something measured, got"):
        __main__.main([])


def test_a_fine_tuning_run_is_on_the_page_and_its_losses_are_in_the_list(tmp_path):
    run = tmp_path / "machine" / "quick"
    run.mkdir(parents=True)
    (run / "table.txt").write_text("the table\n")
    won, lost = ("accelerate_peft: a step took 9.0% less time", "apply_lora: a step took 2.0% more time")
    result = {
        "environment": ENVIRONMENT,
        "settings": {"model": "m", "targets": "all-linear", "r": 16, "lora_dropout": 0.0, "dtype": "float32"},
        "headlines": [won, lost, "In figures, accelerate_peft: no more than figures."],
    }
    (run / "result.json").write_text(json.dumps(result))
    text = report_page.page(tmp_path)
    assert f"Fine-tuning m, all-linear, r 16, dropout 0, float32:\n\n- {won}\n- {lost}\n" in text
    assert f"### Where it loses\n\n- {lost}\n\n### Fine-tuning a real model without dropout" in text
    assert "python -m benchmarks --dtype fp32 --dropout 0\n" in text
    assert "```text\nthe table\n```" in text
    # Runs stored before there were headlines.
    (run / "result.json").write_text(json.dumps({"environment": ENVIRONMENT}))
    assert "Nowhere in what is stored." in report_page.page(tmp_path)


def test_a_file_of_marked_cases_has_their_command(tmp_path):
    directory = tmp_path / "machine"
    fill(directory)
    (directory / "suite.json").rename(directory / "suite_scaling.json")
    text = report_page.page(tmp_path)
    assert "python -m pytest benchmarks -m scaling --benchmark-json=suite_scaling.json\n" in text
    assert "(suite_scaling)" in text


def test_the_answers_have_columns_for_fused_mlps():
    pytest.importorskip("transformers")
    from benchmarks.suite.mlp import ACCELERATED, FUSED, MLPCase

    assert [answers._COLUMNS.get(arm) for arm in (FUSED, ACCELERATED)] == [0, 1]
    assert {("mlp", phase) for phase in MLPCase.phases} <= answers._QUESTIONS.keys()


def test_the_committed_page_is_of_the_committed_results(capsys):
    assert __main__.main(["--check"]) == 0, capsys.readouterr().out
    assert not re.search(r"\bnan\b", report_page.PAGE.read_text())


def test_the_memory_table_of_the_peft_page_is_what_is_counted():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.lab.page import memory

    page = (report_page.PAGE.parents[1] / "guides" / "peft.md").read_text(encoding="utf-8")
    assert memory.table(memory.count()) in page
    assert memory.PLOT.is_file()


def test_the_guide_has_the_table_of_what_fits():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.lab.page import fit

    assert fit.table() in (report_page.PAGE.parents[1] / "guides" / "will-it-fit.md").read_text(encoding="utf-8")

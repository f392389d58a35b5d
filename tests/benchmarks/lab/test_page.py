"""The page that is made from stored results alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from benchmarks.lab.page import __main__

pytest.importorskip("matplotlib", reason="draws the README's figure; the bench extra brings it")

from benchmarks.finetuning.report import loss_difference
from benchmarks.lab.page import page as report_page

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "python": "3.11", "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05",
    "load_average": 0.1,
}  # fmt: skip


def fill(directory):
    """A suite's file with one loss, in both phases of a layer."""
    times = {"median": 2.0, "q1": 1.9, "q3": 2.1}
    base = {"ours": False, "ms": times, "over_base": dict.fromkeys(times, 1.0)}
    ours = {"ours": True, "ms": times, "over_base": times, "over_rival": times}
    info = {"base": "frozen", "rival": "PEFT", "arms": {"frozen": base, "ours": ours}, "skipped": {}}
    step = info | {"case": "training fp32", "phase": "step"}
    worse = {"frozen": base, "ours": ours | {"over_rival": {"median": 3.0, "q1": 2.5, "q3": 3.5}}}
    point = info | {"case": "layer 4", "phase": "both", "axis": {"name": "rank", "size": 4}}
    layers = [
        info | {"case": "layer 1", "phase": "forward"},
        info | {"case": "layer 1", "phase": "both", "arms": worse},
    ]
    suite = {
        "machine_info": {"stablelora_kernels": {**ENVIRONMENT, "load_average": 3.0}},
        "benchmarks": [{"extra_info": report} for report in (step, *layers, point)],
    }
    directory.mkdir(parents=True)
    (directory / "suite.json").write_text(json.dumps(suite))


def test_the_page_answers_first_and_has_every_loss_and_the_files(tmp_path, monkeypatch):
    fill(tmp_path / "results" / "machine")
    page_file = tmp_path / "docs" / "results" / "benchmarks.md"
    monkeypatch.setattr(report_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report_page, "PAGE", page_file)
    assert __main__.main([]) == 0
    text = page_file.read_text()
    assert "No GPU has measured anything yet" in text
    opening, losses = text.split("## Where it loses")
    # A loss is bold. An axis of sizes is no answer to a question.
    assert "| a whole training step, fp32 | PEFT | **2.00** |  |  |" in opening
    assert "| one layer, forward and backward | PEFT | **3.00** |  |  |" in opening
    losses, files = losses.split("## Every figure")
    # Of a case's phases the worst.
    assert (
        "| machine | layer 1, both | ours | PEFT | 3.00 (2.50 to 3.50) |" in losses and "layer 1, forward" not in losses
    )
    assert "| machine | training fp32, step | ours | PEFT | 2.00 (1.90 to 2.10) |" in losses
    assert "[machine/suite.csv](../../benchmarks/results/machine/suite.csv)" in files
    assert files.count("other programs ran beside it") == 1
    rows = (tmp_path / "results" / "machine" / "suite.csv").read_text().splitlines()
    assert (
        rows[0].startswith("case,phase,arm,base,rival,ms median,")
        and "layer 1,both,ours,frozen,PEFT,2,1.9,2.1,2,1.9,2.1,3,2.5,3.5" in rows
    )

    assert __main__.main(["--check"]) == 0
    (tmp_path / "results" / "machine" / "suite.csv").write_text("other")
    assert __main__.main(["--check"]) == 1
    shutil.rmtree(tmp_path / "results" / "machine")
    with pytest.raises(ValueError, match="with something measured, got"):
        __main__.main([])


def test_a_fine_tuning_run_is_on_the_page_and_its_losses_are_in_the_list(tmp_path):
    run = tmp_path / "machine" / "main"
    run.mkdir(parents=True)
    won = "Speed   PEFT + one line: 90 ms a step, PEFT 100 ms: 10% less time"
    lost = [
        "        our layers: 102 ms a step, PEFT 100 ms: 2.0% more time",
        "Quality our layers: 4.1, +0.1 ± 0.0: worse",
    ]
    result = {
        "environment": ENVIRONMENT,
        "settings": {"model": "m", "data": "plays", "targets": [], "lora_dropout": 0.0, "dtype": "float32"},
        "recipe": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        "verdicts": [won, *lost],
    }
    (run / "result.json").write_text(json.dumps(result))
    text = report_page.page(tmp_path)
    about = "Fine-tuning m on plays, r 16, alpha 32, dropout 0 on all linear layers, float32:"
    assert "\n".join([about, "", "```text", won, *lost, "```"]) in text
    losses = text.split("## Where it loses\n\n")[1].split("\n\n")[0].splitlines()
    assert losses == [f"- {line[8:]} (`machine/main`)" for line in lost]
    assert "| `python -m benchmarks --dtype fp32 --dropout 0` |" in text
    # Other programs had its CPUs for half of the time.
    (run / "result.json").write_text(json.dumps(result | {"waited_share": 0.5}))
    assert "other programs ran beside it" in report_page.page(tmp_path) and "other programs" not in text
    (run / "result.json").write_text(json.dumps(result | {"verdicts": [won]}))
    assert "Nowhere in what is stored." in report_page.page(tmp_path)


def test_a_file_of_marked_cases_has_their_command(tmp_path):
    directory = tmp_path / "machine"
    fill(directory)
    (directory / "suite.json").rename(directory / "suite_scaling.json")
    text = report_page.page(tmp_path)
    assert "`python -m pytest benchmarks -m scaling --benchmark-json=suite_scaling.json`" in text


def test_the_answers_have_columns_for_fused_mlps():
    pytest.importorskip("transformers")
    from benchmarks.suite.layers import MLPCase

    assert [report_page.COLUMNS.get(MLPCase.ours[i]) for i in (0, -1)] == [0, 1]
    assert {("mlp", phase) for phase in MLPCase.phases} <= report_page.QUESTIONS.keys()


def test_the_committed_page_is_of_the_committed_results(capsys):
    assert __main__.main(["--check"]) == 0, capsys.readouterr().out
    assert not re.search(r"\bnan\b", report_page.PAGE.read_text())


def test_the_host_time_page_has_the_stored_figures():
    """The table, and each figure of the text as a median over PEFT's or AdamW's."""
    cases = json.loads((report_page.RESULTS / "epyc-avx2-2core" / "host.json").read_text())["cases"]
    page = (report_page.PAGE.parents[1] / "internals" / "host-time.md").read_text(encoding="utf-8")
    assert report_page.host_table(cases) in page
    rows = re.findall(r"^\| (\d+) tensors \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) > 4
    for tensors, *shown in rows:
        for gradients, text in zip(("kept", "moved"), shown, strict=True):
            arm = cases[f"host step {tensors} tensors r2 width 8, gradients {gradients}"]["step"]["StableLoRAAdamW"]
            assert f"{arm['over_rival']['median']:.2f}" == text, (tensors, gradients)


def test_the_performance_page_has_the_figures_of_the_main_jobs():
    page = (report_page.PAGE.parent / "performance.md").read_text(encoding="utf-8")
    files = sorted(report_page.RESULTS.glob("*/main*/result.json"))
    assert files
    for file in files:
        for name, row in json.loads(file.read_text(encoding="utf-8"))["summary"].items():
            shown = [f"{row['saved_mib']:,.0f} / {row['peak_mib']:,.0f}"]
            if name != "frozen":
                shown.append(f"{row['step_overhead_percent']:.1f} ± {row['step_overhead_percent_95']:.1f}")
            if name not in ("frozen", "peft"):
                shown.append(f"{row['speedup_over_peft']:.2f} ± {row['speedup_over_peft_95']:.2f}")
                shown.append(loss_difference(row))
            assert all(text in page for text in shown), (file, name, shown)


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

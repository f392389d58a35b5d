"""The page that is made from stored results alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from benchmarks.lab.page import __main__

pytest.importorskip("peft", reason="an arm of the benchmarks; the bench extra brings it")
pytest.importorskip("matplotlib", reason="draws the plots; the bench extra brings it")

from benchmarks.common import optimizers
from benchmarks.lab.page import page as report_page
from benchmarks.lab.page import plots
from benchmarks.suite import pretrained

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "python": "3.11", "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05",
    "load_average": 0.1,
}  # fmt: skip


def fill(directory):
    """What every benchmark would have stored, in small."""
    times = {"median": 2.0, "q1": 1.9, "q3": 2.1}
    quick = {"median": 1.0, "q1": 0.9, "q3": 1.1}
    over = {f"overhead_{key}": value for key, value in times.items()}
    layer = {"shape": [1, 2, 3, 4], "dtype": "fp32", "dropout": 0.1, "ours_over_peft": 1.5}
    layer["ms"] = {arm: {**times, **over} for arm in ("frozen", "eager", "peft", "ours")}
    states = {state: {optimizers.OURS: times, "AdamW fused": quick} for state in ("shrinking", "latched")}
    row = {"step_percent": times, "optimizer_percent": times, "optimizer_ms": times, "state_bytes": 2048}
    zero = dict.fromkeys(times, 0.0)
    overheads = {
        pretrained.BASE: {**row, "step_percent": zero, "optimizer_percent": zero, "paper_percent": 0.0},
        f"PEFT, {optimizers.OURS}": {**row, "paper_percent": 0.6},
    }
    cell = {"ms": times, "over_ms": times, "saved_bytes": 1e6}
    width = {
        "axis": "width", "still": "r 16", "machine": {"flops": 1e11, "bandwidth": 1e10}, "exponents": {"ours": [2.0, 0.1]},
        "rows": [
            {"size": size, "floor": {"frozen": 1.0, "overhead": 0.5}, "frozen": cell, "peft": cell,
             "ours": {**cell, "over_ms": {**times, "median": 3.0}}}
            for size in (256, 512)
        ],
    }  # fmt: skip
    base = {"ours": False, "ms": quick, "over_base": dict.fromkeys(times, 1.0)}
    ours = {"ours": True, "ms": times, "over_base": times, "over_rival": times, "overhead_over_rival": 0.5}
    info = {
        "case": "training", "phase": "step", "base": "frozen", "rival": "PEFT", "arms": {"frozen": base, "ours": ours},
        "skipped": {"ours, Triton": "there is no GPU"},
    }  # fmt: skip
    stored = {
        "lora_linear.json": {"environment": ENVIRONMENT, "results": [layer]},
        "stable_adamw.json": {
            "environment": ENVIRONMENT,
            "settings": {"pairs": 64, "r": 8, "width": 16},
            "milliseconds": states,
        },
        "optimizer_overhead_small.json": {
            "environment": {**ENVIRONMENT, "load_average": 3.0},
            "settings": {
                "model": "small",
                "targets": "query-value",
                "batch_size": 2,
                "r": 8,
                "dtype": "fp32",
                "lr": 1e-4,
                "steps": 5,
            },
            "rows": overheads,
            "skipped": {},
        },
        "scaling.json": {"environment": ENVIRONMENT, "axes": {"width": width}},
        "suite.json": {
            "machine_info": {"stablelora_kernels": ENVIRONMENT},
            "benchmarks": [{"extra_info": info}] * 2,
        },
    }
    directory.mkdir(parents=True)
    for name, content in stored.items():
        (directory / name).write_text(json.dumps(content))


def test_the_page_has_what_is_stored_and_says_where_it_loses(tmp_path, monkeypatch):
    fill(tmp_path / "results" / "machine")
    page_file = tmp_path / "docs" / "benchmarks.md"
    page_file.parent.mkdir()
    monkeypatch.setattr(report_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report_page, "PAGE", page_file)
    monkeypatch.setattr(plots, "PAGE", page_file)
    assert __main__.main([]) == 0
    text = page_file.read_text()
    assert "No GPU has measured anything yet" in text and "A CPU, 2 cores, load 0.1 at the start" in text
    losses = text.split("### Where it loses")[1].split("###")[0]
    for loss in (
        "layer 1 x 2 x 3, 4, fp32, 0.1: adds 1.50 of what PEFT adds",
        "step of 64 pairs, shrinking: 2.00 times AdamW fused",
        "small, query-value, fp32, PEFT, StableLoRAAdamW: +2.00 % of a step, where at most +0.2 was wanted",
        "training, step: ours takes 2.00 (1.90 to 2.10) of PEFT's time",
        "layer, width 256 (r 16): adds 1.50 of what PEFT adds",
    ):
        assert f"- {loss}\n" in losses, loss
    assert "| PEFT, StableLoRAAdamW | +0.6 | +2.00 (+1.90 to +2.10) |" in text
    assert text.count("Other programs ran beside this one") == 1
    assert text.count("ours, Triton (there is no GPU)") == 1
    assert "| training, step | ours | 2.00 | 2.00 (1.90 to 2.10) | 0.50 |" in text
    assert "Measured by `benchmarks.bench_scaling`, which this command has replaced since." in text
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


def test_the_committed_page_is_of_the_committed_results(capsys):
    assert __main__.main(["--check"]) == 0, capsys.readouterr().out
    assert not re.search(r"\bnan\b", report_page.PAGE.read_text())

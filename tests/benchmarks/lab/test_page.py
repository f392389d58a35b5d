"""Optimizers' overhead, scaling curves, and the page that is built out of stored results alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from benchmarks.lab.page import __main__

pytest.importorskip("peft", reason="an arm of the benchmarks; the bench extra brings it")
pytest.importorskip("matplotlib", reason="draws the plots; the bench extra brings it")

from benchmarks import bench_optimizer_overhead as overhead
from benchmarks import bench_scaling as scaling
from benchmarks.bench_scaling import Machine
from benchmarks.common import optimizers
from benchmarks.lab.page import page as report_page
from tests.benchmarks.test_arms import CPU, RECIPE, small_batch, small_llama

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "python": "3.11", "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05",
    "load_average": 0.1,
}  # fmt: skip


# Optimizers' overhead


def test_every_arm_trains_its_own_pairs_and_no_head():
    backbone = small_llama()
    running = {
        name: overhead.build(layers, optimizer, backbone, 2, RECIPE, CPU)
        for name, (layers, optimizer) in overhead.ARMS.items()
    }
    before = {name: [p.detach().clone() for p in arm.model.parameters()] for name, arm in running.items()}
    overhead.run(running, [small_batch()] * (overhead.SETTLING_STEPS + 2), torch.float32, lambda: None)
    for name, arm in running.items():
        changed = {
            key
            for (key, p), old in zip(arm.model.named_parameters(), before[name], strict=True)
            if not torch.equal(p, old)
        }
        assert changed == {key for key, _ in arm.model.named_parameters() if "lora_" in key}, name
    rows = overhead.summary(running)
    base = rows[overhead.BASE]
    assert base["step_percent"] == base["optimizer_percent"] == {"median": 0.0, "q1": 0.0, "q3": 0.0}
    # Two moments of every A and B.
    trained = sum(p.numel() for p in running[overhead.BASE].model.parameters() if p.requires_grad)
    assert base["state_bytes"] == 8 * trained
    ours = rows[f"PEFT, {optimizers.OURS}"]
    assert ours["state_bytes"] == base["state_bytes"] and ours["paper_percent"] == 0.6
    text = overhead.table(rows)
    assert all(name in text for name in overhead.ARMS)


def test_shares_are_of_the_same_step():
    """Twice the base's step and its optimizer's time, by hand."""
    base = overhead.Running(None, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    other = overhead.Running(None, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    steps = overhead.SETTLING_STEPS + 3
    base.forward_backward, base.optimizer_step = [0.9] * steps, [0.1] * steps
    other.forward_backward, other.optimizer_step = [1.7] * steps, [0.3] * steps
    name = f"PEFT, {optimizers.RITE}"
    rows = overhead.summary({overhead.BASE: base, name: other})
    assert rows[name]["step_percent"]["median"] == pytest.approx(100)
    assert rows[name]["optimizer_percent"]["median"] == pytest.approx(20)


# Scaling


def test_exponents_of_known_powers():
    sizes = [2.0**i for i in range(8)]
    slope, half = scaling.exponent(sizes, [3 * size**1.5 for size in sizes])
    assert slope == pytest.approx(1.5) and half == pytest.approx(0, abs=1e-6)
    noisy = [size * (1.3 if i % 2 else 1.0) for i, size in enumerate(sizes)]
    slope, half = scaling.exponent(sizes, noisy)
    assert abs(slope - 1) < half
    # Overheads below zero are noise, and have no logarithm.
    assert scaling.exponent([1, 2, 4], [-1.0, -1.0, 1.0]) is None


def test_floors_by_hand():
    machine = Machine(flops=1e9, bandwidth=1e9)
    # Rows enough for operations to be the longer: 4 M N K.
    floors = scaling.layer_floors(1000, 100, 100, 10, machine)
    assert floors["frozen"] == pytest.approx(1e3 * 4 * 1000 * 100 * 100 / 1e9)
    assert floors["overhead"] == pytest.approx(1e3 * 6 * 1000 * 10 * 200 / 1e9)
    # A single row: bytes.
    floors = scaling.layer_floors(1, 100, 100, 1, machine)
    assert floors["frozen"] == pytest.approx(1e3 * 4 * (400 + 20_000) / 1e9)
    assert floors["overhead"] == pytest.approx(1e3 * 4 * (200 + 600) / 1e9)


def test_axes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "measure_machine", lambda device: Machine(1e11, 1e10))
    monkeypatch.setattr(scaling, "WIDTHS", (8, 16, 32))
    monkeypatch.setattr(scaling, "TOKENS", (1, 2, 4))
    monkeypatch.setattr(scaling, "PAIRS", (1, 2, 3))
    path = tmp_path / "scaling.json"
    scaling.main(["--axes", "width", "tokens", "pairs", "--iters", "2", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "exponents over the larger half" in printed
    axes = json.loads(path.read_text())["axes"]
    assert [row["size"] for row in axes["width"]["rows"]] == [8, 16, 32]
    for row in axes["tokens"]["rows"]:
        # X is the caller's; what a layer keeps beside it is S.
        assert row["ours"]["saved_bytes"] == row["peft"]["saved_bytes"] == 4 * row["size"] * 16
        assert row["frozen"]["saved_bytes"] == 0
    assert all(row[arm]["ms"]["median"] > 0 for row in axes["pairs"]["rows"] for arm in scaling.STEP_ARMS)
    with pytest.raises(SystemExit):
        scaling.main(["--iters", "0"])


# The page


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
        overhead.BASE: {**row, "step_percent": zero, "optimizer_percent": zero, "paper_percent": 0.0},
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
    entry = {
        "stats": {"median": 0.002},
        "extra_info": {"case": "training", "phase": "step", "arm": "ours", "base": "frozen", "rival": "PEFT", "ours": True,
                       "over_base": times, "over_rival": times, "overhead_over_rival": 0.5},
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
            "benchmarks": [entry],
            "skipped": [{"arm": "ours, Triton", "reason": "there is no GPU"}] * 2,
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

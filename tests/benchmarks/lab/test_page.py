"""Pages and the README's figure have the figures of the stored results."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib", reason="draws the README's figure; the bench extra brings it")
pytest.importorskip("transformers", reason="counts memory; the bench extra brings it")

from benchmarks.common.records import read_records
from benchmarks.lab.page import __main__ as page


def test_the_committed_page_is_of_the_committed_results(tmp_path, monkeypatch, capsys):
    """It has every case that lost, and none that won, among the losses; a changed page is noticed, and written anew."""
    assert page.main(["--check"]) == 0, capsys.readouterr().out
    text = page.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", text)
    losses = text.split("## Where it loses")[1].split("## Every figure")[0]
    ratios, _ = page.read(page.RESULTS)
    ratios = ratios[~ratios["case"].str.startswith("host ")]
    for (machine, case, arm), rows in ratios.groupby(["machine", "case", "arm"]):
        lost = rows[rows["q1"] > 1]["median"].max()
        (*line,) = re.findall(re.escape(f"| {machine} | {case}, ") + f".* \\| {re.escape(arm)} \\| .*", losses)
        assert len(line) == (lost == lost) and all(f"| {lost:.2f} (" in each for each in line), (machine, case, arm)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page.headline, "draw", lambda _: ())
    page.PAGE.write_text("another", encoding="utf-8")
    assert page.main(["--check"]) == 1 and page.main([]) == 0 and page.PAGE.read_text(encoding="utf-8") == text


def test_the_host_time_page_has_the_stored_figures():
    """The table, and each figure of the text as a median over PEFT's or AdamW's."""
    text = (page.PAGE.parents[1] / "internals" / "host-time.md").read_text(encoding="utf-8")
    rows = read_records(page.RESULTS / "xeon-amx-2core" / "suite_host.csv")
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

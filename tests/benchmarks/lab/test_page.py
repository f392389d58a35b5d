"""Pages and the README's figure have the figures of the stored results; what is kept for backward
is what hooks count.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers.launches import needs_triton

pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[bench]"
)
pytest.importorskip("peft", reason="runs where peft is installed: pip install .[bench]")
pytest.importorskip("matplotlib", reason="runs where matplotlib is installed: pip install .[bench]")

from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import stablelora_kernels as slk
from benchmarks.common.arms import (
    ACCELERATED,
    FROZEN,
    MLP_FUSED,
    OURS,
    PEFT,
    PLAIN,
    PROJECTIONS_FUSED,
    adapt,
)
from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.records import read_records
from benchmarks.lab import memory, mixtures
from benchmarks.lab.page import __main__ as page
from benchmarks.lab.page import headline
from tests.helpers.processes import ROOT


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_committed_page_is_of_the_committed_results(tmp_path, monkeypatch, capsys):
    """It has every case that lost among the losses; a changed page is noticed, and written anew."""
    assert page.main(["--check"]) == 0, capsys.readouterr().out
    text = page.PAGE.read_text(encoding="utf-8")
    losses = text.split("## Where it loses")[1].split("## Every figure")[0]
    ratios, _ = page.read(page.RESULTS)
    ratios = ratios[~ratios["case"].str.startswith("host ")]
    for (machine, case, arm), rows in ratios.groupby(["machine", "case", "arm"]):
        lost = rows[rows["q1"] > 1]["median"].max()
        start, end = f"| {machine} | {case}, ", f" | {arm} | "
        lines = [x for x in losses.splitlines() if x.startswith(start) and end in x]
        assert len(lines) == (lost == lost), (machine, case, arm)
        assert all(f"| {lost:.2f} (" in line for line in lines)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page.headline, "draw", lambda _: ())
    page.PAGE.write_text("another", encoding="utf-8")
    assert page.main(["--check"]) == 1 and page.main([]) == 0
    assert page.PAGE.read_text(encoding="utf-8") == text


FORMS = {
    "% over frozen": ".1f", "speedup over PEFT": ".2f", "loss minus PEFT": "+.3f", "MiB at the peak": ",.0f",
}  # fmt: skip


def test_the_performance_page_has_the_stored_figures():
    """Of the main jobs; and the yardstick's times and bytes."""
    text = text_of("docs/results/performance.md")
    for file in sorted(page.RESULTS.glob("*/main*/result.csv")):
        rows = read_records(file)
        rows = rows[rows["phase"].isin(("step", "held-out")) & rows["metric"].isin(FORMS)]
        assert {*rows["metric"]} == {*FORMS}
        shown = (rows["role"] == "ours") | (rows["metric"] == "MiB at the peak")
        for row in rows[shown].itertuples():
            form = FORMS[row.metric]
            value = f"{round(row.median, 3) + 0.0:{form}}"
            has_interval = row.half_95 == row.half_95
            spread = f" ± {row.half_95:{form.strip('+')}}" if has_interval else ""
            assert f"{value}{spread} |" in text, (file, row)
    arms = (PLAIN, ACCELERATED + MLP_FUSED)
    rows = read_records(page.RESULTS / MLP)
    cells = rows.set_index(["case", "arm", "metric"])
    for case in rows["case"].unique():
        line = ""
        for arm in arms:
            time = cells.loc[case, arm, "over_rival"]
            kept = cells.loc[case, arm, "saved_bytes"]["median"] / MIB
            line += (
                f"| {time['median']:.2f} ({time['q1']:.2f} to {time['q3']:.2f}); {kept:.0f} MiB "
            )
        assert line + "|\n" in text, line


MLP = "epyc-avx2-2core/suite_mlp.csv"


def stored(file: str, case: str, arm: str, metric: str) -> float:
    """A median that benchmarks/results holds."""
    rows = read_records(page.RESULTS / file)
    rows = rows[(rows["case"] == case) & (rows["arm"] == arm) & (rows["metric"] == metric)]
    (median,) = rows["median"]
    return median


@needs_triton
def test_the_readme_has_the_figures_of_the_stored_results():
    """The rows of its table, and the sum over a model's layers."""
    readme = text_of("README.md")
    layer = memory.layer_counts()
    kept = layer["bfloat16 adapters, no dropout"]
    rows = ("PEFT", memory.PLAIN, "`accelerate_peft`, `fuse_mlp`")
    assert "| {:,.0f} MiB | {:,.0f} MiB | **{:,.0f} MiB** |".format(*kept.loc[[*rows]]) in readme
    in_float32 = layer["no dropout"]
    assert f"PEFT keeps {in_float32['PEFT']:,.0f} MiB in the first row, and the other" in readme
    assert in_float32.loc[[*rows[1:]]].equals(kept.loc[[*rows[1:]]])
    experts = headline.experts_mib()
    assert f"| {experts['PEFT']:,.0f} MiB | | **{experts['and fuse_mlp']:,.0f} MiB** |" in readme
    case = "mlp 2048x576x1536 r16 fp32 dropout 0.1"
    arms = (memory.PLAIN, ACCELERATED + MLP_FUSED)
    mlp = [stored(MLP, case, arm, "over_rival") for arm in arms]
    assert "| 1 | {:.2f} | **{:.2f}** |".format(*mlp) in readme
    steps = read_records(page.RESULTS / "xeon-amx-2core" / "main" / "result.csv")
    steps = steps[(steps["phase"] == "step") & (steps["metric"] == "ms")].set_index("arm")["median"]
    assert f"| {steps['peft']:.0f} ms | | **{steps['accelerated']:.0f} ms** |" in readme


def test_the_experts_page_has_the_stored_figures():
    """Its three tables of the measured layer, and of DoRA beside it."""
    text, peft_page = text_of("docs/guides/experts.md"), text_of("docs/guides/peft.md")
    file = "xeon-avx512bf16-2core/experts.csv"
    ours = (ACCELERATED, ACCELERATED + MLP_FUSED)

    def line(head: str, form: str, file: str, case: str, arms: tuple[str, ...], metric: str) -> str:
        values = (stored(file, f"64 experts, {case}", arm, metric) for arm in arms)
        return f"| {head} | {' | '.join(form.format(value) for value in values)} |"

    for tokens in (16, 32, 128, 512):
        even = f"{tokens} rows each, bf16"
        for metric in ("peak_mib", "kept_mib"):
            arms = ("frozen, grouped_mm", "PEFT", *ours)
            assert line(f"{tokens}", "{:.0f}", file, even, arms, metric) in text
        cases = (f"64 experts, {tokens} rows each{skewed}, bf16" for skewed in ("", ", skewed"))
        ratios = [stored(file, case, arm, "over_rival") for case in cases for arm in ours]
        assert (
            "| {} | {:.2f} | {:.2f} | {:.2f} | {:.2f} |".format(tokens, *ratios[::2], *ratios[1::2])
            in text
        )
    nf4 = "xeon-avx512bf16-2core/experts_nf4.csv"
    for tokens in (32, 128):
        case = f"{tokens} rows each, NF4"
        of_ours = tuple(f"{arm}, NF4" for arm in ours)
        assert line(f"{tokens}, in NF4", "{:.2f}", nf4, case, of_ours, "over_rival") in text
        arms = ("frozen", "frozen, NF4", "PEFT, NF4", *of_ours)
        for metric, words in (("peak_mib", "peak"), ("kept_mib", "kept for backward")):
            assert line(f"{tokens}: {words}", "{:.0f}", nf4, case, arms, metric) in text
    for rows, words in ((256, "{:.2f} times PEFT's time on two cores"), (1024, "{:.2f} and")):
        case = f"DoRA, {rows} rows, bf16"
        with_amx = stored("xeon-amx-2core/experts.csv", case, ACCELERATED, "over_rival")
        without = stored(file, case, ACCELERATED, "over_rival")
        assert words.format(with_amx) in peft_page and f"{without:.2f} times" in peft_page


def test_the_description_of_the_readmes_figure_has_what_the_figure_shows():
    (described,) = re.findall(
        r"^!\[(.*)\]\(docs/_static/headline\.png\)$", text_of("README.md"), re.M
    )
    assert f"![{described}](_static/headline.png)" in text_of("docs/index.md")
    ratios = headline.adapters_ratios(page.RESULTS / headline.ADAPTERS)
    for words, values in {
        "frozen {:,.0f}, PEFT {:,.0f}, PEFT with bf16 adapters {:,.0f}, 72 lines of PyTorch {:,.0f}, "
        "accelerate_peft {:,.0f}, and fuse_mlp {:,.0f}.": headline.layer_mib(),
        "frozen {:,.0f}, PEFT {:,.0f}, accelerate_peft {:,.0f}, and fuse_mlp {:,.0f}.": headline.experts_mib(),
        "PEFT {:,.0f}, 72 lines of PyTorch {:,.0f}, this library {:,.0f}.": headline.moved_mb(),
        "{:.2f} with 16 tokens each, {:.2f} with 64, {:.2f} with 256.": ratios,
    }.items():
        assert words.format(*values.values()) in described


SEPARATE = "`apply_lora`, also with `fuse_projections`"
ROWS = {
    FROZEN: "frozen", PEFT: "PEFT", OURS: SEPARATE, OURS + PROJECTIONS_FUSED: SEPARATE, OURS + MLP_FUSED: "`fuse_mlp`",
    ACCELERATED + MLP_FUSED: "`fuse_mlp`",
}  # fmt: skip
# More than the 64 rows below which plain operators compute; no size divides another; masks fill
# their words.
SMALL = {"M": 97, "K": 96, "F": 160, "r": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("arm", "sizes", "device"),
    [
        *((arm, SMALL, "cpu") for arm in ROWS),
        *((arm, memory.LLAMA_8B, "meta") for arm in (FROZEN, PEFT)),
    ],
)
@pytest.mark.usefixtures("dropout_of_a_gpu")
def test_the_formula_is_what_hooks_count(arm, sizes, device, dropout):
    """Ours by the kernels in the interpreter, and PEFT's by the operator that a GPU has for
    dropout, whose mask is bool.
    """
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    m, k, f, r = sizes.values()
    with torch.device(device):
        config = LlamaConfig(hidden_size=k, intermediate_size=f, num_attention_heads=1)
        mlp = LlamaMLP(config).to(torch.bfloat16).requires_grad_(False)
        x = torch.zeros(1, m, k, dtype=torch.bfloat16, requires_grad=True)
    adapt(nn.ModuleDict({"mlp": mlp}), arm, memory.LINEAR[-3:], r=r, dropout=dropout).train()
    with slk.settings(backend="triton"):
        found = saved_for_backward(lambda: mlp(x), [*mlp.parameters()])
    kept = memory.kept(dropout > 0, **sizes).loc[ROWS[arm]].sum()
    # A frozen MLP does not keep x; of others a test's x has no other owner.
    assert found == kept


TABLES = {
    memory.mlp_table: "fusing",
    memory.layer_table: "peft",
    memory.terms_table: "will-it-fit",
    memory.plan_table: "will-it-fit",
    memory.fit_table: "will-it-fit",
    memory.arguments_table: "will-it-fit",
    mixtures.fit_table: "will-it-fit",
}
# Each counts steps of many models.
LONG = (memory.fit_table, memory.arguments_table, memory.plan_table, mixtures.fit_table)


@needs_triton
@pytest.mark.parametrize(
    "table",
    [pytest.param(t, marks=pytest.mark.nightly) if t in LONG else t for t in TABLES],
    ids=lambda table: f"{table.__module__.rpartition('.')[2]}.{table.__name__}",
)
def test_the_guides_have_the_tables(table):
    text = text_of(f"docs/guides/{TABLES[table]}.md")
    assert (table(memory.layer_counts()) if table is memory.layer_table else table()) in text


@pytest.mark.nightly
@needs_triton
def test_the_text_of_will_it_fit_has_the_tables_figures():
    text, llama = text_of("docs/guides/will-it-fit.md"), "Llama 3.1 8B"

    def most(arm: str, weights: str, checkpointing: bool, card: int, given: Any, name=llama) -> int:
        run = memory.Run(name, weights, checkpointing, given._replace(arm=arm or given.arm))
        return run.most_tokens(card)

    def gain(*of: Any, over: str = "") -> float:
        return most(memory.FUSED, *of) / most(over, *of)

    float32 = memory.ARGUMENTS["Liger-Kernel"]
    gains = [gain("NF4", True, 80, memory.BEST, name) for name in memory.SHAPES]
    small, large = (
        [[step.tokens for step in plan.steps[3:]] for plan in memory.plans_of(*of)]
        for of in ((llama, "NF4", 24), ("Llama 3.1 70B", "NF4", 80))
    )
    offloaded = [last / fused for fused, _, last in (*small, *large)]
    own, liger = (100 * (tiled / fused - 1) for fused, tiled, _ in small)
    logits = most(memory.FUSED, "bf16", True, 24, memory.DEFAULT)
    without_logits = memory.plans_of(llama, "bf16", 24).own.steps[3].tokens
    assert gain("bf16", False, 80, memory.DEFAULT, over=memory.PLAIN) == 1
    plain = [1 / gain("bf16", each, 80, float32, over=memory.PLAIN) for each in (False, True)]
    for words in (
        f"fits {gain('NF4', False, 24, memory.BEST):.2f} times the tokens of PEFT",
        f"it fits {min(gains):.2f} to {max(gains):.2f} times as many",
        f"fits {gain('bf16', True, 80, float32):.2f} times PEFT's tokens with checkpointing",
        f"and {gain('bf16', False, 80, float32):.2f} times without it",
        f"{plain[0]:.2f} times as many with Liger-Kernel",
        f"With checkpointing they fit {plain[1]:.2f} times as many",
        f"fits {offloaded[0]:.1f} times the tokens of `fuse_mlp`",
        f"and {offloaded[2]:.1f} times for the 70B model",
        f"norms {offloaded[1]:.1f} and {offloaded[3]:.1f} times",
        f"gains {own:.0f} % for the 8B model, and {liger:.0f} % with",
        f"on {logits:,} tokens instead of {without_logits:,}",
    ):
        assert words in text
    readme = text_of("README.md")
    assert f"then fits {own:.0f} % more tokens of an 8B model in NF4 on 24 GiB" in readme
    assert f"and {liger:.0f} % more with Liger-Kernel's norms" in readme

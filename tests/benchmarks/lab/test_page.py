"""Pages and the README's figure have the figures of the stored results; what is kept for backward
is what hooks count.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

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
from benchmarks.lab import memory
from benchmarks.lab.page import __main__ as page
from benchmarks.lab.page import headline
from benchmarks.lab.step_memory import LIGER_LOSS
from tests.helpers.processes import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="runs where Triton is installed, for launch plans: Linux on x86-64 and aarch64",
)


def test_the_committed_page_is_of_the_committed_results(tmp_path, monkeypatch, capsys):
    """It has every case that lost, and none that won, among the losses; a changed page is noticed,
    and written anew.
    """
    assert page.main(["--check"]) == 0, capsys.readouterr().out
    text = page.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", text)
    losses = text.split("## Where it loses")[1].split("## Commands of these figures")[0]
    ratios, _ = page.read(page.RESULTS)
    ratios = ratios[~ratios["case"].str.startswith("host ")]
    for (machine, case, arm), rows in ratios.groupby(["machine", "case", "arm"]):
        lost = rows[rows["q1"] > 1]["median"].max()
        (*line,) = re.findall(
            re.escape(f"| {machine} | {case}, ") + f".* \\| {re.escape(arm)} \\| .*", losses
        )
        assert len(line) == (lost == lost) and all(f"| {lost:.2f} (" in each for each in line), (
            machine,
            case,
            arm,
        )
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page.headline, "draw", lambda _: ())
    page.PAGE.write_text("another", encoding="utf-8")
    assert (
        page.main(["--check"]) == 1
        and page.main([]) == 0
        and page.PAGE.read_text(encoding="utf-8") == text
    )


def test_the_performance_page_has_the_figures_of_the_main_jobs():
    table = page.main_table(page.RESULTS)
    assert table in page.PAGE.with_name("performance.md").read_text(encoding="utf-8")
    files = [*page.RESULTS.glob("*/main*/result.csv")]
    assert table.count("\n") == 1 + len(files) and len(files) >= 6
    first = read_records(page.RESULTS / "xeon-amx-2core" / "main" / "result.csv")
    first = first[first["phase"] == "step"].set_index(["arm", "metric"])["median"]
    speed = first["accelerated", "speedup over PEFT"]
    peaks = [first[arm, "MiB at the peak"] for arm in ("peft", "accelerated")]
    (row,) = [line for line in table.splitlines() if "xeon-amx-2core, bfloat16, 0.05 |" in line]
    assert f"| {speed:.2f} ± " in row and "| {:,.0f} | {:,.0f} |".format(*peaks) in row


def test_the_performance_page_has_the_processors_and_the_optimizers_times():
    text = page.PAGE.with_name("performance.md").read_text(encoding="utf-8")
    rows = {
        "float32": "float32, dropout {}, all",
        "float32, AVX2 instructions alone": "float32, dropout {}, AVX2, emulated",
        "bfloat16": "bfloat16, dropout {}, all",
        "bfloat16, without the processor's bfloat16 instructions": "bfloat16, dropout {}, AVX2, emulated",
    }
    for words, case in rows.items():
        ratios = [
            stored(
                "xeon-amx-2core/cpu.csv",
                f"step, {case.format(dropout)}",
                "accelerated PEFT",
                "ms_over_rival",
            )
            for dropout in ("0.0", "0.05")
        ]
        plain, bold = ("| {} | {:.2f} | {:.2f} |", "| {} | **{:.2f}** | **{:.2f}** |")
        assert any(line.format(words, *ratios) in text for line in (plain, bold)), words
    arms = {
        "Algorithm 1 by hand, AdamW foreach": "AdamW(foreach=True)` | {:.1f} | {:.1f} |",
        "AdamW fused": "without Algorithm 1 | {:.1f} | {:.1f} |",
        "StableLoRAAdamW": "| `StableLoRAAdamW` | **{:.1f}** | {:.1f} |",
    }
    for arm, line in arms.items():
        case = "optimizer 64 pairs r8 width 2048 fp32 {}"
        times = [
            stored("xeon-amx-2core/suite_optimizer.csv", case.format(state), arm, "ms")
            for state in ("shrinking", "latched")
        ]
        assert line.format(*times) in text, arm


def test_the_page_of_several_adapters_has_the_stored_ratios():
    text = (ROOT / "docs" / "guides" / "several-adapters.md").read_text(encoding="utf-8")
    for tokens in (16, 64, 256):
        ratios = [
            stored(
                str(headline.ADAPTERS),
                f"8 adapters x {tokens} tokens, {dtypes}",
                "adapters_of_rows",
                "over_rival",
            )
            for dtypes in ("fp32", "bf16", "bf16, adapters too")
        ]
        assert f"| {tokens} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |" in text


def test_the_performance_page_has_the_yardsticks_times_and_bytes():
    text = page.PAGE.with_name("performance.md").read_text(encoding="utf-8")
    rows = read_records(page.RESULTS / "epyc-avx2-2core" / "suite_mlp.csv")
    rows = rows[rows["arm"].isin((PLAIN, ACCELERATED + MLP_FUSED))]
    cells = rows.set_index(["case", "arm", "metric"])
    lines = []
    for case in rows["case"].unique():
        line = ""
        for arm in (PLAIN, ACCELERATED + MLP_FUSED):
            time = cells.loc[case, arm, "over_rival"]
            kept = cells.loc[case, arm, "saved_bytes"]["median"] / MIB
            line += (
                f" | {time['median']:.2f} ({time['q1']:.2f} to {time['q3']:.2f}); {kept:.0f} MiB"
            )
        lines.append(line + " |\n")
    assert len(lines) == 4 and all(line in text for line in lines), lines


def stored(file: str, case: str, arm: str, metric: str) -> float:
    """A median that benchmarks/results holds."""
    rows = read_records(page.RESULTS / file)
    rows = rows[(rows["case"] == case) & (rows["arm"] == arm) & (rows["metric"] == metric)]
    (median,) = rows["median"]
    return median


def cell(table: str, start: str, column: str) -> str:
    """Of a table in Markdown: the row that begins so, and the column whose head ends so."""
    head, *rows = table.splitlines()
    (row,) = [line for line in rows if line.startswith(start)]
    columns = [name.strip() for name in head.split("|")]
    (place,) = [place for place, name in enumerate(columns) if name.endswith(column)]
    return row.split("|")[place].strip()


@needs_triton
def test_the_readme_has_the_figures_of_the_stored_results():
    """The rows of its table, and the sum over a model's layers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    layer = memory.layer_counts()
    column = "bfloat16 adapters, no dropout"
    rows = ["PEFT", memory.PLAIN, "`accelerate_peft`, `fuse_mlp`"]
    kept, in_float32 = layer.loc[rows, column], layer.loc[rows, "no dropout"]
    in_autocast = layer.loc[rows, "autocast, no dropout"]
    assert "| {:,.0f} MiB | {:,.0f} MiB | **{:,.0f} MiB** |".format(*kept) in readme
    peft = f"{in_float32['PEFT']:,.0f} MiB in the first row, or {in_autocast['PEFT']:,.0f} MiB"
    assert f"PEFT keeps {peft} under autocast, and the other two keep what they kept" in readme
    assert in_float32[1:].equals(kept[1:]) and in_autocast[1:].equals(kept[1:])
    experts = headline.experts_mib()
    assert f"| {experts['PEFT']:,.0f} MiB | | **{experts['and fuse_mlp']:,.0f} MiB** |" in readme
    case = "mlp 2048x576x1536 r16 fp32 dropout 0.1"
    mlp = [
        stored("epyc-avx2-2core/suite_mlp.csv", case, arm, "over_rival")
        for arm in (memory.PLAIN, "accelerated PEFT, MLP fused")
    ]
    assert "| 1 | {:.2f} | **{:.2f}** |".format(*mlp) in readme
    steps = read_records(page.RESULTS / "xeon-amx-2core" / "main" / "result.csv")
    steps = steps[(steps["phase"] == "step") & (steps["metric"] == "ms")].set_index("arm")["median"]
    assert f"| {steps['peft']:.0f} ms | | **{steps['accelerated']:.0f} ms** |" in readme


def test_the_experts_page_has_the_stored_figures():
    """Its two tables of the measured layer, and of DoRA beside it."""
    guides = ROOT / "docs" / "guides"
    text = (guides / "experts.md").read_text(encoding="utf-8")
    file = "xeon-avx512bf16-2core/experts.csv"
    ours = ("accelerated PEFT", "accelerated PEFT, MLP fused")
    for tokens in (16, 32, 128, 512):
        even = f"64 experts, {tokens} rows each, bf16"
        skewed = f"64 experts, {tokens} rows each, skewed, bf16"
        ratios = [stored(file, case, arm, "over_rival") for arm in ours for case in (even, skewed)]
        assert f"| {tokens} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |" in text
        arms = ("frozen, grouped_mm", "PEFT", *ours)
        mib = [stored(file, even, arm, "kept_mib") for arm in arms]
        assert f"| {tokens} | {' | '.join(f'{value:.0f}' for value in mib)} |" in text
    packed = [
        stored(
            "xeon-avx512bf16-2core/experts_nf4.csv",
            f"64 experts, {tokens} rows each, NF4",
            "accelerated PEFT, NF4",
            "over_rival",
        )
        for tokens in (32, 128)
    ]
    assert "take {:.2f} and {:.2f} times PEFT 0.18.1's time on 32".format(*packed) in text
    kept = headline.experts_mib()
    assert f"keep {kept['PEFT']:,.0f} MiB for backward with PEFT" in text
    assert f"**{kept['and fuse_mlp']:,.0f} MiB** with `accelerate_peft" in text
    performance = (guides.parent / "results" / "performance.md").read_text(encoding="utf-8")
    for rows, words in ((256, "{:.2f} times PEFT's time on two cores"), (1024, "{:.2f} and")):
        case = f"DoRA, {rows} rows, bf16"
        with_amx = stored("xeon-amx-2core/experts.csv", case, "accelerated PEFT", "over_rival")
        without = stored(file, case, "accelerated PEFT", "over_rival")
        assert words.format(with_amx) in performance and f"{without:.2f} times" in performance


def test_the_description_of_the_readmes_figure_has_what_the_figure_shows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (described,) = re.findall(r"^!\[(.*)\]\(docs/_static/headline\.png\)$", readme, re.M)
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"![{described}](_static/headline.png)" in index
    kept = "frozen {:,.0f}, PEFT {:,.0f}, accelerate_peft {:,.0f}, and fuse_mlp {:,.0f}."
    of_layer = (
        "frozen {:,.0f}, PEFT {:,.0f}, PEFT with bf16 adapters {:,.0f}, 72 lines of PyTorch {:,.0f}, "
        "accelerate_peft {:,.0f}, and fuse_mlp {:,.0f}."
    )
    assert of_layer.format(*headline.layer_mib().values()) in described
    assert kept.format(*headline.experts_mib().values()) in described
    bytes_moved = "PEFT {:,.0f}, 72 lines of PyTorch {:,.0f}, this library {:,.0f}."
    assert bytes_moved.format(*headline.moved_mb().values()) in described
    ratios = headline.adapters_ratios(page.RESULTS / headline.ADAPTERS)
    adapters = "{:.2f} with 16 tokens each, {:.2f} with 64, {:.2f} with 256."
    assert adapters.format(*ratios.values()) in described


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
def test_the_formula_is_what_hooks_count(arm, sizes, device, dropout, monkeypatch):
    """Ours by the kernels in the interpreter, and PEFT's by the operator that a GPU has for
    dropout, whose mask is bool.
    """
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    drop = torch.native_dropout
    monkeypatch.setattr(
        nn.functional,
        "dropout",
        lambda x, p=0.5, training=True, inplace=False: drop(x, p, training)[0],
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


# Some count steps of many models.
TABLES = {
    memory.mlp_table: "fusing",
    memory.layer_table: "peft",
    memory.plan_table: "will-it-fit",
    memory.fit_table: "will-it-fit",
}


@needs_triton
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_guides_have_the_tables(table):
    text = (ROOT / "docs" / "guides" / f"{TABLES[table]}.md").read_text(encoding="utf-8")
    assert (table(memory.layer_counts()) if table is memory.layer_table else table()) in text


@needs_triton
def test_the_text_of_will_it_fit_has_the_tables_figures():
    text = (ROOT / "docs" / "guides" / "will-it-fit.md").read_text(encoding="utf-8")

    def gain(weights: str, checkpointing: bool, card: int, given: memory.Arguments, name: str):
        run = memory.Run(name, weights, checkpointing, given)
        return run._replace(given=given._replace(arm=memory.FUSED)).most_tokens(
            card
        ) / run.most_tokens(card)

    llama = "Llama 3.1 8B"
    gains = [gain("NF4", False, 80, memory.BEST, name) for name in memory.SHAPES]
    assert f"fits {min(gains):.2f} to {max(gains):.2f} times the tokens of PEFT at its best" in text
    gains = [gain("NF4", True, 80, memory.BEST, name) for name in memory.SHAPES]
    assert f"it fits {min(gains):.2f} to {max(gains):.2f} times as many" in text
    float32 = memory.DEFAULT._replace(loss=LIGER_LOSS, liger=True)
    with_checkpoints, without = (gain("bf16", each, 80, float32, llama) for each in (True, False))
    assert f"fits {with_checkpoints:.2f} times PEFT's tokens with checkpointing" in text
    assert f"and {without:.2f} times without it" in text
    plain = [
        memory.Run(llama, "bf16", checkpointing, given._replace(arm=memory.PLAIN)).most_tokens(80)
        / memory.Run(llama, "bf16", checkpointing, given._replace(arm=memory.FUSED)).most_tokens(80)
        for given in (memory.DEFAULT, float32)
        for checkpointing in (False, True)
    ]
    assert plain[:2] == [1, 1]
    performance = page.PAGE.with_name("performance.md").read_text(encoding="utf-8")
    assert (
        f"it fits {plain[2]:.2f} times as many, and with checkpointing too {plain[3]:.2f} times"
        in performance
    )

    def of_checkpoints(name: str, weights: str, card: int) -> list[list[int]]:
        """The tokens of the rows with checkpoints, with each one's norms."""
        plans = memory.plans_of(name, weights, card)
        return [[step.tokens for step in plan.steps[3:]] for plan in plans]

    small, large = of_checkpoints(llama, "NF4", 24), of_checkpoints("Llama 3.1 70B", "NF4", 80)
    gains = [offloaded / fused for fused, _, offloaded in (*small, *large)]
    assert f"fits {gains[0]:.1f} times the tokens of `fuse_mlp`" in text
    assert f"and {gains[2]:.1f} times for the 70B model" in text
    assert f"norms {gains[1]:.1f} and {gains[3]:.1f} times" in text
    llamas = [
        of_checkpoints(*key, card) for *key, cards in memory.PLANS for card in cards if llama in key
    ]
    own, liger = (
        {f"{100 * (tiled / fused - 1):.0f}" for fused, tiled, _ in rows}
        for rows in zip(*llamas, strict=True)
    )
    assert (
        f"gains {min(own)} to {max(own)} % for the 8B model, and {' to '.join(liger)} % with"
        in text
    )
    own, liger = (100 * (tiled / fused - 1) for fused, tiled, _ in small)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"then fits {own:.0f} % more tokens of an 8B model in NF4 on 24 GiB" in readme
    assert f"and {liger:.0f} % more with Liger-Kernel's norms" in readme
    logits = memory.Run(llama, "bf16", True, memory.DEFAULT._replace(arm=memory.FUSED))
    fused = memory.plans_of(llama, "bf16", 24).own.steps[3]
    assert f"on {logits.most_tokens(24):,} tokens instead of {fused.tokens:,}" in text

"""What an MLP keeps: the formula against hooks, the measured step, and the tables that the documentation has of them."""

from __future__ import annotations

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="has the MLP; the bench extra brings it")
pytest.importorskip("peft", reason="is an arm; the bench extra brings it")

import stablelora_kernels as slk
from benchmarks.lab.mlp_memory import __main__, measure, report
from benchmarks.lab.mlp_memory.arms import COUNTED, MLP_TARGETS, adapt, counted, dropout_of_a_gpu, llama_mlp
from benchmarks.lab.mlp_memory.formula import (
    ACCELERATED,
    ARMS,
    FROZEN,
    FUSED,
    GROUPS,
    PEFT,
    PROJECTIONS,
    SEPARATE,
    UNSLOTH,
    Sizes,
    in_words,
    kept,
    total,
)
from tests.helpers.processes import ROOT

# More than the 64 rows below which the PyTorch path calls plain operators; no size divides another.
SIZES = Sizes(tokens=97, width=24, inner=40, rank=3)
DTYPES = (torch.bfloat16, torch.float32)
MIB = 2**20


def by_formula(arm, sizes, dtype, dropout, gpu):
    return sizes.bytes(total(kept(arm, dtype, bool(dropout), gpu)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arm", COUNTED)
def test_the_formula_is_what_hooks_count_on_a_cpu(arm, dtype, dropout):
    with slk.use_backend("torch"):
        found = counted(llama_mlp(arm, SIZES, dtype, dropout, "cpu"), SIZES.tokens)
    assert found == by_formula(arm, SIZES, dtype, dropout, gpu=False)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arm", COUNTED)
def test_the_formula_is_what_hooks_count_of_a_gpus_kernels(arm, dtype, dropout):
    """Ours by the kernels in the interpreter, and PEFT's by the operator that a GPU has for dropout."""
    pytest.importorskip("triton")
    with slk.use_backend("triton"), dropout_of_a_gpu():
        found = counted(llama_mlp(arm, SIZES, dtype, dropout, "cpu"), SIZES.tokens)
    assert found == by_formula(arm, SIZES, dtype, dropout, gpu=True)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("arm", [FROZEN, PEFT])
def test_an_8b_llamas_mlp_counted_at_its_size(arm, dropout):
    """On tensors without memory. The count is the table's figure."""
    with dropout_of_a_gpu():
        found = counted(llama_mlp(arm, report.LLAMA_8B, report.DTYPE, dropout, "meta"), report.LLAMA_8B.tokens)
    assert found / MIB == report.mib(arm, bool(dropout))


@pytest.mark.parametrize("arm", [SEPARATE, PROJECTIONS, FUSED, ACCELERATED])
def test_our_mlp_of_an_8b_llama_counted_at_its_size(arm):
    """PyTorch's operators also keep A and B in bfloat16."""
    found = counted(llama_mlp(arm, report.LLAMA_8B, report.DTYPE, 0.0, "meta"), report.LLAMA_8B.tokens)
    assert found == by_formula(arm, report.LLAMA_8B, report.DTYPE, 0.0, gpu=False)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("arm", [FUSED, ACCELERATED])
def test_a_fused_mlp_keeps_x_g_and_u_and_at_most_one_percent_more(arm, dropout, gpu):
    m, k, f, _ = report.LLAMA_8B
    least = 2 * (m * k + 2 * m * f)
    assert least <= by_formula(arm, report.LLAMA_8B, report.DTYPE, dropout, gpu) <= 1.01 * least


def test_groups_and_words():
    for arm in ARMS:
        for dropout in {False, arm != UNSLOTH}:
            assert kept(arm, torch.bfloat16, dropout, True).keys() <= {*GROUPS}
    assert in_words(total(kept(FUSED, torch.bfloat16, True, False))) == "2 MK + 4 MF + 6 Mr + 6 r(K+F)"
    assert Sizes(2, 3, 5, 7).bytes({"MK": 1, "MF": 10, "Mr": 100, "r(K+F)": 1000, "1": 4}) == 6 + 100 + 1400 + 56000 + 4
    with pytest.raises(ValueError, match=r"arm must be one of 'frozen', .* got 'peft'"):
        kept("peft", torch.bfloat16, False, True)
    with pytest.raises(ValueError, match="dropout must be False for 'Unsloth'"):
        kept(UNSLOTH, torch.bfloat16, True, True)


def test_an_arm_whose_mlp_is_not_fused_is_an_error():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=1, hidden_act="relu")
    with pytest.raises(RuntimeError, match=r"every MLP must be fused, got .*name='mlp'"):
        adapt(torch.nn.ModuleDict({"mlp": LlamaMLP(config)}), FUSED, MLP_TARGETS, 2, 0.0)


# The measured step


@pytest.fixture(scope="module")
def rows():
    """Steps of a random model, by arm."""
    return {arm: measure.measure(measure.Job(arm, "fp32", 0.0, "random", batch_size=16)) for arm in COUNTED}


def test_a_step_keeps_less_by_what_its_mlps_keep_less(rows):
    sizes, layers = Sizes(16 * 12, 64, 160, 16), 2
    for arm, row in rows.items():
        expected = layers * by_formula(arm, sizes, torch.float32, 0.0, gpu=False) / MIB
        assert row["mlps_saved_mib"] == pytest.approx(expected, abs=0.006), arm
        assert row["layers"] == layers and row["tokens"] == sizes.tokens
    for arm in (FUSED, ACCELERATED):
        less = {key: rows[SEPARATE][key] - rows[arm][key] for key in ("saved_mib", "mlps_saved_mib")}
        assert less["saved_mib"] == pytest.approx(less["mlps_saved_mib"], abs=0.021)
        assert less["mlps_saved_mib"] > 0.4
    # The rest of the model keeps something, too.
    assert all(row["saved_mib"] > row["mlps_saved_mib"] + 0.1 for row in rows.values())


def test_all_arms_of_a_step_have_one_loss(rows):
    adapted = [row for arm, row in rows.items() if arm != FROZEN]
    for key in ("loss", "loss_after_steps"):
        losses = [row[key] for row in adapted]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    # Adapters compute something, and are trained.
    assert abs(rows[FROZEN]["loss"] - rows[PEFT]["loss"]) > 1e-5
    assert adapted[0]["loss_after_steps"] < adapted[0]["loss"] - 1e-4


@pytest.mark.nightly
def test_an_arm_is_measured_in_a_process_of_its_own(capsys):
    job = measure.Job(FUSED, "bf16", 0.05, "random", batch_size=8, layers=1)
    (row,) = measure.measure_all([job])["rows"]
    assert row["arm"] == FUSED and row["layers"] == 1 and math.isfinite(row["loss"])
    assert row["peak_mib"] is None or row["peak_mib"] > row["step_mib"]
    assert FUSED in capsys.readouterr().out


def test_a_process_that_fails_is_named(monkeypatch):
    def fails(*args, **options):
        return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nAssetError: no network\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(RuntimeError, match=r"Job\(arm='PEFT'.*AssetError: no network"):
        measure.measure_all([measure.Job(PEFT, "fp32", 0.0)])


def test_the_measured_jobs_are_all_arms():
    found = [*measure.jobs()]
    assert len({*found}) == len(found) == 2 * 2 * len(measure.ARMS)
    assert {FROZEN, PEFT, SEPARATE, PROJECTIONS, FUSED} <= {job.arm for job in found}


# The documentation


def test_the_picture_and_the_tables(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks.lab.mlp_memory import plots

    (tmp_path / "here").mkdir()
    row = {
        "arm": FUSED, "dtype": "bf16", "dropout": 0.05, "layers": 3, "tokens": 7, "r": 2, "loss": 0.5, "loss_after_steps": 0.25,
        "saved_mib": 1234.5, "mlps_saved_mib": 3.0, "peak_mib": 4.0, "step_mib": 5.0,
    }  # fmt: skip
    peft = row | {"arm": PEFT, "peak_mib": None, "step_mib": None}
    rows = [row, peft, row | {"dropout": 0.0, "peak_mib": 6.0}, peft | {"dropout": 0.0}]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "measure_all", lambda jobs: {"rows": rows})
    monkeypatch.setattr(plots.draw, "__defaults__", (tmp_path / "plot.png",))
    assert __main__.main(["--measure", str(tmp_path / "here" / report.FILE)]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "here" / report.FILE).read_text()) == {"rows": rows}
    assert "for backward), MiB | bfloat16, dropout 0.05, 3 layers | bfloat16, 3 layers |" in text
    assert "| `apply_lora`, `fuse_mlp` | 4 (1,234) | 6 (1,234) |" in text
    assert "| PEFT | (1,234) | (1,234) |" in text
    assert report.formula_table() in text


def test_the_documentation_has_the_tables_of_what_is_stored():
    guide = (ROOT / "docs" / "guides" / "fusing.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    assert report.formula_table() in guide
    assert "../_static/fused-mlp-memory.png" in guide
    assert (ROOT / "docs" / "_static" / "fused-mlp-memory.png").is_file()
    files = report.stored()
    assert files
    for file in files:
        assert report.measured_table(json.loads(file.read_text(encoding="utf-8"))) in page, file


def test_what_is_stored_agrees_with_the_formula_and_has_equal_losses():
    files = report.stored()
    assert files
    for file in files:
        groups = {}
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            groups.setdefault((row["dtype"], row["dropout"]), {})[row["arm"]] = row
        assert len(groups) == 4
        for (name, dropout), arms in groups.items():
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
            for arm, row in arms.items():
                # SmolLM2-135M's.
                sizes = Sizes(row["tokens"], 576, 1536, row["r"])
                expected = row["layers"] * by_formula(arm, sizes, dtype, dropout, gpu=False) / MIB
                assert row["mlps_saved_mib"] == pytest.approx(expected, abs=0.006), (file, name, dropout, arm)
            less = {key: arms[SEPARATE][key] - arms[FUSED][key] for key in ("saved_mib", "mlps_saved_mib")}
            assert less["saved_mib"] == pytest.approx(less["mlps_saved_mib"], abs=0.03)
            losses = [row["loss"] for arm, row in arms.items() if arm not in (FROZEN, PEFT)]
            # PEFT draws other masks from the same seed.
            losses += [] if dropout else [arms[PEFT]["loss"]]
            assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5 if name == "fp32" else 0.02)

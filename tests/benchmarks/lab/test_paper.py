"""The paper's benchmark: what it plans, chooses and concludes from given runs, and real runs of tiny models."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from benchmarks.common.data import Dataset
from benchmarks.common.tables import RESULTS
from benchmarks.lab.paper import __main__, ablations, plots, report, scores, training
from benchmarks.lab.paper import study as paper
from benchmarks.lab.paper import tasks as _paper_tasks
from benchmarks.lab.paper.training import ADAMW, LORA_PLUS, RIEMANNIAN, RITE, STABLE, Run

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

STUDY = paper.Study(
    "m",
    "sarcasm",
    9,
    4,
    lrs=(1e-3, 1e-2),
    ratios=(5e-4, 5e-3),
    optimizers=(ADAMW, LORA_PLUS, STABLE),
    seeds=3,
    headline_seeds=4,
)


def record(run, test=0.5, validation=0.5, **more):
    return {
        "run": asdict(run), "diverged": False, "train_loss": [1.0], "seconds": 1.0, "optimizer_ms": 2.0, "state_bytes": 1024,
        "a_over_start": 1.0, "b_norm": 1.0, "validation": {"accuracy": validation, "loss": 1.0},
        "test": {"accuracy": test, "loss": 1.0},
    } | more  # fmt: skip


def screened(validation):
    """Records of the study's screening, with ``validation(run)`` as accuracy."""
    return [record(run, validation=validation(run)) for run in STUDY.screen()]


def test_the_screening_has_every_arm_rate_and_first_seed():
    runs = STUDY.screen()
    assert len(runs) == len(set(runs)) == 2 * 2 * (2 + 2)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.arm for run in runs} == {ADAMW, LORA_PLUS, f"{STABLE} 0.0005", f"{STABLE} 0.005"}
    assert len({run.file_name for run in runs}) == len(runs)


def test_further_seeds_go_to_what_validation_examples_chose(monkeypatch):
    def validation(run):
        return {ADAMW: 0.9 if run.lr == 1e-3 else 0.8, STABLE: 0.8 + run.shrink_ratio + run.lr}.get(
            run.optimizer, run.lr
        )

    records = screened(validation)
    assert scores.best(records) == {ADAMW: (1e-3, 0.0), LORA_PLUS: (1e-2, 0.0), STABLE: (1e-2, 5e-3)}
    runs = STUDY.decide(records)
    assert [(run.optimizer, run.seed) for run in runs] == [
        (ADAMW, 2), (LORA_PLUS, 2), (STABLE, 2), (ADAMW, 3), (STABLE, 3)
    ]  # fmt: skip
    monkeypatch.setitem(paper.PRESETS, "test", paper.Preset((STUDY,)))
    # A screening that is not whole decides nothing.
    assert paper.missing("test", records[:-1]) == [STUDY.screen()[-1]]
    assert STABLE not in scores.best(records[:-1]) and ADAMW in scores.best(records[:-1])
    assert paper.missing("test", records) == runs
    assert paper.missing("test", records + [record(run) for run in runs]) == []


def test_presets_have_their_parts_in_order(monkeypatch):
    study = replace(STUDY, edge_seeds=3)
    for parts in (paper.one_change, paper.high_rates):
        monkeypatch.setitem(paper.PRESETS, parts.__name__, paper.Preset((study,), parts))
    assert paper.missing("high_rates", []) == paper.edge(study)
    records = screened(lambda run: run.lr)
    assert paper.missing("one_change", []) == study.screen()
    assert paper.missing("one_change", records) == study.decide(records)
    records += [record(run) for run in study.decide(records)]
    assert paper.missing("one_change", records) == paper.ablations(study, records, paper.ABLATION_SEEDS)


def test_the_untrained_are_two_runs_a_task_and_never_fell():
    runs = paper.missing("untrained", [])
    assert {run.lr for run in runs} == {0.0} and {run.model for run in runs} == {"smollm2"}
    records = [record(run, test=0.4) for run in runs]
    plays = paper.missing("untrained", records)
    assert [run.task for run in runs + plays] == ["sarcasm"] * 2 + ["plays"] * 2
    records += [record(run) | {"test": {"accuracy": None, "loss": 4.1}} for run in plays]
    assert paper.missing("untrained", records) == []
    assert not scores.fallen(records[:2]) and not scores.fallen(records[2:])
    text = report.table(records)
    assert "1 step, batch 16" in text and "40.0" in text and "4.100" in text and "minus AdamW" not in text


def test_runs_of_two_batch_sizes_are_never_compared():
    records = screened(lambda run: run.lr)
    others = [record(replace(run, batch_size=8), test=0.9) for run in STUDY.screen()]
    assert not {run.file_name for run in STUDY.screen()} & {scores.run_of(found).file_name for found in others}
    assert scores.plain(records + others, STUDY.setting) == records
    assert replace(STUDY, batch_size=8).decide(records) == []
    text = report.table(records + others)
    assert "m on sarcasm, bf16, 9 steps, batch 4," in text and "m on sarcasm, bf16, 9 steps, batch 8," in text
    assert "50.0" in text and "90.0" in text and "70.0" not in text


def test_a_run_that_diverged_is_never_the_best():
    records = screened(lambda run: 0.5)
    for found in records:
        if found["run"]["lr"] == 1e-3:
            found.update(diverged=True, validation=None, test=None)
    assert {lr for lr, _ in scores.best(records).values()} == {1e-2}
    text = "\n".join(report.rate_table(records, loss=False))
    assert "0.0" in text and "50.0" in text


def test_runs_that_fell_are_counted_apart():
    runs = [run for run in STUDY.screen() if run.optimizer == ADAMW]
    records = [record(run, test=0.8) for run in runs]
    assert report.fallen_table(records, loss=False) == []
    records += [record(replace(runs[-1], seed=seed), test=test) for seed, test in ((2, 0.495), (3, 0.86))]
    assert scores.fallen(records) == {(ADAMW, 1e-2)}
    header, _, row = report.fallen_table(records, loss=False)
    # Of the rate at which none fell, nothing is said.
    assert "lr 0.01" in header and "lr 0.001 " not in header
    assert row.split() == [ADAMW, "1", "of", "4,", "82.0", "±", "8.6"]
    assert scores.seeds(records) == "2 to 4 seeds" and scores.seeds(records[:1]) == "1 seed"
    # At a rate below the best, so few right answers are not a fall.
    slow = [record(replace(run, lr=1e-4), test=0.55, validation=0.4) for run in runs]
    assert scores.fallen(records + slow) == {(ADAMW, 1e-2)}
    text = report.table(records)
    assert "1 of 4, 82.0" in text and "at its best" in text
    # Of few runs there is a p where one could be small: one of one beside four can't, three of three can.
    for seeds, chance in ((1, ""), (3, " (p 0.14)")):
        beside = [record(replace(runs[-1], optimizer=LORA_PLUS, seed=seed), test=0.495) for seed in range(seeds)]
        *_, row = report.fallen_table(records + beside, loss=False)
        assert row.split(maxsplit=1) == [LORA_PLUS, f"{seeds} of {seeds}{chance}"]
    # Of a single rate, as the edge has it in float32, none was chosen.
    assert "at its best" not in report.table([found for found in records if found["run"]["lr"] == 1e-2])


def test_the_edge_is_the_high_rates_and_the_highest_in_float32_too():
    runs = paper.edge(replace(STUDY, edge_lrs=(3e-3, 1e-2), edge_seeds=2))
    expected = [ADAMW, f"{STABLE} 0.0005", f"{STABLE} 0.005"]
    assert [(run.dtype, run.seed, run.lr, run.arm) for run in runs] == [
        (dtype, seed, lr, arm)
        for dtype, lrs in (("bf16", (3e-3, 1e-2)), ("fp32", (1e-2,)))
        for seed in (0, 1)
        for lr in lrs
        for arm in expected
    ]
    # Where a study says nothing else.
    assert {run.lr for run in paper.edge(replace(STUDY, edge_seeds=1))} == {1e-2}


def test_ablations_change_one_thing_each():
    runs = paper.ablations(STUDY, screened(lambda run: run.lr), 1)
    plain = {name: Run("m", "sarcasm", 9, 4, name, 1e-2) for name in (ADAMW, LORA_PLUS)}
    plain[STABLE] = Run("m", "sarcasm", 9, 4, STABLE, 1e-2, 5e-4)
    # bfloat16 at a ratio that it rounds away is beside another run of the screening.
    vanishing = [run for run in runs if run.shrink_ratio == paper.VANISHING]
    assert {(run.lr, run.adapters, run.rounding, run.seed) for run in vanishing} == {
        (1e-3, "bf16", rounding, seed) for rounding in ("stochastic", "nearest") for seed in (0, 1)
    }
    others = [run for run in runs if run not in vanishing]
    for run in others:
        base = replace(plain[run.optimizer], seed=run.seed)
        changed = {key for key, value in asdict(run).items() if value != asdict(base)[key]}
        assert changed in ({"r"}, {"targets"}, {"stop_condition"}, {"adapters"}, {"adapters", "rounding"})
    # Rounded bfloat16 and a missing stop are Stable-LoRA's questions only, and of the rivals it is the rank.
    assert len(others) == 3 * 4 + 2 * 2 + 2 + STUDY.headline_seeds


@pytest.mark.parametrize(
    ("differences", "expected"),
    [((1.0, 1.0, 1.0), 2 / 8), ((1.0, -1.0), 1.0), ((0.0, 0.0, 0.0), 1.0), ((3, 1, 1, 1), 2 / 16)],
)
def test_sign_flips(differences, expected):
    assert scores.sign_flip(differences) == pytest.approx(expected)


def test_fishers_exact_test():
    # 2 (210 * 45 + 252 * 10 + 210) / C(20, 6)
    assert scores.fisher(4, 10, 2, 10) == pytest.approx(24360 / 38760)
    assert scores.fisher(2, 10, 4, 10) == pytest.approx(24360 / 38760)
    assert scores.fisher(3, 3, 0, 3) == pytest.approx(2 / 20)
    assert scores.fisher(0, 5, 0, 7) == 1.0


def test_differences_are_taken_seed_by_seed(tmp_path):
    base = replace(STUDY.screen()[0], lr=1e-3)
    records = [record(replace(base, seed=seed), test=0.6 + 0.1 * seed) for seed in range(3)]
    stable = replace(base, optimizer=STABLE, shrink_ratio=5e-3)
    more = {"shrinks": 5.0, "a_left": 0.975}
    records += [record(replace(stable, seed=seed), test=0.62 + 0.1 * seed, **more) for seed in range(3)]
    # A rate that AdamW has not been run at has nothing to be compared with.
    records += [record(replace(stable, lr=1e-2, seed=seed), test=0.9, validation=0.4, **more) for seed in range(2)]
    (same,) = scores.same_rate(records)
    assert (same["arm"], same["lr"], same["seeds"]) == ("Stable-LoRA 0.005", 1e-3, 3)
    assert same["difference"] == pytest.approx(0.02)
    # Of two seeds an interval says nothing.
    assert "+2.0 ± 0.0" in "\n".join(report.same_rate_table(records, loss=False))
    assert "±" not in "\n".join(report.same_rate_table([r for r in records if r["run"]["seed"] < 2], loss=False))
    _, row = scores.headline(records)
    assert row["difference"] == pytest.approx(0.02) and row["difference_95"] == pytest.approx(0, abs=1e-9)
    assert (row["p"], row["pairs"], row["a_left"]) == (pytest.approx(2 / 8), 3, 0.975)
    records.append(record(replace(stable, stop_condition="never"), test=0.7))
    for path in (*report.write(records, tmp_path), *plots.draw(records, tmp_path)):
        assert path.stat().st_size > 100
    text = (tmp_path / "table.txt").read_text()
    assert "+2.00 ± 0.00" in text and "stop_condition never" in text and "0.250 (3)" in text
    assert len(list(csv.DictReader((tmp_path / "runs.csv").open()))) == 9


def test_of_language_modeling_the_lowest_loss_is_best(tmp_path):
    study = replace(STUDY, task="plays")

    def loss(run):
        return 3.0 + 0.1 * run.seed + (0.5 if run.lr == 1e-3 else 0.0) - (0.0123 if run.optimizer == STABLE else 0.0)

    runs = [run for run in study.screen() if run.optimizer in (ADAMW, STABLE)]
    records = []
    for run in runs:
        found = {"accuracy": None, "loss": loss(run)}
        records.append(record(run) | {"validation": found, "test": found})
    assert scores.best(records)[ADAMW] == (1e-2, 0.0)
    header, *lines = report.table(records).splitlines()
    assert "loss, nats a token (less is better)" in header
    text = "\n".join(lines)
    # Below AdamW's is minus; a size has no sign.
    assert "3.050 ± 0.635" in text and "-0.0123 ± 0.0000" in text and "-0.012 " in text and "runs below" not in text
    # Worse than before training, at the highest rate, is broken.
    worse = {"accuracy": None, "loss": 5.0}
    records += [record(replace(runs[-1], seed=2, lr=0.1)) | {"validation": worse, "test": worse}]
    header, _, adamw, *_, fell = report.fallen_table(records, loss=True)
    assert header.startswith("runs above 4.086 nats,") and "1 of 1" in fell and "of" not in adamw
    assert tmp_path / "m_plays_bf16_9_4.png" in plots.draw(records, tmp_path)


def test_an_ablation_is_beside_what_it_changed(tmp_path):
    base = replace(STUDY.screen()[0], lr=1e-3)
    records = [record(replace(base, seed=seed), test=0.6 + 0.1 * seed) for seed in range(4)]
    assert ablations.rows(records) == []
    records += [record(replace(base, seed=seed, r=64), test=0.5 + 0.1 * seed, a_over_start=2.0) for seed in range(3)]
    unchanged, rank = ablations.rows(records)
    assert (unchanged["seeds"], unchanged["test"], unchanged["r"]) == (3, pytest.approx(0.7), None)
    assert (rank["seeds"], rank["r"], rank["a_over_start"]) == (3, 64, 2.0)
    assert rank["difference"] == pytest.approx(-0.1) and rank["difference_95"] == pytest.approx(0, abs=1e-9)
    stable = [replace(found, optimizer=STABLE, shrink_ratio=5e-3, lr=1e-2) for found in (base, replace(base, r=64))]
    records += [record(replace(run, seed=seed), test=0.52 + 0.1 * seed) for run in stable for seed in range(3)]
    against = [row["minus_adamw"] for row in ablations.rows(records)]
    assert against == [None, None, pytest.approx(-0.08), pytest.approx(0.02)]
    # Not of a change that AdamW has no part in.
    records = [found for found in records if found["run"]["optimizer"] == ADAMW or found["run"]["r"] == 8]
    records += [record(replace(stable[0], seed=seed, stop_condition="never"), test=0.5) for seed in range(3)]
    assert [row["minus_adamw"] for row in ablations.rows(records)] == [None] * 4
    assert "-10.00 ± 0.00" in "\n".join(report.ablation_table([unchanged, rank]))


def test_a_call_goes_on_from_the_records_of_another(tmp_path, monkeypatch, capsys):
    records = [record(run) for run in STUDY.screen()]
    (tmp_path / "before").mkdir()
    report.write(records, tmp_path / "before")
    monkeypatch.setitem(paper.PRESETS, "quick", paper.Preset((STUDY,)))
    file, out = tmp_path / "before" / report.RECORDS, tmp_path / "after"
    assert __main__.main(["--records", str(file), "--out", str(out), "--report"]) == 0
    assert paper.missing("quick", paper.load(out / "runs")) == STUDY.decide(records)
    # What is there already stays.
    kept = out / "runs" / STUDY.screen()[0].file_name
    kept.write_text(json.dumps(record(STUDY.screen()[0], test=0.9)))
    paper.unpack(file, out / "runs")
    assert json.loads(kept.read_text())["test"]["accuracy"] == 0.9
    with pytest.raises(SystemExit):
        __main__.main(["--records", str(tmp_path / "none.gz"), "--out", str(out)])
    assert f"there is no {tmp_path / 'none.gz'}" in capsys.readouterr().err


def test_the_stored_table_is_that_of_the_stored_runs(tmp_path):
    place = RESULTS / "epyc-avx512-2core" / "paper"
    records = report.read_records(place / report.RECORDS)
    report.write(records, tmp_path)
    # What is rounded; the last digits of the others are Python's and zlib's, whatever their version.
    for name in ("table.txt", "runs.csv"):
        assert (tmp_path / name).read_bytes() == (place / name).read_bytes(), name
    assert report.read_records(tmp_path / report.RECORDS) == records
    (untrained,) = {
        found["test"]["loss"] for found in records if found["run"]["lr"] == 0 and found["test"]["accuracy"] is None
    }
    assert -scores.FALLEN["plays"] == pytest.approx(untrained, abs=5e-4)


class Letters:
    """A tokenizer: a letter is a token, and so are the answers."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True, max_length=None, **kwargs):
        if isinstance(text, str):
            return {"input_ids": [60] if text == " yes" else [61] if text == " no" else [ord(c) % 50 + 1 for c in text]}
        rows = [torch.tensor(self(one)["input_ids"][:max_length]) for one in text]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}


@pytest.fixture
def tiny(monkeypatch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        use_cache=False,
    )  # fmt: skip
    backbone, tokenizer = transformers.LlamaModel(config).requires_grad_(False), Letters()
    examples = tuple((f"headline {word * (1 + i % 3)}", label) for i in range(40) for label, word in enumerate("ab"))
    dataset = Dataset("sarcasm", ("no", "yes"), examples[:60], examples[60:], 40)
    parts = {"train": dataset.train, "validation": dataset.test[:10], "test": dataset.test[10:]}
    blocks = tuple(torch.randint(1, 60, (12, 20)))
    tasks = {
        "sarcasm": _paper_tasks.MultipleChoice(
            "sarcasm", tokenizer, **parts, dataset=dataset, template="{} Answer:", answers=(" no", " yes")
        ),
        "reuters-52": _paper_tasks.Classification("reuters-52", tokenizer, **parts, dataset=dataset),
        "plays": _paper_tasks.LanguageModelling("plays", tokenizer, blocks[:8], blocks[8:10], blocks[10:]),
    }
    monkeypatch.setattr(training, "_loaded", lambda model: (backbone, tokenizer))
    monkeypatch.setattr(training, "_task", lambda model, task: tasks[task])
    return tasks


@pytest.mark.parametrize("task", ["sarcasm", "reuters-52", "plays"])
def test_runs_learn_repeat_and_say_what_happened(task, tiny):
    run = Run("tiny", task, 60, 2 if task == "plays" else 8, STABLE, 1e-2, 5e-3, dtype="fp32")
    found, again = training.execute(run), training.execute(run)
    assert found["train_loss"][-1] < found["train_loss"][0]
    for key in ("validation", "test", "train_loss", "shrinks", "a_over_start"):
        assert found[key] == again[key]
    assert found["pairs"] == 4 and 0 < found["shrinks"] <= 60 and 0.995**60 <= found["a_left"] < 1
    assert (found["test"]["accuracy"] is None) == (task == "plays")
    assert found["state_bytes"] == 4 * 2 * 8 * sum((16 + 16, 16 + 8)) * 2
    json.dumps(found)


@pytest.mark.parametrize(("task", "examples"), [("sarcasm", 60), ("reuters-52", 60), ("plays", 8)])
def test_a_batch_is_no_larger_than_the_examples(task, examples, tiny):
    run = Run("tiny", task, 1, examples + 1, ADAMW, 1e-3, 0.0)
    with pytest.raises(ValueError, match=f"batch_size must be at most the {examples} training .*, got {examples + 1}"):
        training.execute(run)


@pytest.mark.parametrize("task", ["sarcasm", "reuters-52", "plays"])
def test_a_run_has_batches_of_its_size(task, tiny, monkeypatch):
    sizes, loss = [], tiny[task].loss

    def spy(model, batch):
        sizes.append(len(batch["input_ids"]))
        return loss(model, batch)

    monkeypatch.setattr(tiny[task], "loss", spy)
    monkeypatch.setattr(tiny[task], "evaluate", lambda model, examples: _paper_tasks.Result(1.0, None))
    for size in (1, 3):
        training.execute(Run("tiny", task, 4, size, ADAMW, 1e-3, dtype="fp32"))
    assert sizes == [1] * 4 + [3] * 4


@pytest.mark.parametrize("optimizer", [ADAMW, LORA_PLUS, RIEMANNIAN, RITE])
def test_every_optimizer_runs(optimizer, tiny):
    found = training.execute(Run("tiny", "sarcasm", 12, 8, optimizer, 1e-3, dtype="fp32"))
    assert not found["diverged"] and "shrinks" not in found
    assert found["a_over_start"] != 1.0 and found["b_norm"] > 0


def test_bfloat16_adapters_shrink_only_by_random_rounding(tiny):
    run = Run("tiny", "sarcasm", 40, 8, STABLE, 1e-6, 5e-4, adapters="bf16")
    left = {
        rounding: training.execute(replace(run, rounding=rounding))["a_over_start"]
        for rounding in ("stochastic", "nearest")
    }
    assert left["nearest"] == 1.0
    assert left["stochastic"] == pytest.approx((1 - 5e-4) ** 40, abs=2e-3)


def test_the_answers_are_one_token_each(tiny):
    task = tiny["sarcasm"]
    assert task.train[0][0].endswith(" Answer:")
    assert task._tokens.tolist() == [61, 60]
    with pytest.raises(ValueError, match="one token each"):
        replace(task, answers=(" no", " never"))


def test_targets_are_those_layers(tiny):
    for targets, count in (("query-value", 4), ("attention", 8), ("all-linear", 14)):
        _, _, pairs, every = training.build(Run("tiny", "reuters-52", 1, 8, ADAMW, 1e-3, targets=targets))
        assert len(pairs) == count and len(every) == 2

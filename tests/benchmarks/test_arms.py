"""The benchmarks' arms: fair, counted rightly, and trained in lockstep, on a small Llama that is not pretrained."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from benchmarks.common import assets, measure, memory, models
from benchmarks.finetuning import arms, experiment, plots, report, train
from benchmarks.finetuning.tasks import Head
from tests.helpers.headlines import write_headlines

CPU = torch.device("cpu")


class WordTokenizer:
    """As much of a tokenizer as the benchmarks use."""

    def __call__(self, texts, **_options):
        words = [[1 + sum(map(ord, word)) % 60 for word in text.split()] for text in texts]
        longest = max(map(len, words))
        padded = [[*row, *[0] * (longest - len(row))] for row in words]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in words]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


class CharacterTokenizer:
    """As much of a tokenizer as language modeling uses."""

    def __call__(self, text, **_options):
        return {"input_ids": [1 + ord(character) % 60 for character in text]}


def small_llama(causal: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

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
    return (LlamaForCausalLM if causal else LlamaModel)(config).requires_grad_(False)


RECIPE = arms.Recipe(("q_proj", "v_proj"), r=4, lora_alpha=16, lora_dropout=0.0, steps=20, lr=1e-2, shrink_ratio=0.005)
NAMES = ("frozen", "peft", "accelerated", "stable")


def build(names, recipe=RECIPE, backbone=None, seed=0):
    return arms.build_arms(names, backbone or small_llama(), Head(2), recipe, seed, CPU)


def small_batch(rows: int = 4, length: int = 6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def test_schedule_warms_up_and_decays_to_zero():
    factors = [RECIPE.schedule(step) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[11] == 0.5 and factors[20] == 0.0
    assert [replace(RECIPE, steps=1).schedule(step) for step in range(2)] == [1.0, 0.0]


def test_arms_share_the_frozen_weights_and_start_alike():
    backbone = small_llama()
    frozen, peft, accelerated, stable = build(NAMES, backbone=backbone)
    base = backbone.layers[0].self_attn.q_proj.weight
    wrapped, ours = (arm.model.backbone.base_model.model.layers[0].self_attn.q_proj for arm in (peft, accelerated))
    # PEFT's own layer in its arm, our forward on it in the other.
    assert (
        type(wrapped).__module__.startswith("peft.")
        and isinstance(ours, type(wrapped))
        and type(ours) is not type(wrapped)
    )
    # One line: PEFT's own optimizer stays.
    assert all(isinstance(arm.optimizer, torch.optim.AdamW) for arm in (frozen, peft, accelerated))
    assert isinstance(stable.optimizer, slk.StableLoRAAdamW) and stable.optimizer.defaults["shrink_ratio"] == 0.005
    fused = stable.model.backbone.layers[0].self_attn.q_proj
    assert isinstance(fused, slk.LoRALinear)
    assert base.data_ptr() == wrapped.base_layer.weight.data_ptr() == fused.weight.data_ptr()
    assert base.data_ptr() == ours.base_layer.weight.data_ptr()
    assert len(peft.pairs) == len(stable.pairs) == 4 and not frozen.pairs
    for other in (accelerated, stable):
        for a, b in zip(peft.pairs, other.pairs, strict=True):
            assert torch.equal(a.A, b.A) and a.A.data_ptr() != b.A.data_ptr() and a.A.any()
            assert not a.B.any() and not b.B.any()
    losses = [train.forward(arm, small_batch(), torch.float32) for arm in (frozen, peft, accelerated, stable)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])
    torch.testing.assert_close(losses[2], losses[3])


@pytest.mark.parametrize("ours", ["accelerated", "stable"])
def test_ratio_zero_trains_as_peft_does(ours):
    peft, stable = build(["peft", ours], replace(RECIPE, shrink_ratio=0.0, max_grad_norm=0.01))
    batch = small_batch()
    for _ in range(6):
        for arm in (peft, stable):
            for _, run in train.phases(arm, batch, torch.float32):
                run()
            arm.scheduler.step()
    for mine, theirs in zip(stable.pairs, peft.pairs, strict=True):
        assert theirs.B.any()
        torch.testing.assert_close(mine.B, theirs.B, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.A, theirs.A, rtol=1e-3, atol=1e-5)


def test_a_new_head_has_a_rate_of_its_own():
    for arm in build(NAMES):
        rates = {len(group["params"]): group["lr"] for group in arm.optimizer.param_groups}
        # After the first of two warm-up steps' factor. The head is a weight and a bias.
        assert rates.pop(2) == RECIPE.head_lr / 2 and set(rates.values()) <= {RECIPE.lr / 2}


def test_every_arm_has_the_recipes_rank_alpha_and_dropout():
    recipe = replace(RECIPE, r=3, lora_alpha=12.0, lora_dropout=0.25)
    _, peft, accelerated, stable = build(NAMES, recipe)
    for arm in (peft, accelerated):
        layer = arm.model.backbone.base_model.model.layers[0].self_attn.q_proj
        assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 4.0, 0.25)
    layer = stable.model.backbone.layers[0].self_attn.q_proj
    assert (layer.r, layer.scaling, layer.lora_dropout) == (3, 4.0, 0.25)


def test_dropout_acts_in_training_alone_in_every_adapted_arm():
    recipe = replace(RECIPE, lora_dropout=0.5)
    adapted = build(NAMES, recipe)[1:]
    for arm in adapted:
        with torch.no_grad():
            for pair in arm.pairs:
                pair.B.fill_(0.1)
        arm.model.train()
        first, second = (train.forward(arm, small_batch(), torch.float32).item() for _ in range(2))
        assert first != second
        arm.model.eval()
        first, second = (train.forward(arm, small_batch(), torch.float32).item() for _ in range(2))
        assert first == second


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="arm must be one of frozen, peft, accelerated, stable, got 'other'"):
        build(["other"])


def test_the_frozen_models_backward_pass_reaches_the_first_adapted_layer_and_no_weight():
    (frozen,) = build(["frozen"])
    attention = frozen.model.backbone.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "v_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    train.forward(frozen, small_batch(), torch.float32).backward()
    assert seen["q_proj"].grad.any() and seen["v_proj"].grad.any() and not seen["k_proj"].requires_grad
    assert [name for name, p in frozen.model.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_pooling_ignores_padding():
    (frozen,) = build(["frozen"])
    batch = small_batch()
    padded = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    short = frozen.model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(frozen.model(**padded), short)


def test_an_unknown_family_is_told_about_target_modules():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear layers named .*--target-modules"):
        models.query_value_names(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_layers_named_by_hand_must_be_linear_layers_of_the_model(small_run):
    for targets in (("q_proj", "q_porj"), ("q_porj",), ("self_attn.q_proj",), ("norm",)):
        with pytest.raises(ValueError, match=rf"--target-modules must name linear .*q_proj.*, got {targets[-1]}$"):
            replace(small_run, targets=targets).recipe(small_llama())


def test_all_linear_layers_are_found_in_the_model_but_for_its_head(small_run):
    linear = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    for backbone in (small_llama(), small_llama(causal=True)):
        assert replace(small_run, targets=()).recipe(backbone).target_modules == linear


def test_a_pooler_gets_no_adapters(tmp_path, monkeypatch):
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: SimpleNamespace(pad_token="."))
    backbone, _ = models.load_model(str(tmp_path))
    recipe = replace(RECIPE, target_modules=models.linear_names(backbone))
    for arm in build(NAMES[1:], recipe, backbone):
        train.forward(arm, small_batch(), torch.float32).backward()
        assert len(arm.pairs) == 6 and all(pair.B.grad is not None for pair in arm.pairs)
    # An encoder has no language model's head, and transformers would draw one.
    with pytest.raises(assets.AssetError, match="with all its weights"):
        models.load_model(str(tmp_path), causal=True)


def test_rehearsal_leaves_the_first_batch_out_of_the_mean(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 12.0, 15.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert train.rehearse(build(["frozen"]), [small_batch()] * 3, torch.float32) == pytest.approx(2.5)


# ---- what is counted ----


def test_saved_bytes_are_distinct_storages_without_parameters():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def run():
        # x is saved by the first product, its result once though two products need it, the weight not at all.
        y = x @ weight
        return (y * y + y @ weight).sum()

    assert memory.saved_for_backward(run, [weight]) == 2 * 4 * 8 * 4
    assert memory.saved_for_backward(run, [weight, x]) == 4 * 8 * 4


def test_operators_counted_are_those_that_compute():
    x = torch.randn(4, 4)
    with memory.CountOperators() as counter:
        torch.addmm(x, x.t(), x.view(4, 4)).relu_()
        torch.empty(3)
    assert dict(counter.counts) == {"aten.addmm.default": 1, "aten.relu_.default": 1}


# ---- a whole run, on the small model ----


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Settings of a run on plain text."""
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    tokenizers = {False: WordTokenizer(), True: CharacterTokenizer()}
    monkeypatch.setattr(experiment, "load_model", lambda _, causal: (small_llama(causal), tokenizers[causal]))
    monkeypatch.setattr(
        experiment, "measure_in_subprocess", lambda *_, **__: {"saved_mib": 5.0, "peak_mib": 9.0, "tokens": 32}
    )
    where = {"model": "small", "data": str(tmp_path / "text.txt"), "device": "cpu", "dtype": "float32", "arms": NAMES}
    adapters = {"targets": ("q_proj", "v_proj"), "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1}
    rates = {"lr": 1e-2, "head_lr": 1e-2, "shrink_ratio": 0.005, "steps": 6, "seeds": (3, 4)}
    return experiment.Settings(**where, **adapters, **rates, batch_size=4, length=8, held_out=10)


def run(settings, out):
    """The result of a run, and the names of its files."""
    result = experiment.run(settings, 0.0, lambda result: report.write_result(result, out))
    plots.draw(result, out)
    return result, {path.name for path in out.iterdir()}


@pytest.mark.parametrize("data", ["text", "sarcasm"])
def test_a_run_leaves_verdicts_tables_and_plots(small_run, tmp_path, monkeypatch, data):
    if data == "sarcasm":
        monkeypatch.setattr(assets, "sarcasm_file", lambda: write_headlines(tmp_path / "samples.jsonl", 60))
        small_run = replace(small_run, data=data)
    result, names = run(small_run, tmp_path / "out")
    assert result["status"] == "complete" and tuple(result["arms"]) == NAMES
    assert names == {"result.json", "steps.csv", "table.txt", "summary.png", "loss.png"}
    for name, record in result["arms"].items():
        assert [each["seed"] for each in record["runs"]] == [3, 4]
        assert record["trainable"] > 0 or (name, data) == ("frozen", "text")
        for each in record["runs"]:
            assert {len(values) for values in each["series"].values()} == {6}
            assert all(math.isfinite(loss) for loss in each["series"]["loss"])
            assert 0 <= each["held_out"]["accuracy"] <= 1 and math.isfinite(each["held_out"]["loss"])
            assert ("start" in each) == (name != "frozen") and ("latched" in each) == (name == "stable")
    # The first loss is before any update, on one batch, from one start.
    for number in range(2):
        assert len({round(record["runs"][number]["series"]["loss"][0], 4) for record in result["arms"].values()}) == 1
    first, second = (each["series"]["loss"][0] for each in result["arms"]["peft"]["runs"])
    assert first != second
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "nan" not in text and "(95% interval over seeds)" in text
    with (tmp_path / "out" / "steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 2 * 6


def test_one_step_of_one_seed_prints_no_nan(small_run, tmp_path):
    result, names = run(replace(small_run, steps=1, seeds=(0,)), tmp_path / "out")
    assert "summary.png" not in names
    text = (tmp_path / "out" / "table.txt").read_text()
    assert result["status"] == "complete" and "nan" not in text
    assert "(one step: shows nothing)" in text and "(one seed: shows nothing)" in text


def test_language_modeling_predicts_each_token_from_those_before_it(small_run):
    backbone, tokenizer = experiment.load_model("small", True)
    text = Path(small_run.data).read_text()
    task = experiment.open_task(small_run.data, tokenizer, batch_size=4, length=8, held_out=10, seed=0)
    batch = next(task.batches(5))
    tokens = "".join(map(chr, tokenizer(text)["input_ids"]))
    for inputs, labels in zip(batch["input_ids"], batch["labels"].view(4, 8), strict=True):
        assert torch.equal(inputs[1:], labels[:-1]) and "".join(map(chr, [*inputs, labels[-1]])) in tokens
    assert torch.equal(batch["input_ids"], next(task.batches(5))["input_ids"])
    (frozen,) = arms.build_arms(["frozen"], backbone, task.head, RECIPE, 0, CPU)
    # As transformers takes the loss of whole rows.
    rows = torch.cat([batch["input_ids"], batch["labels"].view(4, 8)[:, -1:]], dim=1)
    torch.testing.assert_close(train.forward(frozen, batch, torch.float32), backbone(input_ids=rows, labels=rows).loss)


def test_an_interrupt_leaves_what_was_measured(small_run, monkeypatch, tmp_path):
    real, calls = train._timed_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4 * 6 + 11:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "_timed_step", interrupted)
    result, names = run(small_run, tmp_path / "out")
    assert result["status"] == "interrupted" and "loss.png" in names
    assert sorted(len(record["runs"][1]["series"]["loss"]) for record in result["arms"].values()) == [2, 2, 3, 3]
    assert "interrupted" in (tmp_path / "out" / "table.txt").read_text()
    # One seed was finished, and a second one begun.
    assert "(one seed: shows nothing)" in (tmp_path / "out" / "table.txt").read_text()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == "interrupted"


def test_an_interrupt_between_evaluations_loses_none(small_run, monkeypatch, tmp_path):
    """PEFT and one line are evaluated, the frozen model and our layers are not."""
    real, calls = experiment.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(experiment, "evaluate", interrupted)
    result, _ = run(replace(small_run, arms=("peft", "accelerated", "frozen", "stable")), tmp_path / "out")
    assert result["status"] == "interrupted" and len(calls) == 3
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "Quality held-out loss: PEFT" in text and "PEFT + one line" in text and "nan" not in text


def test_a_slow_machine_plans_fewer_steps_then_one_seed_and_never_cuts_a_schedule(
    small_run, monkeypatch, tmp_path, capsys
):
    settings = replace(small_run, steps=30, seeds=(0, 1, 2))
    assert experiment.plan(settings, 2.0, 5.0, None) == (3, 30)
    assert experiment.plan(settings, 2.0, 5.0, 3 * 35 * 2.0) == (3, 30)
    assert experiment.plan(settings, 2.0, 5.0, 3 * 25 * 2.0) == (3, 20)
    assert experiment.plan(settings, 2.0, 5.0, 3 * 19 * 2.0) == (1, 30)
    assert experiment.plan(settings, 2.0, 5.0, 1 * 21 * 2.0) == (1, 16)
    assert experiment.plan(settings, 2.0, 5.0, 0.0) == (1, experiment.FEWEST_STEPS)
    # The minutes that are told are those of what is planned, in time or not.
    monkeypatch.setattr(experiment, "rehearse", lambda *_args: 90.0)
    monkeypatch.setattr(experiment, "FEWEST_STEPS", 4)
    result, _ = run(replace(small_run, time_limit_s=60.0), tmp_path / "out")
    assert result["recipe"]["steps"] == 4 and len(result["arms"]["peft"]["runs"]) == 1
    assert {len(record["runs"][0]["series"]["loss"]) for record in result["arms"].values()} == {4}
    # 4 steps and 2 of held-out rows of 9 tokens, 90 s each, and 4 processes.
    told = capsys.readouterr().err
    assert "1 seed x 4 steps, 90.0 s a step of all arms: about 20 minutes more." in told, told


def test_a_run_beside_busy_programs_takes_fewer_threads(monkeypatch):
    monkeypatch.setattr(experiment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(experiment.torch, "get_num_threads", lambda: 4)
    assert [experiment.free_threads(others) for others in (0.0, 0.4, 0.9, 2.6, 7.0)] == [4, 4, 3, 1, 1]


def test_other_programs_cpus_are_counted_and_ones_own_are_not():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with measure.others_cpus() as beside:
            time.sleep(1.0)
    finally:
        busy.kill()
        busy.wait()
    with measure.others_cpus() as alone:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    # Other tests may run beside this one, but not fewer than the busy program.
    assert not beside or beside[0] > 0.3
    assert not alone or 0.0 <= alone[0] < os.cpu_count()

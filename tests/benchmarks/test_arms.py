"""The benchmarks' arms: fair, counted rightly, and trained in lockstep, on a small Llama that is not pretrained."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import stablelora_kernels as slk
from benchmarks import __main__ as command
from benchmarks.common import assets, memory, models
from benchmarks.finetuning import arms, experiment, train
from benchmarks.finetuning import result as report
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
NAMES = ["frozen", "peft", "accelerated-0.005", "stable-0.005"]


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
    frozen, peft, accelerated, stable = arms.build_arms(NAMES, backbone, 2, RECIPE, CPU)
    base = backbone.layers[0].self_attn.q_proj.weight
    wrapped, ours = (arm.model.backbone.base_model.model.layers[0].self_attn.q_proj for arm in (peft, accelerated))
    # PEFT's own layer in its arm, our forward on it in the other.
    assert (
        type(wrapped).__module__.startswith("peft.")
        and isinstance(ours, type(wrapped))
        and type(ours) is not type(wrapped)
    )
    assert isinstance(accelerated.optimizer, slk.StableLoRAAdamW) and isinstance(peft.optimizer, torch.optim.AdamW)
    fused = stable.model.backbone.layers[0].self_attn.q_proj
    assert isinstance(fused, slk.LoRALinear)
    assert base.data_ptr() == wrapped.base_layer.weight.data_ptr() == fused.weight.data_ptr()
    assert base.data_ptr() == ours.base_layer.weight.data_ptr()
    assert len(peft.pairs) == len(stable.pairs) == 4 and not frozen.pairs
    for other in (accelerated, stable):
        for a, b in zip(peft.pairs, other.pairs, strict=True):
            assert torch.equal(a.A, b.A) and a.A.data_ptr() != b.A.data_ptr() and a.A.any()
            assert not a.B.any() and not b.B.any()
    losses = [train.forward(arm, small_batch(), torch.float32)[0] for arm in (frozen, peft, accelerated, stable)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])
    torch.testing.assert_close(losses[2], losses[3])


@pytest.mark.parametrize("ours", ["accelerated-0", "stable-0"])
def test_ratio_zero_trains_as_peft_does(ours):
    peft, stable = arms.build_arms(["peft", ours], small_llama(), 2, RECIPE, CPU)
    batch = small_batch()
    for _ in range(6):
        for arm in (peft, stable):
            train.forward(arm, batch, torch.float32)[0].backward()
            arm.optimizer.step()
            arm.optimizer.zero_grad()
            arm.scheduler.step()
    for mine, theirs in zip(stable.pairs, peft.pairs, strict=True):
        assert theirs.B.any()
        torch.testing.assert_close(mine.B, theirs.B, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.A, theirs.A, rtol=1e-3, atol=1e-5)


def test_every_arm_has_the_recipes_rank_alpha_and_dropout():
    recipe = replace(RECIPE, r=3, lora_alpha=12.0, lora_dropout=0.25)
    _, peft, accelerated, stable = arms.build_arms(NAMES, small_llama(), 2, recipe, CPU)
    for arm in (peft, accelerated):
        layer = arm.model.backbone.base_model.model.layers[0].self_attn.q_proj
        assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 4.0, 0.25)
    layer = stable.model.backbone.layers[0].self_attn.q_proj
    assert (layer.r, layer.scaling, layer.lora_dropout) == (3, 4.0, 0.25)


def test_dropout_acts_in_training_alone_in_every_adapted_arm():
    recipe = replace(RECIPE, lora_dropout=0.5)
    adapted = arms.build_arms(NAMES, small_llama(), 2, recipe, CPU)[1:]
    for arm in adapted:
        with torch.no_grad():
            for pair in arm.pairs:
                pair.B.fill_(0.1)
        arm.model.train()
        first, second = (train.forward(arm, small_batch(), torch.float32)[0].item() for _ in range(2))
        assert first != second
        arm.model.eval()
        first, second = (train.forward(arm, small_batch(), torch.float32)[0].item() for _ in range(2))
        assert first == second


@pytest.mark.parametrize("name", ["peft-0.005", "accelerated", "stable", "stable-", "frozen-1", "other-0.1"])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(ValueError, match=f"arm must be .*, got '{name}'"):
        arms.build_arm(name, small_llama(), 2, RECIPE, CPU)


def test_the_frozen_models_backward_pass_reaches_the_first_adapted_layer_and_no_weight():
    (frozen,) = arms.build_arms(["frozen"], small_llama(), 2, RECIPE, CPU)
    attention = frozen.model.backbone.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "v_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    train.forward(frozen, small_batch(), torch.float32)[0].backward()
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


def test_layers_named_by_hand_must_be_linear_layers_of_the_model(small_run):
    settings, _ = small_run
    for targets in (("q_proj", "q_porj"), ("q_porj",), ("self_attn.q_proj",), ("norm",)):
        with pytest.raises(ValueError, match=rf"--target-modules must name linear .*q_proj.*, got {targets[-1]}$"):
            replace(settings, targets=targets).recipe(small_llama())


def test_all_linear_and_query_value_are_found_in_the_model(small_run):
    settings, _ = small_run
    linear = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert replace(settings, targets="all-linear").recipe(small_llama()).target_modules == linear
    recipe = replace(settings, targets="query-value", r=3, lora_alpha=7.0, lora_dropout=0.2).recipe(small_llama())
    assert recipe == arms.Recipe(("q_proj", "v_proj"), 3, 7.0, 0.2, lr=1e-2, steps=8, seed=0)


def test_accelerate_peft_runs_at_the_largest_of_the_ratios(small_run):
    settings, _ = small_run
    names = replace(settings, shrink_ratios=(0.0, 0.005, 0.001)).arms
    assert names == ["frozen", "peft", "accelerated-0.005", "stable-0", "stable-0.005", "stable-0.001"]


def test_a_pooler_gets_no_adapters():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    backbone = BertModel(config).requires_grad_(False)
    models.drop_pooler(backbone)
    recipe = replace(RECIPE, target_modules=models.linear_names(backbone))
    for arm in arms.build_arms(NAMES[1:], backbone, 2, recipe, CPU):
        train.forward(arm, small_batch(), torch.float32)[0].backward()
        assert len(arm.pairs) == 6 and all(pair.B.grad is not None for pair in arm.pairs)


def test_rehearsal_leaves_the_first_batch_out_of_the_mean(monkeypatch):
    clock = iter([0.0, 10.0, 16.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    arm = arms.build_arm("frozen", small_llama(), 2, RECIPE, CPU)
    assert train.rehearse([arm], [small_batch()] * 4, torch.float32) == pytest.approx(2.0)


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
    file = write_headlines(tmp_path / "samples.jsonl", 60)
    monkeypatch.setattr(assets, "sarcasm_file", lambda: file)
    monkeypatch.setattr(experiment, "load_model", lambda name: (small_llama(), WordTokenizer()))
    settings = experiment.Settings(
        "small",
        "sarcasm",
        "cpu",
        "float32",
        1e-2,
        8,
        4,
        0,
        20,
        (0.005,),
        ("q_proj", "v_proj"),
        4,
        8.0,
        0.1,
        footprint=False,
    )
    return settings, tmp_path / "out"


def test_a_run_leaves_tables_and_plots(small_run):
    settings, out = small_run
    out.mkdir()
    result, paths = command._run(settings, out, 0.0)
    assert result["status"] == "complete" and set(result["arms"]) == set(NAMES)
    assert {path.name for path in paths} == {
        "result.json", "summary.csv", "steps.csv", "norms.csv", "table.txt",
        "summary.png", "loss.png", "step_time.png", "norms.png", "accuracy.png",
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
        assert len(list(csv.DictReader(file))) == 4 * 8
    # A finished run with the same settings is not repeated, one with others is.
    assert command._done(settings, out)["status"] == "complete"
    assert command._done(replace(settings, lr=1e-3), out) is None


def test_an_interrupt_leaves_what_was_measured(small_run, monkeypatch):
    settings, out = small_run
    out.mkdir()
    real, calls = train._timed_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "_timed_step", interrupted)
    result, paths = command._run(settings, out, 0.0)
    assert result["status"] == "interrupted"
    assert sorted(len(record["series"]["loss"]) for record in result["arms"].values()) == [2, 2, 3, 3]
    assert "loss.png" in {path.name for path in paths} and "accuracy.png" not in {path.name for path in paths}
    assert "interrupted" in (out / "table.txt").read_text()
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    assert command._done(settings, out) is None


def test_a_slow_machine_takes_fewer_steps(small_run, monkeypatch):
    settings, out = small_run
    out.mkdir()
    assert experiment._training_deadline(settings, 5.0, 1.0, 1.0) is None
    # 20 texts in fives at 3 s a batch of 4: 5 s of evaluation.
    limited = replace(settings, time_limit_s=100.0)
    assert experiment._training_deadline(limited, 5.0, 3.0, 1.0) == pytest.approx(100.0)
    # Fast when rehearsed, then past every deadline: the least is trained, and the rest still comes.
    monkeypatch.setattr(experiment, "rehearse", lambda *_args: 1e-3)
    monkeypatch.setattr(experiment, "FEWEST_STEPS", 1000)
    monkeypatch.setattr(experiment, "_LEAST_BEFORE_STOP", 3)
    result, _ = command._run(replace(settings, time_limit_s=0.0), out, 0.0)
    assert result["status"] == "complete" and result["recipe"]["steps"] == 8
    assert [len(record["series"]["loss"]) for record in result["arms"].values()] == [3, 3, 3, 3]
    assert "Training stopped after 3 of 8 steps" in report.table(result)

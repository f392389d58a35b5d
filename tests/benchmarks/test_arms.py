"""The main job's arms: fair, on a small Llama that is not pretrained; and the layers and texts that
they take.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import stablelora_kernels as slk
from benchmarks.common import assets, data, models
from benchmarks.finetuning import arms
from benchmarks.finetuning.recipe import LABELS, Recipe
from tests.helpers.small_models import llama


def write_headlines(path: Path, count: int) -> Path:
    texts = [f"headline number {i % count}" + " again" * (i % 5) for i in range(count + 3)]
    lines = [
        {"input": [{"content": "?"}, {"content": text}], "ideal": str(i % 2)}
        for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(map(json.dumps, [*lines, *lines[:3]])))
    return path


RECIPE = Recipe(
    ("q_proj", "v_proj"), r=3, lora_alpha=12.0, lora_dropout=0.0, steps=6, lr=1e-2, dtype="float32"
)
IDS = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.arange(4) % 2}


def build(names=(*LABELS,), recipe=RECIPE, backbone=None):
    torch.manual_seed(0)
    backbone = backbone or llama(vocab_size=64, use_cache=False).requires_grad_(False).model
    return arms.build_arms(names, backbone, 2, recipe, 0, torch.device("cpu"))


def test_arms_share_the_frozen_weights_start_alike_and_follow_the_recipe():
    frozen, *adapted = every = build(recipe=replace(RECIPE, lora_dropout=0.25))
    base = frozen.model.backbone.layers[0].self_attn.q_proj
    peft, accelerated = (
        arm.model.backbone.base_model.model.layers[0].self_attn.q_proj for arm in adapted[:2]
    )
    ours = adapted[2].model.backbone.layers[0].self_attn.q_proj
    # PEFT's own layer in its arm, our forward on it in the other.
    assert type(peft).__module__.startswith("peft.") and type(accelerated) is not type(peft)
    assert isinstance(accelerated, type(peft)) and isinstance(ours, slk.LoRALinear)
    assert {x.weight.data_ptr() for x in (base, peft.base_layer, accelerated.base_layer, ours)} == {
        base.weight.data_ptr()
    }
    for layer in (peft, accelerated):
        assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (
            3,
            4.0,
            0.25,
        )
    assert (ours.r, ours.scaling, ours.lora_dropout) == (3, 4.0, 0.25)
    # One line: PEFT's own optimizer stays. A new head, a weight and a bias, has a rate of its own.
    assert [type(arm.optimizer) for arm in every] == [torch.optim.AdamW] * 3 + [slk.StableLoRAAdamW]
    assert every[3].optimizer.defaults["shrink_ratio"] == RECIPE.shrink_ratio == 5e-4
    for arm in every:
        rates = {len(group["params"]): group["lr"] for group in arm.optimizer.param_groups}
        assert rates.pop(2) == RECIPE.head_lr and set(rates.values()) <= {RECIPE.lr}
    for pairs in zip(*(arm.pairs for arm in adapted), strict=True):
        assert all(
            torch.equal(pair.A, pairs[0].A) and pair.A.any() and not pair.B.any() for pair in pairs
        )
        assert len({pair.A.data_ptr() for pair in pairs}) == 3
    losses = [arms.forward(arm, BATCH, torch.float32) for arm in build()]
    torch.testing.assert_close(losses, losses[:1] * 4)
    factors = [replace(RECIPE, steps=20).schedule(step) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[11] == 0.5 and factors[20] == 0.0


@pytest.mark.parametrize("ours", ["accelerated", "stable"])
def test_ratio_zero_trains_as_peft_does(ours):
    recipe = replace(RECIPE, shrink_ratio=0.0, max_grad_norm=0.01)
    peft, stable = build(["peft", ours], recipe)
    rows = [
        row for step in arms.train([peft, stable], iter([BATCH] * 6), recipe, 0) for row in step
    ]
    assert {(row["arm"], row["step"]) for row in rows} == {
        (arm, i) for arm in ("peft", ours) for i in range(1, 7)
    }
    for mine, theirs in zip(stable.pairs, peft.pairs, strict=True):
        assert theirs.B.any()
        torch.testing.assert_close((mine.A, mine.B), (theirs.A, theirs.B), rtol=1e-3, atol=1e-5)


def test_adapted_layers_are_linear_layers_of_the_model(tmp_path, monkeypatch):
    from transformers import AutoTokenizer, BertConfig, BertModel

    every = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    model = llama()
    assert models.linear_names(model) == every and models.query_value_names(model) == (
        "q_proj",
        "v_proj",
    )
    with pytest.raises(
        ValueError, match=r"--target-modules must name linear .*q_proj.*, got q_porj, lm_head$"
    ):
        models.linear_names(model, ("q_proj", "q_porj", "lm_head"))
    with pytest.raises(
        ValueError, match=r"Sequential must have layers named q_proj.*, got \('0',\)"
    ):
        models.query_value_names(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    # A BERT's pooler would get no gradient, and no MLP of its can be fused.
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: SimpleNamespace(pad_token="."))
    backbone, _ = models.load_model(str(tmp_path))
    for arm in build(
        [*LABELS][1:], replace(RECIPE, targets=models.linear_names(backbone)), backbone
    ):
        arms.forward(arm, BATCH, torch.float32).backward()
        assert len(arm.pairs) == 6 and all(pair.B.grad is not None for pair in arm.pairs)
    # An encoder has no language model's head, and transformers would draw one.
    with pytest.raises(assets.AssetError, match="with all its weights"):
        models.load_model(str(tmp_path), causal=True)


def test_no_text_is_on_both_sides_and_a_seed_gives_the_split(tmp_path, monkeypatch):
    head = "Category\tText\nd\tstring\nclass\t\n\t\n"
    (tmp_path / "train").write_text(head + "earn\tone\nearn\ttwo\nacq\tthree\n")
    (tmp_path / "test").write_text(head + "\nacq\ttwo\nearn\tfour\n")
    files = {assets.SARCASM: [write_headlines(tmp_path / "samples", 40)]}
    monkeypatch.setattr(
        assets, "fetch", lambda asset: files.get(asset, [tmp_path / "train", tmp_path / "test"])
    )
    one, same, other = (data.load_dataset("sarcasm", seed=seed, held_out=10) for seed in (1, 1, 2))
    texts = [text for text, _ in (*one.train, *one.test)]
    assert (
        len(one.test) == 10
        and len(texts) == len(set(texts))
        and one == same
        and one.test != other.test
    )
    with pytest.raises(ValueError, match=r"held_out must be in \[1, \d+\], got 1000"):
        data.load_dataset("sarcasm", seed=0, held_out=1000)
    dataset = data.load_dataset("reuters-52", seed=0, held_out=99)
    assert dataset.classes == ("acq", "earn") and dataset.majority == 0.5
    assert set(dataset.train) == {("one", 1), ("three", 0)} and set(dataset.test) == {
        ("two", 0),
        ("four", 1),
    }

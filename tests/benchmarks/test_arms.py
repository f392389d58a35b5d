"""The main job's arms: fair, on a small Llama that is not pretrained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stablelora_kernels as slk
from benchmarks.finetuning import arms
from benchmarks.finetuning.recipe import LABELS, Recipe
from tests.helpers.small_models import llama

RECIPE = Recipe(
    ("q_proj", "v_proj"), r=3, lora_alpha=12.0, lora_dropout=0.0, steps=6, lr=1e-2, dtype="float32"
)
IDS = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.arange(4) % 2}


def build(names=(*LABELS,), recipe=RECIPE, backbone=None):
    torch.manual_seed(0)
    backbone = backbone or llama(vocab_size=64, use_cache=False).requires_grad_(False).model
    return arms.build_arms(names, backbone, 2, recipe, 0, torch.device("cpu"))


def test_arms_share_the_frozen_weights_and_start_alike():
    frozen, *adapted = every = build(recipe=replace(RECIPE, lora_dropout=0.25))
    base = frozen.model.backbone.layers[0].self_attn.q_proj
    peft, accelerated = (
        arm.model.backbone.base_model.model.layers[0].self_attn.q_proj for arm in adapted[:2]
    )
    ours = adapted[2].model.backbone.layers[0].self_attn.q_proj
    # PEFT's own layer in its arm, our forward on it in the other.
    assert type(peft).__module__.startswith("peft.") and type(accelerated) is not type(peft)
    weights = (base.weight, peft.base_layer.weight, accelerated.base_layer.weight, ours.weight)
    assert len({weight.data_ptr() for weight in weights}) == 1
    for layer in (peft, accelerated):
        dropout = layer.lora_dropout["default"].p
        assert (layer.r["default"], layer.scaling["default"], dropout) == (3, 4.0, 0.25)
    assert (ours.r, ours.scaling, ours.lora_dropout) == (3, 4.0, 0.25)
    # One line: PEFT's own optimizer stays.
    assert [type(arm.optimizer) for arm in every] == [torch.optim.AdamW] * 3 + [slk.StableLoRAAdamW]
    assert every[3].optimizer.defaults["shrink_ratio"] == RECIPE.shrink_ratio
    for pairs in zip(*(arm.pairs for arm in adapted), strict=True):
        assert all(torch.equal(pair.A, pairs[0].A) and not pair.B.any() for pair in pairs)
        assert pairs[0].A.any() and len({pair.A.data_ptr() for pair in pairs}) == 3
    losses = [arms.forward(arm, BATCH, torch.float32) for arm in build()]
    torch.testing.assert_close(losses, losses[:1] * 4)


@pytest.mark.parametrize("ours", ["accelerated", "stable"])
def test_ratio_zero_trains_as_peft_does(ours):
    recipe = replace(RECIPE, shrink_ratio=0.0, max_grad_norm=0.01)
    peft, stable = build(["peft", ours], recipe)
    steps = [*arms.train([peft, stable], iter([BATCH] * 6), recipe, 0)]
    assert [{row["arm"] for row in step} for step in steps] == [{"peft", ours}] * 6
    for mine, theirs in zip(stable.pairs, peft.pairs, strict=True):
        assert theirs.B.any()
        torch.testing.assert_close((mine.A, mine.B), (theirs.A, theirs.B), rtol=1e-3, atol=1e-5)

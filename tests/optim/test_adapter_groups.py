"""``StableLoRAAdamW.from_model(model, adapters=...)``: settings of each adapter's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.pairs import adapter_of
from tests.helpers.peft_models import make
from tests.helpers.small_models import IDS

SETTINGS = {
    "default": {"lr": 0.1, "shrink_ratio": 0.1},
    "b": {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3},
    "c": {"shrink_ratio": 0.0, "lr_ratio_B": 4.0},
}
NAMES = ["default", "b"]


def two_and_one_more():
    return make(("b", {"r": 3}), ("c", {"r": 5})).train()


def step(model, optimizer, names=NAMES):
    with slk.adapters_of_rows(model, names):
        sum(slk.losses_of_rows(model(IDS), IDS, names).values()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["b", "default"])
def test_each_adapter_steps_as_with_an_optimizer_of_its_own(name, backend):
    together = two_and_one_more()
    slk.accelerate_peft(together)
    alone = copy.deepcopy(together)
    optimizer = slk.StableLoRAAdamW.from_model(together, adapters=SETTINGS, lr=0.05, seed=7)
    alone.set_adapter(name)
    own = slk.StableLoRAAdamW.from_model(alone, **{"lr": 0.05, "seed": 7} | SETTINGS[name])
    for _ in range(6):
        step(together, optimizer)
        step(alone, own)
    latches = {pair.name: pair.latched_at for pair in optimizer.stability()}
    for pair in own.stability():
        assert latches[pair.name] == pair.latched_at
    assert any(pair.latched for pair in own.stability())
    for key, p in alone.named_parameters():
        if f".{name}." in key:
            # The kernels of one and of several ranges may take other tiles.
            torch.testing.assert_close(
                together.get_parameter(key), p, rtol=1e-5, atol=1e-6, msg=key
            )
    # An adapter without rows is left alone: its moments and its latch too.
    untouched = two_and_one_more()
    for key, p in untouched.named_parameters():
        if ".c." in key:
            assert torch.equal(together.get_parameter(key), p)
            assert not optimizer.state[together.get_parameter(key)].get("step")


def test_groups_and_what_trains():
    model = two_and_one_more()
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {adapter_of(name) for name in before} == {"default"}
    optimizer = slk.StableLoRAAdamW.from_model(
        model, adapters={"b": {"lr": 0.02}, "c": {}}, lr=0.05, shrink_ratio=0.25
    )
    groups = optimizer.param_groups
    assert [group.get("adapter") for group in groups] == ["b", "c", None]
    assert [group["lr"] for group in groups] == [0.02, 0.05, 0.05]
    assert {group["shrink_ratio"] for group in groups} == {0.25}
    for group, adapter in zip(groups, ("b", "c", "default"), strict=True):
        assert {adapter_of(name) for name in group["param_names"]} == {adapter}
        assert len(group["params"]) == 8 and all(p.requires_grad for p in group["params"])
    # A state is that of its groups.
    again = slk.StableLoRAAdamW.from_model(model, adapters={"b": {"lr": 1.0}, "c": {}})
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.02, 0.05, 0.05]
    assert [group.get("adapter") for group in again.param_groups] == ["b", "c", None]
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["adapter"] == "b"


def test_what_the_user_froze_stays_frozen():
    """PEFT freezes an adapter as a whole; a part of one is the user's choice. Frozen weights alone
    are no group.
    """
    model = make(("b", {"r": 3})).train()
    frozen = [
        p for name, p in model.named_parameters() if "layers.0" in name and ".default." in name
    ]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = slk.StableLoRAAdamW.from_model(model, adapters={"default": {}, "b": {}})
    assert frozen and not any(p.requires_grad for p in frozen)
    assert [group.get("adapter") for group in optimizer.param_groups] == ["default", "b"]


@pytest.mark.parametrize(
    ("adapters", "options", "error", "match"),
    [
        ({"x": {}}, {}, ValueError, "adapters names 'x', but the model's adapters are 'b', 'c', 'default'"),
        ({"b": {"rate": 1}}, {}, ValueError, r"adapters\['b'\] may have the keys lr, betas, .*, got 'rate'"),
        ({"b": {"max_grad_norm": 1.0}}, {}, ValueError, "got 'max_grad_norm'"),
        ({"b": {}}, {"max_grad_norm": 1.0}, ValueError, "max_grad_norm must be None with adapters, got 1.0"),
        ({"b": 0.1}, {}, TypeError, r"adapters\['b'\] must be a dict of settings, got 0.1"),
        ({}, {}, TypeError, "must be a dict of adapters' names and their settings, got {}"),
        (["b"], {}, TypeError, r"got \['b'\]"),
        ({"b": {"lr": -1.0}}, {}, ValueError, "lr must be .* got -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(adapters, options, error, match):
    model = two_and_one_more()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        slk.StableLoRAAdamW.from_model(model, adapters=adapters, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_adapter_that_was_frozen_since_is_named_once():
    model = two_and_one_more()
    slk.accelerate_peft(model)
    optimizer = slk.StableLoRAAdamW.from_model(model, adapters=SETTINGS)
    step(model, optimizer)
    model.set_adapter("b")
    with pytest.warns(RuntimeWarning) as warned:
        step(model, optimizer)
        step(model, optimizer)
    # adapters_of_rows warns too, as a UserWarning.
    of_optimizer = [warning for warning in warned if warning.category is RuntimeWarning]
    texts = [str(warning.message) for warning in of_optimizer]
    assert len(texts) == 2 and all("no longer requires gradients" in text for text in texts)
    assert ["'default'" in texts[0], "'c'" in texts[1]] == [True, True]
    assert of_optimizer[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("base_model.model.q_proj.lora_A.a.weight", "a"),
        ("q_proj.lora_embedding_B.b2", "b2"),
        ("q_proj.lora_magnitude_vector.default.weight", "default"),
        ("lm_head.modules_to_save.a.weight", "a"),
        ("embed.token_adapter.trainable_tokens_delta.a", "a"),
        ("q_proj.lora_A", None),
        ("q_proj.base_layer.weight", None),
    ],
)
def test_the_adapter_of_a_parameters_name(name, adapter):
    assert adapter_of(name) == adapter

"""A call that fails half-way leaves the model as it was: apply_lora and load_adapter, at every step of theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stablelora_kernels.integrations.peft import accelerate_peft
from stablelora_kernels.model import apply as apply_module
from stablelora_kernels.model import save_load
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.modules import CONFIG_ATTRIBUTE, lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.small_models import Model, fill_b, lora_config, output, refused

STEPS = [("make_layer", 1), ("make_layer", 4), ("replace_modules", 1), ("untie", 1), ("untie", 2)]
STEPS += [("make_projection_groups", 1), ("report_on", 1)]


class Boom(BaseException):
    """As KeyboardInterrupt: no Exception."""


def failing(function, at):
    """``function``, which raises after its call number ``at``."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == at:
            raise Boom("out of memory")
        return result

    return call


@pytest.mark.parametrize(("step", "at"), STEPS)
def test_apply_lora_is_rolled_back(monkeypatch, step, at):
    model = Model(tied=True)
    model.layers[0].norm.weight.requires_grad_(False)
    calls = []
    handle = model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(apply_module, step, failing(getattr(apply_module, step), at))
    config = lora_config(modules_to_save=["lm_head", "embed"], bias="all")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with refused(model, Boom, "out of memory"):
        apply_lora(model, config, fuse_projections=True)
    monkeypatch.undo()
    assert not lora_layers(model) and not hasattr(model, CONFIG_ATTRIBUTE)
    assert model.lm_head.weight is model.embed.weight and list(model.state_dict()) == list(state)
    output(model)
    assert calls == [1]
    handle.remove()
    output(model)
    assert calls == [1]
    apply_lora(model, config)


def test_a_lazy_layer_beside_the_matches_is_frozen():
    model = Model()
    model.lazy = nn.LazyLinear(3)
    report = apply_lora(model, lora_config())
    assert len(report.replaced) == 4 and report.total == sum(p.numel() for p in Model().parameters()) + 4 * 2 * 16
    model.lazy(torch.randn(2, 5))
    assert not model.lazy.weight.requires_grad and not model.lazy.bias.requires_grad


def test_a_lazy_layer_that_is_asked_for_is_refused_or_reported():
    model = Model()
    model.lazy = nn.LazyLinear(3)
    with refused(Model(), ValueError, "target_modules must match"):
        apply_lora(Model(), lora_config(target_modules=["lazy"]))
    report = apply_lora(model, lora_config(target_modules=["q_proj", "lazy"]))
    assert [skipped.name for skipped in report.skipped] == ["lazy"]
    other = Model()
    other.lazy = nn.LazyLinear(3)
    with pytest.raises(
        ValueError, match=r"modules_to_save names 'lazy', but 'lazy.weight' has no shape before its first"
    ):
        apply_lora(other, lora_config(modules_to_save=["lazy"]))
    assert not lora_layers(other)


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_load_adapter_is_rolled_back(tmp_path, monkeypatch, has_lora, at):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")
    source = Model()
    apply_lora(source, lora_config(modules_to_save=["lm_head"]))
    fill_b(source)
    save_adapter(source, tmp_path)
    target = Model()
    if has_lora:
        apply_lora(target, lora_config(modules_to_save=["lm_head"]))
    monkeypatch.setattr(save_load, "copy", failing(save_load.copy, at))
    with refused(target, Boom, "out of memory"):
        load_adapter(target, tmp_path)
    monkeypatch.undo()
    load_adapter(target, tmp_path)


# What matched nothing


def test_a_typo_beside_a_match_is_warned_of_and_reported():
    model = Model()
    with pytest.warns(UserWarning, match="target_modules 'v_porj' matches nothing, while other names match 2 modules"):
        report = apply_lora(model, lora_config(target_modules=["q_proj", "v_porj"]))
    assert report.notes == ("target_modules 'v_porj' matches nothing",) and "v_porj" in str(report)


@pytest.mark.filterwarnings("error")
def test_what_matches_and_is_skipped_is_no_typo():
    apply_lora(Model(), lora_config(target_modules=["q_proj", "norm", "layers.1.v_proj"]))
    apply_lora(Model(), lora_config(target_modules=["q_proj"], exclude_modules=["nothing"]))


def test_accelerate_peft_reports_a_typo():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_porj"])
    report = accelerate_peft(peft.get_peft_model(Model(), config))
    assert report.notes == ("target_modules 'v_porj' matches nothing (adapter 'default')",)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    assert accelerate_peft(peft.get_peft_model(Model(), config)).notes == ()


def test_a_model_of_dora_alone_is_not_said_to_have_lora_on_0_modules():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    report = accelerate_peft(
        peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    )
    assert str(report).startswith("No LoRA module runs on this library's ops; ") and "variant of LoRA" in str(report)


def test_one_module_is_not_said_to_be_modules():
    model = Model()
    report = apply_lora(model, lora_config(target_modules=["layers.0.q_proj"]))
    assert str(report).startswith("LoRA on 1 module; ")


# PEFT's config


def test_pefts_config_is_taken():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "use_rslora": True, "bias": "lora_only"}
    theirs = peft.LoraConfig(**fields, rank_pattern={"lm_head": 2}, task_type="CAUSAL_LM", exclude_modules=["lm_head"])
    model, other = Model(), Model()
    report = apply_lora(model, theirs)
    ours = lora_config(**fields, rank_pattern={"lm_head": 2}, exclude_modules=["lm_head"], task_type="CAUSAL_LM")
    assert report == apply_lora(other, ours)
    assert hash(getattr(model, CONFIG_ATTRIBUTE)) == hash(ours) or set(theirs.target_modules) == set(
        ours.target_modules
    )
    for change, message in (
        ({"use_dora": True}, "the LoraConfig must use plain LoRA, got use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"layers_to_transform": [0]}, r"got layers_to_transform=\[0\]; write them as a regular expression"),
    ):
        with refused(other, ValueError, message):
            apply_lora(other, peft.LoraConfig(r=2, target_modules=["q_proj"], **change))
    with refused(other, ValueError, "peft_type in the IA3Config must be 'LORA'"):
        apply_lora(other, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with refused(other, TypeError, "config must be a LoRAConfig, got dict; PEFT's LoraConfig will do, too"):
        apply_lora(other, {"r": 2})


def test_configs_are_hashable():
    one, other = (lora_config(lora_alpha=a, rank_pattern={"a": 1, "b": 2}, modules_to_save=["x"]) for a in (16, 16.0))
    assert one == other and hash(one) == hash(other) and len({one, other, lora_config(r=3)}) == 2

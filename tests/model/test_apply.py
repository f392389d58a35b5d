"""apply_lora, merging and removing on whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora, remove_lora, unmerge_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import IDS, Model, fill_b, lora_config, reasons, refused, trainable


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_every_replaced_module_is_in_the_report(model):
    report = apply_lora(model, lora_config(r=4, lora_alpha=6, lora_dropout=0.25, rank_pattern={"layers.1.q_proj": 3}))
    assert [m.name for m in report.replaced] == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    assert [m.r for m in report.replaced] == [4, 4, 3, 4]
    assert [(m.in_features, m.out_features, m.lora_alpha) for m in report.replaced] == [(8, 8, 6)] * 4
    assert [m.scaling for m in report.replaced] == [1.5, 1.5, 2, 1.5]
    assert all(layer.lora_dropout == 0.25 for layer in lora_layers(model).values())
    assert report.trainable == 3 * 4 * 16 + 3 * 16 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert (report.skipped, report.notes) == ((), ())


def test_report_as_text(model):
    report = apply_lora(model, lora_config(target_modules=["q_proj", "embed", "norm"], r=4, rank_pattern={"k_proj": 3}))
    assert str(report).splitlines() == [
        "LoRA on 2 modules; 128 of 608 parameters train (21.05%)",
        "  2 x q_proj: 8 -> 8, r 4, alpha 16, scaling 4",
        "  skipped embed: Embedding is not an nn.Linear",
        "  skipped layers.0.norm, layers.1.norm: LayerNorm is not an nn.Linear",
        "  note: rank_pattern 'k_proj' matches nothing",
    ]


def test_notes_name_what_matched_nothing(model):
    report = apply_lora(
        model,
        lora_config(alpha_pattern={"k_proj": 1}, exclude_modules=["k_proj"], modules_to_save=["lm_head", "score"]),
    )
    assert report.notes == (
        "modules_to_save 'score' matches nothing",
        "alpha_pattern 'k_proj' matches nothing",
        "exclude_modules ['k_proj'] matches nothing that target_modules does",
    )


def test_outputs_are_those_of_w_plus_scaled_ba(model):
    plain = copy.deepcopy(model)
    apply_lora(model, lora_config(lora_alpha=3, use_rslora=True))
    assert torch.equal(model(IDS), plain(IDS))
    fill_b(model)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            plain.get_submodule(name).weight += 3 / 2**0.5 * layer.lora_B @ layer.lora_A
    assert not torch.allclose(model(IDS), Model()(IDS))
    torch.testing.assert_close(model(IDS), plain(IDS))


def test_weight_bias_device_dtype_and_mode_are_kept(model):
    model.layers[0].eval()
    model.to(torch.bfloat16)
    old = {name: model.get_submodule(name) for name in ("layers.0.q_proj", "layers.1.v_proj")}
    apply_lora(model, lora_config())
    for name, linear in old.items():
        layer = model.get_submodule(name)
        assert type(layer) is LoRALinear
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert layer.training == linear.training
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    assert model.layers[0].training is False
    assert model.layers[1].training is True
    meta = apply_lora(Model().to("meta"), lora_config())
    assert meta.trainable == 4 * 2 * 16


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_init_is_passed_on(model, init):
    apply_lora(model, lora_config(init_lora_weights=init))
    layer = model.layers[0].q_proj
    assert bool(layer.lora_A.any())
    assert bool(layer.lora_B.any()) is (init is False)


def test_only_lora_is_trainable(model):
    apply_lora(model, lora_config())
    assert trainable(model) == {f"layers.{i}.{n}_proj.lora_{ab}" for i in (0, 1) for n in "qv" for ab in "AB"}
    fill_b(model)
    model(IDS).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.filterwarnings("ignore")
def test_trainable_parameters_are_pefts(bias):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    theirs, ours = Model(), Model()
    kwargs = {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": bias, "modules_to_save": ["lm_head"]}
    peft.get_peft_model(theirs, peft.LoraConfig(**kwargs))
    apply_lora(ours, LoRAConfig(**kwargs))
    names = {
        name.replace(".default", "").replace(".modules_to_save", "").replace(".base_layer", "")
        for name in trainable(theirs)
    }
    assert {
        name.replace("lora_A", "lora_A.weight").replace("lora_B", "lora_B.weight") for name in trainable(ours)
    } == names
    assert any(name.endswith("bias") for name in names) == (bias != "none")


def test_trained_biases_get_their_gradient(model):
    plain = copy.deepcopy(model)
    apply_lora(model, lora_config(bias="lora_only"))
    model(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    torch.testing.assert_close(model.layers[0].q_proj.bias.grad, plain.layers[0].q_proj.bias.grad)
    assert model.layers[0].norm.bias.grad is None


def test_a_tied_module_to_save_is_trained_alone():
    model = Model(tied=True)
    report = apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    assert report.notes == ("'lm_head.weight' was tied to a module outside modules_to_save and is a copy now",)
    assert model.lm_head.weight is not model.embed.weight
    assert torch.equal(model.lm_head.weight, model.embed.weight)
    assert model.lm_head.weight.requires_grad
    assert not model.embed.weight.requires_grad


def test_a_layer_in_two_places_stays_one():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    report = apply_lora(model, lora_config(target_modules=["q_proj"]))
    assert [m.name for m in report.replaced] == ["layers.0.q_proj"]
    assert report.notes == ("'layers.0.q_proj' is registered in 2 places and stays one layer",)
    assert model.layers[0].q_proj is model.layers[1].q_proj
    assert type(model.layers[1].q_proj) is LoRALinear
    remove_lora(model)
    assert type(model.layers[0].q_proj) is nn.Linear
    assert model.layers[0].q_proj is model.layers[1].q_proj


def test_a_second_name_that_alone_matches_is_reported():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    report = apply_lora(model, lora_config(target_modules=["layers.1.q_proj", "v_proj"]))
    assert reasons(report) == {"layers.1.q_proj": "it is the same module as 'layers.0.q_proj', which is not matched"}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_move_and_their_handles_still_work(model):
    calls = []
    layer = model.layers[0].q_proj
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append("pre")),
        layer.register_forward_hook(lambda module, args, kwargs, out: calls.append("forward"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
    ]
    report = apply_lora(model, lora_config())
    assert report.notes == ("3 hooks of 'layers.0.q_proj' moved to the new layer",)
    model(IDS).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    handles[0].remove()
    handles[2].remove()
    remove_lora(model)
    model(IDS)
    assert calls == ["pre", "forward", "backward", "forward"]


def test_lora_on_top_of_lora(model):
    apply_lora(model, lora_config(target_modules=["q_proj"]))
    first = model.layers[0].q_proj
    report = apply_lora(model, lora_config())
    assert [m.name for m in report.replaced] == ["layers.0.v_proj", "layers.1.v_proj"]
    assert reasons(report) == dict.fromkeys(["layers.0.q_proj", "layers.1.q_proj"], "it is a LoRALinear already")
    assert model.layers[0].q_proj is first
    assert len(trainable(model)) == 8


def test_merge_and_unmerge(model):
    apply_lora(model, lora_config())
    fill_b(model)
    model.eval()
    weights = {name: layer.weight for name, layer in lora_layers(model).items()}
    expected = model(IDS)
    merge_lora(model)
    merge_lora(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(model(IDS), expected)
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(layer.weight is weights[name] for name, layer in lora_layers(model).items())
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("merged_before", [False, True])
def test_remove_with_merge(model, merged_before):
    apply_lora(model, lora_config())
    fill_b(model)
    model.eval()
    expected = model(IDS)
    if merged_before:
        merge_lora(model)
    remove_lora(model)
    assert type(model.layers[0].q_proj) is nn.Linear
    assert not model.layers[0].q_proj.training
    assert not lora_layers(model)
    assert set(model.state_dict()) == set(Model().state_dict())
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize("merged_before", [False, True])
def test_remove_without_merge_gives_the_original_back(model, merged_before):
    linear, expected = model.layers[0].q_proj, model(IDS)
    apply_lora(model, lora_config())
    fill_b(model)
    if merged_before:
        merge_lora(model)
    remove_lora(model, merge=False)
    assert model.layers[0].q_proj.weight is linear.weight
    assert model.layers[0].q_proj.bias is linear.bias
    assert torch.equal(model(IDS), expected)
    apply_lora(model, lora_config())


@pytest.mark.parametrize("action", [merge_lora, remove_lora])
def test_a_merge_that_is_not_finite_changes_nothing(model, action):
    apply_lora(model, lora_config())
    fill_b(model)
    with torch.no_grad():
        model.layers[1].v_proj.lora_B[3, 1] = float("inf")
    with refused(model, ValueError, r"'layers.1.v_proj': merging would give a weight that is not finite"):
        action(model)
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("action", [merge_lora, unmerge_lora, remove_lora])
def test_a_model_without_lora_is_refused(model, action):
    with pytest.raises(
        ValueError, match=r"model must have LoRALinear layers \(apply_lora makes them\), got a Model without any"
    ):
        action(model)


def test_a_layer_cannot_remove_itself():
    layer = LoRALinear(2, 2)
    with pytest.raises(ValueError, match="got a LoRALinear, which can't replace itself"):
        remove_lora(layer)
    assert not layer.merged

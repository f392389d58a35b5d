"""apply_lora on whole models, and that a call that fails half-way leaves the model as it was."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.small_models import Model, fill_b, lora_config, output, refused


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_every_replaced_module_is_in_the_report(model):
    report = slk.apply_lora(
        model, lora_config(r=4, lora_alpha=6, lora_dropout=0.25, rank_pattern={"layers.1.q_proj": 3})
    )
    assert [m.name for m in report.replaced] == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    assert [(m.r, m.scaling) for m in report.replaced] == [(4, 1.5), (4, 1.5), (3, 2), (4, 1.5)]
    assert [(m.in_features, m.out_features, m.lora_alpha) for m in report.replaced] == [(8, 8, 6)] * 4
    assert all(layer.lora_dropout == 0.25 for layer in lora_layers(model).values())
    assert report.trainable == 3 * 4 * 16 + 3 * 16 and report.total == sum(p.numel() for p in model.parameters())
    assert slk.apply_lora(Model().to("meta"), lora_config()).trainable == 4 * 2 * 16


def test_init_is_passed_on(model):
    slk.apply_lora(model, lora_config(init_lora_weights=False))
    assert bool(model.layers[0].q_proj.lora_B.any())


def test_a_tied_module_to_save_is_trained_alone():
    model = Model(tied=True)
    report = slk.apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    assert report.notes == ("'lm_head.weight' was tied to a module outside modules_to_save and is a copy now",)
    assert model.lm_head.weight is not model.embed.weight and torch.equal(model.lm_head.weight, model.embed.weight)
    assert model.lm_head.weight.requires_grad and not model.embed.weight.requires_grad


def test_a_layer_in_two_places_stays_one():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    report = slk.apply_lora(model, lora_config(target_modules=["q_proj"]))
    assert [m.name for m in report.replaced] == ["layers.0.q_proj"]
    assert report.notes == ("'layers.0.q_proj' is registered in 2 places and stays one layer",)
    assert model.layers[0].q_proj is model.layers[1].q_proj and type(model.layers[1].q_proj) is slk.LoRALinear
    slk.remove_lora(model)
    assert type(model.layers[0].q_proj) is nn.Linear and model.layers[0].q_proj is model.layers[1].q_proj


class Interrupt(TorchDispatchMode):
    """Ctrl-C before the operator number ``at``."""

    def __init__(self, at):
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt("by the user")
        return func(*args, **(kwargs or {}))


SAVED = lora_config(modules_to_save=["lm_head", "embed"], bias="all")
CALLS = {
    "apply_lora": (False, lambda model, path: slk.apply_lora(model, SAVED, fuse_projections=True)),
    "load_adapter, new layers": (False, lambda model, path: slk.load_adapter(model, path, fuse_projections=True)),
    "load_adapter, old layers": (True, slk.load_adapter),
    "merge_lora": (True, lambda model, path: slk.merge_lora(model)),
}


@pytest.mark.parametrize(("has_lora", "call"), CALLS.values(), ids=CALLS)
def test_a_call_that_is_interrupted_at_any_operator_is_rolled_back(tmp_path, has_lora, call):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")
    source, model, calls = Model(), Model(tied=True), []
    slk.apply_lora(source, SAVED)
    fill_b(source)
    slk.save_adapter(source, tmp_path)
    if has_lora:
        slk.apply_lora(model, SAVED)
    model.layers[0].norm.weight.requires_grad_(False)
    model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    before = output(model)
    for at in count(1, 3):
        interrupt = Interrupt(at)
        calls.clear()
        try:
            # safetensors makes a ValueError of the user's interrupt.
            with refused(model, (KeyboardInterrupt, ValueError), "by the user|cannot be read"), interrupt:
                call(model, tmp_path)
        except pytest.fail.Exception:
            break
        assert torch.equal(output(model), before) and calls == [1]
        assert bool(lora_layers(model)) == has_lora
        assert model.lm_head.weight is model.embed.weight or has_lora
    assert interrupt.seen < at

"""What the functions on a model refuse before anything changes: neither the model nor a file does."""

from __future__ import annotations

import copy
import os
from functools import partial

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import adapted, fresh
from tests.helpers.small_models import Model, llama, lora_config, refused


def applies(**config):
    return lambda model, path: slk.apply_lora(model, lora_config(**config))


def applies_pefts(kind="LoraConfig", **options):
    """With a config of PEFT's that is no plain LoRA."""

    def call(model, path):
        peft = pytest.importorskip(
            "peft", reason="runs where peft is installed: pip install .[test]"
        )
        slk.apply_lora(model, getattr(peft, kind)(target_modules=["q_proj"], **options))

    return call


def saves(model, path):
    slk.save_adapter(model, path / "new")


def loads(model, path):
    slk.load_adapter(model, path / "adapter")


def disables(model, path):
    with slk.disable_lora(model):
        pass


def on_meta(call):
    """A copy of the model, which has no values that could be compared afterwards."""
    return lambda model, path: call(copy.deepcopy(model).to("meta"), path)


def changed(change, **config):
    """Makes a model with LoRA and changes it."""

    def make():
        model = adapted(1, **config)
        with torch.no_grad():
            change(model)
        return model

    return make


def integers(name):
    """A head whose weight cannot be trained."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), name: nn.Linear(4, 4)})
    model[name].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def another_scaling(model):
    model.lm_head = slk.LoRALinear.from_linear(model.lm_head, use_rslora=True)


def overflow(model):
    model.layers[1].v_proj.lora_B[3, 1] = float("inf")


def with_peft(**config):
    from tests.helpers.peft_models import make

    return make(**config)


def accelerated(model):
    slk.accelerate_peft(model)
    return model


OF_PEFT = "^the LoRA layers of this PeftModel are PEFT's: call "
NO_LORA = r"model must have LoRALinear layers \(apply_lora makes them\), got a Model"
NOT_FINITE = r"'layers.1.v_proj': merging would give a weight that is not finite"
TRAINED = r"model must keep what its base model computes, got "
# The model, the call, and what the error says.
REFUSED = {
    "no match": (
        Model, applies(target_modules=["k_proj"]),
        r"target_modules must match an nn.Linear of the model, got \['k_proj'\], which matches none. "
        r"Its linear layers: 'layers.0.q_proj', .*, 'lm_head'$",
    ),
    "no match of an expression": (
        Model, applies(target_modules="k_proj"), "a string is a regular expression for the whole dotted name",
    ),
    "no config": (
        Model, lambda model, path: slk.apply_lora(model, "all-linear"),
        "config must be a LoRAConfig, got str; PEFT's LoraConfig will do, too",
    ),
    "lazy to save": (
        lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.LazyLinear(4)}), applies(modules_to_save=["head"]),
        "modules_to_save names 'head', but 'head.weight' has no shape before its first forward",
    ),
    "all skipped": (
        Model, applies(target_modules=["norm"]),
        r"which matches none; skipped layers.0.norm \(LayerNorm is not an nn.Linear\), ",
    ),
    "integers to save": (
        lambda: integers("head"), applies(modules_to_save=["head"]),
        r"modules_to_save names 'head', but 'head.weight' holds torch.int8, which cannot be trained",
    ),
    "nothing to save": (
        Model, applies(modules_to_save=["score"]), r"modules_to_save must name modules of the model, got \['score'\]",
    ),
    "PEFT's DoRA": (Model, applies_pefts(use_dora=True), "the LoraConfig must use plain LoRA, got use_dora=True"),
    "PEFT's layers": (Model, applies_pefts(layers_to_transform=[0]), "write them as a regular expression"),
    "PEFT's IA3": (
        Model, applies_pefts("IA3Config", feedforward_modules=[]), "peft_type in the IA3Config must be 'LORA'",
    ),
    "PEFT's model, adapted": (
        with_peft, applies(),
        r"target_modules \['q_proj', 'v_proj'\] matches no layer but PEFT's, which have LoRA already: slk.accelerate_peft",
    ),
    "PEFT's model and its head, adapted": (
        lambda: with_peft(model=llama(), target_modules="all-linear"), applies(target_modules="all-linear"),
        "^target_modules 'all-linear' matches no layer but PEFT's, .{,100}$",
    ),
    "PEFT's model, merged": (with_peft, lambda model, path: slk.merge_lora(model), OF_PEFT + r"model.merge_adapter\(\) "),
    "PEFT's model, unmerged": (
        with_peft, lambda model, path: slk.unmerge_lora(model), OF_PEFT + r"model.unmerge_adapter\(\) ",
    ),
    "PEFT's model, removed": (
        lambda: accelerated(with_peft()), lambda model, path: slk.remove_lora(model),
        OF_PEFT + r"model.merge_and_unload\(\), or model.unload\(\) to drop the adapter, ",
    ),
    "PEFT's model, saved": (with_peft, saves, OF_PEFT + r"model.save_pretrained\(path\) "),
    "PEFT's model, loaded": (
        lambda: accelerated(with_peft()), loads,
        OF_PEFT + r"model.load_adapter\(path, adapter_name\), or peft.PeftModel.from_pretrained\(base_model, path\), instead$",
    ),
    "merged, no LoRA": (Model, lambda model, path: slk.merge_lora(model), NO_LORA),
    "unmerged, no LoRA": (Model, lambda model, path: slk.unmerge_lora(model), NO_LORA),
    "removed, no LoRA": (Model, lambda model, path: slk.remove_lora(model), NO_LORA),
    "merged, not finite": (changed(overflow), lambda model, path: slk.merge_lora(model), NOT_FINITE),
    "removed, not finite": (changed(overflow), lambda model, path: slk.remove_lora(model), NOT_FINITE),
    "saved, no LoRA": (Model, saves, NO_LORA),
    "saved, a layer": (lambda: slk.LoRALinear(2, 2), saves, "got a LoRALinear, which has no name in a file"),
    "saved, on meta": (lambda: adapted(1), on_meta(saves), "must hold values, got .* on the meta device"),
    "saved, two scalings": (
        changed(another_scaling), saves, "use_rslora must be one value for all layers, got both; lm_head differ",
    ),
    "saved, to a file": (
        lambda: adapted(1), lambda model, path: slk.save_adapter(model, path / "adapter" / "adapter_config.json"),
        "path must be a directory, got the file",
    ),
    "loaded, a revision that is none": (
        fresh, lambda model, path: slk.load_adapter(model, path / "adapter", revision=1),
        "revision must be a string or None, got int",
    ),
    "loaded, merged": (
        changed(slk.merge_lora), loads, "must not be merged while an adapter is loaded, got layers.0.q_proj, .* merged",
    ),
    "loaded, on meta": (
        fresh, on_meta(loads), r"model must hold values, got layers.0.q_proj.weight.* on the meta device",
    ),
    "disabled, no LoRA": (lambda: nn.Linear(2, 2), disables, "got a Linear without any"),
    "disabled, modules_to_save": (
        lambda: nn.DataParallel(adapted(1, modules_to_save=["lm_head"])), disables,
        TRAINED + r"modules_to_save=\['lm_head'\]",
    ),
    "disabled, biases": (lambda: adapted(1, bias="lora_only"), disables, TRAINED + "bias='lora_only'"),
    "disabled, PEFT's biases": (lambda: with_peft(bias="all"), disables, "got bias='all'"),
    "disabled, a layer's bias": (
        lambda: adapted(1, bias="all").layers[0].q_proj, disables, "got a bias that trains",
    ),
}  # fmt: skip


@pytest.mark.parametrize("names", [[*REFUSED][i::4] for i in range(4)], ids=str)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_refused_before_anything_changes(saved, names):
    for name in names:
        print(name)
        make, call, message = REFUSED[name]
        model = make()
        before = [layer.merged for layer in lora_layers(model).values()]
        unchanged = pytest.raises if "lazy" in name else partial(refused, model)
        with unchanged((ValueError, TypeError), match=message):
            call(model, saved.parent)
        assert [layer.merged for layer in lora_layers(model).values()] == before
        assert os.listdir(saved.parent) == ["adapter"]

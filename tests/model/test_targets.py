"""What apply_lora leaves alone, with the reason in its report, and what it refuses before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import stablelora_kernels as slk
from tests.helpers.small_models import Model, llama, lora_config, reasons, refused


def linear(**attributes):
    layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def with_state_hook():
    layer = nn.Linear(4, 4)
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def peft_layer():
    layer = nn.Module()
    layer.base_layer, layer.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})
    return layer


def with_experts():
    """As transformers 5 stores them, beside a convolution and a position embedding, which are none."""
    model = Model()
    model.experts, model.conv = nn.Module(), nn.Conv1d(3, 5, 2)
    model.experts.up, model.experts.down = (nn.Parameter(torch.zeros(4, *shape)) for shape in ((16, 8), (8, 16)))
    model.positions = nn.Parameter(torch.zeros(1, 7, 16))
    return model


class Subclass(nn.Linear):
    pass


SUBCLASS = "{} is a subclass of nn.Linear that a model may use without calling it"
OUT_PROJ = SUBCLASS.format("NonDynamicallyQuantizableLinear")
READ = "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
PARTS = "it holds other parameters or modules than weight and bias"
PEFTS = "it is part of a PEFT layer; accelerate_peft runs those"
INTEGERS = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
# A layer, and why "all-linear" skips which part of it.
ODD = {
    "lora": (lambda: slk.LoRALinear(4, 4), {"": "it is a LoRALinear already"}),
    "sub": (lambda: Subclass(4, 4), {"": SUBCLASS.format("Subclass")}),
    "conv1d": (lambda: type("Conv1D", (nn.Embedding,), {})(4, 4), {"": "Conv1D is not an nn.Linear"}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {".out_proj": OUT_PROJ}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4), {".self_attn.out_proj": OUT_PROJ, ".linear1": READ, ".linear2": READ},
    ),
    "normed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {"": SUBCLASS.format("ParametrizedLinear")}),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2), {"": PARTS}),
    "replaced": (lambda: linear(forward=lambda x: x), {"": "its forward was replaced (as accelerate's hooks do)"}),
    "integers": (
        lambda: linear(weight=INTEGERS), {"": "it holds a Parameter of torch.int8, not a plain floating-point Parameter"},
    ),
    "state_hook": (with_state_hook, {"": "it has state_dict hooks"}),
    "empty": (lambda: nn.Linear(0, 4), {"": "its weight is empty, [4, 0]"}),
    "peft": (peft_layer, {".base_layer": PEFTS, ".lora_A.default": PEFTS}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_replaced_is_skipped_with_its_reason(name):
    make, parts = ODD[name]
    model = nn.ModuleDict({"good": nn.Linear(4, 4), name: make()})
    kept = {name + part: model.get_submodule(name + part) for part in parts}
    report = slk.apply_lora(model, lora_config(target_modules="all-linear"))
    assert [m.name for m in report.replaced] == ["good"]
    assert reasons(report) == {name + part: reason for part, reason in parts.items()}
    assert all(model.get_submodule(path) is module for path, module in kept.items())


HEAD = 'it is the output head, which "all-linear" leaves out'
SHARE = 2 * 4 * 16 * 8 / sum(p.numel() for p in with_experts().parameters())
EXPERTS = (
    "it stacks matrices in up, down, as experts are stored, and has no linear layers for them: "
    f"{SHARE:.1%} of the model's weights are in such parameters and get no adapter; PEFT's target_parameters can adapt them"
)
EXCLUDED, SAVED = "exclude_modules matches it", "it is trained whole (modules_to_save)"
# A model, the config, how many layers are replaced, and what is skipped.
SKIPPED = {
    "by name": (
        Model, {"exclude_modules": ["layers.0.v_proj"], "modules_to_save": ["layers.1"]}, 1,
        {"layers.0.v_proj": EXCLUDED, "layers.1.q_proj": SAVED, "layers.1.v_proj": SAVED},
    ),
    "experts": (with_experts, {"target_modules": "all-linear"}, 5, {"experts": EXPERTS}),
    "a llama's head": (llama, {"target_modules": "all-linear"}, 14, {"lm_head": HEAD}),
    "a tied head": (
        lambda: Model(tied=True), {"target_modules": "all-linear"}, 4,
        {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "replaced", "skipped"), SKIPPED.values(), ids=SKIPPED)
def test_matches_that_are_left_out_are_reported(make, config, replaced, skipped):
    report = slk.apply_lora(make(), lora_config(**config))
    assert len(report.replaced) == replaced and reasons(report) == skipped and not report.notes


REFUSED = {
    "no match": (
        Model, {"target_modules": ["k_proj"]},
        r"target_modules must match an nn.Linear of the model, got \['k_proj'\], which matches none. "
        r"Its linear layers: 'layers.0.q_proj', .*, 'lm_head'$",
    ),
    "all skipped": (
        Model, {"target_modules": ["norm"]}, r"which matches none; skipped layers.0.norm \(LayerNorm is not an nn.Linear\), ",
    ),
    "integers to save": (
        lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": linear(weight=INTEGERS)}), {"modules_to_save": ["head"]},
        r"modules_to_save names 'head', but 'head.weight' holds torch.int8, which cannot be trained",
    ),
    "nothing to save": (
        Model, {"modules_to_save": ["score"]}, r"modules_to_save must name modules of the model, got \['score'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(make, config, message):
    with refused(model := make(), ValueError, message):
        slk.apply_lora(model, lora_config(**config))


def test_a_typo_beside_a_match_is_warned_of_and_reported(recwarn):
    with pytest.warns(UserWarning, match="target_modules 'v_porj' matches nothing, while other names match 2 modules"):
        report = slk.apply_lora(Model(), lora_config(target_modules=["q_proj", "v_porj"]))
    assert report.notes == ("target_modules 'v_porj' matches nothing",)
    # What matches and is skipped is no typo.
    recwarn.clear()
    slk.apply_lora(Model(), lora_config(target_modules=["q_proj", "norm", "layers.1.v_proj"]))
    assert not recwarn.list

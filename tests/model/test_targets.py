"""What apply_lora leaves alone, with the reason in its report, and what it refuses before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import Model, llama, lora_config, reasons, refused


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_excluded_matches_are_reported(model):
    report = apply_lora(model, lora_config(exclude_modules=["layers.0.v_proj"], modules_to_save=["layers.1"]))
    assert [m.name for m in report.replaced] == ["layers.0.q_proj"]
    assert reasons(report) == {
        "layers.0.v_proj": "exclude_modules matches it",
        "layers.1.q_proj": "it is trained whole (modules_to_save)",
        "layers.1.v_proj": "it is trained whole (modules_to_save)",
    }


class Conv1D(nn.Module):
    """The look of GPT-2's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


class Linear4bit(nn.Linear):
    pass


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


SUBCLASS = "{} is a subclass of nn.Linear that a model may use without calling it"
OUT_PROJ = SUBCLASS.format("NonDynamicallyQuantizableLinear")
READ = "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
PARTS = "it holds other parameters or modules than weight and bias"
PEFTS = "it is part of a PEFT layer; accelerate_peft runs those"
INTEGERS = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
# A layer, and why "all-linear" skips which part of it.
ODD = {
    "lora": (lambda: LoRALinear(4, 4), {"": "it is a LoRALinear already"}),
    "sub": (lambda: Linear4bit(4, 4), {"": SUBCLASS.format("Linear4bit")}),
    "conv1d": (Conv1D, {"": "Conv1D is not an nn.Linear"}),
    "conv2d": (lambda: nn.Conv2d(4, 4, 1), {}),
    "embedding": (lambda: nn.Embedding(4, 4), {}),
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
    "extra": (lambda: linear(gain=nn.Parameter(torch.zeros(4))), {"": PARTS}),
    "state_hook": (with_state_hook, {"": "it has state_dict hooks"}),
    "empty": (lambda: nn.Linear(0, 4), {"": "its weight is empty, [4, 0]"}),
    "peft": (peft_layer, {".base_layer": PEFTS, ".lora_A.default": PEFTS}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_replaced_is_skipped_with_its_reason():
    def make():
        return nn.ModuleDict({"good": nn.Linear(4, 4)} | {name: layer() for name, (layer, _) in ODD.items()})

    model = make()
    expected = {name + part: reason for name, (_, parts) in ODD.items() for part, reason in parts.items()}
    kept = {name: model.get_submodule(name) for name in expected}
    report = apply_lora(model, lora_config(target_modules="all-linear"))
    assert [m.name for m in report.replaced] == ["good"] and reasons(report) == expected
    assert all(model.get_submodule(name) is module for name, module in kept.items())
    # Those that a list names are reported whatever they are.
    report = apply_lora(make(), lora_config(target_modules=["good", "embedding", "conv2d", "attention"]))
    kinds = {"embedding": "Embedding", "conv2d": "Conv2d", "attention": "MultiheadAttention"}
    assert reasons(report) == {name: f"{kind} is not an nn.Linear" for name, kind in kinds.items()}


def test_all_linear_names_experts_and_their_share():
    """As transformers 5 stores them; no convolution, no position embedding and nothing that is left out by name."""

    def make():
        model = Model()
        model.experts, model.conv = nn.Module(), nn.Conv1d(3, 5, 2)
        model.experts.up, model.experts.down = (nn.Parameter(torch.zeros(4, *shape)) for shape in ((16, 8), (8, 16)))
        model.positions = nn.Parameter(torch.zeros(1, 7, 16))
        return model

    share = 2 * 4 * 16 * 8 / sum(p.numel() for p in make().parameters())
    report = apply_lora(make(), lora_config(target_modules="all-linear"))
    ((name, reason),) = ((name, reason) for name, reason in reasons(report).items() if "stacks" in reason)
    assert name == "experts" and reason.startswith("it stacks matrices in up, down, as experts are stored")
    assert f"{share:.1%} of the model's weights are in such parameters and get no adapter" in reason
    excluded = apply_lora(make(), lora_config(target_modules="all-linear", exclude_modules=["experts"]))
    assert reasons(excluded) == {"experts": "exclude_modules matches it"} and not excluded.notes
    assert not apply_lora(make(), lora_config(target_modules=["q_proj"])).skipped


def test_all_linear_leaves_heads_out(model):
    head = 'it is the output head, which "all-linear" leaves out'
    model.get_output_embeddings = lambda: model.lm_head
    report = apply_lora(nn.ModuleDict({"wrapped": model}), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"wrapped.lm_head": head} and len(report.replaced) == 4
    report = apply_lora(Model(tied=True), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"}
    report = apply_lora(llama(num_hidden_layers=1), lora_config(target_modules="all-linear"))
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert [m.name.rpartition(".")[2] for m in report.replaced] == names and reasons(report) == {"lm_head": head}


def with_integers():
    model = Model()
    model.counts = nn.Module()
    model.counts.total = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    return model


def lazy():
    model = Model()
    model.lazy = nn.LazyLinear(3)
    return model


REFUSED = {
    "no match": (
        Model, {"target_modules": ["k_proj"]},
        r"target_modules must match an nn.Linear of the model, got \['k_proj'\], which matches none. "
        r"Its linear layers: 'layers.0.q_proj', .*, 'lm_head'$",
    ),
    "a name as an expression": (
        Model, {"target_modules": "q_proj"}, "got 'q_proj', .*; a string is a regular expression for the whole dotted name",
    ),
    "all skipped": (
        Model, {"target_modules": ["norm"]}, r"which matches none; skipped layers.0.norm \(LayerNorm is not an nn.Linear\), ",
    ),
    "all excluded": (Model, {"exclude_modules": ".*"}, r"skipped layers.0.q_proj \(exclude_modules matches it\)"),
    "a layer itself": (lambda: nn.Linear(2, 2), {"target_modules": "all-linear"}, "Its linear layers: none"),
    "nothing to save": (
        Model, {"modules_to_save": ["score"]}, r"modules_to_save must name modules of the model, got \['score'\]",
    ),
    "integers to save": (
        with_integers, {"modules_to_save": ["counts"]},
        r"modules_to_save names 'counts', but 'counts.total' holds torch.int64, which cannot be trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kwargs", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(make, kwargs, message):
    with refused(model := make(), ValueError, message):
        apply_lora(model, lora_config(**kwargs))


def test_arguments_of_the_wrong_type(model):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        apply_lora({}, lora_config())
    with refused(model, TypeError, "config must be a LoRAConfig, got dict; PEFT's LoraConfig will do, too"):
        apply_lora(model, {"r": 2})


def test_a_lazy_layer_is_frozen_skipped_or_refused():
    model = lazy()
    report = apply_lora(model, lora_config())
    assert len(report.replaced) == 4 and report.total == sum(p.numel() for p in Model().parameters()) + 4 * 2 * 16
    model.lazy(torch.randn(2, 5))
    assert not model.lazy.weight.requires_grad and not model.lazy.bias.requires_grad
    report = apply_lora(lazy(), lora_config(target_modules=["q_proj", "lazy"]))
    assert [skipped.name for skipped in report.skipped] == ["lazy"]
    model = lazy()
    with pytest.raises(
        ValueError, match=r"modules_to_save names 'lazy', but 'lazy.weight' has no shape before its first"
    ):
        apply_lora(model, lora_config(modules_to_save=["lazy"]))
    assert not lora_layers(model)


def test_a_typo_beside_a_match_is_warned_of_and_reported(recwarn):
    with pytest.warns(UserWarning, match="target_modules 'v_porj' matches nothing, while other names match 2 modules"):
        report = apply_lora(Model(), lora_config(target_modules=["q_proj", "v_porj"]))
    assert report.notes == ("target_modules 'v_porj' matches nothing",) and "v_porj" in str(report)
    # What matches and is skipped is no typo.
    recwarn.clear()
    apply_lora(Model(), lora_config(target_modules=["q_proj", "norm", "layers.1.v_proj"]))
    apply_lora(Model(), lora_config(target_modules=["q_proj"], exclude_modules=["nothing"]))
    assert not recwarn.list

"""apply_lora: which layers it replaces, as PEFT would, which it leaves alone and why, and what it
leaves of a call that fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.reports import count_parameters
from tests.helpers.processes import needs_gloo
from tests.helpers.quantized_weights import K, N, bnb_4bit
from tests.helpers.small_models import (
    Model,
    fill_b,
    llama,
    lora_options,
    output,
    reasons,
    refused,
    trainable,
)

CHOICES = [
    ["layers.1.q_proj", "v_proj"],
    ["proj"],
    {"q_proj"},
    ("q_proj", "lm_head"),
    r".*q_proj|lm_head",
    r"layers\.\d\.q_proj",
    "q_proj",
    "All-Linear",
]


@pytest.mark.parametrize("targets", CHOICES, ids=str)
@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 4, "use_rslora": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_matches_what_peft_matches(targets, options):
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    options = {"r": 2, "lora_alpha": 16} | options
    theirs = Model()
    try:
        tuned = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=targets, **options))
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match"):
            slk.apply_lora(Model(), targets, **options)
        return
    expected = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT knows the heads of transformers' models only; here the head is a layer like any other.
    report = slk.apply_lora(Model(), targets, **options)
    assert {m.name: (m.r, m.lora_alpha, m.scaling) for m in report.replaced} == expected
    assert report.trainable == tuned.get_nb_trainable_parameters()[0]


def test_all_but_the_pairs_is_frozen_and_reported():
    model = Model()
    report = slk.apply_lora(model, ["q_proj", "v_proj"], r=4, lora_alpha=6, lora_dropout=0.25)
    names = [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    assert [m.name for m in report.replaced] == names == [*lora_layers(model)]
    assert {(m.r, m.scaling, m.in_features, m.out_features) for m in report.replaced} == {
        (4, 1.5, 8, 8)
    }
    assert all(layer.lora_dropout == 0.25 for layer in lora_layers(model).values())
    assert trainable(model) == {f"{name}.lora_{half}" for name in names for half in "AB"}
    assert report.trainable == 4 * 4 * 16
    assert report.total == sum(p.numel() for p in model.parameters())
    assert str(report).splitlines()[1] == "  2 x q_proj: 8 -> 8, r 4, alpha 6, scaling 1.5"
    assert slk.apply_lora(Model().to("meta"), **lora_options()).trainable == 4 * 2 * 16


def test_a_second_call_adds_layers_of_another_rank():
    """And the first call's go on training."""
    model = Model()
    slk.apply_lora(model, ["q_proj"], r=2)
    first = trainable(model)
    report = slk.apply_lora(model, ["q_proj", "v_proj"], r=3)
    assert reasons(report) == dict.fromkeys(
        ("layers.0.q_proj", "layers.1.q_proj"), "it is a LoRALinear already"
    )
    assert trainable(model) > first and {layer.r for layer in lora_layers(model).values()} == {2, 3}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_layer_in_two_places_stays_one():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    report = slk.apply_lora(model, ["q_proj"])
    assert [m.name for m in report.replaced] == ["layers.0.q_proj"]
    assert report.notes == ("'layers.0.q_proj' is registered in 2 places and stays one layer",)
    assert model.layers[0].q_proj is model.layers[1].q_proj
    assert type(model.layers[1].q_proj) is slk.LoRALinear


def test_a_typo_beside_a_match_is_warned_of_and_reported(recwarn):
    message = "target_modules 'v_porj' matches nothing, while other names match 2 modules"
    with pytest.warns(UserWarning, match=message):
        report = slk.apply_lora(Model(), ["q_proj", "v_porj"])
    assert report.notes == ("target_modules 'v_porj' matches nothing",)
    # What matches and is skipped is no typo.
    recwarn.clear()
    slk.apply_lora(Model(), ["q_proj", "norm", "layers.1.v_proj"])
    assert not recwarn.list


# What is left alone


def linear(**attributes):
    layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *args: None)
    return layer


def peft_layer():
    layer = nn.Module()
    layer.base_layer, layer.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})
    return layer


class Subclass(nn.Linear):
    pass


class Headless(Model):
    def get_output_embeddings(self):
        raise NotImplementedError


def odd(make):
    """A model with this layer as "odd" and a good one beside it."""
    return lambda: nn.ModuleDict({"good": nn.Linear(4, 4), "odd": make()})


SUBCLASS = "it is a {}, which may compute more than a linear layer; use PEFT and accelerate_peft"
OUT_PROJ = SUBCLASS.format("NonDynamicallyQuantizableLinear")
READ = "nn.TransformerEncoderLayer reads its weight instead of calling it in inference"
PEFTS = "it is part of a PEFT layer; accelerate_peft runs those"
HOOKS = "it has hooks, or its forward was replaced (as accelerate's hooks do)"
TENSOR = "it has a weight that is a Tensor; use PEFT and accelerate_peft"
INTEGERS = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
# A layer, and why "all-linear" skips which part of it.
ODD = {
    "lora": (lambda: slk.LoRALinear(4, 4), {"": "it is a LoRALinear already"}),
    "sub": (lambda: Subclass(4, 4), {"": SUBCLASS.format("Subclass")}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {".out_proj": OUT_PROJ}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4), {".self_attn.out_proj": OUT_PROJ, ".linear1": READ, ".linear2": READ},
    ),
    "normed": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {"": SUBCLASS.format("ParametrizedLinear")}),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2), {"": TENSOR}),
    "replaced": (lambda: linear(forward=lambda x: x), {"": HOOKS}),
    "hooked": (hooked, {"": HOOKS}),
    "with a part": (
        lambda: linear(part=nn.Linear(4, 4)), {"": "it holds other parameters or modules than weight and bias"},
    ),
    "integers": (lambda: linear(weight=INTEGERS), {"": "its weight is of torch.int8"}),
    "empty": (lambda: nn.Linear(0, 4), {"": "its weight is empty, [4, 0]"}),
    "peft": (peft_layer, {".base_layer": PEFTS, ".lora_A.default": PEFTS}),
}  # fmt: skip
# A model, how many layers "all-linear" replaces, and what is skipped.
SKIPPED = {
    "a head that is not said": (Headless, 5, {}),
    "a llama's head": (llama, 14, {"lm_head": 'it is the output head, which "all-linear" leaves out'}),
    "a tied head": (
        lambda: Model(tied=True), 4, {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"},
    ),
} | {
    name: (odd(make), 2 if name == "with a part" else 1, {f"odd{part}": reason for part, reason in parts.items()})
    for name, (make, parts) in ODD.items()
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "replaced", "skipped"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_skipped_is_reported_with_its_reason(make, replaced, skipped):
    model = make()
    kept = {path: model.get_submodule(path) for path in skipped}
    report = slk.apply_lora(model, "all-linear", r=2)
    assert len(report.replaced) == replaced and reasons(report) == skipped and not report.notes
    assert all(model.get_submodule(path) is module for path, module in kept.items())


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (
            ["k_proj"],
            {},
            ValueError,
            r"must match an nn.Linear .*, got \['k_proj'\], which matches none.*layers.0.q_proj",
        ),
        ("k_proj", {}, ValueError, "a string is a regular expression for the whole dotted name"),
        (
            ["norm"],
            {},
            ValueError,
            r"skipped layers.0.norm \(it is a LayerNorm, not an nn.Linear; use PEFT",
        ),
        ("(", {}, ValueError, r"target_modules must be a regular expression, got '\('"),
        (
            [],
            {},
            TypeError,
            r"target_modules must be 'all-linear', a regular expression or names, got \[\]",
        ),
        (None, {}, TypeError, "target_modules must be .*, got None"),
        ([1], {}, TypeError, r"target_modules must be .*, got \[1\]"),
        (["q_proj"], {"r": 0}, ValueError, "r must be at least 1, got 0"),
        (
            ["q_proj"],
            {"lora_dropout": 1},
            ValueError,
            r"lora_dropout must be .* in \[0, 1\), got 1",
        ),
        (["q_proj"], {"use_rslora": 1}, TypeError, "use_rslora must be a bool, got 1"),
    ],
)
def test_what_is_refused_changes_nothing(targets, options, error, message):
    with refused(model := Model(), error, f"(?s){message}"):
        slk.apply_lora(model, targets, **options)


def test_no_module_and_a_layer_alone_are_refused():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        slk.apply_lora({}, ["q_proj"])
    with pytest.raises(ValueError, match="which matches none"):
        slk.apply_lora(nn.Linear(4, 4), "all-linear")


def test_a_call_that_runs_out_of_memory_changes_nothing(monkeypatch):
    """At the third layer."""
    reset, count = slk.LoRALinear.reset_lora_parameters, iter(range(9))

    def fail(self, *args):
        if next(count) == 2:
            raise torch.OutOfMemoryError("no more")
        reset(self, *args)

    monkeypatch.setattr(slk.LoRALinear, "reset_lora_parameters", fail)
    with refused(model := Model(), torch.OutOfMemoryError, "no more"):
        slk.apply_lora(model, **lora_options())


@needs_gloo
def test_ddp_around_a_model_comes_later(mesh):
    with refused(
        model := DistributedDataParallel(Model()), ValueError, "LoRA before DistributedDataParallel"
    ):
        slk.apply_lora(model, ["q_proj"])


def calls(layers: int, directory: Path) -> dict[str, int]:
    """The calls of each action on a model of so many layers."""

    def fresh() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))})

    model, other = fresh(), fresh()
    names = [f"layers.{i}" for i in range(layers)]
    actions = {
        "apply": lambda: slk.apply_lora(model, names, r=1, fuse_projections=True),
        "save": lambda: slk.save_adapter(model, directory),
        "load": lambda: slk.load_adapter(other, directory),
        "load again": lambda: slk.load_adapter(model, directory),
        "optimizer": lambda: slk.StableLoRAAdamW.from_model(model),
    }
    counts = dict.fromkeys(actions, 0)
    for name, action in actions.items():

        def see(frame, event, arg, name=name):
            counts[name] += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            action()
        finally:
            sys.setprofile(None)
    return counts


def test_calls_grow_like_layers(tmp_path):
    """Twice the layers take twice the calls, Python's and C's."""
    pytest.importorskip(
        "safetensors", reason="runs where safetensors is installed: pip install .[test]"
    )
    # What only a first run does.
    calls(2, tmp_path)
    few, twice = calls(100, tmp_path), calls(200, tmp_path)
    growth = {name: twice[name] / few[name] for name in few}
    assert all(factor < 2.2 for factor in growth.values()), growth


@pytest.mark.filterwarnings("ignore:.*4-bit linear.*")
def test_bitsandbytes_layers_are_replaced_and_train_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(bnb_4bit(nn.Linear(K, N)), nn.ReLU(), nn.Linear(N, 2))
    x = torch.randn(5, K)
    expected = model(x)
    report = slk.apply_lora(model, "all-linear", r=3)
    assert [row.name for row in report.replaced] == ["0", "2"] and not report.skipped
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(model).values())


def test_the_report_is_no_model():
    report = slk.apply_lora(Model(), ["q_proj"])
    assert repr(report).startswith("<LoRAReport: LoRA on 2 modules; ")
    for mistake in (lambda: report(1), lambda: report.parameters()):
        with pytest.raises((TypeError, AttributeError), match="the model was changed in place"):
            mistake()


def test_merged_layers_become_plain_ones_as_the_guide_says(tmp_path):
    """transformers saves and loads such a model as any other."""
    torch.manual_seed(0)
    model, plain = llama().eval(), llama()
    slk.apply_lora(model, "all-linear", r=2, fuse_projections=True, fuse_mlp=True)
    fill_b(model)
    expected = output(model)
    for name, layer in lora_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.to_linear())
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(output(model), expected)
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), output(model))


def of_zero_3():
    """Cut by DeepSpeed, which leaves an empty placeholder."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_numel, model.weight.data = 16, torch.empty(0)
    return model


EDGES = {
    "nothing": (nn.Identity, 0),
    "lazy": (lambda: nn.LazyLinear(4), 0),
    "ZeRO 3": (of_zero_3, 16),
}


@pytest.mark.parametrize(("make", "count"), EDGES.values(), ids=EDGES)
def test_edges_of_the_counts(make, count):
    assert count_parameters(make()) == (count, count)


def test_a_new_head_that_stays_frozen_is_told():
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    model = transformers.LlamaForSequenceClassification(llama().config)
    note = (
        "'score' of LlamaForSequenceClassification stays frozen; if it is new, its values are random: "
        "name it in PEFT's modules_to_save, or let its parameters require gradients after apply_lora"
    )
    with pytest.warns(UserWarning, match="'score' of LlamaForSequenceClassification stays frozen"):
        assert note in slk.apply_lora(model, ["q_proj"]).notes
    # A head with LoRA trains.
    assert not slk.apply_lora(model, ["score"]).notes


def test_all_linear_leaves_a_new_head_out():
    """LoRA on it would keep its random weight frozen, and save_adapter would lose that."""
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    # The head's parts are in a module of their own.
    parts = ["classifier.dense", "classifier.out_proj"]
    made = {
        "score": transformers.LlamaForSequenceClassification(llama().config),
        "classifier": roberta,
    }
    for head, model in made.items():
        with pytest.warns(UserWarning, match=f"'{head}' of .* stays frozen"):
            report = slk.apply_lora(model, "all-linear")
        left_out = [head] if head == "score" else parts
        assert reasons(report) == dict.fromkeys(left_out, SKIPPED["a llama's head"][2]["lm_head"])
        assert report.replaced

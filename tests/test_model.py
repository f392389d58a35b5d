"""apply_lora on whole models: what is matched, what is replaced, what is trained, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model import apply_lora, lora_layers, merge_lora, remove_lora, unmerge_lora
from stablelora_kernels.nn import LoRALinear


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Model(nn.Module):
    """Two blocks under "layers", an embedding and a head."""

    def __init__(self, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def lora_config(**kwargs):
    return LoRAConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | kwargs)


def fill_b(model):
    """A branch that is zero would hide every mistake."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model):
    """Everything that a refused call must leave alone: objects, flags and values."""
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [
        (name, p, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [(name, id(p), flag) for name, p, flag, _ in parameters] == [(n, id(p), f) for n, p, f, _ in before[1]]
    assert all(torch.equal(now[3], then[3]) for now, then in zip(parameters, before[1], strict=True))


# LoRAConfig


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got 2.0 of type float"),
        ({"r": True}, TypeError, "r must be an int, got True"),
        ({"lora_alpha": float("nan")}, ValueError, r"lora_alpha must be a finite number in .*, got nan"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, got '16'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be a finite number in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be a finite number in \[0, 1\), got -0.1"),
        ({"target_modules": None}, ValueError, "target_modules must be a list of names, 'all-linear' or .*, got None"),
        ({"target_modules": []}, ValueError, r"target_modules must name at least one module, got \[\]"),
        ({"target_modules": ""}, ValueError, "target_modules must name at least one module, got ''"),
        ({"target_modules": "(q"}, ValueError, r"target_modules must be a regular expression, got '\(q'"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be a string or a list of names, got \[1\]"),
        ({"exclude_modules": "*"}, ValueError, r"exclude_modules must be a regular expression, got '\*'"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules must be a string or a list of names, got 3"),
        (
            {"modules_to_save": "head"},
            TypeError,
            "modules_to_save must be a list of names or None, got the string 'head'",
        ),
        ({"modules_to_save": [""]}, TypeError, r"modules_to_save must be a string or a list of names, got \[''\]"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False, got 1"),
        (
            {"init_lora_weights": "pissa"},
            ValueError,
            "init_lora_weights must be True, False or 'gaussian', got 'pissa'",
        ),
        ({"init_lora_weights": None}, ValueError, "init_lora_weights must be True, False or 'gaussian', got None"),
        ({"bias": "some"}, ValueError, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be at least 1, got 0"),
        ({"rank_pattern": {"(": 1}}, ValueError, r"rank_pattern must be a regular expression, got '\('"),
        ({"rank_pattern": [1]}, TypeError, r"rank_pattern must be a dict of name patterns, got \[1\]"),
        (
            {"alpha_pattern": {"q": float("inf")}},
            ValueError,
            r"alpha_pattern\['q'\] must be a finite number in .*, got inf",
        ),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out must be False: .*, got True"),
    ],
)
def test_config_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        lora_config(**kwargs)


def test_config_copies_what_it_checked():
    names, ranks = ["q_proj"], {"q_proj": 3}
    config = lora_config(target_modules=names, rank_pattern=ranks)
    names.append("v_proj")
    ranks["q_proj"] = -1
    assert (config.target_modules, config.rank_pattern) == (["q_proj"], {"q_proj": 3})


def test_config_takes_sets_and_tuples():
    config = lora_config(target_modules={"v_proj", "q_proj"}, exclude_modules=("a",), rank_pattern=None)
    assert (config.target_modules, config.exclude_modules, config.rank_pattern) == (["q_proj", "v_proj"], ["a"], {})


# Matching, also against peft itself

CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["layers.1.q_proj", "v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.1\..*_proj"},
    {"target_modules": r".*q_proj|lm_head"},
    {"target_modules": "All-Linear"},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"layers\.0\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.0"]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, "layers.0.v_proj": 5}, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^layers.0.q_proj": 4, r"1\.\w_proj": 0.5}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"oj": 3, ".*0.q_proj": 7, "q_proj": 1}},
]


@pytest.mark.parametrize("kwargs", CHOICES)
@pytest.mark.filterwarnings("ignore")
def test_matches_what_peft_matches(kwargs):
    peft = pytest.importorskip("peft")
    theirs, ours = Model(), Model()
    try:
        peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 2, "lora_alpha": 16} | kwargs))
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match"):
            apply_lora(ours, lora_config(**kwargs))
        return
    expected = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT knows the heads of transformers' models only; here the head is a layer like any other.
    report = apply_lora(ours, lora_config(**kwargs))
    assert {m.name: (m.r, m.lora_alpha, m.scaling) for m in report.replaced} == expected


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


# Skipping


def reasons(report):
    return {module.name: module.reason for module in report.skipped}


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


def odd_layers():
    replaced_forward = nn.Linear(4, 4)
    replaced_forward.forward = lambda x: x
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    extra = nn.Linear(4, 4)
    extra.gain = nn.Parameter(torch.zeros(4))
    with_state_hook = nn.Linear(4, 4)
    with_state_hook.register_state_dict_post_hook(lambda *args: None)
    peft_layer = nn.Module()
    peft_layer.base_layer = nn.Linear(4, 4)
    peft_layer.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
    return {
        "good": nn.Linear(4, 4),
        "lora": LoRALinear(4, 4),
        "sub": Linear4bit(4, 4),
        "conv1d": Conv1D(),
        "conv2d": nn.Conv2d(4, 4, 1),
        "embedding": nn.Embedding(4, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "encoder": nn.TransformerEncoderLayer(4, 2, 4),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "pruned": prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
        "replaced_forward": replaced_forward,
        "integers": integers,
        "extra": extra,
        "state_hook": with_state_hook,
        "empty": nn.Linear(0, 4),
        "peft": peft_layer,
    }


SKIPPED_BY_ALL_LINEAR = {
    "lora": "it is a LoRALinear already",
    "sub": "Linear4bit is a subclass of nn.Linear, whose users may not call it as one",
    "conv1d": "Conv1D is not an nn.Linear",
    "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear, whose users may not call it as one",
    "encoder.self_attn.out_proj": (
        "NonDynamicallyQuantizableLinear is a subclass of nn.Linear, whose users may not call it as one"
    ),
    "encoder.linear1": "nn.TransformerEncoderLayer reads its weight instead of calling it in inference",
    "encoder.linear2": "nn.TransformerEncoderLayer reads its weight instead of calling it in inference",
    "normed": "ParametrizedLinear is a subclass of nn.Linear, whose users may not call it as one",
    "pruned": "it holds other parameters or modules than weight and bias",
    "replaced_forward": "its forward was replaced (as accelerate's hooks do)",
    "integers": "it holds a Parameter of torch.int8, not a plain floating-point Parameter",
    "extra": "it holds other parameters or modules than weight and bias",
    "state_hook": "it has state_dict hooks",
    "empty": "its weight is empty, [4, 0]",
    "peft.base_layer": "it is part of a PEFT layer; accelerate_peft runs those",
    "peft.lora_A.default": "it is part of a PEFT layer; accelerate_peft runs those",
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_cannot_be_replaced_is_skipped_with_its_reason():
    model = nn.ModuleDict(odd_layers())
    kept = {name: model.get_submodule(name) for name in SKIPPED_BY_ALL_LINEAR}
    report = apply_lora(model, lora_config(target_modules="all-linear"))
    assert [m.name for m in report.replaced] == ["good"]
    assert reasons(report) == SKIPPED_BY_ALL_LINEAR
    assert all(model.get_submodule(name) is module for name, module in kept.items())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_named_matches_of_any_type_are_reported():
    report = apply_lora(
        nn.ModuleDict(odd_layers()), lora_config(target_modules=["good", "embedding", "conv2d", "attention"])
    )
    assert reasons(report) == {
        "embedding": "Embedding is not an nn.Linear",
        "conv2d": "Conv2d is not an nn.Linear",
        "attention": "MultiheadAttention is not an nn.Linear",
    }


def test_tensor_subclass_weights_are_skipped():
    class Quantised(torch.Tensor):
        pass

    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Quantised))
    report = apply_lora(nn.ModuleDict({"a": linear, "b": nn.Linear(4, 4)}), lora_config(target_modules=["a", "b"]))
    assert reasons(report) == {"a": "it holds a Quantised of torch.float32, not a plain floating-point Parameter"}


def test_torch_encoder_keeps_its_outputs_in_inference():
    # Why linear1 and linear2 are skipped: the fast path in eval mode would read their weights past the branch.
    torch.manual_seed(0)
    model = nn.ModuleDict({"enc": nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "out": nn.Linear(8, 8)}).eval()
    apply_lora(model, lora_config(target_modules="all-linear"))
    fill_b(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = model["out"](model["enc"](x))
    assert torch.allclose(fast, model["out"](model["enc"](x)), atol=1e-5)


def test_all_linear_leaves_the_output_head_out(model):
    model.get_output_embeddings = lambda: model.lm_head
    report = apply_lora(nn.ModuleDict({"wrapped": model}), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"wrapped.lm_head": 'it is the output head, which "all-linear" leaves out'}
    assert len(report.replaced) == 4


def test_all_linear_leaves_a_tied_head_out():
    report = apply_lora(Model(tied=True), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"}


def test_all_linear_on_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    report = apply_lora(transformers.LlamaForCausalLM(config), lora_config(target_modules="all-linear"))
    assert [m.name.rpartition(".")[2] for m in report.replaced] == [
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert reasons(report) == {"lm_head": 'it is the output head, which "all-linear" leaves out'}


# Replacing


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
    peft = pytest.importorskip("peft")
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
    assert report.notes == ("3 hook(s) of 'layers.0.q_proj' were moved to the new layer",)
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


# Refusing


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target_modules": ["k_proj"]},
            r"target_modules must match an nn.Linear of the model, got \['k_proj'\], which matches none. "
            r"Its nn.Linear layers: 'layers.0.q_proj', .*, 'lm_head'$",
        ),
        ({"target_modules": "q_proj"}, "got 'q_proj', .*; a string is a regular expression for the whole dotted name"),
        (
            {"target_modules": ["norm"]},
            r"which matches none; skipped layers.0.norm \(LayerNorm is not an nn.Linear\), ",
        ),
        ({"exclude_modules": ".*"}, r"skipped layers.0.q_proj \(exclude_modules matches it\)"),
        ({"modules_to_save": ["score"]}, r"modules_to_save must name modules of the model, got \['score'\]"),
    ],
)
def test_refused_before_anything_changes(model, kwargs, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, lora_config(**kwargs))
    assert_untouched(model, before)


def test_modules_to_save_must_be_trainable(model):
    model.counts = nn.Module()
    model.counts.total = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    before = snapshot(model)
    message = r"modules_to_save names 'counts', but 'counts.total' holds torch.int64, which cannot be trained"
    with pytest.raises(ValueError, match=message):
        apply_lora(model, lora_config(modules_to_save=["counts"]))
    assert_untouched(model, before)


def test_failure_while_layers_are_made_leaves_the_model_alone(model, monkeypatch):
    made = []

    def from_linear(linear, **kwargs):
        if made:
            raise MemoryError
        made.append(LoRALinear(8, 8))
        linear.requires_grad_(False)
        return made[0]

    monkeypatch.setattr(LoRALinear, "from_linear", from_linear)
    before = snapshot(model)
    with pytest.raises(MemoryError):
        apply_lora(model, lora_config())
    assert_untouched(model, before)


def test_arguments_of_the_wrong_type(model):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        apply_lora({}, lora_config())
    with pytest.raises(TypeError, match="config must be a LoRAConfig, got dict"):
        apply_lora(model, {"r": 2})


def test_a_bare_linear_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"Its nn.Linear layers: none"):
        apply_lora(nn.Linear(2, 2), lora_config(target_modules="all-linear"))


# Merging and removing


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


def test_merging_a_tied_head_leaves_the_embedding_alone():
    model = Model(tied=True).eval()
    apply_lora(model, lora_config(target_modules=["lm_head"]))
    fill_b(model)
    embedding, expected = model.embed.weight.detach().clone(), model(IDS)
    remove_lora(model)
    assert torch.equal(model.embed.weight, embedding)
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize("action", [merge_lora, remove_lora])
def test_a_merge_that_is_not_finite_changes_nothing(model, action):
    apply_lora(model, lora_config())
    fill_b(model)
    with torch.no_grad():
        model.layers[1].v_proj.lora_B[3, 1] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers.1.v_proj': merging would give a weight that is not finite"):
        action(model)
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [id(p) for _, p, _, _ in parameters] == [id(p) for _, p, _, _ in before[1]]
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

"""What apply_lora leaves alone, with the reason in its report, and what it refuses before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stablelora_kernels.model import apply
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import Model, assert_untouched, fill_b, llama, lora_config, reasons, refused, snapshot


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
    "sub": "Linear4bit is a subclass of nn.Linear that a model may use without calling it",
    "conv1d": "Conv1D is not an nn.Linear",
    "attention.out_proj": "NonDynamicallyQuantizableLinear is a subclass of nn.Linear that a model may use without calling it",
    "encoder.self_attn.out_proj": (
        "NonDynamicallyQuantizableLinear is a subclass of nn.Linear that a model may use without calling it"
    ),
    "encoder.linear1": "nn.TransformerEncoderLayer reads its weight instead of calling it in inference",
    "encoder.linear2": "nn.TransformerEncoderLayer reads its weight instead of calling it in inference",
    "normed": "ParametrizedLinear is a subclass of nn.Linear that a model may use without calling it",
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


def test_all_linear_names_experts_and_their_share():
    """As Mixtral stores them in transformers 5; no convolution, no position embedding and nothing that is left out by name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"vocab_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **settings))
    if not any(".experts." in name and p.dim() == 3 for name, p in model.named_parameters()):
        pytest.skip("this transformers stores experts as linear layers")
    model.conv, model.positions = nn.Conv1d(3, 5, 2), nn.Parameter(torch.zeros(1, 7, 16))
    total = sum(p.numel() for p in model.parameters())
    sizes = [p.numel() for name, p in model.named_parameters() if ".experts." in name]
    report = apply_lora(copy.deepcopy(model), lora_config(target_modules="all-linear"))
    experts = {name: reason for name, reason in reasons(report).items() if "stacks" in reason}
    assert list(experts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"] and len(sizes) == 4
    (reason,) = set(experts.values())
    assert reason.startswith("it stacks matrices in gate_up_proj, down_proj, as experts are stored")
    assert f"{sum(sizes) / total:.1%} of the model's weights are in such parameters and get no adapter" in reason
    assert "skipped model.layers.0.mlp.experts, model.layers.1.mlp.experts: it stacks" in str(report)
    excluded = apply_lora(copy.deepcopy(model), lora_config(target_modules="all-linear", exclude_modules=["experts"]))
    assert {name: reasons(excluded)[name] for name in experts} == dict.fromkeys(experts, "exclude_modules matches it")
    assert not excluded.notes and not apply_lora(model, lora_config(target_modules=["q_proj"])).skipped


def test_torch_encoder_computes_the_same_in_training_and_inference():
    # Why linear1 and linear2 are skipped: the fast path of inference reads their weights past the branch.
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(8, 8))
    apply_lora(model, lora_config(target_modules="all-linear"))
    fill_b(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))
        encoder.linear1 = LoRALinear.from_linear(encoder.linear1, init_lora_weights=False)
        assert not torch.allclose(model.eval()(x), model.train()(x), atol=1e-3), "no longer a reason to skip them"


def test_all_linear_leaves_the_output_head_out(model):
    model.get_output_embeddings = lambda: model.lm_head
    report = apply_lora(nn.ModuleDict({"wrapped": model}), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"wrapped.lm_head": 'it is the output head, which "all-linear" leaves out'}
    assert len(report.replaced) == 4


def test_all_linear_leaves_a_tied_head_out():
    report = apply_lora(Model(tied=True), lora_config(target_modules="all-linear"))
    assert reasons(report) == {"lm_head": "its weight is tied to 'embed', so \"all-linear\" leaves it out"}


def test_all_linear_on_transformers():
    report = apply_lora(llama(num_hidden_layers=1), lora_config(target_modules="all-linear"))
    assert [m.name.rpartition(".")[2] for m in report.replaced] == [
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert reasons(report) == {"lm_head": 'it is the output head, which "all-linear" leaves out'}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target_modules": ["k_proj"]},
            r"target_modules must match an nn.Linear of the model, got \['k_proj'\], which matches none. "
            r"Its linear layers: 'layers.0.q_proj', .*, 'lm_head'$",
        ),
        ({"target_modules": "q_proj"}, "got 'q_proj', .*; a string is a regular expression for the whole dotted name"),
        ({"target_modules": ["norm"]}, r"which matches none; skipped layers.0.norm \(LayerNorm is not an nn.Linear\), "),
        ({"exclude_modules": ".*"}, r"skipped layers.0.q_proj \(exclude_modules matches it\)"),
        ({"modules_to_save": ["score"]}, r"modules_to_save must name modules of the model, got \['score'\]"),
    ],
)  # fmt: skip
def test_refused_before_anything_changes(model, kwargs, message):
    with refused(model, ValueError, message):
        apply_lora(model, lora_config(**kwargs))


def test_modules_to_save_must_be_trainable(model):
    model.counts = nn.Module()
    model.counts.total = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    message = r"modules_to_save names 'counts', but 'counts.total' holds torch.int64, which cannot be trained"
    with refused(model, ValueError, message):
        apply_lora(model, lora_config(modules_to_save=["counts"]))


def test_failure_while_layers_are_made_leaves_the_model_alone(model, monkeypatch):
    made = []

    def make_layer(layer_class, linear, **settings):
        if made:
            raise MemoryError
        made.append(LoRALinear(8, 8))
        linear.requires_grad_(False)
        return made[0]

    monkeypatch.setattr(apply, "make_layer", make_layer)
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
    with pytest.raises(ValueError, match=r"Its linear layers: none"):
        apply_lora(nn.Linear(2, 2), lora_config(target_modules="all-linear"))

"""Adapters on their way between this library and the real peft package, both ways, and parameters counted in its words."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import CONFIG_NAME, config_in
from tests.helpers.peft_models import make as make_peft
from tests.helpers.peft_models import peft
from tests.helpers.quantized_weights import bnb_4bit
from tests.helpers.small_models import Model, fill_b, gpt2, llama, output, trainable


class Small(Model):
    """The small model with buffers under a module that will be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(11, 4), nn.BatchNorm1d(4))

    def forward(self, ids):
        return self.score(super().forward(ids).flatten(0, -2))


MODELS = {
    "torch": Small,
    "tied llama": lambda: llama(attention_bias=True, tie_word_embeddings=True),
    "gpt2": gpt2,
}


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def train(model):
    """Stands in for training: every trainable parameter and every buffer beside one gets a new value, none of them zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
                module.running_mean.normal_()
                module.num_batches_tracked += 3


# A model and the config.
CASES = {
    "rslora": ("torch", {"use_rslora": True, "r": 3}),
    "patterns": ("torch", {"rank_pattern": {"layers.1..*q_proj": 4}, "alpha_pattern": {"v_proj": 1.5, "q_proj": 5}}),
    "all-linear": ("torch", {"target_modules": "all-linear"}),
    "regex": ("torch", {"target_modules": r".*layers\.1\..*[qv]_proj", "exclude_modules": r".*v_proj"}),
    "buffers": ("torch", {"modules_to_save": ["score", "norm"], "bias": "all"}),
    "one of two to save": ("torch", {"modules_to_save": ["classifier", "score"], "bias": "lora_only"}),
    "all-linear llama": ("tied llama", {"target_modules": "all-linear"}),
    "modules_to_save": ("tied llama", {"modules_to_save": ["lm_head"], "bias": "lora_only"}),
    "tied modules_to_save": ("tied llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
}
BASE = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_each_loads_what_the_other_saves(kind, config, tmp_path):
    ours, second, third = (make(kind) for _ in range(3))
    before = output(ours)
    slk.apply_lora(ours, slk.LoRAConfig(**BASE | config))
    train(ours)
    slk.save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        # Such as one about missing keys.
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings.*|.*did not match any targeted module.*")
        theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    out = output(ours)
    torch.testing.assert_close(output(theirs), out)
    assert not torch.allclose(out, before, atol=1e-3)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        n: m.r for n, m in lora_layers(ours).items()
    }
    # And so do we.
    slk.load_adapter(second, tmp_path / "ours")
    assert torch.equal(output(second), out) and trainable(second) == trainable(ours)

    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**BASE | config)).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = output(theirs)
    report = slk.load_adapter(third, tmp_path / "theirs")
    assert [m.name for m in report.replaced] == list(lora_layers(third))
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]
    # And into the layers that are there now.
    train(ours)
    slk.load_adapter(ours, tmp_path / "theirs")
    for model in (third, ours):
        torch.testing.assert_close(output(model), expected)


# Layers that a list of names tells apart, and some that it does not: "embed.fc" ends in "fc".
@pytest.mark.parametrize(
    ("layers", "targets"),
    [
        (["layers.0.q_proj", "layers.1.v_proj", "lm_head"], ["layers.0.q_proj", "layers.1.v_proj", "lm_head"]),
        (["lm_head", "fc"], r"lm_head|fc"),
    ],
)
def test_layers_made_by_hand_are_described(tmp_path, layers, targets):
    def make_two():
        torch.manual_seed(0)
        model = Model().eval()
        model.fc, model.embed.fc = nn.Linear(8, 8), nn.Linear(8, 8)
        return model

    ours, second = make_two(), make_two()
    for name, (r, alpha) in zip(layers, ((3, 4), (2, 7), (3, 4)), strict=False):
        parent, _, key = name.rpartition(".")
        layer = slk.LoRALinear.from_linear(ours.get_submodule(name), r=r, lora_alpha=alpha, use_rslora=True)
        setattr(ours.get_submodule(parent), key, layer)
    fill_b(ours)
    slk.save_adapter(ours, tmp_path)
    config, own = config_in(tmp_path), "^" + layers[1].replace(".", r"\.")
    assert config["target_modules"] == targets
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({own: 2}, {own: 7})
    slk.load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(ours)) and list(lora_layers(second)) == list(lora_layers(ours))
    theirs = peft.PeftModel.from_pretrained(make_two(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(ours))


def test_a_config_without_alpha_means_pefts_default(tmp_path):
    model = Model()
    slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules=["q_proj"]))
    slk.save_adapter(model, tmp_path)
    content = config_in(tmp_path)
    del content["lora_alpha"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    replaced = slk.load_adapter(Model(), tmp_path).replaced
    assert {module.scaling for module in replaced} == {peft.LoraConfig().lora_alpha / 2}


def test_peft_finds_the_models_class(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    slk.apply_lora(model, slk.LoRAConfig(**BASE))
    fill_b(model)
    slk.save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(theirs), output(model))


# Their count of parameters, too.


def in_4_bits(storage):
    layer = bnb_4bit(nn.Linear(64, 64), quant_storage=storage)
    return make_peft(model=nn.Sequential(layer), target_modules=["0"])


PEFTS = {
    "tied": lambda: make_peft(model=Model(tied=True)),
    "modules_to_save": lambda: make_peft(modules_to_save=["lm_head"]),
    "4 bits": lambda: in_4_bits(torch.uint8),
    "4 bits in bfloat16": lambda: in_4_bits(torch.bfloat16),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_pefts_line(capsys, kind):
    model = PEFTS[kind]()
    model.print_trainable_parameters()
    theirs = capsys.readouterr().out
    for _ in range(2):
        slk.print_trainable_parameters(model)
        assert capsys.readouterr().out == theirs
        assert slk.count_parameters(model) == model.get_nb_trainable_parameters()
        slk.accelerate_peft(model)

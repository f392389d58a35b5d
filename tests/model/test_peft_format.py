"""Adapters on their way between this library and the real peft package, both ways, compared by the models' outputs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from stablelora_kernels.config import LoRAConfig
from stablelora_kernels.model.adapter_files import CONFIG_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import Model, fill_b, gpt2, llama, output, trainable

pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")


class Small(Model):
    """The small model with buffers under a module that will be trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(11, 4), nn.BatchNorm1d(4))

    def forward(self, ids):
        return self.score(super().forward(ids).flatten(0, -2))


MODELS = {
    "torch": Small,
    "llama": lambda: llama(attention_bias=True),
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


QV = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
CASES = {
    "plain": QV,
    "rslora": QV | {"use_rslora": True, "r": 3},
    "patterns": QV | {"rank_pattern": {"layers.1..*q_proj": 4}, "alpha_pattern": {"v_proj": 1.5, "q_proj": 5}},
    "all-linear": QV | {"target_modules": "all-linear"},
    "regex": QV | {"target_modules": r".*layers\.1\..*[qv]_proj", "exclude_modules": r".*v_proj"},
    "lora_only": QV | {"bias": "lora_only"},
    "all biases": QV | {"bias": "all"},
    "modules_to_save": QV | {"modules_to_save": ["lm_head"], "bias": "lora_only"},
}
BY_DAY = ("plain", "all-linear", "modules_to_save")
BOTH = [("torch", case) for case in CASES] + [
    *(pytest.param("llama", case, marks=() if case in BY_DAY else pytest.mark.nightly) for case in CASES),
    ("torch", QV | {"modules_to_save": ["score", "norm"], "bias": "all"}),
    ("torch", QV | {"modules_to_save": ["classifier", "score"]}),
    ("tied llama", QV | {"modules_to_save": ["lm_head"]}),
    ("tied llama", QV | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tied llama", QV | {"target_modules": "all-linear"}),
    *(("gpt2", QV | {"target_modules": ["c_attn", "c_proj"], "bias": bias}) for bias in ("none", "lora_only", "all")),
]
both = pytest.mark.parametrize(("kind", "case"), BOTH, ids=str)


def kwargs_of(case):
    return CASES[case] if isinstance(case, str) else case


@both
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_what_we_save(kind, case, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    ours = make(kind)
    before = output(ours)
    apply_lora(ours, LoRAConfig(**kwargs_of(case)))
    train(ours)
    save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        # Such as one about missing keys.
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings.*|.*did not match any targeted module.*")
        theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "adapter").eval()
    out = output(ours)
    torch.testing.assert_close(output(theirs), out)
    assert not torch.allclose(out, before, atol=1e-3)
    ranks = {
        n: m.r["default"] for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    assert ranks == {name: layer.r for name, layer in lora_layers(ours).items()}


@both
@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_saves(kind, case, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**kwargs_of(case))).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, expected = make(kind), output(theirs)
    assert not torch.allclose(output(ours), expected, atol=1e-3)
    report = load_adapter(ours, tmp_path / "adapter")
    assert [m.name for m in report.replaced] == list(lora_layers(ours))
    torch.testing.assert_close(output(ours), expected)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    # And into the layers that are there now.
    train(ours)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(output(ours), expected)


@both
def test_we_load_what_we_save(kind, case, tmp_path):
    first, second = make(kind), make(kind)
    apply_lora(first, LoRAConfig(**kwargs_of(case)))
    train(first)
    save_adapter(first, tmp_path)
    report = load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(first))
    assert trainable(second) == trainable(first)
    assert (report.trainable, report.total) == (
        sum(p.numel() for p in second.parameters() if p.requires_grad),
        report.total,
    )


def test_layers_made_by_hand_are_described(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    ours = make("torch")
    # "fc" alone would name both; the ranks and alphas are not one.
    ours.layers[0].q_proj = LoRALinear.from_linear(ours.layers[0].q_proj, r=3, lora_alpha=4, use_rslora=True)
    ours.layers[1].v_proj = LoRALinear.from_linear(ours.layers[1].v_proj, r=2, lora_alpha=7, use_rslora=True)
    ours.lm_head = LoRALinear.from_linear(ours.lm_head, r=3, lora_alpha=4, use_rslora=True)
    fill_b(ours)
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["target_modules"] == ["layers.0.q_proj", "layers.1.v_proj", "lm_head"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({r"^layers\.1\.v_proj": 2}, {r"^layers\.1\.v_proj": 7})
    second = make("torch")
    load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(ours))
    theirs = peft.PeftModel.from_pretrained(make("torch"), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(ours))


def test_a_config_without_alpha_means_pefts_default(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    model, other = Model(), Model()
    apply_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    file = tmp_path / CONFIG_NAME
    content = json.loads(file.read_text())
    del content["lora_alpha"]
    file.write_text(json.dumps(content))
    assert {module.scaling for module in load_adapter(other, tmp_path).replaced} == {peft.LoraConfig().lora_alpha / 2}

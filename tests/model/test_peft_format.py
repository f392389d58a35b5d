"""Adapters on their way between this library and the real peft package, both ways, and parameters
counted in its words.
"""

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
from tests.helpers.small_models import (
    IDS,
    Model,
    fill_b,
    gpt2,
    llama,
    lora_config,
    output,
    trainable,
)


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
    """Stands in for training: every trainable parameter and every buffer beside one gets a new
    value, none of them zero.
    """
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
    "patterns": (
        "torch",
        {"rank_pattern": {"layers.1..*q_proj": 4}, "alpha_pattern": {"v_proj": 1.5, "q_proj": 5}},
    ),
    "all-linear": ("torch", {"target_modules": "all-linear"}),
    "regex": (
        "torch",
        {"target_modules": r".*layers\.1\..*[qv]_proj", "exclude_modules": r".*v_proj"},
    ),
    "buffers": ("torch", {"modules_to_save": ["score", "norm"], "bias": "all"}),
    "one of two to save": (
        "torch",
        {"modules_to_save": ["classifier", "score"], "bias": "lora_only"},
    ),
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
        warnings.filterwarnings(
            "ignore", message=r".*tie_word_embeddings.*|.*did not match any targeted module.*"
        )
        theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    out = output(ours)
    torch.testing.assert_close(output(theirs), out)
    assert not torch.allclose(out, before, atol=1e-3)
    layers = {
        n: m
        for n, m in theirs.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
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
        (
            ["layers.0.q_proj", "layers.1.v_proj", "lm_head"],
            ["layers.0.q_proj", "layers.1.v_proj", "lm_head"],
        ),
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
        layer = slk.LoRALinear.from_linear(
            ours.get_submodule(name), r=r, lora_alpha=alpha, use_rslora=True
        )
        setattr(ours.get_submodule(parent), key, layer)
    fill_b(ours)
    slk.save_adapter(ours, tmp_path)
    config, own = config_in(tmp_path), "^" + layers[1].replace(".", r"\.")
    assert config["target_modules"] == targets
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({own: 2}, {own: 7})
    slk.load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(ours)) and list(lora_layers(second)) == list(
        lora_layers(ours)
    )
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


# Heads that a task trains whole.


def of_task(name, **changes):
    """A small model of transformers for a task, in float64 and without dropout."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install .[test])"
    )
    kind = getattr(transformers, name)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_labels": 2,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    if "DistilBert" in name:
        sizes = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 1, "num_labels": 2}
        heads = {"n_heads": 2}
    torch.manual_seed(0)
    return kind(kind.config_class(**sizes | heads | changes)).double().eval()


ANSWERS = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 4])}
TOKENS, SEQUENCES = {"labels": IDS % 2}, {"labels": torch.tensor([1, 0])}
# The task, the model, the layers with LoRA, and the labels.
TASKS = {
    "sequences": ("SEQ_CLS", "BertForSequenceClassification", ["query", "value"], SEQUENCES),
    "sequences, all-linear": ("SEQ_CLS", "BertForSequenceClassification", "all-linear", SEQUENCES),
    "sequences, the head named": (
        "SEQ_CLS",
        "BertForSequenceClassification",
        ["query", "classifier"],
        SEQUENCES,
    ),
    "sequences, two layers in the head": (
        "SEQ_CLS",
        "DistilBertForSequenceClassification",
        ["q_lin"],
        SEQUENCES,
    ),
    "sequences, a llama": ("SEQ_CLS", "LlamaForSequenceClassification", "all-linear", SEQUENCES),
    "tokens": ("TOKEN_CLS", "BertForTokenClassification", ["query", "value"], TOKENS),
    "answers": ("QUESTION_ANS", "BertForQuestionAnswering", ["query", "value"], ANSWERS),
}
TASKS_BY_NIGHT = ("sequences", "sequences, the head named", "sequences, a llama")


def first_output(model):
    with torch.no_grad():
        return model(input_ids=IDS).to_tuple()[0]


def by_our_names(model):
    """The parameters that train, of a PEFT model or of ours."""
    return {
        name.removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace(".default.weight", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def losses(model, labels):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        loss = model(input_ids=IDS, **labels).loss
        yield loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("task", "name", "targets", "labels"),
    [
        pytest.param(*case, id=key, marks=pytest.mark.nightly if key in TASKS_BY_NIGHT else ())
        for key, case in TASKS.items()
    ],
)
@pytest.mark.parametrize("config_class", [slk.LoRAConfig, peft.LoraConfig], ids=["ours", "PEFT's"])
def test_a_tasks_head_is_trained_saved_and_loaded_as_by_peft(
    config_class, task, name, targets, labels, tmp_path
):
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets, "task_type": task}
    ours = of_task(name)
    theirs = peft.get_peft_model(of_task(name), peft.LoraConfig(**settings)).eval()
    report = slk.apply_lora(ours, config_class(**settings))
    trained, expected = by_our_names(ours), by_our_names(theirs)
    assert trained.keys() == expected.keys() and not all(".lora_" in key for key in trained)
    heads = {key.partition(".")[0] for key in trained if ".lora_" not in key}
    note = f"{', '.join(sorted(heads, reverse=True))} trained whole, as PEFT does for task_type {task!r}"
    assert note in report.notes and not any("matches nothing" in text for text in report.notes)
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(expected[key])
    assert [*losses(ours, labels)] == pytest.approx([*losses(theirs, labels)], rel=1e-12)

    slk.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for place, wanted in (
        (tmp_path / "ours", first_output(ours)),
        (tmp_path / "theirs", first_output(theirs)),
    ):
        loaded = of_task(name)
        slk.load_adapter(loaded, place)
        torch.testing.assert_close(first_output(loaded), wanted)
        torch.testing.assert_close(
            first_output(peft.PeftModel.from_pretrained(of_task(name), place).eval()), wanted
        )


def test_a_head_that_stays_frozen_is_told():
    text = "'classifier' of BertForSequenceClassification stays frozen; if it is new, its values are random"
    for task in (None, "FEATURE_EXTRACTION", "QUESTION_ANS"):
        config = lora_config(target_modules=["query"], task_type=task)
        with pytest.warns(UserWarning, match=text):
            report = slk.apply_lora(of_task("BertForSequenceClassification"), config)
        assert [note for note in report.notes if text in note]
        model = peft.get_peft_model(
            of_task("BertForSequenceClassification"),
            peft.LoraConfig(target_modules=["query"], task_type=task),
        )
        assert [note for note in slk.accelerate_peft(model).notes if text in note]
    # PEFT's rule has no name for these heads.
    with pytest.warns(
        UserWarning, match="'classification_head' of BartForSequenceClassification stays frozen"
    ):
        slk.apply_lora(
            of_task(
                "BartForSequenceClassification", d_model=16, encoder_layers=1, decoder_layers=1
            ),
            lora_config(task_type="SEQ_CLS"),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"modules_to_save": ["classifier"]}, {"target_modules": "all-linear"}):
            report = slk.apply_lora(
                of_task("BertForSequenceClassification"),
                lora_config(**{"target_modules": ["query"]} | options),
            )
            assert report.notes == ()

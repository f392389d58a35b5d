"""lora_pairs: A and B found by name, in our layers, in PEFT's and in plain named parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.pairs import LoRAPair, lora_pairs, split_lora_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_A", ("", "A")),
        ("fc.lora_A", ("fc", "A")),
        ("a.b.fc.lora_B", ("a.b.fc", "B")),
        ("fc.lora_A.weight", ("fc", "A")),
        ("fc.lora_B.default.weight", ("fc.default", "B")),
        ("fc.lora_B.default", ("fc.default", "B")),
        ("fc.lora_A.weight.weight", ("fc.weight", "A")),
        ("fc.weight", None),
        ("fc.lora_C", None),
        ("fc.my_lora_A", None),
        ("fc.lora_A.bias.x.weight", None),
        ("embed.lora_embedding_A.default", None),
        ("fc.lora_magnitude_vector.default.weight", None),
    ],
)
def test_names(name, expected):
    assert split_lora_name(name) == expected


def test_pairs_of_our_layers_come_in_order_with_their_parameters():
    model = nn.Sequential(slk.LoRALinear(5, 3, r=2), nn.Linear(3, 4), nn.ModuleDict({"x": slk.LoRALinear(4, 7, r=1)}))
    first, second = lora_pairs(model)
    assert (first.name, first.r) == ("0", 2)
    assert (second.name, second.r) == ("2.x", 1)
    assert first.A is model[0].lora_A
    assert first.B is model[0].lora_B
    assert second.A is model[2]["x"].lora_A
    assert second.B is model[2]["x"].lora_B


def test_pairs_from_named_parameters_equal_those_of_the_model():
    model = nn.Sequential(slk.LoRALinear(5, 3, r=2), slk.LoRALinear(3, 4, r=2))
    assert [(p.name, p.A, p.B) for p in lora_pairs(iter(list(model.named_parameters())))] == [
        (p.name, p.A, p.B) for p in lora_pairs(model)
    ]


def test_a_shared_layer_is_one_pair():
    layer = slk.LoRALinear(4, 4, r=2)
    assert [pair.name for pair in lora_pairs(nn.Sequential(layer, layer))] == ["0"]


def test_no_lora_gives_no_pairs():
    assert lora_pairs(nn.Linear(2, 2)) == []


def test_pairs_of_a_peft_model_with_two_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    base = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 4), nn.Conv2d(4, 4, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1", "2"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0"]))
    # The embedding's and the convolution's LoRA are not the method's and are left out.
    pairs = {pair.name: pair for pair in lora_pairs(model)}
    assert {name: pair.r for name, pair in pairs.items()} == {
        "base_model.model.0.default": 2,
        "base_model.model.0.other": 3,
    }
    layer = base[0]
    assert pairs["base_model.model.0.other"].A is layer.lora_A["other"].weight
    assert pairs["base_model.model.0.other"].B is layer.lora_B["other"].weight


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"fc.lora_A": (2, 4)}, r"pair 'fc' has lora_A \[2, 4\] but no lora_B"),
        ({"fc.lora_B.default.weight": (4, 2), "fc.weight": (4, 4)}, r"'fc.default' has lora_B \[4, 2\] but no lora_A"),
        (
            {"fc.lora_A": (2, 4), "fc.lora_B": (4, 3)},
            r"pair 'fc': A must be \[r, in\] and B \[out, r\] with one r, got A \[2, 4\] and B \[4, 3\]",
        ),
    ],
)
def test_halves_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        lora_pairs([(name, torch.zeros(shape)) for name, shape in shapes.items()])


def test_a_vector_is_no_half():
    with pytest.raises(ValueError, match=r"got A \[2\] and B \[4, 2\]"):
        LoRAPair("fc", torch.zeros(2), torch.zeros(4, 2))


@pytest.mark.parametrize("source", [[torch.zeros(2)], [("a", 1)], [(1, torch.zeros(2))], ["ab"]])
def test_source_of_the_wrong_kind(source):
    with pytest.raises(
        TypeError, match=r"source must be a module or give \(name, parameter\) tuples, got an item of type"
    ):
        lora_pairs(source)

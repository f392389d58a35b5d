"""lora_pairs: A and B found by name, in our layers, in PEFT's and in plain named parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.pairs import lora_pairs, split_lora_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_A", ("", "A")),
        ("a.b.fc.lora_B", ("a.b.fc", "B")),
        ("fc.lora_A.weight", ("fc", "A")),
        ("fc.lora_B.default.weight", ("fc.default", "B")),
        ("fc.weight", None),
        ("fc.my_lora_A", None),
        ("embed.lora_embedding_A.default", None),
        ("fc.lora_magnitude_vector.default.weight", None),
    ],
)
def test_names(name, expected):
    assert split_lora_name(name) == expected


def test_pairs_of_our_layers_come_in_order_with_their_parameters():
    shared = slk.LoRALinear(4, 4, r=2)
    model = nn.Sequential(
        slk.LoRALinear(5, 4, r=2), shared, nn.ModuleDict({"x": slk.LoRALinear(4, 7, r=1)}), shared
    )
    expected = [("0", 2, model[0]), ("1", 2, shared), ("2.x", 1, model[2]["x"])]
    for source in (model, iter(list(model.named_parameters()))):
        pairs = lora_pairs(source)
        assert [(pair.name, pair.r) for pair in pairs] == [(name, r) for name, r, _ in expected]
        assert all(
            p.A is layer.lora_A and p.B is layer.lora_B
            for p, (*_, layer) in zip(pairs, expected, strict=True)
        )


def test_pairs_of_a_peft_model_with_two_adapters():
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    base = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 4), nn.Conv2d(4, 4, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1", "2"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0"]))
    # The embedding's and the convolution's LoRA are not the method's and are left out.
    pairs = {pair.name: pair for pair in lora_pairs(model)}
    assert {name.removeprefix("base_model.model."): pair.r for name, pair in pairs.items()} == {
        "0.default": 2,
        "0.other": 3,
    }
    other = pairs["base_model.model.0.other"]
    assert other.A is base[0].lora_A["other"].weight and other.B is base[0].lora_B["other"].weight


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"fc.lora_A": (2, 4)}, r"pair 'fc' has lora_A \[2, 4\] but no lora_B"),
        (
            {"fc.lora_B.default.weight": (4, 2), "fc.weight": (4, 4)},
            r"'fc.default' has lora_B \[4, 2\] but no lora_A",
        ),
        (
            {"fc.lora_A": (2, 4), "fc.lora_B": (4, 3)},
            r"'fc': A must be .* one r, got A \[2, 4\] and B \[4, 3\]",
        ),
    ],
)
def test_halves_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        lora_pairs([(name, torch.zeros(shape)) for name, shape in shapes.items()])


def test_parameters_without_names_are_refused():
    with pytest.raises(
        TypeError,
        match=r"source must be a module or give \(name, parameter\) tuples, got an item of",
    ):
        lora_pairs([torch.zeros(2)])

"""count_parameters and print_trainable_parameters: PEFT's numbers in PEFT's words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.quantized_weights import bnb_4bit
from tests.helpers.small_models import Model


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


def of_zero_3():
    """Cut by DeepSpeed, which leaves an empty placeholder."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.ds_numel, model.weight.data = 16, torch.empty(0)
    return model


EDGES = {"nothing": (nn.Identity, 0), "lazy": (lambda: nn.LazyLinear(4), 0), "ZeRO 3": (of_zero_3, 16)}


@pytest.mark.parametrize(("make", "count"), EDGES.values(), ids=EDGES)
def test_edges(capsys, make, count):
    slk.print_trainable_parameters(make())
    line = f"trainable params: {count} || all params: {count} || trainable%: {100 if count else 0:.4f}\n"
    assert capsys.readouterr().out == line

"""What grows with a model: its parameters, counted in PEFT's words, and the calls of each action, not with a square."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import main
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


def calls(layers: int, directory: Path) -> dict[str, int]:
    """The calls of each action on a model of so many layers."""

    def fresh() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))})

    config = slk.LoRAConfig(r=1, target_modules=[f"layers.{i}" for i in range(layers)])
    model, other = fresh(), fresh()
    actions = {
        "apply": lambda: slk.apply_lora(model, config, fuse_projections=True),
        "save": lambda: slk.save_adapter(model, directory),
        "load": lambda: slk.load_adapter(other, directory),
        "load again": lambda: slk.load_adapter(model, directory),
        "inspect": lambda: main(["inspect", str(directory)]),
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


def test_calls_grow_like_layers(tmp_path: Path) -> None:
    """Twice the layers take twice the calls, Python's and C's."""
    pytest.importorskip("safetensors", reason="safetensors is not installed (pip install .[test])")
    # What only a first run does.
    calls(2, tmp_path)
    few, twice = calls(100, tmp_path), calls(200, tmp_path)
    growth = {name: twice[name] / few[name] for name in few}
    assert all(factor < 2.2 for factor in growth.values()), growth

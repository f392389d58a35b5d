"""Twice the layers take twice the calls, Python's and C's: no cost grows with a square."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import main

pytest.importorskip("safetensors", reason="safetensors is not installed (pip install .[test])")


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
    # What only a first run does.
    calls(2, tmp_path)
    few, twice = calls(100, tmp_path), calls(200, tmp_path)
    growth = {name: twice[name] / few[name] for name in few}
    assert all(factor < 2.2 for factor in growth.values()), growth

"""Twice the layers, or twice the patterns, take twice the calls, Python's and C's: no cost grows with a square."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import main

pytest.importorskip("safetensors", reason="safetensors is not installed (pip install .[test])")


def calls(layers: int, patterns: int, directory: Path) -> dict[str, int]:
    """The calls of each action on a model of so many layers; each pattern matches a layer or, beyond these, none."""

    def fresh() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))})

    names = [f"layers.{i}" for i in range(layers)]
    own = {f"^{re.escape(f'layers.{i}')}": 1 + i % 2 for i in range(patterns)}
    config = slk.LoRAConfig(r=1, target_modules=names, rank_pattern=own, alpha_pattern=own)
    model, other = fresh(), fresh()
    # A pattern that matches no pair would be refused.
    shrink = {rf"layers\.\d+|{i}": 1e-4 for i in range(patterns)}
    actions = {
        "apply": lambda: slk.apply_lora(model, config, fuse_projections=True),
        "save": lambda: slk.save_adapter(model, directory),
        "load": lambda: slk.load_adapter(other, directory),
        "load again": lambda: slk.load_adapter(model, directory),
        "inspect": lambda: main(["inspect", str(directory)]),
        "optimizer": lambda: slk.StableLoRAAdamW.from_model(model, shrink_pattern=shrink),
    }
    counts = dict.fromkeys(actions, 0)
    for name, action in actions.items():

        def see(frame, event, arg, name=name):
            counts[name] += event in ("call", "c_call")

        # An expression that Python compiles takes hundreds of calls: none is left from an action before.
        re.purge()
        sys.setprofile(see)
        try:
            action()
        finally:
            sys.setprofile(None)
    return counts


@pytest.mark.parametrize(("layers", "patterns"), [(100, 5), (20, 300)])
def test_calls_grow_like_layers_and_like_patterns(layers: int, patterns: int, tmp_path: Path) -> None:
    """Of few patterns, twice the layers; of few layers, twice the patterns: 600, of which Python keeps 512 compiled."""
    # What only a first run does.
    calls(2, 2, tmp_path)
    many = (2 * layers, patterns) if layers > patterns else (layers, 2 * patterns)
    few, twice = calls(layers, patterns, tmp_path), calls(*many, tmp_path)
    growth = {name: twice[name] / few[name] for name in few}
    assert all(factor < 2.2 for factor in growth.values()), growth

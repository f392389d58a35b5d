"""Saving and loading an adapter of a small Llama, and adapters of many layers and patterns.

Making the fresh model that an adapter is loaded into is not timed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.models import share
from benchmarks.suite.layers import PEFT
from benchmarks.suite.llama import Sizes, fill, llama, our_model, peft_model
from benchmarks.suite.rivals import Case, Parts

OURS = "ours"
HALF = "half of both"


@dataclass(frozen=True)
class AdapterCase(Case):
    base = PEFT
    rival = PEFT
    ours = (OURS,)
    arms = (PEFT, OURS)
    phases: ClassVar = {"save": ("save",), "load": ("load",)}

    sizes: Sizes
    r: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"adapter {self.sizes} r{self.r} fp32"

    def open(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="adapter-"))
        self.shared.update(directory=directory, base=llama(self.sizes, self.device, torch.float32))

    def close(self) -> None:
        shutil.rmtree(self.shared["directory"])
        super().close()

    def build(self, arm: str) -> Parts:
        base, directory = self.shared["base"], self.shared["directory"] / arm
        trained = (our_model if arm == OURS else peft_model)(share(base), self.r)
        fill(trained)
        fresh: list[Any] = []

        def prepare() -> None:
            fresh[:] = [share(base)]

        def save() -> None:
            slk.save_adapter(trained, directory) if arm == OURS else trained.save_pretrained(directory)

        def load() -> None:
            slk.load_adapter(fresh[0], directory) if arm == OURS else PeftModel.from_pretrained(fresh[0], directory)

        return {"prepare": prepare, "save": save, "load": load}


@dataclass(frozen=True)
class ManyLayersCase(Case):
    """Thousands of layers, a third of which have a rank of their own, against half as many of both."""

    base = HALF
    rival = HALF
    ours = (OURS,)
    arms = (HALF, OURS)
    phases: ClassVar = {phase: (phase,) for phase in ("apply", "save", "load", "optimizer")}
    mark = "scaling"

    layers: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"adapter {self.layers} layers {self.layers // 3} patterns"

    def open(self) -> None:
        self.shared["directory"] = Path(tempfile.mkdtemp(prefix="adapter-"))

    def close(self) -> None:
        shutil.rmtree(self.shared["directory"])
        super().close()

    def build(self, arm: str) -> Parts:
        count = self.layers if arm == OURS else self.layers // 2
        directory, models = self.shared["directory"] / arm, []
        patterns = {f"^{i}": 1 + i % 2 for i in range(count // 3)}
        config = slk.LoRAConfig(r=1, target_modules=r"\d+", rank_pattern=patterns)

        def prepare() -> None:
            models[:] = (nn.ModuleList(nn.Linear(2, 2, device=self.device) for _ in range(count)) for _ in range(2))

        return {
            "prepare": prepare,
            "apply": lambda: slk.apply_lora(models[0], config),
            "save": lambda: slk.save_adapter(models[0], directory),
            "load": lambda: slk.load_adapter(models[1], directory),
            "optimizer": lambda: slk.StableLoRAAdamW.from_model(
                models[0], shrink_pattern=dict.fromkeys(patterns, 1e-4)
            ),
        }


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [AdapterCase(Sizes(1, 32, 64), 2, device), ManyLayersCase(12, device)]
    quick = [AdapterCase(Sizes(4, 256), 8, device), ManyLayersCase(6000, device)]
    return quick if suite == "quick" else [*quick, AdapterCase(Sizes(16, 512), 64, device)]


def test_adapter(compare: Callable[[], None]) -> None:
    compare()

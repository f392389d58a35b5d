"""Saving and loading an adapter of a small Llama. Loading puts LoRA into a fresh model, whose making is not timed."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel

import stablelora_kernels as slk
from benchmarks.common.models import share
from benchmarks.conftest import Entry
from benchmarks.suite.layers import PEFT
from benchmarks.suite.llama import Sizes, fill, llama, our_model, peft_model
from benchmarks.suite.rivals import Case, Parts

OURS = "ours"


@dataclass(frozen=True)
class AdapterCase(Case):
    base: ClassVar[str] = PEFT
    rival: ClassVar[str] = PEFT
    ours: ClassVar[tuple[str, ...]] = (OURS,)
    arms: ClassVar[tuple[str, ...]] = (PEFT, OURS)
    phases: ClassVar[dict[str, tuple[str, ...]]] = {"save": ("save",), "load": ("load",)}

    sizes: Sizes
    r: int
    device: torch.device
    _shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return f"adapter {self.sizes} r{self.r} fp32"

    def facts(self) -> dict[str, Any]:
        return {"shape": {**self.sizes._asdict(), "r": self.r}, "dtype": "fp32", "device": str(self.device)}

    def open(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="adapter-"))
        self._shared.update(directory=directory, base=llama(self.sizes, self.device, torch.float32))

    def close(self) -> None:
        shutil.rmtree(self._shared["directory"])
        self._shared.clear()

    def build(self, arm: str) -> Parts:
        base, directory = self._shared["base"], self._shared["directory"] / arm
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


def cases(suite: str, device: torch.device) -> list[AdapterCase]:
    if suite == "tiny":
        return [AdapterCase(Sizes(1, 32, 64), 2, device)]
    quick = [AdapterCase(Sizes(4, 256), 8, device)]
    return quick if suite == "quick" else [*quick, AdapterCase(Sizes(16, 512), 64, device)]


def test_adapter(entry: Entry, benchmark: pytest.FixtureRequest) -> None:
    entry.record(benchmark)

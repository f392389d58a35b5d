"""Saving and loading an adapter of a small Llama. Making the fresh model that it is loaded into is
not timed.
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

import stablelora_kernels as slk
from benchmarks.common.arms import OURS, PEFT, adapt
from benchmarks.common.models import linear_names, share
from benchmarks.suite.layers import Sizes, llama
from benchmarks.suite.rivals import Case, Parts


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
        trained: Any = adapt(share(base), arm, linear_names(base), r=self.r)
        fresh: list[Any] = []

        def prepare() -> None:
            fresh[:] = [share(base)]

        def save() -> None:
            slk.save_adapter(trained, directory) if arm == OURS else trained.save_pretrained(
                directory
            )

        def load() -> None:
            slk.load_adapter(fresh[0], directory) if arm == OURS else PeftModel.from_pretrained(
                fresh[0], directory
            )

        return {"prepare": prepare, "save": save, "load": load}


def cases(suite: str, device: torch.device) -> list[Case]:
    if suite == "tiny":
        return [AdapterCase(Sizes(1, 32, 64), 2, device)]
    quick = AdapterCase(Sizes(4, 256), 8, device)
    return [quick] if suite == "quick" else [quick, AdapterCase(Sizes(16, 512), 64, device)]


def test_adapter(compare: Callable[[], None]) -> None:
    compare()

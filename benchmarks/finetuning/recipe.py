"""A run's settings, which are the command's options. Nothing here imports torch: options are
checked before it takes seconds.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.assets import DATASETS

FROZEN, PEFT, ACCELERATED, STABLE = "frozen", "peft", "accelerated", "stable"
LABELS = {
    FROZEN: "frozen",
    PEFT: "PEFT",
    ACCELERATED: "PEFT + one line",
    STABLE: "our layers, Stable-LoRA",
}


def _checked(
    kind: Callable[[str], Any], holds: Callable[[Any], bool], words: str
) -> Callable[[str], Any]:
    """What reads an option's value, and refuses one that does not hold."""

    def read(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


COUNT = _checked(int, lambda n: n >= 1, "at least 1")
SEED = _checked(int, lambda n: 0 <= n < 2**31, "in [0, 2**31)")
POSITIVE = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
SHARE = _checked(float, lambda x: 0 <= x < 1, "in [0, 1)")
MODEL = _checked(
    str,
    lambda name: (
        not (name.startswith((".", "/", "~")) or name.count("/") > 1)
        or Path(name).expanduser().is_dir()
    ),
    "smollm2, minilm, a local directory or a hub id",
)
DATA = _checked(
    str,
    lambda name: name in ("plays", *DATASETS) or Path(name).expanduser().is_file(),
    f"plays, {', '.join(DATASETS)} or a text file",
)


def _writable(path: Path) -> bool:
    # It is made when there is something to write.
    parent = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return parent.is_dir() and os.access(parent, os.W_OK)


OUT = _checked(Path, _writable, "a directory that can be written to")


def option(
    default: Any, read: Any, words: str, flag: str | None = None, classes: Any = None
) -> Any:
    """A field that is an option. ``read`` gives its value, or has its choices; ``classes`` is the
    default of classification.
    """
    return field(
        default=default, metadata={"read": read, "words": words, "flag": flag, "classes": classes}
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers, but for the machine.

    The rate of next tokens is the one with the lowest held-out loss of PEFT's arm, on seeds 100 to
    102; that of classes was not chosen so. A run that would take longer than ``time_limit_s`` has
    fewer steps or seeds.
    """

    targets: tuple[str, ...] = option(
        (), str, "last parts of the names of the adapted layers", "target-modules"
    )
    r: int = option(16, COUNT, "r", "rank")
    lora_alpha: float = option(32.0, POSITIVE, "the branch is scaled by alpha / r", "alpha")
    lora_dropout: float = option(0.05, SHARE, "on the branch's input", "dropout")
    lr: float = option(2e-3, POSITIVE, "peak learning rate", classes=5e-4)
    head_lr: float = option(3e-3, POSITIVE, "that of a classifier's new head")
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    shrink_ratio: float = option(5e-4, SHARE, "Stable-LoRA's lambda")
    steps: int = option(
        30, COUNT, "exactly so many; without this option fewer on a slow machine", classes=60
    )
    model: str = option("smollm2", MODEL, "smollm2 (93 MB), minilm, a local directory or a hub id")
    data: str = option(
        "plays",
        DATA,
        "plays (5 MB) or a text file: the next token; sarcasm or reuters-52: the class",
    )
    device: str = option("auto", ("auto", "cpu", "cuda"), "auto: a GPU if there is one")
    dtype: str = option(
        "auto", ("auto", "fp32", "bf16"), "auto: bf16 autocast where the hardware has it"
    )
    arms: tuple[str, ...] = option(tuple(LABELS), tuple(LABELS), "those to compare")
    seed: int = option(0, SEED, "the first seed, of adapters, batches and dropout")
    seeds: int = option(3, COUNT, "how many", classes=1)
    batch_size: int = option(4, COUNT, "pieces of text, or texts", classes=8)
    length: int = option(32, COUNT, "tokens of a piece of text")
    held_out: int = option(64, COUNT, "texts to test on", classes=200)
    time_limit_s: float | None = None

    @property
    def causal(self) -> bool:
        """Whether next tokens are predicted, not classes."""
        return self.data not in DATASETS

    def schedule(self, step: int) -> float:
        """The factor on the learning rate at a 0-based step: linear warm-up over a tenth of the
        steps, then decay to zero.
        """
        warmup = max(1, self.steps // 10)
        return (
            (step + 1) / warmup
            if step < warmup
            else (self.steps - step) / max(1, self.steps - warmup)
        )

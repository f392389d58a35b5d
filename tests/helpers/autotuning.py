"""Autotuning with a timer that a test sets, and an empty cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from stablelora_kernels import testing
from stablelora_kernels.dispatch import autotune, problem
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import BF16, DEVICE, Case, run
from tests.helpers.case_checks import check

SCALING = 1.7
GPU = problem.device_of(torch.device(DEVICE))


def words(launches) -> str:
    """The launches' kernels and tiles: "lora_down 64x128 + lora_linear_tma 128x128x64", "vendor +
    ...".

    A product that computes its S has "fused" or "chained" before its tile.
    """
    found = []
    for launch in launches:
        if hasattr(launch, "kernel"):
            named = launch.named
            tile = "TILE" if "TILE.BLOCK_M" in named else "S" if "S.BLOCK_M" in named else "DA"
            sizes = [str(named[f"{tile}.BLOCK_{d}"]) for d in "MNK" if f"{tile}.BLOCK_{d}" in named]
            name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            chained = "TILE.BLOCK_M" in named and "S.BLOCK_M" in named
            how = " chained" if chained else "" if named.get("BRANCH.LOAD_S", True) else " fused"
            found.append(f"{name}{how} {'x'.join(sizes)}")
        else:
            found.append("vendor")
    return " + ".join(found)


class Timer:
    """In place of the GPU's timer: 10 us for everything but what the patterns in ``fast`` match."""

    def __init__(self):
        self.fast: dict[str, float] = {}
        self.measured: list[list] = []

    def __call__(self, run) -> float:
        self.measured.append(run.args[0])
        text = words(run.args[0])
        return next(
            (seconds for pattern, seconds in self.fast.items() if re.search(pattern, text)), 10e-6
        )


def forget():
    """Forget every answer, as a new process would."""
    plans.clear()
    autotune._answers.clear()
    autotune._warn_once.cache_clear()
    autotune._made_for.cache_clear()


@contextmanager
def tuned_by_hand(directory: Path) -> Iterator[Timer]:
    """Answers come from a timer that is set by hand, and are kept in ``directory``, which has none
    yet.
    """
    forget()
    with (
        patch.dict("os.environ", STABLELORA_CACHE=str(directory)),
        patch.object(autotune, "measure", Timer()) as timer,
    ):
        yield timer
    forget()


def inputs_of(rows=70, k=64, n=80, r=8, **options):
    return testing.make_inputs((rows, k), n, r, **{"dtype": BF16, "device": DEVICE, **options})


def forward(inputs, dropout_p=0.0):
    return lora_linear(
        *(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING, dropout_p
    )


def check_all(inputs):
    """Y and the three gradients against the oracle."""
    x, lora_A = inputs["x"], inputs["lora_A"]
    case = Case(
        shape=tuple(x.shape),
        sizes=(len(inputs["weight"]),),
        ranks=(len(lora_A),),
        dtype=x.dtype,
        lora_dtype=lora_A.dtype,
        scalings=(SCALING,),
    )
    operands = {name if name == "x" else f"{name}0": t for name, t in inputs.items()}
    check(case, run(case, operands), operands)


def files() -> list[Path]:
    return sorted(autotune.cache_dir().glob("*.json"))


def answers() -> dict[str, dict]:
    """What the files hold, by key."""
    return {answer["key"]: answer for answer in (json.loads(path.read_text()) for path in files())}

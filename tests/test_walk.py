"""The files of the package that x enters on its way to a launch: docs/internals/architecture.md
quotes the counts.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import BF16, DEVICE

PACKAGE = Path(slk.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "internals" / "architecture.md"


def holds(value: Any, x: Tensor) -> bool:
    """Whether ``value`` is x, a view of it, a descriptor of it, or a tuple or list with one of
    these.
    """
    if isinstance(value, (tuple, list)):
        return any(holds(each, x) for each in value)
    tensor = getattr(value, "base", value)
    return (
        isinstance(tensor, Tensor)
        and tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    )


def walk(call: Callable[[], object], x: Tensor) -> list[str]:
    """The files whose functions are given x while ``call`` runs, in order; kernels, which run on
    the GPU, are left out.
    """
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if (
            event == "call"
            and path.is_relative_to(PACKAGE)
            and not path.is_relative_to(PACKAGE / "kernels")
        ):
            given = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)
            if holds([frame.f_locals.get(name) for name in code.co_varnames[:given]], x):
                entered.append(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [path for path, _ in groupby(entered)]


@pytest.mark.skipif(
    DEVICE == "cuda",
    reason="runs in the interpreter, which gives a launch tensors, on machines without a GPU",
)
def test_x_enters_few_files_and_comes_back_to_none_more_than_three_times() -> None:
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    layer = slk.LoRALinear(64, 48, r=8, dtype=BF16)
    x = torch.randn(70, 64, dtype=BF16, requires_grad=True)
    plans.clear()
    with slk.settings(backend="triton"):
        cold, _, warm = (walk(lambda: layer(x), x) for _ in range(3))
    # Prepared launches are given addresses; in the interpreter they are made anew, of tensors.
    warm = [path for path in warm if path != "launch/base.py"]
    text = ARCHITECTURE.read_text(encoding="utf-8")
    found = re.search(r"x enters (\d+) files at a first call .* and (\d+) from the third on", text)
    assert found and (len({*cold}), len({*warm})) == (int(found[1]), int(found[2]))
    assert len({*cold}) <= 15 and len({*warm}) <= 7
    for path, stays in Counter(cold).items():
        # To the key, to the op's call, behind its record, and behind first use.
        assert stays <= 4, (path, stays, cold)

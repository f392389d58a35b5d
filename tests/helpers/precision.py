"""PyTorch's switches of the precision of float32 products: the old ones, the new ones, and
mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

_MATMUL, _ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn
_PLACES: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "backends.cuda.matmul.allow_tf32": (_MATMUL, "allow_tf32", (False, True)),
    "backends.cuda.matmul.fp32_precision": (_MATMUL, "fp32_precision", ("none", "ieee", "tf32")),
    "backends.fp32_precision": (torch.backends, "fp32_precision", ("none", "ieee", "tf32", "bf16")),
    "backends.mkldnn.fp32_precision": (_ONEDNN, "fp32_precision", ("none", "ieee", "tf32", "bf16")),
    "backends.mkldnn.matmul.fp32_precision": (
        _ONEDNN.matmul,
        "fp32_precision",
        ("none", "ieee", "tf32", "bf16"),
    ),  # type: ignore[attr-defined]
}
# By name and value, each switch as a call.
SWITCHES: dict[str, Callable[[], None]] = {
    f"set_float32_matmul_precision({value!r})": partial(torch.set_float32_matmul_precision, value)
    for value in ("highest", "high", "medium")
} | {
    f"{name} = {value!r}": partial(setattr, owner, attribute, value)
    for name, (owner, attribute, values) in _PLACES.items()
    for value in values
}


@contextmanager
def switched(*names: str) -> Iterator[None]:
    """The block under these of SWITCHES, one after another; then PyTorch's start values."""
    # PyTorch's own test helpers forbid these settings in the whole process once somebody imports
    # them.
    with torch.backends.__allow_nonbracketed_mutation():
        try:
            for name in names:
                SWITCHES[name]()
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
            for owner in (_MATMUL, torch.backends, _ONEDNN.matmul):  # type: ignore[attr-defined]
                owner.fp32_precision = "none"

"""torch's own inputs for AdamW's tests, run on StableLoRAAdamW: equal to AdamW without shrink.

They come from ``torch.testing._internal.common_optimizers``, from which ``test/test_optim.py`` of
PyTorch takes them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import make_pairs
from tests.helpers.steps import assert_no_worse_than_adamw

pytest.importorskip("expecttest", reason="runs where expecttest is installed: pip install .[test]")
from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.usefixtures("one_thread")

(ADAMW,) = (info for info in optim_db if info.optim_cls is torch.optim.AdamW)
# Those for a GPU have capturable and tensors beside, which ours takes everywhere; it has no amsgrad.
INPUTS = [
    item for item in ADAMW.optim_inputs_func(device="cuda") if not item.kwargs.pop("amsgrad", False)
]


def described(item: Any) -> str:
    return item.desc.replace(" ", "-")


def on_any_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that ``torch.optim.AdamW`` takes for CPU parameters too, meaning the same."""
    as_number = {"lr": float, "betas": lambda betas: tuple(map(float, betas))}
    return {
        key: as_number.get(key, lambda x: x)(value)
        for key, value in kwargs.items()
        if key != "capturable"
    }


@pytest.mark.covering(1)
@pytest.mark.parametrize("item", INPUTS, ids=described)
def test_equal_to_adamw_without_shrink(backend, item):
    # AdamW's default learning rate is not ours.
    kwargs = {"lr": 1e-3, **copy.deepcopy(item.kwargs)}
    optimizer = StableLoRAAdamW(make_pairs(), shrink_ratio=0.0, **copy.deepcopy(kwargs))
    # Smaller and smaller, so that the second moments fall too.
    assert_no_worse_than_adamw(optimizer, on_any_device(kwargs), [0.3**step for step in range(9)])

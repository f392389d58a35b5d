"""torch's own inputs for AdamW's tests, run on StableLoRAAdamW: equal to AdamW without shrink.

They come from ``torch.testing._internal.common_optimizers``, from which ``test/test_optim.py`` of PyTorch takes them.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import halves, make_pairs
from tests.helpers.steps import assert_no_worse_than_adamw

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest (pip install expecttest)")
from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.usefixtures("one_thread")

(ADAMW,) = (info for info in optim_db if info.optim_cls is torch.optim.AdamW)
# Those for a GPU have capturable and tensors beside, which ours takes everywhere.
INPUTS = ADAMW.optim_inputs_func(device="cuda")
# "foreach" is an option that ours does not have, and lone betas as tensors it takes.
ERRORS = ADAMW.optim_error_inputs_func(device="cpu", dtype=torch.float32)
ERRORS = [item.optimizer_error_input for item in ERRORS if "betas must be either" not in item.error_regex]


def described(item: Any) -> str:
    return item.desc.replace(" ", "-")


def on_any_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that ``torch.optim.AdamW`` takes for CPU parameters too, meaning the same."""
    as_number = {"lr": float, "betas": lambda betas: tuple(map(float, betas))}
    return {key: as_number.get(key, lambda x: x)(value) for key, value in kwargs.items() if key != "capturable"}


def test_the_inputs_are_there() -> None:
    asked = {key for item in INPUTS for key in item.kwargs}
    assert {"lr", "betas", "weight_decay", "maximize", "amsgrad", "capturable"} <= asked
    assert any(isinstance(item.kwargs.get("lr"), torch.Tensor) for item in INPUTS)


@pytest.mark.covering(1)
@pytest.mark.parametrize("item", INPUTS, ids=described)
def test_equal_to_adamw_without_shrink(backend: str, item: Any) -> None:
    # AdamW's default learning rate is not ours.
    kwargs = {"lr": 1e-3, **copy.deepcopy(item.kwargs)}
    optimizer = StableLoRAAdamW(make_pairs(), shrink_ratio=0.0, **copy.deepcopy(kwargs))
    # Smaller and smaller, so that the largest second moment is not the latest.
    assert_no_worse_than_adamw(optimizer, on_any_device(kwargs), [0.3**step for step in range(9)])


@pytest.mark.parametrize("given", ERRORS, ids=described)
def test_their_bad_inputs_are_refused(given: Any) -> None:
    params = (
        given.params
        if given.params is not None
        else list(zip(("q.lora_A", "q.lora_B"), halves(make_pairs()), strict=False))
    )
    with warnings.catch_warnings(), pytest.raises((TypeError, ValueError)):
        warnings.simplefilter("error")
        StableLoRAAdamW(params, **given.kwargs)

"""Data-parallel training over gloo: every rank latches at the same step, and all agree with one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.distributed_training import TRAINING, compare, fit
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import Model, lora_config

pytestmark = needs_gloo


def train(rank: int, world: int, place: Path | None, dtype: torch.dtype, max_grad_norm: float | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, lora_config())
    # The adapters too.
    model.to(dtype)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = slk.StableLoRAAdamW.from_model(wrapped, max_grad_norm=max_grad_norm, **TRAINING)
    found = fit(wrapped, optimizer, rank, world)
    return found | {"params": {name.removeprefix("module."): value for name, value in found["params"].items()}}


@pytest.mark.parametrize(
    ("world", "dtype", "max_grad_norm"),
    [(2, torch.float32, None), (4, torch.float32, 0.05), (2, torch.bfloat16, None)],
    ids=["2 ranks", "4 ranks, clipped", "2 ranks, bf16"],
)
def test_ddp(tmp_path, world, dtype, max_grad_norm):
    ranks = spawn(train, world, tmp_path, dtype, max_grad_norm)
    alone = train(0, 1, None, dtype, max_grad_norm)
    for rank in ranks:
        assert rank["latches"] == alone["latches"]
        assert all(torch.equal(value, ranks[0]["params"][name]) for name, value in rank["params"].items())
    assert any(alone["latches"])
    if dtype is torch.float32:
        # In bfloat16, AdamW makes whole steps of gradients that are averaged in another order.
        compare(ranks[0], alone)

"""An accelerated PEFT model under FSDP2 and the sharded optimizer: equal to one process, on the ops in every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import stablelora_kernels as slk
from tests.helpers.distributed_training import TRAINING, compare, fit
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import Model

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = needs_gloo


def train(rank: int, world: int, place: Path | None = None) -> dict[str, Any]:
    from stablelora_kernels.integrations import peft_layers

    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    report = slk.accelerate_peft(model, strict=True)
    assert len(report.replaced) == 4
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = slk.StableLoRAAdamW.from_model(model, **TRAINING)
    assert all(isinstance(p, DTensor) == (world > 1) for p in optimizer.param_groups[0]["params"])
    with mock.patch.object(peft_layers, "lora_linear_where", side_effect=peft_layers.lora_linear_where) as called:
        found = fit(model, optimizer, rank, world)
    assert called.call_count == 6 * 4
    return found


def test_fsdp2(tmp_path: Path) -> None:
    alone = train(0, 1)
    for found in spawn(train, 2, tmp_path):
        compare(found, alone)

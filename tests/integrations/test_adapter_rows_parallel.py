"""Several adapters in one step in two processes over gloo: DistributedDataParallel and FSDP2 train
as one process does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stablelora_kernels as slk
from tests.helpers.distributed_training import gather
from tests.helpers.peft_models import make
from tests.helpers.processes import needs_gloo, spawn

pytestmark = needs_gloo
SETTINGS: dict[str, Any] = {
    "default": {"lr": 0.1, "shrink_ratio": 0.1},
    "b": {"lr": 0.02},
    "c": {"lr": 0.05},
}
STEPS = 5
# Of both processes together, each of which has half of each adapter's rows.
NAMES = ["default"] * 2 + ["b"] * 4 + ["__base__"] * 2


def train(rank: int, world: int, directory: Path, way: str) -> dict[str, Any]:
    """``way``: "ddp", "fsdp" or "alone"; "c" has rows in the first process alone."""
    model = make(("b", {"r": 3}), ("c", {"r": 3})).train()
    slk.accelerate_peft(model)
    if way == "fsdp":
        for layer in model.base_model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = slk.StableLoRAAdamW.from_model(model, adapters=SETTINGS, seed=7)
    run = model
    if way.startswith("ddp"):
        run = DistributedDataParallel(model, find_unused_parameters=True)
    generator = torch.Generator().manual_seed(2)
    mine = slice(rank, None, world)
    names = NAMES[mine]
    if way == "ddp, c in one process":
        names = ["c", *names[1:]] if rank == 0 else names
    for _ in range(STEPS):
        ids = torch.randint(11, (len(NAMES), 5), generator=generator)[mine]
        with slk.adapters_of_rows(run, names):
            losses = slk.losses_of_rows(run(ids), ids, names)
            sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: gather(p) for name, p in model.named_parameters() if "lora_" in name}
    return {"params": trained, "latches": [pair.latched_at for pair in optimizer.stability()]}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one(way, tmp_path):
    """Each adapter has as many tokens in both, so the mean of their means is its own."""
    expected = train(0, 1, tmp_path, "alone")
    assert any(expected["latches"])
    for result in spawn(train, 2, tmp_path, way):
        assert result["latches"] == expected["latches"]
        for name, value in expected["params"].items():
            torch.testing.assert_close(
                result["params"][name], value, rtol=1e-4, atol=1e-5, msg=name
            )


def test_an_adapter_in_one_process_trains_with_ddp(tmp_path):
    """DistributedDataParallel averages its gradient with the zeros of the others."""
    first, second = spawn(train, 2, tmp_path, "ddp, c in one process")
    moved = make(("b", {"r": 3}), ("c", {"r": 3}))
    for name, p in moved.named_parameters():
        if ".c." in name:
            assert torch.equal(first["params"][name], second["params"][name])
            assert not torch.equal(first["params"][name], p)

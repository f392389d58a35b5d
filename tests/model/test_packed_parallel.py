"""Packed experts under DistributedDataParallel and fully_shard, on two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stablelora_kernels as slk
from stablelora_kernels.testing.cases import FP32
from tests.helpers.distributed_training import gather
from tests.helpers.moe_models import IDS, build, stacks, with_lora
from tests.helpers.packed_stacks import in_4_bits, in_float8, in_mxfp4
from tests.helpers.processes import needs_gloo, spawn

pytestmark = pytest.mark.filterwarnings("ignore")


class Stored(NamedTuple):
    """A family of models, a width that is whole blocks, and what packs its experts."""

    family: str
    width: int
    pack: Callable[[Any], tuple[Any, Any]]


STORED = {
    "NF4": Stored("qwen3_moe", 64, partial(in_4_bits, compress_statistics=True)),
    "float8": Stored("qwen3_moe", 128, in_float8),
    "MXFP4": Stored("gpt_oss", 64, in_mxfp4),
}


def adapted(library: str, stored: str) -> Any:
    """A model with LoRA on its experts, ``stored`` as one of STORED."""
    kind = STORED[stored]
    model = build(kind.family, dtype=FP32, width=kind.width)
    ends = stacks(model)
    names = [name for name, _ in model.named_parameters() if name.endswith(tuple(ends))]
    model, _ = kind.pack(model)
    if library == "PEFT":
        model = with_lora(model, target_parameters=names)
        slk.accelerate_peft(model, strict=True)
        return model
    torch.manual_seed(1)
    config = slk.LoRAConfig(r=3, target_parameters=names, init_lora_weights=False)
    slk.apply_lora(model, config)
    return model.eval()


def train(
    rank: int, world: int, directory: Any, library: str, way: str, stored: str
) -> dict[str, Any]:
    model = adapted(library, stored)
    trained = model
    if world > 1 and way == "DDP":
        # gloo broadcasts no float8. Both processes have made the same model.
        model = DistributedDataParallel(model, init_sync=stored != "float8")
    elif world > 1:
        path = "model.layers" if library == "ours" else "base_model.model.model.layers"
        for layer in model.get_submodule(path):
            fully_shard(layer)
        fully_shard(model)
        if library == "PEFT":
            # Sharded, it is accelerated still.
            assert not slk.accelerate_peft(model).skipped
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    rows = IDS.repeat(2, 1)[rank * 4 // world : (rank + 1) * 4 // world]
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: gather(p) for name, p in trained.named_parameters() if p.requires_grad}


@needs_gloo
@pytest.mark.covering
@pytest.mark.parametrize("way", ["DDP", "fully_shard"])
@pytest.mark.parametrize("library", ["ours", "PEFT"])
@pytest.mark.parametrize("stored", STORED)
def test_two_processes_train_as_one(library, way, stored, tmp_path):
    alone = train(0, 1, tmp_path, library, way, stored)
    for values in spawn(train, 2, tmp_path, library, way, stored):
        assert values.keys() == alone.keys() and len(alone) == 4
        for name, value in values.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)

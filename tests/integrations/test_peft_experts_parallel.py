"""accelerate_peft on stacks of experts, plain and packed, under DistributedDataParallel and
fully_shard, on two processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stablelora_kernels as slk
from stablelora_kernels.nn import experts, fused_experts
from stablelora_kernels.testing.cases import FP32, FP64
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
    dtype: torch.dtype = FP32


STORED = {
    "plain": Stored("qwen3_moe", 32, lambda model: (model, None), FP64),
    "NF4": Stored("qwen3_moe", 64, partial(in_4_bits, compress_statistics=True)),
    "float8": Stored("qwen3_moe", 128, in_float8),
    "MXFP4": Stored("gpt_oss", 64, in_mxfp4),
}


def adapted(stored: str, fuse: bool) -> Any:
    """A model with LoRA on its experts, ``stored`` as one of STORED, and a router that trains."""
    kind = STORED[stored]
    model = build(kind.family, dtype=kind.dtype, width=kind.width)
    ends = stacks(model)
    # PEFT finds packed parameters by their whole names alone.
    names = [name for name, _ in model.named_parameters() if name.endswith(tuple(ends))]
    model = with_lora(kind.pack(model)[0], target_parameters=names)
    slk.accelerate_peft(model, strict=True, fuse_mlp=fuse)
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.requires_grad_()
    return model


def train(
    rank: int, world: int, directory: Any, way: str, stored: str, fuse: bool
) -> dict[str, torch.Tensor]:
    """What trains, after two steps on this process's rows."""
    trained = model = adapted(stored, fuse)
    if world > 1 and way == "DDP":
        # gloo broadcasts no float8. Both processes have made the same model.
        model = DistributedDataParallel(model, init_sync=stored != "float8")
    elif world > 1:
        for layer in model.get_submodule("base_model.model.model.layers"):
            fully_shard(layer)
        fully_shard(model)
        # Sharded, it is accelerated still.
        assert not slk.accelerate_peft(model).skipped
    calls = []
    module, name = (fused_experts, "lora_experts_mlp_op") if fuse else (experts, "lora_experts")
    op = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    rows = IDS.repeat(2, 1)[rank * 4 // world : (rank + 1) * 4 // world]
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    setattr(module, name, op)
    assert len(calls) == (2 if fuse else 4)
    return {name: gather(p) for name, p in trained.named_parameters() if p.requires_grad}


@needs_gloo
@pytest.mark.covering
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("way", ["DDP", "fully_shard"])
@pytest.mark.parametrize("stored", STORED)
def test_two_processes_train_as_one(way, stored, fuse, tmp_path):
    alone = train(0, 1, tmp_path, way, stored, fuse)
    for values in spawn(train, 2, tmp_path, way, stored, fuse):
        assert values.keys() == alone.keys() and len(alone) == 5
        for name, value in values.items():
            rtol = 1e-5 if stored == "plain" else 1e-4
            torch.testing.assert_close(value, alone[name], rtol=rtol, atol=1e-6)

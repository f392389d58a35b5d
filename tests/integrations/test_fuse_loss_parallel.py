"""fuse_loss under DistributedDataParallel and fully_shard, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk
from stablelora_kernels.nn import fused_loss
from stablelora_kernels.utils.tensors import whole
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import llama
from tests.helpers.trainer_runs import peft

IDS = torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(2))


class Step(NamedTuple):
    """Gradients of a step, gathered; how often the op ran; the report's note on the loss."""

    gradients: list[Tensor]
    calls: int
    note: str


def head_llama() -> nn.Module:
    """A Llama with adapters on q_proj and the head, whose branches are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llama(), config)


def two(rank: int, world: int, place: Path, way: str) -> Step:
    model = head_llama()
    wrapped = model
    if way == "DistributedDataParallel":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world,))
        parts = [*model.base_model.model.model.layers]
        if way == "fully_shard, the head by itself":
            parts.append(model.base_model.model.lm_head)
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh)
    report = slk.accelerate_peft(model, fuse_loss=True)
    ids = IDS[2 * rank : 2 * rank + 2]
    op = mock.Mock(wraps=fused_loss.lora_linear_cross_entropy)
    with mock.patch.object(fused_loss, "lora_linear_cross_entropy", op):
        wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    (note,) = [note for note in report.notes if note.startswith("fuse_loss")]
    return Step(gradients, op.call_count, note)


@needs_gloo
@pytest.mark.parametrize(
    ("way", "calls", "words"),
    [
        ("DistributedDataParallel", 1, "computes its loss without logits"),
        ("fully_shard", 1, "computes its loss without logits"),
        # Its hooks gather the head when it is called, so it must be.
        ("fully_shard, the head by itself", 0, "'lm_head' has hooks"),
    ],
)
def test_two_processes_train_as_one(tmp_path, way, calls, words):
    first, second = spawn(two, 2, tmp_path, way)
    assert first.calls == second.calls == calls and words in first.note
    model = head_llama()
    model(input_ids=IDS, labels=IDS).loss.backward()
    alone = [p.grad for p in model.parameters() if p.requires_grad]
    for one, other, expected in zip(first.gradients, second.gradients, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)

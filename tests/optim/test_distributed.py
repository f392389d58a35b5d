"""Data-parallel training over gloo: every rank latches at the same step, and all agree with one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import Model, lora_config

pytestmark = needs_gloo
STEPS, ROWS = 6, 8
# At this rate the pairs latch on the way, not all at once.
SETTINGS = {"lr": 0.1, "shrink_ratio": 0.1, "seed": 7}


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids, targets = (torch.randint(11, (STEPS, ROWS, 5), generator=generator) for _ in range(2))
    return ids, targets


def train(
    rank: int, world: int, place: Path | None, dtype: torch.dtype, max_grad_norm: float | None
) -> dict[str, object]:
    """Adapters and latches after training on this rank's part of every batch."""
    torch.manual_seed(0)
    whole = model = Model()
    slk.apply_lora(model, lora_config())
    # The adapters too.
    model.to(dtype)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = slk.StableLoRAAdamW.from_model(model, max_grad_norm=max_grad_norm, **SETTINGS)
    share = ROWS // world
    for ids, targets in zip(*batches(), strict=True):
        mine = slice(rank * share, (rank + 1) * share)
        loss = torch.nn.functional.cross_entropy(model(ids[mine]).flatten(0, 1).float(), targets[mine].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters = {name: p.detach() for name, p in whole.named_parameters() if p.requires_grad}
    return {"adapters": adapters, "latches": [pair.latched_at for pair in optimizer.stability()]}


@pytest.mark.parametrize(
    ("world", "dtype", "max_grad_norm"),
    [(2, torch.float32, None), (4, torch.float32, 0.05), (2, torch.bfloat16, None)],
    ids=["2 ranks", "4 ranks, clipped", "2 ranks, bf16"],
)
def test_ddp(tmp_path, world, dtype, max_grad_norm):
    ranks = spawn(train, world, tmp_path, dtype, max_grad_norm)
    alone = train(0, 1, None, dtype, max_grad_norm)
    for rank in ranks:
        assert rank["latches"] == ranks[0]["latches"]
        for name, value in rank["adapters"].items():
            assert torch.equal(value, ranks[0]["adapters"][name]), name
    assert any(ranks[0]["latches"])
    assert ranks[0]["latches"] == alone["latches"]
    if dtype is torch.float32:
        # Gradients are averaged in another order than in one process, which in bfloat16 AdamW makes whole steps of.
        for name, value in ranks[0]["adapters"].items():
            assert torch.allclose(value, alone["adapters"][name], rtol=1e-4, atol=1e-5), name

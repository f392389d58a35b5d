"""fuse_loss on two processes: DistributedDataParallel with the flags that trainers set, fully_shard
with policies, and a real Trainer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import stablelora_kernels as slk
from stablelora_kernels.nn import fused_loss
from stablelora_kernels.utils.tensors import whole
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import llama
from tests.helpers.trainer_runs import make_trainer, peft, trained

IDS = torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(2))
BF16 = torch.bfloat16
# By the words after "fully_shard"; the last is what accelerate's plugin sets for mixed_precision="bf16".
POLICIES = {
    "": MixedPrecisionPolicy(),
    ", parameters in bfloat16": MixedPrecisionPolicy(param_dtype=BF16),
    ", as accelerate for bf16": MixedPrecisionPolicy(
        param_dtype=BF16, reduce_dtype=BF16, output_dtype=BF16
    ),
}
# transformers' Trainer sets the first for every PEFT model without gradient checkpointing.
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    ", find_unused_parameters": {"find_unused_parameters": True},
    ", static_graph": {"static_graph": True},
}


class Steps(NamedTuple):
    """What each of two steps gave: the losses, the gradients of the last one, gathered; how often
    the op ran; the report's note on the loss.
    """

    losses: list[float]
    gradients: list[Tensor]
    calls: int
    note: str


def head_llama(**changes: Any) -> nn.Module:
    """A Llama with adapters on q_proj and the head, whose branches are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llama(**changes), config)


def steps(rank: int, world: int, way: str, fuse: bool) -> Steps:
    """Two steps of one model on this process's half of the batch."""
    model = head_llama()
    wrapped = model
    kind, _, rest = way.partition(", ")
    rest = f", {rest}" if rest else ""
    if kind == "DistributedDataParallel":
        wrapped = nn.parallel.DistributedDataParallel(model, **FLAGS[rest])
    else:
        mesh = init_device_mesh("cpu", (world,))
        parts = [*model.base_model.model.model.layers]
        if rest == ", the head by itself":
            parts.append(model.base_model.model.lm_head)
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh, mp_policy=POLICIES.get(rest, MixedPrecisionPolicy()))
    report = slk.accelerate_peft(model, fuse_loss=fuse)
    ids = IDS[2 * rank : 2 * rank + 2]
    op = mock.Mock(wraps=fused_loss.lora_linear_cross_entropy)
    losses = []
    with mock.patch.object(fused_loss, "lora_linear_cross_entropy", op):
        for _ in range(2):
            model.zero_grad()
            output = wrapped(input_ids=ids, labels=ids)
            assert (output.logits is None) == (op.call_count > 0)
            output.loss.backward()
            losses.append(output.loss.item())
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    note = next((note for note in report.notes if note.startswith("fuse_loss")), "")
    return Steps(losses, gradients, op.call_count, note)


Key = tuple[str, bool]


def two(rank: int, world: int, place: Path, keys: list[Key]) -> dict[Key, Steps]:
    return {key: steps(rank, world, *key) for key in keys}


EXACT = [*(f"DistributedDataParallel{flags}" for flags in FLAGS), "fully_shard"]
# Its hooks gather the head when it is called, so it must be.
HEAD_ALONE = "fully_shard, the head by itself"
ROUNDED = [f"fully_shard{policy}" for policy in POLICIES if policy]


@needs_gloo
def test_two_processes(tmp_path):
    """All ways in one pair of processes, since starting one takes longer than its steps."""
    keys = [(way, True) for way in [*EXACT, HEAD_ALONE, *ROUNDED]]
    keys += [(way, False) for way in ROUNDED]
    first, second = spawn(two, 2, tmp_path, keys)
    for key in keys:
        for one, other in zip(first[key].gradients, second[key].gradients, strict=True):
            assert torch.equal(one, other), key
        is_fused = key[1] and key[0] != HEAD_ALONE
        assert first[key].calls == second[key].calls == (2 if is_fused else 0), key
        assert ("computes its loss without logits" in first[key].note) == is_fused, key
    assert "'lm_head' has hooks" in first[HEAD_ALONE, True].note
    model = head_llama()
    model(input_ids=IDS, labels=IDS).loss.backward()
    alone = [p.grad for p in model.parameters() if p.requires_grad]
    for way in [*EXACT, HEAD_ALONE]:
        for one, expected in zip(first[way, True].gradients, alone, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7, msg=way)
    for way in ROUNDED:
        fused, plain = first[way, True], first[way, False]
        # A rounding of each of the two losses to bfloat16, where the policy rounds it.
        assert fused.losses == pytest.approx(plain.losses, rel=2**-7), way
        for one, expected in zip(fused.gradients, plain.gradients, strict=True):
            # Some roundings to bfloat16, of the largest elements.
            scale = expected.float().abs().max().item()
            torch.testing.assert_close(
                one.float(), expected.float(), rtol=0.05, atol=0.02 * scale + 1e-7, msg=way
            )


class TrainerRun(NamedTuple):
    """The losses of a Trainer, what it trained, and what its evaluations found."""

    losses: list[float]
    adapters: dict[str, Tensor]
    evaluations: list[float]
    logits: list[tuple[int, ...]]


def trained_by_trainer(rank: int, world: int, place: Path, checkpointing: bool) -> list[TrainerRun]:
    """A Trainer with the flags that it sets itself, evaluations with metrics between its steps:
    with logits, and without.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    import transformers

    logits: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        logits.append(prediction.predictions.shape)
        return {}

    def with_evaluation(**options: Any) -> Any:
        rows = options["train_dataset"]
        return transformers.Trainer(**options, eval_dataset=rows, compute_metrics=metrics)

    runs = []
    for fuse in (False, True):
        trainer = make_trainer(
            head_llama(pad_token_id=0), place / str(rank), made=with_evaluation,
            callbacks=[slk.AccelerateCallback(fuse_loss=fuse)], gradient_checkpointing=checkpointing,
            max_steps=2, logging_steps=1, ddp_backend="gloo", eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        op = mock.Mock(wraps=fused_loss.lora_linear_cross_entropy)
        with mock.patch.object(fused_loss, "lora_linear_cross_entropy", op):
            trainer.train()
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        assert trainer.model_wrapped.find_unused_parameters or checkpointing
        # Two steps of two batches each.
        assert op.call_count == (4 if fuse else 0)
        history = trainer.state.log_history
        losses, evaluations = (
            [entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss")
        )
        runs.append(TrainerRun(losses, trained(trainer.model), evaluations, [*logits]))
        logits.clear()
    return runs


@needs_gloo
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_trainer_on_two_processes(tmp_path, checkpointing):
    """Without checkpointing the Trainer sets find_unused_parameters, under which
    DistributedDataParallel clones all that a model returns.
    """
    (plain, fused), (_, other) = spawn(trained_by_trainer, 2, tmp_path, checkpointing)
    assert len(fused.losses) == len(fused.evaluations) == 2
    assert fused.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fused.evaluations == pytest.approx(plain.evaluations, rel=1e-5)
    assert fused.logits == plain.logits and len(fused.logits) == 2
    for name, value in plain.adapters.items():
        assert torch.equal(fused.adapters[name], other.adapters[name])
        torch.testing.assert_close(fused.adapters[name], value, rtol=1e-4, atol=1e-6)

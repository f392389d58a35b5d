"""Trainings of a small model with LoRA under DeepSpeed's ZeRO and under DistributedDataParallel, each
by two processes on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stablelora_kernels as slk

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="runs where deepspeed is installed: pip install .[test]",
)
STEPS, ROWS = 10, 8
# At these rates some pairs latch on the way, at different steps, and some do not.
SHRINK_RATIO, LEARNING_RATES = 0.1, (0.2, 0.1)


class Branch(nn.Module):
    """A frozen linear layer with LoRA."""

    def __init__(self, n: int, m: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n) / n**0.5, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.zeros(m, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() + x @ self.lora_A.t() @ self.lora_B.t()


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """No two ranks can share its parameters evenly, and one has fewer elements than there are ranks."""
    torch.manual_seed(0)
    sizes = [(13, 7, 3), (7, 5, 1), (5, 1, 1), (1, 9, 3)]
    layers = [layer for n, m, r in sizes for layer in (Branch(n, m, r), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, which have one half each of some pairs."""
    trained = [p for p in module.parameters() if p.requires_grad]
    parts = trained[:3], trained[3:]
    return [{"params": part, "lr": lr} for part, lr in zip(parts, LEARNING_RATES, strict=True)]


def adamw(params: Any) -> torch.optim.AdamW:
    # Small gradients differ by rounding; by this eps their updates do not differ by much more.
    return torch.optim.AdamW(params, eps=1e-3, weight_decay=0.02)


def batches(rank: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """This rank's half of every batch."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(STEPS, ROWS, 13, generator=generator)
    targets = torch.randn(STEPS, ROWS, 9, generator=generator)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return [(x[mine].to(dtype), t[mine].to(dtype)) for x, t in zip(inputs, targets, strict=True)]


class Found(NamedTuple):
    """What a training has left on a rank."""

    parameters: dict[str, torch.Tensor]
    # After every step.
    stability: list[list[slk.PairStability]]
    # All-reduces of the library.
    collectives: int


def import_deepspeed() -> Any:
    """DeepSpeed for CPUs, without the communication of its own that it would compile for a minute."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    import deepspeed

    # An attribute of deepspeed.comm by this name is PyTorch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's. Changes of "zero_optimization" are added to it."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero |= changes.pop("zero_optimization", {})
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }


def engine(stage: int, **changes: Any) -> Any:
    """A fresh model in DeepSpeed's engine."""
    dtype = torch.bfloat16 if "bf16" in changes else torch.float32
    module = model(dtype)
    optimizer = changes.pop("optimizer", adamw)(groups(module))
    deepspeed = import_deepspeed()
    made, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config(stage, **changes)
    )
    if stage == 3:
        _fill_padding(made.optimizer)
    return made


def _fill_padding(zero: Any) -> None:
    """Put large values where stage 3 leaves memory uninitialized: behind the last element of a
    parameter, in the last rank's partition.
    """
    for partition, parameters in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True
    ):
        pieces = partition.detach().split([p.partition_numel() for p in parameters])
        for piece, p in zip(pieces, parameters, strict=True):
            piece[max(0, p.ds_numel - dist.get_rank() * len(piece)) :] = 1e4


def train(engine: Any, shrink: slk.StableShrink, steps: range = range(STEPS)) -> Found:
    """Train under ZeRO."""
    seen: list[list[slk.PairStability]] = []
    handle = shrink.register_step_post_hook(lambda *_: seen.append(shrink.stability()))
    dtype = next(engine.module.parameters()).dtype
    mine = batches(dist.get_rank(), dtype)
    with _Collectives() as counted:
        for x, target in [mine[step] for step in steps]:
            engine.backward(nn.functional.mse_loss(engine(x), target))
            engine.step()
    handle.remove()
    return Found(full_parameters(engine), seen, counted.calls)


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The float32 values of A and B: the model's, or those that the ranks own together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: p.detach().clone()
        if p.numel() and p.dtype == torch.float32
        else safe_get_full_fp32_param(p).detach().clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def train_under_ddp(
    dtype: torch.dtype = torch.float32, master_dtype: torch.dtype = torch.float32
) -> Found:
    """The same training without DeepSpeed. AdamW updates copies in ``master_dtype``, as ZeRO."""
    module = model(dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    masters = {
        name: nn.Parameter(p.detach().to(master_dtype, copy=True)) for name, p in trained.items()
    }
    numbers = {p: i for i, p in enumerate(trained.values())}
    by_number = list(masters.values())
    own = [
        group | {"params": [by_number[numbers[p]] for p in group["params"]]}
        for group in groups(module)
    ]
    optimizer = adamw(own)
    shrink = slk.StableShrink(optimizer, slk.lora_pairs(masters.items()), shrink_ratio=SHRINK_RATIO)
    wrapped = nn.parallel.DistributedDataParallel(module)
    seen = []
    for x, target in batches(dist.get_rank(), dtype):
        nn.functional.mse_loss(wrapped(x), target).backward()
        for name, p in trained.items():
            masters[name].grad = p.grad.to(master_dtype)
            p.grad = None
        optimizer.step()
        seen.append(shrink.stability())
        for name, p in trained.items():
            p.data.copy_(masters[name].data)
    return Found({name: p.detach().float() for name, p in masters.items()}, seen, 0)


class _Collectives:
    """Counts the all-reduces that this library makes, and not DeepSpeed's."""

    calls = 0

    def __enter__(self) -> _Collectives:
        self.original = dist.all_reduce
        dist.all_reduce = self
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += sys._getframe(1).f_globals["__name__"].startswith("stablelora_kernels")
        return self.original(*args, **kwargs)

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original

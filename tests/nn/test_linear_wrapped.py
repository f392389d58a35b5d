"""LoRALinear in what users wrap an nn.Module in: autocast, both kinds of checkpointing, torch.compile,
DistributedDataParallel and fully_shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels.testing import nf4_weight
from tests.helpers.distributed_training import TRAINING, compare, fit
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.quantized_weights import K, Linear4bit, N
from tests.helpers.small_models import Model, lora_options, lora_over

BF16, FP32 = torch.bfloat16, torch.float32


def layer_of(kind: str, dropout: float = 0.0) -> slk.LoRALinear:
    torch.manual_seed(0)
    if kind == "nf4":
        base: nn.Linear = Linear4bit(nf4_weight(N, K, 64, nested=True), True, FP32)
    else:
        base = nn.Linear(K, N)
    return lora_over(base, lora_dropout=dropout)


def step(layer: slk.LoRALinear, call: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, A and B, from one state of the generator."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = call(x)
    y.float().square().sum().backward()
    gradients = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    return [y.detach(), *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, dropout, reentrant, backend):
    layer, x = layer_of(kind, dropout), torch.randn(20, K)
    expected = step(layer, layer, x)
    found = step(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), x)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_autocast(kind, backend):
    layer, x = layer_of(kind), torch.randn(20, K)
    expected = step(layer, layer, x)
    with torch.autocast("cpu", BF16):
        found = step(layer, layer, x)
    assert [t.dtype for t in found] == [BF16, FP32, FP32, FP32]
    for value, right in zip(found, expected, strict=True):
        # Products of bfloat16 operands.
        torch.testing.assert_close(
            value.float(), right, rtol=0, atol=0.03 * right.abs().max().item()
        )


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_torch_compile_has_one_graph(kind, backend):
    layer, x = layer_of(kind), torch.randn(20, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = step(layer, compiled, x), step(layer, layer, x)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-4)


def lora_model() -> Model:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, **lora_options())
    return model


def in_ddp(model: Model, world: int) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Model, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: nn.Module, rank: int, world: int) -> dict[str, Any]:
    optimizer = slk.StableLoRAAdamW.from_model(model, **TRAINING)
    result = fit(model, optimizer, rank, world)
    result["params"] = {k.removeprefix("module."): v for k, v in result["params"].items()}
    return result


def on_a_rank(rank: int, world: int, place: Path) -> list[Any]:
    results: list[Any] = [
        trained(wrap(lora_model(), world), rank, world) for wrap in (in_ddp, sharded)
    ]
    # In bfloat16 by a policy, A and B stay float32.
    model, mesh = lora_model(), init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    y = model(torch.arange(10).view(2, 5))
    y.float().square().mean().backward()
    pairs = [p for name, p in model.named_parameters() if "lora_" in name]
    gradients = [p.grad for p in pairs]
    assert y.dtype == BF16 and {p.dtype for p in pairs} == {FP32}
    assert all(g is not None and bool(g.full_tensor().isfinite().all()) for g in gradients)
    return results


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    """In DistributedDataParallel and in fully_shard, which gathers and cuts the frozen weights too."""
    alone = trained(lora_model(), 0, 1)
    for results in spawn(on_a_rank, 2, tmp_path):
        for result in results:
            compare(result, alone)

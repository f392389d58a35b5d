"""LoRA on weights that tensor parallelism has cut: over gloo on two processes, equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.sharded import LoRAShardedLinear
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import reasons

pytestmark = needs_gloo
WIDTH, HIDDEN, STEPS = 12, 20, 8
NAMES = ["up", "down"]


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias), nn.Linear(HIDDEN, WIDTH, bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def close(got: dict[str, Any], alone: dict[str, Any], outputs: slice = slice(None)) -> None:
    """Equal to one process, which computes some outputs more; sums are in another order."""
    assert got.keys() == alone.keys() and got["latches"] == alone["latches"]
    for key, value in alone.items():
        if key != "latches":
            near(key, got[key], value[outputs] if key == "y" else value)


def near(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol, msg=lambda text: f"{name}: {text}")


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def train(world: int, backend: str, r: int, bias: bool, dropout: float = 0.0) -> dict[str, Any]:
    """Outputs, gradients, and what some steps make of the adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(bias), Block(bias))
    config = slk.LoRAConfig(r=r, target_modules=NAMES, init_lora_weights=False, lora_dropout=dropout, bias="lora_only")
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    report = slk.apply_lora(model, config)
    assert [(m.in_features, m.out_features) for m in report.replaced] == 2 * [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    # One start for any number of processes.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            assert (type(layer) is LoRAShardedLinear) == (world > 1)
            for p in (layer.lora_A, layer.lora_B):
                value = torch.randn(p.shape, generator=generator) * 0.3
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if world > 1 else value)
    found: dict[str, Any] = {}
    # Sums are in another order on several processes: with PyTorch's eps AdamW would make up to a whole step of that where a
    # gradient is next to nothing, and steps much longer than these make the model amplify it.
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.01, eps=1e-2, shrink_ratio=0.1, seed=7)
    with slk.use_backend(backend):
        for step in range(STEPS):
            x = torch.randn(3, 5, WIDTH, generator=generator, requires_grad=True)
            y = model(x)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            if not step:
                found |= {"y": y.detach().clone(), "dx": x.grad}
                found |= {f"d{name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    found |= {name: whole(p) for name, p in model.named_parameters() if "lora" in name}
    found["latches"] = [pair.latched_at for pair in optimizer.stability()]
    return found


CASES = {
    "torch": ("torch", 3, True),
    "triton": ("triton", 3, True),
    "triton, no bias, rank 20": ("triton", 20, False),
    "rank 1": ("torch", 1, True),
}


def save_and_load(rank: int, world: int, place: Path) -> None:
    """Of a model that is cut, into one that is cut and one that is not."""
    torch.manual_seed(rank)
    models = [nn.Sequential(Block()) for _ in range(2)]
    config = slk.LoRAConfig(r=3, target_modules=NAMES, init_lora_weights=False, bias="lora_only")
    mesh = init_device_mesh("cpu", (world,))
    for model in models:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
        parallelize_module(model[0], mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    slk.apply_lora(models[0], config)
    slk.save_adapter(models[0], place / "adapter")
    dist.barrier()
    slk.load_adapter(models[1], place / "adapter")
    plain = nn.Sequential(Block())
    slk.load_adapter(plain, place / "adapter")
    layers = [lora_layers(model) for model in (*models, plain)]
    for name in layers[0]:
        for half in ("lora_A", "lora_B", "bias"):
            first, *others = (whole(getattr(found[name], half)) for found in layers)
            assert all(torch.equal(first, other) for other in others)
    assert type(layers[1]["0.up"]) is LoRAShardedLinear and type(layers[2]["0.up"]) is slk.LoRALinear


def one_rank(rank: int, world: int, place: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    save_and_load(rank, world, place)
    results = {name: train(world, *case) for name, case in CASES.items()}
    # Masks are each process's own; what is replicated has to stay so.
    torch.manual_seed(rank)
    dropped = train(world, "torch", 3, True, dropout=0.5)
    assert all(bool(torch.isfinite(value).all()) for name, value in dropped.items() if name != "latches")
    return results, dropped


def test_column_and_row_wise(tmp_path: Path) -> None:
    ranks, (first, second) = zip(*spawn(one_rank, 2, tmp_path), strict=True)
    for name, case in CASES.items():
        alone = train(1, *case)
        for rank in ranks:
            close(rank[name], alone)
    assert all(torch.equal(first[key], second[key]) for key in first if "lora" in key)


def cut(mesh: DeviceMesh, *placements: Any) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, HIDDEN, bias=False)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, placements))
    return linear


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)])
@pytest.mark.parametrize("given", [Replicate(), Shard(0), Shard(1)])
def test_any_placement_of_x(placement, given, mesh):
    linear = cut(mesh, placement)
    layer = slk.LoRALinear.from_linear(linear, r=3, init_lora_weights=False)
    assert type(layer) is LoRAShardedLinear and layer.lora_A.placements[0].is_shard() == (placement == Shard(1))
    plain = slk.LoRALinear(WIDTH, HIDDEN, bias=False, r=3)
    for name in ("weight", "lora_A", "lora_B"):
        getattr(plain, name).data = whole(getattr(layer, name))
    x = torch.randn(5, WIDTH)
    y, expected = layer(distribute_tensor(x, mesh, [given])), plain(x)
    torch.testing.assert_close(whole(y), expected.detach())
    grad = torch.randn(5, HIDDEN)
    expected.backward(grad)
    y.backward(distribute_tensor(grad, mesh, [Replicate()]))
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(whole(getattr(layer, name).grad), getattr(plain, name).grad)


def test_start_and_errors(mesh):
    linear = cut(mesh, Shard(0))
    layer = slk.LoRALinear.from_linear(linear, r=3)
    first = layer.lora_A
    assert bool(whole(first).any()) and not bool(whole(layer.lora_B).any())
    before = whole(first)
    layer.reset_lora_parameters("gaussian")
    assert layer.lora_A is first and not torch.equal(whole(first), before)
    with pytest.raises(TypeError, match="x must be a DTensor beside a sharded weight, got a Tensor"):
        layer(torch.randn(5, WIDTH))
    two = init_device_mesh("cpu", (1, 1))
    with pytest.raises(ValueError, match=r"linear's weight must be replicated or cut .* on 2 dimensions"):
        slk.LoRALinear.from_linear(cut(two, Shard(0), Replicate()))


def test_after_fully_shard_it_is_refused(mesh):
    model = nn.Sequential(Block(), Block())
    fully_shard(model[0], mesh=mesh)
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules=NAMES))
    assert [m.name for m in report.replaced] == ["1.up", "1.down"]
    assert reasons(report) == dict.fromkeys(
        ("0.up", "0.down"), "fully_shard has cut its weight, and would not cut A and B; apply LoRA before it"
    )


def disabled(rank: int, world: int, place: Path) -> None:
    """disable_lora on sharded layers, merged and not: the output of the same layers before they got LoRA."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    mesh = init_device_mesh("cpu", (world,))
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x = torch.randn(5, WIDTH)
    expected = model(x)
    slk.apply_lora(model, slk.LoRAConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    active = model(x)
    assert not torch.allclose(active, expected, atol=1e-3)
    with slk.disable_lora(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), active)
    slk.merge_lora(model.eval())
    with slk.disable_lora(model):
        assert torch.equal(model(x), expected)


def test_disable_lora(tmp_path):
    spawn(disabled, 2, tmp_path)

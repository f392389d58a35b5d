"""Column- and row-wise plans for LoRALinear: 2 processes, and 4 as data x tensor parallel with FSDP2, equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.sharded import LoRAShardedLinear
from stablelora_kernels.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel
from tests.helpers.processes import needs_gloo, spawn
from tests.nn.test_sharded import NAMES, WIDTH, Block, close, near, whole

pytestmark = needs_gloo
STEPS, ROWS, LENGTH = 4, 4, 6


def plan(sequence: bool = False) -> dict[str, Any]:
    if not sequence:
        return {"up": LoRAColwiseParallel(), "down": LoRARowwiseParallel()}
    # Sequence parallelism: between the layers each process has some of the tokens.
    return {"up": LoRAColwiseParallel(input_layouts=Shard(1)), "down": LoRARowwiseParallel(output_layouts=Shard(1))}


def lora_model(dropout: float = 0.0, bias: str = "lora_only") -> nn.Sequential:
    """The same in every process, and with a bias of the adapters' that is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    config = slk.LoRAConfig(r=3, target_modules=NAMES, init_lora_weights=False, lora_dropout=dropout, bias=bias)
    slk.apply_lora(model, config)
    return model


def train(backend: str, group: Any = None, cut: Any = None, steps: int = STEPS) -> dict[str, Any]:
    """Outputs, gradients and adapters; ``group`` are the number and index of this process's part of each batch."""
    model = lora_model(bias="lora_only" if backend == "torch" else "none")
    if cut is not None:
        cut(model)
    # As in test_nn_sharded.py: what makes sums in another order matter less.
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.01, eps=1e-2, shrink_ratio=0.1, seed=7)
    generator = torch.Generator().manual_seed(1)
    parts, part = group or (1, 0)
    rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    found: dict[str, Any] = {}
    with slk.use_backend(backend):
        for step in range(steps):
            x, grad = (torch.randn(ROWS, LENGTH, WIDTH, generator=generator) for _ in range(2))
            y = model(x[rows])
            # A mean over processes, as FSDP2 takes it.
            (y * grad[rows]).sum().mul(parts).backward()
            if not step:
                found["y"] = y.detach().clone()
                found |= {f"d{name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    found |= {name: whole(p) for name, p in model.named_parameters()}
    found["latches"] = [pair.latched_at for pair in optimizer.stability()]
    return found


def cut_in_two(model: nn.Module) -> None:
    for block in model.children():
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan())
    assert all(type(layer) is LoRAShardedLinear for layer in lora_layers(model).values())


def sequence_parallel(rank: int) -> dict[str, torch.Tensor]:
    """One block on this process's tokens: its part of the output, and the gradients."""
    block = lora_model()[0]
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    mine = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2)
    parallelize_module(block, init_device_mesh("cpu", (2,)), plan(sequence=True))
    x = x[:, mine].requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return {
        "y": y.detach().clone(),
        "dx": x.grad,
        **{n: whole(p.grad) for n, p in block.named_parameters() if p.grad is not None},
    }


def masks(rank: int, backend: str) -> dict[str, torch.Tensor]:
    """With dropout, of processes that were seeded alike: what each layer made of one input, and what came next."""
    model = lora_model(dropout=0.5)
    cut_in_two(model)
    torch.manual_seed(5)
    with slk.use_backend(backend):
        up, down = model[0].up, model[0].down
        # Ones for A and no base product show the mask of each column: the sums of what was kept.
        y = up(torch.ones(64, WIDTH))
        here = down.in_features // 2
        with torch.no_grad():
            down.weight.zero_(), down.bias.zero_(), down.lora_B.fill_(1.0), down.lora_A.zero_()
            # Each process shows its own columns, in its own output column before the sum.
            down.lora_A.to_local()[rank].fill_(1.0)
            down.lora_B.zero_()
            down.lora_B.to_local()[0, 0] = 1.0
            down.lora_B.to_local()[1, 1] = 1.0
        kept = down(torch.ones(64, here))
    return {"up": y.detach().clone(), "kept": kept.detach()[:, :2].clone(), "next": torch.rand(3)}


def two(rank: int, world: int, place: Path) -> dict[str, Any]:
    found: dict[str, Any] = {backend: train(backend, cut=cut_in_two) for backend in ("torch", "triton")}
    found["sequence"] = sequence_parallel(rank)
    found["masks"] = {backend: masks(rank, backend) for backend in ("torch", "triton")}
    model = lora_model()
    frozen = {name: layer.weight.detach().clone() for name, layer in lora_layers(model).items()}
    cut_in_two(model)
    model.eval()
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    before = model(x).detach().clone()
    report = slk.merge_lora(model)
    found["merged"] = (
        before,
        model(x).detach().clone(),
        {n: (e.largest_error, e.largest_delta) for n, e in report.errors.items()},
    )
    with pytest.raises(ValueError, match="is not merged, got a merged one"):
        merged = lora_model()
        slk.merge_lora(merged)
        parallelize_module(merged[0], init_device_mesh("cpu", (2,)), plan())
    slk.unmerge_lora(model)
    assert all(torch.equal(whole(layer.weight), frozen[name]) for name, layer in lora_layers(model).items())
    # One process's part is not finite: none merges.
    layer = model[0].up
    with torch.no_grad():
        layer.lora_B.to_local()[-1 if rank else slice(0)] = float("nan")
    with pytest.raises(ValueError, match="would give a weight that is not finite"):
        layer.merge()
    assert not layer.merged
    return found


def four(rank: int, world: int, place: Path) -> dict[str, Any]:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def cut(model: nn.Module) -> None:
        for block in model.children():
            parallelize_module(block, both["tensor"], plan())
            fully_shard(block, mesh=both["data"])
        fully_shard(model, mesh=both["data"])

    def copies_of_shards(model: nn.Module) -> None:
        for block in model.children():
            fully_shard(block, mesh=both)
        fully_shard(model, mesh=both)

    found = {backend: train(backend, (2, both.get_local_rank("data")), cut) for backend in ("torch", "triton")}
    # Every process has its own part of the batch.
    return found | {"copies": train("torch", (4, rank), copies_of_shards)}


def test_two_processes(tmp_path: Path) -> None:
    ranks = spawn(two, 2, tmp_path)
    for backend in ("torch", "triton"):
        alone = train(backend)
        assert any(alone["latches"])
        for rank in ranks:
            close(rank[backend], alone)

    block = lora_model()[0]
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = block(x)
    y.square().sum().backward()
    parts = [rank["sequence"] for rank in ranks]
    for key, expected in (("y", y.detach()), ("dx", x.grad)):
        torch.testing.assert_close(torch.cat([part[key] for part in parts], 1), expected)
    for name, p in block.named_parameters():
        if p.requires_grad:
            for part in parts:
                near(name, part[name], p.grad)

    for backend in ("torch", "triton"):
        first, second = (rank["masks"][backend] for rank in ranks)
        # Cut rows: one mask in all processes, the one that one process draws.
        model = lora_model(dropout=0.5)
        torch.manual_seed(5)
        with slk.use_backend(backend):
            expected = model[0].up(torch.ones(64, WIDTH)).detach()
        torch.testing.assert_close(torch.cat([first["up"], second["up"]], -1), expected)
        # Cut columns: each process has drawn its own, and goes on alike.
        assert torch.equal(first["kept"], second["kept"]) and torch.equal(first["next"], second["next"])
        a, b = first["kept"].unbind(-1)
        assert a.std() > 0 and b.std() > 0 and not torch.equal(a, b)

    model = lora_model()
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    report = slk.merge_lora(model)
    for rank in ranks:
        before, after, errors = rank["merged"]
        torch.testing.assert_close(after, before)
        assert errors.keys() == report.errors.keys()
        for name, (error, delta) in errors.items():
            assert delta == pytest.approx(report.errors[name].largest_delta, rel=1e-5)
            assert 0 < error < 1e-6


@pytest.mark.nightly
def test_four_processes_in_two_dimensions(tmp_path: Path) -> None:
    alone = {backend: train(backend) for backend in ("torch", "triton")}
    for rank, found in enumerate(spawn(four, 4, tmp_path)):
        for backend in alone:
            part = rank // 2 * ROWS // 2
            close(found[backend], alone[backend], slice(part, part + ROWS // 2))
        part = rank * ROWS // 4
        close(found["copies"], alone["torch"], slice(part, part + ROWS // 4))


def test_other_modules_and_hooks(mesh: DeviceMesh) -> None:
    """What torch's own styles do for a module without LoRA; and the layer's hooks stay."""
    model = lora_model()
    plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    parallelize_module(plain, mesh, {"0": LoRAColwiseParallel(), "1": LoRARowwiseParallel()})
    assert plain[0].weight.placements == (Shard(0),) and plain[1].weight.placements == (Shard(1),)
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear and nn.Embedding"):
        parallelize_module(nn.Tanh(), mesh, LoRAColwiseParallel())

    up, seen = model[0].up, []
    up.register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parallelize_module(model[0], mesh, plan())
    assert model[0].up is up and type(up) is LoRAShardedLinear
    assert up.lora_A.placements == (Replicate(),) and up.lora_B.placements == (Shard(0),)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model(torch.randn(2, WIDTH))
    assert seen == ["DTensor"]
    with pytest.raises(NotImplementedError, match="over a plain weight, got a LoRAShardedLinear"):
        parallelize_module(model[0], mesh, plan())


def test_projections_that_were_computed_together(mesh: DeviceMesh) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    slk.apply_lora(model, slk.LoRAConfig(target_modules="all-linear"), fuse_projections=True)
    with pytest.warns(RuntimeWarning, match="fuse_projections does not reach layers that tensor parallelism has cut"):
        parallelize_module(model, mesh, {"q_proj": LoRAColwiseParallel()})
    x = torch.randn(5, 8)
    assert model["q_proj"](x).shape == model["v_proj"](x).shape == (5, 8)

"""save_adapter and load_adapter under FSDP2, DistributedDataParallel, torch.compile and
checkpoint_wrapper: one file for all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import IDS, Model, lora_config, refused

pytest.importorskip(
    "safetensors", reason="runs where safetensors is installed: pip install .[test]"
)
pytestmark = needs_gloo
# A saved module, trained biases and an odd rank: every kind of tensor that a file holds, cut
# unevenly.
CONFIG = {"r": 3, "modules_to_save": ["lm_head"], "bias": "lora_only"}


def make(seed: int = 0, **config) -> Model:
    """A model of one base and of adapters that go by the seed."""
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, lora_config(**CONFIG | config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def files(path: Path) -> tuple[bytes, bytes]:
    return (path / WEIGHTS_NAME).read_bytes(), (path / CONFIG_NAME).read_bytes()


def compile_(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_parts(model: Model, wrap) -> Model:
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrap(layer)
    return model


def shard(model: Model, blocks: bool) -> Model:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers if blocks else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# What a user may have around a model, in processes that are in contact.
AROUND = {
    "data parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "ddp of compiled parts": lambda model: DistributedDataParallel(with_parts(model, compile_)),
    "fsdp": lambda model: shard(model, blocks=True),
    # A forward leaves the root's parameters whole.
    "fsdp of the root alone": lambda model: shard(model, blocks=False),
    "compiled fsdp of checkpointed parts": lambda model: compile_(
        shard(with_parts(model, checkpoint_wrapper), True)
    ),
}


def save_and_load(around: Callable[[Model], nn.Module], place: Path, sharded: bool) -> None:
    first, second = around(make(seed=1)), around(make(seed=2))
    # Of shards, of which a process holds some.
    assert slk.count_parameters(first) == slk.count_parameters(make())
    with torch.no_grad():
        expected = first(IDS)
        assert not torch.allclose(second(IDS), expected)
        slk.save_adapter(first, place)
        # The others don't wait for the one that writes.
        dist.barrier()
        report = slk.load_adapter(second, place)
        assert all(
            isinstance(layer.lora_A, DTensor) == sharded for layer in lora_layers(second).values()
        )
        assert torch.equal(second(IDS), expected)
    assert [row.name for row in report.replaced] == [
        f"layers.{i}.{p}_proj" for i in range(2) for p in "qv"
    ]


def on_a_rank(rank: int, world: int, place: Path) -> None:
    for name, around in AROUND.items():
        save_and_load(around, place / name, sharded="fsdp" in name)
        assert not list(place.rglob(".*")), name


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    slk.save_adapter(make(seed=1), tmp_path / "alone")
    spawn(on_a_rank, 2, tmp_path)
    for name in AROUND:
        assert files(tmp_path / name) == files(tmp_path / "alone"), name


def test_what_is_refused(tmp_path: Path, mesh) -> None:
    """LoRA comes before what would not know its layers; and an adapter is whole."""

    def apply(model: nn.Module, _: Path) -> None:
        slk.apply_lora(model, lora_config())

    def load(model: nn.Module, place: Path) -> None:
        slk.load_adapter(model, place / "adapter")

    def save(model: nn.Module, place: Path) -> None:
        slk.save_adapter(model, place / "other")

    slk.save_adapter(make(), tmp_path / "adapter")
    flat = FullyShardedDataParallel(
        make(bias="none"), use_orig_params=True, device_id=torch.device("cpu")
    )
    part, in_ddp = make(), "LoRA before DistributedDataParallel is around it"
    part.layers[0] = DistributedDataParallel(part.layers[0])
    for model, calls, message in (
        (DistributedDataParallel(Model()), (apply, load), in_ddp),
        (
            with_parts(Model(), compile_),
            (load,),
            "parts of it are compiled or wrapped, got layers.0, layers.1 wrapped",
        ),
        (
            shard(Model(), True),
            (load,),
            "fully_shard has cut its weight, and would not cut A and B; apply LoRA before it",
        ),
        (
            flat,
            (save, load),
            r"sharded by fully_shard \(FSDP2\), got FullyShardedDataParallel .*, whose flat parameters",
        ),
        (
            part,
            (save, load),
            "in DistributedDataParallel as a whole, got its part 'layers.0' in one",
        ),
    ):
        for call in calls:
            with refused(model, ValueError, message):
                call(model, tmp_path)
    assert not (tmp_path / "other").exists()

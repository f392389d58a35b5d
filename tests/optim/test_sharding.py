"""Over gloo, equal to one process: sharded A and B (DTensor) of FSDP2 and tensor parallelism, DDP, and checkpoints of FSDP2."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import stablelora_kernels as slk
from tests.helpers.distributed_training import TRAINING, compare, fit, gather
from tests.helpers.optimizers import set_grads
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import decide_on_device

pytestmark = needs_gloo
# Of (r, m, n): A's rows are fewer than four ranks, divide by two and not, and widths are odd.
SHAPES = {"q": (8, 24, 40), "v": (3, 15, 31), "o": (1, 7, 13)}
# Tensor-parallel and FSDP's placements of A [r, n] and B [m, r] on a mesh of one dimension or of two.
PLACEMENTS = {
    "fsdp": ([Shard(0)], [Shard(0)]),
    "column-wise": ([Replicate()], [Shard(0)]),
    "row-wise": ([Shard(1)], [Replicate()]),
    "mixed": ([Shard(1)], [Shard(1)]),
    "hsdp": ([Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "fsdp and row-wise": ([Shard(0), Shard(1)], [Shard(0), Replicate()]),
    "fsdp and column-wise": ([Shard(0), Replicate()], [Shard(1), Shard(0)]),
}
# Every process has all of it; PyTorch 2.6 sends it nonetheless.
NO_SCATTER = {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
STEPS = 9
SETTINGS: dict[str, Any] = {"lr": 0.08, "shrink_ratio": 0.1, "weight_decay": 0.1, "seed": 7}


def named_parameters(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    named = []
    for name, (r, m, n) in SHAPES.items():
        named.append((f"{name}.lora_A", torch.randn(r, n, generator=generator) / n**0.5))
        named.append((f"{name}.lora_B", torch.zeros(m, r)))
        named.append((f"{name}.bias", torch.randn(m, generator=generator)))
    return [(name, p.to(dtype)) for name, p in named]


def train(named: list[tuple[str, torch.Tensor]], steps: int, **settings: Any) -> dict[str, Any]:
    """Everything after some steps, whole, and the collectives of each step."""
    optimizer = slk.StableLoRAAdamW(named, **settings)
    whole = [torch.empty(p.shape, dtype=p.dtype) for _, p in named]
    calls: list[int] = []
    reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[-1] += 1
        return reduce(*args, **kwargs)

    for step in range(steps):
        set_grads(whole, step)
        for (_, p), w in zip(named, whole, strict=True):
            p.grad = (
                distribute_tensor(w.grad, p.device_mesh, p.placements, **NO_SCATTER)
                if isinstance(p, DTensor)
                else w.grad.clone()
            )
        calls.append(0)
        dist.all_reduce = counted
        optimizer.step()
        dist.all_reduce = reduce
    state = {name: {key: gather(value) for key, value in optimizer.state[p].items()} for name, p in named}
    stability = [(s.a_norm, s.b_norm, s.latched_at) for s in optimizer.stability()]
    return {"params": {n: gather(p) for n, p in named}, "state": state, "stability": stability, "calls": calls}


def distributed(named: list[tuple[str, torch.Tensor]], world: int, way: str) -> list[tuple[str, torch.Tensor]]:
    """The pairs as DTensors; biases stay as they are, so that both kinds meet in one optimizer."""
    a_way, b_way = PLACEMENTS[way]
    mesh = init_device_mesh(
        "cpu", (world,) if len(a_way) == 1 else (2, world // 2), mesh_dim_names=("x", "y")[: len(a_way)]
    )
    placed = []
    for name, p in named:
        if "lora" in name:
            p = distribute_tensor(p, mesh, a_way if "lora_A" in name else b_way)
        placed.append((name, p.requires_grad_()))
    return placed


# Placements


def run_placements(rank: int, world: int, place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (dtype, backend, settings) in CASES.items():
        if name.startswith("on the device"):
            # The last cases, in a process that ends with them.
            decide_on_device()
        for way in WAYS[world]:
            if name in (*FEW, *(CASES if way == WAYS[world][0] else ())):
                with slk.use_backend(backend):
                    found[name, way] = train(distributed(named_parameters(dtype), world, way), STEPS, **settings)
    return found


BF16 = torch.bfloat16
# Of each: parameters' dtype, backend, settings.
CASES: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "float32": (torch.float32, "torch", SETTINGS),
    "float64": (torch.float64, "torch", SETTINGS),
    "clipped": (torch.float32, "torch", {**SETTINGS, "max_grad_norm": 0.05}),
    "kernel": (torch.float32, "triton", SETTINGS),
    "clipped kernel": (torch.float32, "triton", {**SETTINGS, "max_grad_norm": 0.05}),
    "bfloat16": (BF16, "torch", SETTINGS),
    "bfloat16 kernel": (BF16, "triton", SETTINGS),
    "master kernel": (BF16, "triton", {**SETTINGS, "master_weights": True}),
    "bfloat16 moments": (BF16, "torch", {**SETTINGS, "moments_dtype": BF16}),
    "bfloat16 moments kernel": (BF16, "triton", {**SETTINGS, "moments_dtype": BF16}),
    "never": (torch.float32, "torch", {**SETTINGS, "stop_condition": "never"}),
    "on the device": (torch.float32, "torch", SETTINGS),
    "on the device, clipped": (torch.float32, "torch", {**SETTINGS, "max_grad_norm": 0.05}),
}
# All of them for the first way of each number of processes, these for every way.
FEW = ("float32", "bfloat16", "bfloat16 kernel", "clipped kernel", "on the device")
WAYS = {2: list(PLACEMENTS)[:4], 4: ["fsdp and row-wise", "fsdp and column-wise", "hsdp", "fsdp"]}


@functools.cache
def in_one_process(name: str) -> dict[str, Any]:
    dtype, backend, settings = CASES[name]
    with slk.use_backend(backend):
        return train([(n, p.requires_grad_()) for n, p in named_parameters(dtype)], STEPS, **settings)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_equal_to_one_process(spawned: Spawned, world: int) -> None:
    ranks = [found["placements"] for found in spawned(2)] if world == 2 else spawned(4, run_placements)
    assert set(ranks[0]) == {(name, way) for way in WAYS[world] for name in (CASES if way == WAYS[world][0] else FEW)}
    for name, way in ranks[0]:
        what = f"{name}, {way}"
        alone, others = in_one_process(name), [found[name, way] for found in ranks]
        latches = [latched for *_, latched in alone["stability"]]
        for other in others:
            assert [latched for *_, latched in other["stability"]] == latches, what
            for (a, b, _), (x, y, _) in zip(alone["stability"], other["stability"], strict=True):
                assert (x, y) == pytest.approx((a, b), rel=1e-6 if CASES[name][0] is not BF16 else 1e-3), what
            for parameter, p in alone["params"].items():
                equal_enough(p, other["params"][parameter], name, f"{way}, {parameter}")
                for key, value in alone["state"][parameter].items():
                    equal_enough(value, other["state"][parameter][key], name, f"{way}, {parameter}, {key}")
            assert other["calls"] == others[0]["calls"], what
        check_collectives(name, way, latches, others[0]["calls"])


def equal_enough(expected: torch.Tensor, got: torch.Tensor, name: str, parameter: str) -> None:
    assert expected.dtype == got.dtype and expected.shape == got.shape
    what = f"{name}, {parameter}: "
    if "kernel" in name and "clipped" not in name:
        # Every element is computed as in one process, its random rounding too.
        assert torch.equal(expected, got), what
    elif expected.dtype is BF16:
        # PyTorch computes the last few elements of a tensor in other instructions: rarely, that rounds one to the other side.
        assert (expected != got).double().mean() < 0.02, what
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=1e-6, msg=lambda m: what + m)
    else:
        # That difference, and the clipped norm's, which is added up in another order.
        bound = 1e-12 if expected.dtype is torch.float64 else 1e-5
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound / 100, msg=lambda m: what + m)


def check_collectives(name: str, way: str, latches: list[int | None], calls: list[int]) -> None:
    """One for each dimension of the mesh that shards pairs, until all have latched, and one more a step for clipping."""
    what = f"{name}, {way}"
    assert all(latches) == (name != "never"), what
    dimensions = 2 if way.startswith("fsdp and") else 1
    clipping = dimensions if "clipped" in name else 0
    last = max((latch for latch in latches if latch), default=len(calls))
    assert last > 1
    assert calls == [dimensions + clipping if step <= last else clipping for step in range(1, len(calls) + 1)], what


# Models


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, lora_config())
    # The adapters too.
    return model.to(dtype)


def sharded(world: int) -> torch.nn.Module:
    model = make_model()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# Of data-parallel runs by their number of processes: the parameters' dtype, and max_grad_norm.
REPLICATED: dict[int, list[tuple[torch.dtype, float | None]]] = {
    2: [(torch.float32, None), (BF16, None)],
    4: [(torch.float32, 0.05)],
}


def train_replicated(rank: int, world: int, dtype: torch.dtype, max_grad_norm: float | None) -> dict[str, Any]:
    model = make_model(dtype)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = slk.StableLoRAAdamW.from_model(wrapped, max_grad_norm=max_grad_norm, **TRAINING)
    found = fit(wrapped, optimizer, rank, world)
    return found | {"params": {name.removeprefix("module."): value for name, value in found["params"].items()}}


def train_sharded(rank: int, world: int) -> dict[str, Any]:
    model = sharded(world)
    optimizer = slk.StableLoRAAdamW.from_model(model, **TRAINING)
    assert any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    return fit(model, optimizer, rank, world)


def save(rank: int, world: int, place: Path) -> None:
    model = sharded(world)
    optimizer = slk.StableLoRAAdamW.from_model(model, **TRAINING)
    fit(model, optimizer, rank, world, range(3))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=str(place / f"of{world}"))


def resume(rank: int, world: int, place: Path, saved_on: int) -> dict[str, Any]:
    model = sharded(world)
    optimizer = slk.StableLoRAAdamW.from_model(model, **{**TRAINING, "lr": 1.0, "seed": 1})
    before = {name: gather(p) for name, p in model.named_parameters()}
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    # That took a step of the optimizer to have a state to fill.
    for name, p in model.named_parameters():
        assert torch.equal(before[name], gather(p)), name
    checkpoint.load(state, checkpoint_id=str(place / f"of{saved_on}"))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == TRAINING["lr"] and optimizer.param_groups[0]["seed"] == TRAINING["seed"]
    return fit(model, optimizer, rank, world, range(3, 6))


def train_all(rank: int, world: int, place: Path) -> dict[str, Any]:
    """All that a rank does by day. Four ranks go on with what two have saved."""
    found = {"sharded": train_sharded(rank, world)}
    found["replicated"] = [train_replicated(rank, world, *case) for case in REPLICATED[world]]
    if world == 4:
        return found | {"resumed": resume(rank, world, place, 2)}
    save(rank, world, place)
    return found | {"placements": run_placements(rank, world, place)}


Spawned = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Spawned:
    """What each of some processes returns; they run once."""
    place = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world, work=train_all, *args: spawn(work, world, place, *args))


@functools.cache
def alone() -> dict[str, Any]:
    model = make_model()
    return fit(model, slk.StableLoRAAdamW.from_model(model, **TRAINING), 0, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp(spawned: Spawned, world: int) -> None:
    spawned(2)
    for found in spawned(world):
        compare(found["sharded"], alone())


@pytest.mark.parametrize("world", [2, 4])
def test_ddp(spawned: Spawned, world: int) -> None:
    """Every rank latches at the same step, and all agree with one process on the whole batch."""
    spawned(2)
    for k, (dtype, max_grad_norm) in enumerate(REPLICATED[world]):
        expected = train_replicated(0, 1, dtype, max_grad_norm)
        ranks = [found["replicated"][k] for found in spawned(world)]
        for rank in ranks:
            assert rank["latches"] == expected["latches"] and any(rank["latches"])
            assert all(torch.equal(value, ranks[0]["params"][name]) for name, value in rank["params"].items())
        if dtype is torch.float32:
            # In bfloat16, AdamW makes whole steps of gradients that are averaged in another order.
            compare(ranks[0], expected)


def test_a_checkpoint_resumes_on_more_ranks(spawned: Spawned) -> None:
    spawned(2)
    for found in spawned(4):
        compare(found["resumed"], alone())


@pytest.mark.nightly
def test_a_checkpoint_resumes_on_fewer_ranks(spawned: Spawned) -> None:
    spawned(4, save)
    for found in spawned(2, resume, 4):
        compare(found, alone())

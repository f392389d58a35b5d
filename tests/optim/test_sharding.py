"""Over gloo, equal to one process: sharded A and B (DTensor) of FSDP2 and tensor parallelism, and
checkpoints of FSDP2.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import stablelora_kernels as slk
from stablelora_kernels.optim import sharding
from stablelora_kernels.utils.tensors import local
from tests.helpers.distributed_training import TRAINING, compare, fit, gather
from tests.helpers.optimizers import make_pairs, params_of, set_grads
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.small_models import Model, lora_options

pytestmark = needs_gloo
Named = list[tuple[str, torch.Tensor]]
# Tensor-parallel and FSDP's placements of A [r, n] and B [m, r] on a mesh of one dimension or of
# two.
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
NO_SCATTER = (
    {"src_data_rank": None}
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters
    else {}
)
SETTINGS: dict[str, Any] = {"lr": 0.08, "shrink_ratio": 0.1, "weight_decay": 0.1, "seed": 7}
# The step that is skipped.
SKIPPED = 5
CLIPPED = {**SETTINGS, "max_grad_norm": 0.05}
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
# Of each: parameters' dtype, backend, settings.
CASES: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "float32": (FP32, "torch", SETTINGS),
    "float64": (FP64, "torch", SETTINGS),
    "clipped": (FP32, "torch", CLIPPED),
    "kernel": (FP32, "triton", SETTINGS),
    "clipped kernel": (FP32, "triton", CLIPPED),
    "bfloat16": (BF16, "torch", SETTINGS),
    "bfloat16 kernel": (BF16, "triton", SETTINGS),
    "master": (BF16, "torch", {**SETTINGS, "master_weights": True}),
    "master kernel": (BF16, "triton", {**SETTINGS, "master_weights": True}),
    "bfloat16 moments": (BF16, "torch", {**SETTINGS, "moments_dtype": BF16}),
    "bfloat16 moments kernel": (BF16, "triton", {**SETTINGS, "moments_dtype": BF16}),
    "never": (FP32, "torch", {**SETTINGS, "stop_condition": "never"}),
}
# All of them for the first way of each number of processes, these for every way.
FEW = ("float32", "bfloat16", "bfloat16 kernel", "clipped kernel")
WAYS = {2: list(PLACEMENTS)[:4], 4: ["fsdp and row-wise", "fsdp and column-wise", "hsdp", "fsdp"]}


def named_parameters(dtype: torch.dtype) -> Named:
    """Rows of A that are fewer than four ranks, that divide by two and that do not, and odd widths."""
    found = []
    for pair in make_pairs([(8, 24, 40), (3, 15, 31), (1, 7, 13)], dtype):
        bias = torch.ones(pair.B.shape[0], dtype=dtype)
        found += [
            (f"{pair.name}.{part}", p)
            for part, p in (("lora_A", pair.A), ("lora_B", pair.B), ("bias", bias))
        ]
    return [(name, p.detach()) for name, p in found]


def distributed(named: Named, world: int, way: str) -> Named:
    """The pairs as DTensors; biases stay as they are, so that both kinds meet in one optimizer."""
    a_way, b_way = PLACEMENTS[way]
    sizes, names = ((world,), ("x",)) if len(a_way) == 1 else ((2, world // 2), ("x", "y"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    ways = {"lora_A": a_way, "lora_B": b_way}
    return [
        (name, distribute_tensor(p, mesh, ways[part]) if part in ways else p)
        for name, p in named
        for part in [name.split(".")[1]]
    ]


def train(named: Named, overflows: bool = True, **settings: Any) -> dict[str, Any]:
    """Everything after some steps, whole.

    A gradient appears in a step that is skipped. Others write to a parameter before it, and to this
    process's part later.

    Args:
        named: the parameters.
        overflows: whether this process is one that finds the infinity for which all skip the step.
        settings: of the optimizer.
    """
    optimizer = slk.StableLoRAAdamW([(name, p.requires_grad_()) for name, p in named], **settings)
    whole = [torch.empty(p.shape, dtype=p.dtype) for _, p in named]
    for step in range(9):
        set_grads(whole, step)
        for (_, p), w in zip(named, whole, strict=True):
            p.grad = w.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(w.grad, p.device_mesh, p.placements, **NO_SCATTER)
        if step < SKIPPED:
            named[-1][1].grad = None
        elif step == SKIPPED:
            with torch.no_grad():
                named[0][1].mul_(1.5)
        elif step == SKIPPED + 2:
            with torch.no_grad():
                local(named[0][1]).mul_(1.5)
        optimizer.found_inf = torch.tensor(float(overflows and step == SKIPPED))
        optimizer.step()
    tensors = {name: gather(p) for name, p in named}
    tensors |= {
        f"{name}, {key}": gather(value)
        for name, p in named
        for key, value in optimizer.state[p].items()
    }
    said = optimizer.stability()
    norms = [norm for s in said for norm in (s.a_norm, s.b_norm)]
    return {"tensors": tensors, "norms": norms, "latches": [s.latched_at for s in said]}


def run_placements(rank: int, world: int, place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (dtype, backend, settings) in CASES.items():
        for way in WAYS[world]:
            if name in FEW or way == WAYS[world][0]:
                with slk.settings(backend=backend):
                    named = distributed(named_parameters(dtype), world, way)
                    # Of a process's part; replicas have all-reduced their gradients.
                    parts = world // 2 if way == "hsdp" else world
                    overflows = rank % parts == parts - 1
                    found[name, way] = train(named, overflows, **settings)
    return found


@functools.cache
def in_one_process(name: str) -> dict[str, Any]:
    dtype, backend, settings = CASES[name]
    with slk.settings(backend=backend):
        return train(named_parameters(dtype), **settings)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_equal_to_one_process(spawned, world):
    ranks = (
        [found["placements"] for found in spawned(2)] if world == 2 else spawned(4, run_placements)
    )
    assert {name for name, _ in ranks[0]} == {*CASES} and {way for _, way in ranks[0]} == {
        *WAYS[world]
    }
    for name, way in ranks[0]:
        alone, others = in_one_process(name), [found[name, way] for found in ranks]
        for other in others:
            what = f"{name}, {way}"
            assert other["latches"] == alone["latches"], what
            assert other["norms"] == pytest.approx(
                alone["norms"], rel=1e-3 if CASES[name][0] is BF16 else 1e-6
            ), what
            for key, value in alone["tensors"].items():
                equal_enough(value, other["tensors"][key], name, f"{what}, {key}: ")
        assert all(alone["latches"]) == (name != "never"), name


def equal_enough(expected: torch.Tensor, got: torch.Tensor, name: str, what: str) -> None:
    assert expected.dtype == got.dtype and expected.shape == got.shape
    if "kernel" in name and "clipped" not in name:
        # Every element is computed as in one process, its random rounding too.
        assert torch.equal(expected, got), what
    elif expected.dtype is BF16:
        # PyTorch computes the last few elements of a tensor in other instructions: rarely, that
        # rounds one to the other side.
        assert (expected != got).double().mean() < 0.02, what
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=1e-6, msg=lambda m: what + m)
    else:
        # That difference, and the clipped norm's, which is added up in another order.
        bound = 1e-12 if expected.dtype is FP64 else 1e-5
        torch.testing.assert_close(
            got, expected, rtol=bound, atol=bound / 100, msg=lambda m: what + m
        )


# Models


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, **lora_options())
    return model


def sharded(world: int) -> torch.nn.Module:
    model = make_model()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(rank: int, world: int, place: Path) -> dict[str, Any]:
    """It is saved halfway."""
    model = sharded(world)
    optimizer = slk.StableLoRAAdamW.from_model(model, **TRAINING)
    assert any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    fit(model, optimizer, rank, world, range(3))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoint.save(state, checkpoint_id=str(place / f"of{world}"))
    return fit(model, optimizer, rank, world, range(3, 6))


def resume(rank: int, world: int, place: Path, saved_on: int) -> dict[str, Any]:
    model = sharded(world)
    optimizer = slk.StableLoRAAdamW.from_model(model, **{**TRAINING, "lr": 1.0, "seed": 1})
    before = {name: gather(p) for name, p in model.named_parameters()}
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    # That took a step of the optimizer to have a state to fill.
    for name, p in model.named_parameters():
        assert torch.equal(before[name], gather(p)), name
    checkpoint.load(state, checkpoint_id=str(place / f"of{saved_on}"))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert (
        optimizer.param_groups[0]["lr"] == TRAINING["lr"]
        and optimizer.param_groups[0]["seed"] == TRAINING["seed"]
    )
    return fit(model, optimizer, rank, world, range(3, 6))


def train_all(rank: int, world: int, place: Path) -> dict[str, Any]:
    """All that a rank does by day. Four ranks go on with what two have saved."""
    found: dict[str, Any] = {"sharded": train_sharded(rank, world, place)}
    if world == 4:
        return found | {"resumed": resume(rank, world, place, 2)}
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
def test_fsdp(spawned, world):
    spawned(2)
    for found in spawned(world):
        compare(found["sharded"], alone())


def test_a_checkpoint_resumes_on_more_ranks(spawned):
    spawned(2)
    for found in spawned(4):
        compare(found["resumed"], alone())


# In one process


def pair(mesh: DeviceMesh, a_way: Placement | None = None) -> Named:
    parts = {
        "q.lora_A": (torch.randn(4, 6), a_way or Shard(0)),
        "q.lora_B": (torch.zeros(5, 4), Shard(0)),
    }
    return [
        (n, DTensor.from_local(t, mesh, [w], run_check=False).requires_grad_())
        for n, (t, w) in parts.items()
    ]


def whole(named: Named) -> Named:
    return [(name, gather(p).requires_grad_()) for name, p in named]


def step_alike(both: list[slk.StableLoRAAdamW], way: Placement | None = None) -> None:
    """Of sharded parameters, and of whole ones of the same values: a step of both on gradients
    placed another way.
    """
    named = list(zip(*map(params_of, both), strict=True))
    for p, q in named:
        q.grad = torch.randn(q.shape)
        p.grad = DTensor.from_local(
            q.grad.clone(), p.device_mesh, [way or Shard(0)], run_check=False
        )
    for optimizer in both:
        optimizer.step()
    for p, q in named:
        torch.testing.assert_close(gather(p), q.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(gather(both[0].state[p]["exp_avg"]), both[1].state[q]["exp_avg"])
        assert both[0].state[p]["step"].item() == both[1].state[q]["step"].item()


def test_what_is_refused_of_dtensors(mesh, monkeypatch):
    with pytest.raises(
        TypeError, match=r"'q.lora_A' must be sharded or replicated, got the placements \(Part"
    ):
        slk.StableLoRAAdamW(pair(mesh, Partial()))
    with pytest.raises(
        ValueError, match=r"parameter 'q.lora_A' is a DTensor, whose moments cannot be in 8 bits"
    ):
        slk.StableLoRAAdamW(pair(mesh), moments_dtype=torch.uint8)
    strided = DTensor.from_local(
        torch.randn(6, 4).t(), mesh, [Shard(0)], run_check=False
    ).requires_grad_()
    with pytest.raises(
        ValueError,
        match=r"'q.lora_A' is sharded, so its shards must be contiguous, got the strides",
    ):
        slk.StableLoRAAdamW([("q.lora_A", strided), pair(mesh)[1]])
    # As on four processes.
    placements = [Shard(1), Shard(2)]
    cut_twice = distribute_tensor(
        torch.randn(4, 6, 8), init_device_mesh("cpu", (1, 1)), placements
    ).requires_grad_()
    monkeypatch.setattr(sharding, "shard_extent", lambda p: ((4, 3, 4), (0, 0, 0)))
    with pytest.raises(
        ValueError, match=r"'w' may be sharded along its first dimension and one more, got .*dim=1"
    ):
        slk.StableLoRAAdamW([("w", cut_twice), *whole(pair(mesh))])


def test_parts_change_as_a_whole_does(mesh, backend):
    """Gradients of other placements, a state that is replaced, loaded from a whole, and one that
    does not fit.
    """
    named = pair(mesh)
    both = [slk.StableLoRAAdamW(each, lr=0.1) for each in (named, whole(named))]
    step_alike(both, Partial())
    for optimizer in both:
        for p in params_of(optimizer):
            optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5).detach()
    step_alike(both)
    both[0].load_state_dict(both[1].state_dict())
    step_alike(both)
    back = slk.StableLoRAAdamW(whole(pair(mesh)))
    back.load_state_dict(both[0].state_dict())
    p, q = back.pairs[0].A, both[1].pairs[0].A
    assert torch.equal(back.state[p]["exp_avg"], both[1].state[q]["exp_avg"])
    both[0].state[named[0][1]]["exp_avg"] = torch.zeros(4, 7)
    message = r"the state of 'q.lora_A': 'exp_avg' must be .* \[4, 6\] on cpu, got .* \[4, 7\]"
    with pytest.raises(ValueError, match=message):
        step_alike(both)


def test_parameters_that_a_trainer_exchanges_are_found(mesh):
    """As accelerate does when it shards a model after the optimizer was made."""
    named = pair(mesh)
    optimizer = slk.StableLoRAAdamW(whole(named), lr=0.1, shrink_ratio=0.5, weight_decay=0.0)
    optimizer.param_groups[0]["params"] = [p for _, p in named]
    for _, p in named:
        p.grad = torch.zeros_like(p)
    before = gather(named[0][1])
    optimizer.step()
    assert torch.equal(gather(named[0][1]), 0.5 * before) and optimizer.pairs[0].A is named[0][1]

"""StableShrink over gloo, equal to one process: sharded A and B (DTensor) of FSDP2 and tensor
parallelism, how often the processes talk, and checkpoints.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import stablelora_kernels as slk
from stablelora_kernels.optim.sharding import LatchMonitor
from tests.helpers.distributed_training import EPS, ROWS, batches, compare, gather
from tests.helpers.optimizers import make_pairs, set_grads
from tests.helpers.processes import needs_gloo, spawn
from tests.optim.test_sharding import NO_SCATTER, WAYS, distributed, make_model

pytestmark = needs_gloo
FP32, BF16 = torch.float32, torch.bfloat16
KINDS = [(dtype, backend) for dtype in (FP32, BF16) for backend in ("torch", "triton")]
SKIPPED, STEPS = 5, 12
# Powers of two: products with them are exact, so that no instruction rounds otherwise.
LR, RATIO = 2.0, 2**-3


def named_pairs(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Rows of A that are fewer than four ranks, that divide by two and that do not, and odd widths."""
    pairs = make_pairs([(8, 24, 40), (3, 15, 31), (1, 7, 13)], dtype)
    return [
        (f"{pair.name}.{part}", p.detach())
        for pair in pairs
        for part, p in (("lora_A", pair.A), ("lora_B", pair.B))
    ]


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The number of all-reduces in the block, once it has ended."""
    original, count = dist.all_reduce, [0]

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield count
    finally:
        dist.all_reduce = original


class Descent(torch.optim.Optimizer):
    """p <- p - lr grad, whatever GradScaler found."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])


def train(named: list[tuple[str, torch.Tensor]], overflows: bool | None = None) -> dict[str, Any]:
    """Everything after some steps, whole. A's gradient of the last pair comes later than others.

    Args:
        named: the parameters.
        overflows: whether this process is one that finds an infinity, for which all skip a step;
            None if there is no GradScaler.
    """
    params = [p.requires_grad_() for _, p in named]
    optimizer = Descent(params, {"lr": LR})
    pairs = slk.lora_pairs(list(named))
    shrink = slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO, seed=7)
    whole = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    talks = []
    for step in range(STEPS):
        set_grads(whole, step)
        for p, w in zip(params, whole, strict=True):
            p.grad = w.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(w.grad, p.device_mesh, p.placements, **NO_SCATTER)
        if step == 0:
            pairs[-1].A.grad = None
        if overflows is not None:
            optimizer.found_inf = torch.tensor(float(overflows and step == SKIPPED))
        with counted_collectives() as count:
            optimizer.step()
        talks.append(count[0])
    said = shrink.stability()
    return {
        "tensors": {name: gather(p) for name, p in named},
        "latches": [(s.steps, s.latched_at) for s in said],
        "norms": [norm for s in said for norm in (s.a_norm, s.b_norm)],
        "talks": talks,
    }


def run_placements(rank: int, world: int, place: Path) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for dtype, backend in KINDS:
        # Rounding at random depends on the elements' places, float32 does not.
        ways = WAYS[world][:1] if (dtype, backend) == (FP32, "triton") else WAYS[world]
        for way in ways:
            for scales in (False, True)[: 2 if way == WAYS[world][0] else 1]:
                with slk.settings(backend=backend):
                    named = distributed(named_pairs(dtype), world, way)
                    overflows = rank == world - 1 if scales else None
                    found[dtype, backend, way, scales] = train(named, overflows)
    return found


@functools.cache
def in_one_process(dtype: torch.dtype, backend: str, scales: bool) -> dict[str, Any]:
    with slk.settings(backend=backend):
        return train(named_pairs(dtype), True if scales else None)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_equal_to_one_process(spawned, world):
    """To the bit, random rounding included."""
    ranks = (
        [found["placements"] for found in spawned(2)] if world == 2 else spawned(4, run_placements)
    )
    assert {way for _, _, way, _ in ranks[0]} == {*WAYS[world]}
    for dtype, backend, way, scales in ranks[0]:
        what = f"{dtype}, {backend}, {way}, {scales}"
        alone = in_one_process(dtype, backend, scales)
        assert {steps for steps, _ in alone["latches"]} == {STEPS - scales, STEPS - scales - 1}
        for rank in ranks:
            found = rank[dtype, backend, way, scales]
            assert found["latches"] == alone["latches"], what
            assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6), what
            for key, value in alone["tensors"].items():
                assert torch.equal(value, found["tensors"][key]), f"{what}, {key}"


@pytest.mark.parametrize(("dtype", "backend"), KINDS)
def test_one_collective_a_step_until_all_have_latched(spawned, dtype, backend):
    """On the kernels' path the host knows of the last latch some steps later."""
    for rank in spawned(2):
        for key, found in rank["placements"].items():
            if key[:2] != (dtype, backend) or key[3]:
                continue
            # The last pair's A takes no first step.
            latches = [at for _, at in found["latches"]]
            last = max(*latches[:-1], latches[-1] + 1)
            until = last + LatchMonitor.LAG - 1 if backend == "triton" else last
            assert until < STEPS, latches
            assert found["talks"] == [1] * until + [0] * (STEPS - until), key


def load_behind_the_last_latch(world: int) -> list[bool]:
    """By pair, whether A shrinks again under the first state, long after all have latched."""
    named = distributed(named_pairs(FP32), world, "fsdp")
    pairs = slk.lora_pairs([(name, p.requires_grad_()) for name, p in named])
    optimizer = Descent([p for _, p in named], {"lr": 0.0})
    shrink = slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
    state = copy.deepcopy(optimizer.state_dict())
    for _, p in named:
        p.grad = torch.ones_like(p)
    for pair in pairs:
        torch.nn.init.ones_(pair.B)
    for _ in range(LatchMonitor.LAG + 1):
        optimizer.step()
    assert all(s.latched_at == 1 for s in shrink.stability())
    for pair in pairs:
        torch.nn.init.zeros_(pair.B)
    optimizer.load_state_dict(state)
    before = [gather(pair.A) for pair in pairs]
    optimizer.step()
    return [
        torch.equal(gather(pair.A), (1 - RATIO) * a) for pair, a in zip(pairs, before, strict=True)
    ]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_state_that_is_loaded_makes_collectives_again(spawned, backend):
    assert spawned(2)[0][backend] == [True] * 3


# Models


def model_of_two_speeds() -> torch.nn.Module:
    """The first layer's pairs latch before the third step, the others behind it."""
    model = make_model()
    with torch.no_grad():
        for pair in slk.lora_pairs(model)[:2]:
            pair.A.mul_(0.3)
    return model


def sharded(world: int, **policies: Any) -> torch.nn.Module:
    model = model_of_two_speeds()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


Shrunk = tuple[torch.optim.Optimizer, slk.StableShrink]


def adamw(model: torch.nn.Module, **changes: Any) -> Shrunk:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, **{"lr": 0.1, "eps": EPS, **changes})
    return optimizer, slk.StableShrink(optimizer, model, shrink_ratio=0.1, seed=7)


def fit(
    model: torch.nn.Module, shrunk: Shrunk, rank: int, world: int, steps: range
) -> dict[str, Any]:
    """Train on this rank's part of every batch."""
    (ids, targets), share = batches(), ROWS // world
    mine = slice(rank * share, (rank + 1) * share)
    for step in steps:
        logits = model(ids[step, mine]).flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits, targets[step, mine].flatten()).backward()
        shrunk[0].step()
        shrunk[0].zero_grad()
    trained = {name: gather(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"params": trained, "latches": [s.latched_at for s in shrunk[1].stability()]}


# torch itself loads no state that is both full and flat.
WAYS_TO_SAVE = {
    "plain": {},
    "full": {"full_state_dict": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
    "in files": {},
}


def train_and_resume(rank: int, world: int, place: Path) -> dict[str, Any]:
    """A whole run, and its second half in other models by each way to save."""
    whole = sharded(world)
    shrunk = adamw(whole)
    fit(whole, shrunk, rank, world, range(3))
    saved = {}
    for way, options in WAYS_TO_SAVE.items():
        options = StateDictOptions(**options)
        state = get_optimizer_state_dict(whole, shrunk[0], options=options)
        # Copies, since the run goes on.
        saved[way] = torch.utils._pytree.tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
        )
    weights = {name: value.clone() for name, value in get_model_state_dict(whole).items()}
    checkpoint.save(
        {"model": weights, "optimizer": saved["in files"]}, checkpoint_id=str(place / "saved")
    )
    found = {"whole": fit(whole, shrunk, rank, world, range(3, 6))}
    for way, options in WAYS_TO_SAVE.items():
        options = StateDictOptions(**options)
        model = sharded(world)
        shrunk = adamw(model, lr=1.0)
        state = {"model": weights, "optimizer": saved[way]}
        if way == "in files":
            before = {name: gather(p) for name, p in model.named_parameters()}
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, shrunk[0]),
            }
            # That took a step of the optimizer, to have a state to fill: it shrinks nothing.
            assert all(torch.equal(before[name], gather(p)) for name, p in model.named_parameters())
            assert [s.steps for s in shrunk[1].stability()] == [0] * 4 and shrunk[0].state
            checkpoint.load(state, checkpoint_id=str(place / "saved"))
        set_model_state_dict(model, state["model"])
        given = {} if rank and way == "broadcast" else state["optimizer"]
        set_optimizer_state_dict(model, shrunk[0], given, options=options)
        found[way] = fit(model, shrunk, rank, world, range(3, 6))
    return found


POLICIES = {
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def shrink_under_policies(rank: int, world: int, place: Path) -> dict[str, Any]:
    """The halves of the pairs before and after a step whose learning rate is zero."""
    found = {}
    for name, policies in POLICIES.items():
        model = sharded(world, **policies)
        with torch.no_grad():
            for pair in slk.lora_pairs(model)[:2]:
                pair.B.normal_()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        shrink = slk.StableShrink(optimizer, model, shrink_ratio=0.25)
        before = [(gather(pair.A), gather(pair.B)) for pair in shrink.pairs]
        model(batches()[0][0]).float().square().mean().backward()
        optimizer.step()
        after = [gather(pair.A) for pair in shrink.pairs]
        found[name] = before, after, [s.latched_at for s in shrink.stability()]
    return found


def work(rank: int, world: int, place: Path) -> dict[str, Any]:
    loaded = {}
    for backend in ("torch", "triton"):
        with slk.settings(backend=backend):
            loaded[backend] = load_behind_the_last_latch(world)
    return loaded | {
        "placements": run_placements(rank, world, place),
        "models": train_and_resume(rank, world, place),
        "policies": shrink_under_policies(rank, world, place),
    }


Spawned = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Spawned:
    """What each of some processes returns; they run once."""
    place = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world, work=work: spawn(work, world, place))


@functools.cache
def alone() -> dict[str, Any]:
    model = model_of_two_speeds()
    return fit(model, adamw(model), 0, 1, range(6))


def test_fsdp(spawned):
    for found in spawned(2):
        compare(found["models"]["whole"], alone())


@pytest.mark.parametrize("way", WAYS_TO_SAVE)
def test_a_checkpoint_resumes_to_the_bit(spawned, way):
    for found in spawned(2):
        whole, resumed = found["models"]["whole"], found["models"][way]
        assert resumed["latches"] == whole["latches"]
        assert {at <= 3 for at in whole["latches"]} == {True, False}
        for name, value in whole["params"].items():
            assert torch.equal(resumed["params"][name], value), name


@pytest.mark.parametrize("name", POLICIES)
def test_policies_of_fsdp(spawned, name):
    for found in spawned(2):
        before, after, latches = found["policies"][name]
        assert latches == [1, 1, None, None]
        for (a, _), now, at in zip(before, after, latches, strict=True):
            assert torch.equal(now, a if at else 0.75 * a)

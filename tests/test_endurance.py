"""Long runs keep their memory, and the same call gives the same bits: again, in another process,
from several threads.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import random
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.dispatch.settings import STRATEGIES
from stablelora_kernels.launch import base
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.interpreter import speed_up_interpreter
from tests.helpers.optimizers import DEVICE, make_pairs, params_of, set_grads, snapshot
from tests.helpers.processes import answer_of
from tests.helpers.small_models import fill_b
from tests.optim.options import OPTIONS

#: One step of something; what it computed, by the step's number.
Work = Callable[[int], list[Tensor]]
LAYERS, GROUP = "layers", "group"


class Setting(NamedTuple):
    """What works: layers one by one, a group of them, or an optimizer with a row of
    tests/optim/options.py.
    """

    kind: str
    backend: str
    dtype: torch.dtype = torch.float32
    r: int = 3
    p: float = 0.0


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, out in (("q_proj", 24), ("k_proj", 16), ("v_proj", 16)):
            setattr(self, name, nn.Linear(520, out, dtype=dtype, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def make_layers(s: Setting) -> nn.Module:
    torch.manual_seed(0)
    model = Attention(s.dtype)
    slk.apply_lora(
        model,
        ["q_proj", "k_proj", "v_proj"],
        r=s.r,
        lora_alpha=2 * s.r,
        lora_dropout=s.p,
        fuse_projections=s.kind == GROUP,
    )
    fill_b(model)
    return model.train()


def make_input(s: Setting, seed: int, rows: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 520, generator=generator).to(DEVICE, s.dtype).requires_grad_()


def train(s: Setting, model: nn.Module, step: int) -> list[Tensor]:
    """Outputs and gradients of a call with many rows and, of layers one by one, of one with few;
    now and then inference, too.
    """
    if step % 4 == 3:
        with torch.no_grad():
            model(make_input(s, step))
    model.zero_grad()
    found = []
    for rows in (70, 5) if s.kind == LAYERS else (70,):
        x = make_input(s, step, rows)
        torch.manual_seed(step)
        y = model(x)
        (
            y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        ).sum().backward()
        found += [y.detach(), x.grad]
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def take_step(optimizer: StableLoRAAdamW, step: int) -> list[Tensor]:
    """With another learning rate, and now and then a missing gradient or a look at the state."""
    params = params_of(optimizer)
    set_grads(params, step)
    if step % 5 == 1:
        params[step % len(params)].grad = None
    optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step % 100)
    optimizer.step()
    optimizer.zero_grad()
    if step % 8 == 0:
        optimizer.stability()
        optimizer.state_dict()
    return snapshot(optimizer)


def make(s: Setting) -> Work:
    if s.kind in (LAYERS, GROUP):
        return partial(train, s, make_layers(s))
    row = OPTIONS[s.kind]
    pairs = make_pairs([(4, 24, 40), (1, 7, 13)], row.dtypes[0])
    return partial(take_step, row.optimizer(pairs, shrink_ratio=0.1))


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def go_on(work: Work, backend: str, first: int = 0, count: int = 4) -> str:
    """The digest of some steps."""
    with slk.settings(backend=backend):
        return digest(t for step in range(first, first + count) for t in work(step))


def digests(settings: Iterable[Setting]) -> list[str]:
    """Of the first call of layers, or the first steps of an optimizer."""
    return [go_on(make(s), s.backend, count=4 if s.kind in OPTIONS else 1) for s in settings]


def infer(s: Setting, count: int) -> list[str]:
    """A worker's part of a data loader: outputs without gradients."""
    with slk.settings(backend=s.backend), torch.no_grad():
        model = make_layers(s)
        return [digest([model(make_input(s, seed))]) for seed in range(count)]


def results(calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Of each function with its arguments."""
    speed_up_interpreter()
    return [function(*args) for function, args in calls]


def holdings() -> dict[str, int]:
    """How many tensors live, and the sizes of all containers and caches of the package's modules."""
    gc.collect()
    sizes = {"tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())}
    for name, module in list(sys.modules.items()):
        for attribute, value in (
            vars(module).items() if name.startswith("stablelora_kernels") else ()
        ):
            if isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                sizes[f"{name}.{attribute}"] = len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{name}.{attribute}"] = value.cache_info().currsize
    return sizes


pytestmark = pytest.mark.usefixtures("one_thread")
nightly = pytest.mark.nightly
FP32, BF16 = torch.float32, torch.bfloat16
BACKENDS = ["torch", "triton"]
OPTIMIZERS = ["plain", "clipped", "bf16-moments", "masters-8-bit-moments-clipped"]
EVERY = [
    *(Setting(LAYERS, *rest) for rest in product(BACKENDS, (FP32, BF16), (3, 20), (0.0, 0.3))),
    *(Setting(GROUP, backend, p=p) for backend, p in product(BACKENDS, (0.0, 0.3))),
    *(Setting(name, backend) for backend, name in product(BACKENDS, OPTIMIZERS)),
]
# Some of every kind.
FEW = [*EVERY[:16:8], EVERY[17], *EVERY[21::6]]


def flat_while(work: Work, count: int) -> None:
    """Some steps and then ``count`` steps of ``work``; what the process holds does not grow in the
    latter.
    """
    for step in range(8):
        work(step)
    before = holdings()
    tracemalloc.start()
    try:
        for step in range(8, 8 + count // 2):
            work(step)
        holdings()
        traced = tracemalloc.get_traced_memory()[0]
        for step in range(8 + count // 2, 8 + count):
            work(step)
        now = holdings()
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    # Some objects, not some in each step of a long run.
    assert grown < 64 * 1024, f"traced memory has grown by {grown} bytes in {count // 2} steps"
    # A step more or less may be pending in a container.
    assert {
        name: size
        for name, size in now.items()
        if size > before.get(name, 0) + 4 * (name != "tensors")
    } == {}


LOW = "masters-8-bit-moments-clipped"


def long_run(kind: str, backend: str) -> int:
    """Steps of a long run. While memory is traced, a step in Triton's interpreter takes about half a
    second with an optimizer, and several with layers.
    """
    if backend == "torch" or DEVICE == "cuda":
        return 1_000
    return 16 if kind in (LAYERS, GROUP) else 300


LONG = [
    (GROUP, "torch", 10),
    *(
        pytest.param(kind, backend, long_run(kind, backend), marks=nightly)
        for kind in (LAYERS, GROUP, "clipped", LOW)
        for backend in BACKENDS
    ),
]


@pytest.mark.parametrize(("kind", "backend", "count"), LONG)
def test_long_runs_hold_no_more_memory(kind: str, backend: str, count: int) -> None:
    with slk.settings(backend=backend):
        flat_while(make(Setting(kind, backend, p=0.1)), count)


@pytest.mark.parametrize(
    "settings", [pytest.param(FEW, id="few"), pytest.param(EVERY, id="all", marks=nightly)]
)
def test_the_same_bits_again_and_in_another_process(settings: list[Setting]) -> None:
    """The spawned process also goes on with pickled optimizers, and infers as a data loader's
    worker would.
    """
    first = digests(settings)
    shuffled = random.Random(0).sample(range(len(settings)), len(settings))
    assert [first[i] for i in shuffled] == digests([settings[i] for i in shuffled])
    others: list[Any] = [(infer, (s, 2)) for s in settings if s.kind in (LAYERS, GROUP) and not s.p]
    for s in (s for s in settings if s.kind in OPTIMIZERS):
        go_on(work := make(s), s.backend)
        others.append((go_on, (work, s.backend, 4)))
    calls = [(digests, (settings,)), *others]
    (spawned, *rest), _ = answer_of(partial(results, calls), "spawn")
    # Here last, since it changes the optimizers.
    assert [s for s, one, other in zip(settings, first, spawned, strict=True) if one != other] == []
    assert rest == [function(*args) for function, args in others]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs on systems with fork")
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs on machines without a GPU: CUDA forbids forks of a process that has used it",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_worker_computes_the_same(backend: str) -> None:
    """After calls here, backward included. torch refuses backward in a fork, so the worker infers
    and steps.
    """
    layers, steps = Setting(LAYERS, backend), Setting(LOW, backend)
    digests([layers, steps])
    calls: list[Any] = [(infer, (layers, 3)), (digests, ([steps],))]
    assert answer_of(partial(results, calls), "fork") == (
        [function(*args) for function, args in calls],
        0,
    )


# Threads


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of several threads run one after another, as on a GPU's stream; the interpreter
    itself knows no threads.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import GridExecutor

    launch, lock = GridExecutor.__call__, threading.Lock()

    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return launch(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", alone)


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What ``work(0)``, ``work(1)``, ... return, all begun at once."""
    start = threading.Barrier(count)

    def begin(i: int) -> Any:
        torch.set_num_threads(1)
        start.wait(30)
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


ROUNDS = [
    ("torch", 20),
    *(pytest.param(backend, long_run(LAYERS, backend) // 5, marks=nightly) for backend in BACKENDS),
]


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize(("backend", "rounds"), ROUNDS)
def test_threads_with_objects_of_their_own(backend: str, rounds: int) -> None:
    """Forward, backward and steps; each thread sees what it would see alone."""
    with slk.settings(backend=backend):
        made = [[make(Setting(kind, backend)) for kind in (LAYERS, GROUP, LOW)] for _ in range(5)]

        def work(thread: int) -> list[str]:
            return [digest(each(i)) for i in range(rounds) for each in made[thread]]

        alone, before = work(4), sum(base.launch_counts.values())
        assert in_threads(work) == [alone] * 4
    assert backend == "torch" or sum(base.launch_counts.values()) > before


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("kind", [LAYERS, GROUP])
@pytest.mark.parametrize(("backend", "rounds"), ROUNDS)
def test_threads_that_share_a_layer_for_inference(backend: str, rounds: int, kind: str) -> None:
    s = Setting(kind, backend)
    with slk.settings(backend=backend), torch.no_grad():
        model = make_layers(s).eval()
        expected = [model(make_input(s, seed)) for seed in range(4)]

        def work(i: int) -> list[torch.Tensor]:
            with torch.no_grad():
                return [model(make_input(s, i)) for _ in range(rounds)]

        with warnings.catch_warnings():
            # A group whose layers are called with several tensors turns itself off and says so.
            warnings.filterwarnings("ignore", message="fuse_projections")
            found = in_threads(work)
    # Layers in a group and alone add up in another order.
    tolerance = 1e-5 if kind == GROUP else 0
    for outputs, one in zip(found, expected, strict=True):
        for y in outputs:
            torch.testing.assert_close(y, one, rtol=tolerance, atol=tolerance)


def test_settings_of_threads_hold_for_the_process_and_end_with_their_blocks() -> None:
    """Blocks that overlap at random: whenever none is open, the setting is the one from before."""
    before = repr(slk.settings)

    def work(i: int) -> None:
        generator = random.Random(i)
        for _ in range(500):
            with (
                slk.settings(backend=generator.choice(["torch", "triton"])),
                slk.settings(strategy=generator.choice(STRATEGIES[1:])),
                slk.settings(first_use=generator.choice(["on", "off"])),
            ):
                assert slk.settings.backend in ("torch", "triton")
                assert slk.settings.strategy != "auto" and slk.settings.first_use != "auto"

    in_threads(work)
    assert repr(slk.settings) == before

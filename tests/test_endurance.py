"""Long runs keep their memory, and the same call gives the same bits: again, in another process, from several threads."""

from __future__ import annotations

import os
import random
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.launch import base
from tests.helpers import endurance
from tests.helpers.endurance import LayerSetting, StepSetting
from tests.helpers.optimizers import params_of, set_grads
from tests.helpers.processes import answer_of

pytestmark = pytest.mark.usefixtures("one_thread")
nightly = pytest.mark.nightly
FP32, BF16 = torch.float32, torch.bfloat16
BACKENDS = ["torch", "triton"]
LAYERS = [
    LayerSetting(backend, dtype, r, p, rows)
    for backend in BACKENDS
    for dtype in (FP32, BF16)
    for r in (3, 20)
    for p in (0.0, 0.3)
    for rows in (5, 70)
]
GROUPS = [LayerSetting(backend, FP32, 3, p, 70, fused=True) for backend in BACKENDS for p in (0.0, 0.3)]
STEPS = [
    StepSetting(backend, dtype, norm, moments, dtype is torch.float16)
    for backend in BACKENDS
    for dtype, moments in ((FP32, FP32), (BF16, BF16), (torch.float16, torch.uint8))
    for norm in (None, 0.1)
]
SETTINGS: list[Any] = [*LAYERS, *GROUPS, *STEPS]
# Some of every kind.
FEW = [*LAYERS[::9], GROUPS[1], *STEPS[1::3]]


def flat_while(run: Callable[[int], None], count: int) -> None:
    """``run(step)`` for some and then ``count`` steps; what the process holds does not grow in the latter."""
    for step in range(8):
        run(step)
    before = endurance.holdings()
    tracemalloc.start()
    try:
        for step in range(8, 8 + count // 2):
            run(step)
        endurance.holdings()
        traced = tracemalloc.get_traced_memory()[0]
        for step in range(8 + count // 2, 8 + count):
            run(step)
        now = endurance.holdings()
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    # Some objects, not some in each step of a long run.
    assert grown < 64 * 1024, f"traced memory has grown by {grown} bytes in {count // 2} steps"
    # A step more or less may be pending in a container.
    assert {name: size for name, size in now.items() if size > before.get(name, 0) + 4 * (name != "tensors")} == {}


STEP_COUNTS = [("torch", 100), ("triton", 4), *(pytest.param(b, 2_000, marks=nightly) for b in BACKENDS)]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("backend", "count"), STEP_COUNTS)
@pytest.mark.parametrize("low", [False, True], ids=["float32", "few bits"])
def test_optimizer_steps_hold_no_more_memory(backend: str, count: int, low: bool) -> None:
    """With new gradients, another learning rate, a missing gradient and a look at the state now and then."""
    s = StepSetting(backend, BF16 if low else FP32, 0.1, torch.uint8 if low else FP32)
    with slk.use_backend(backend):
        optimizer = endurance.make_optimizer(s)

        def run(step: int) -> None:
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

        flat_while(run, count)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("backend", "count"), [("torch", 20), *(pytest.param(b, 1_000, marks=nightly) for b in BACKENDS)]
)
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "group"])
def test_layer_calls_hold_no_more_memory(backend: str, count: int, fused: bool) -> None:
    """With few rows and many, gradients and none."""
    s = LayerSetting(backend, FP32, 3, 0.1, 70, fused)
    with slk.use_backend(backend):
        model = endurance.make_layers(s)

        def run(step: int) -> None:
            own = s._replace(rows=(70, 5)[step % 2] if not fused else 70)
            if step % 4 == 3:
                with torch.no_grad():
                    model(endurance.make_input(own, step))
            endurance.train_layers(own, model, step)
            model.zero_grad()

        flat_while(run, count)


@pytest.mark.parametrize("settings", [pytest.param(FEW, id="few"), pytest.param(SETTINGS, id="all", marks=nightly)])
def test_the_same_bits_again_and_in_another_process(settings: list[Any]) -> None:
    """The spawned process also goes on with pickled optimizers, and infers as a data loader's worker would."""
    first = endurance.digests(settings)
    shuffled = random.Random(0).sample(range(len(settings)), len(settings))
    assert [first[i] for i in shuffled] == endurance.digests([settings[i] for i in shuffled])
    others: list[Any] = [(endurance.infer, (s, 2)) for s in settings if isinstance(s, LayerSetting) and not s.p]
    for s in (s for s in settings if isinstance(s, StepSetting)):
        with slk.use_backend(s.backend):
            optimizer = endurance.make_optimizer(s)
            endurance.take_steps(optimizer, 0, 4)
        others.append((endurance.go_on, (optimizer, s.backend)))
    calls = [(endurance.digests, (settings,)), *others]
    (spawned, *rest), _ = answer_of(partial(endurance.results, calls), "spawn")
    # Here last, since it changes the optimizers.
    assert [s for s, one, other in zip(settings, first, spawned, strict=True) if one != other] == []
    assert rest == [function(*args) for function, args in others]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA forbids forks of a process that has used it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_worker_computes_the_same(backend: str) -> None:
    """After calls here, backward included. torch refuses backward in a fork, so the worker infers and steps."""
    layers, steps = LayerSetting(backend, FP32, 3, 0.0, 70), StepSetting(backend, BF16, 0.1, FP32)
    endurance.digests([layers, steps])
    calls: list[Any] = [(endurance.infer, (layers, 3)), (endurance.digests, ([steps],))]
    assert answer_of(partial(endurance.results, calls), "fork") == ([function(*args) for function, args in calls], 0)


# Threads


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of several threads run one after another, as on a GPU's stream; the interpreter itself knows no threads."""
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


ROUNDS = [("torch", 20), ("triton", 1), *(pytest.param(backend, 200, marks=nightly) for backend in BACKENDS)]


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize(("backend", "rounds"), ROUNDS)
def test_threads_with_objects_of_their_own(backend: str, rounds: int) -> None:
    """Forward, backward and steps; each thread sees what it would see alone."""
    many = LayerSetting(backend, FP32, 3, 0.0, 70)
    settings = [many, many._replace(rows=5), many._replace(fused=True)]
    with slk.use_backend(backend):
        made = [
            ([*map(endurance.make_layers, settings)], endurance.make_optimizer(StepSetting(backend, BF16, 0.1, FP32)))
            for _ in range(5)
        ]

        def work(thread: int) -> list[str]:
            models, optimizer = made[thread]
            found = []
            for i in range(rounds):
                for s, model in zip(settings, models, strict=True):
                    model.zero_grad()
                    found.append(endurance.digest(endurance.train_layers(s, model, i)))
                found.append(endurance.digest(endurance.take_steps(optimizer, i, 1)))
            return found

        alone, before = work(4), sum(base.launch_counts.values())
        assert in_threads(work) == [alone] * 4
    assert backend == "torch" or sum(base.launch_counts.values()) > before


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "group"])
@pytest.mark.parametrize(("backend", "rounds"), ROUNDS)
def test_threads_that_share_a_layer_for_inference(backend: str, rounds: int, fused: bool) -> None:
    s = LayerSetting(backend, FP32, 3, 0.0, 70, fused)
    with slk.use_backend(backend), torch.no_grad():
        model = endurance.make_layers(s).eval()
        expected = [model(endurance.make_input(s, seed)) for seed in range(4)]

        def work(i: int) -> list[torch.Tensor]:
            with torch.no_grad():
                return [model(endurance.make_input(s, i)) for _ in range(rounds)]

        with warnings.catch_warnings():
            # A group whose layers are called with several tensors turns itself off and says so.
            warnings.filterwarnings("ignore", message="fuse_projections")
            found = in_threads(work)
    for outputs, one in zip(found, expected, strict=True):
        for y in outputs:
            # Layers in a group and alone add up in another order.
            torch.testing.assert_close(y, one, rtol=1e-5 if fused else 0, atol=1e-5 if fused else 0)


def test_settings_of_threads_hold_for_the_process_and_end_with_their_blocks() -> None:
    """Blocks that overlap at random: whenever none is open, the setting is the one from before."""
    before = slk.get_backend(), slk.get_kernel(), slk.get_autotune()

    def work(i: int) -> None:
        generator = random.Random(i)
        for _ in range(500):
            with (
                slk.use_backend(generator.choice(["torch", "triton"])),
                slk.use_kernel(generator.choice(["split", "fused", "vendor"])),
                slk.use_autotune(generator.choice([True, False])),
            ):
                assert slk.get_backend() in ("torch", "triton")
                assert slk.get_kernel() != "auto"

    in_threads(work)
    assert (slk.get_backend(), slk.get_kernel(), slk.get_autotune()) == before

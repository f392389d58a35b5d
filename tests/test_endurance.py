"""Long runs keep their memory, and the same call gives the same bits: again, in another process, from several threads.

The short cases run always, the long ones with ``python -m pytest -m nightly``.
"""

from __future__ import annotations

import os
import random
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.launch import base, counters
from tests.helpers import endurance
from tests.helpers.endurance import LayerSetting, StepSetting
from tests.helpers.inputs import BF16, FP16, FP32
from tests.helpers.optimizers import params_of, set_grads

pytestmark = pytest.mark.usefixtures("one_thread")
nightly = pytest.mark.nightly
BACKENDS = ["torch", "triton"]
# 32 + 4 + 12.
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
    StepSetting(backend, dtype, norm, moments, dtype is FP16)
    for backend in BACKENDS
    for dtype, moments in ((FP32, FP32), (BF16, BF16), (FP16, torch.uint8))
    for norm in (None, 0.1)
]
SETTINGS: list[Any] = [*LAYERS, *GROUPS, *STEPS]
# Some of every kind.
FEW = [*LAYERS[::9], GROUPS[1], *STEPS[1::3]]


# Soak


def flat_while(run: Callable[[int], None], warm_up: int, count: int, held: Callable[[], Any]) -> None:
    """``run(step)`` for ``warm_up`` and then ``count`` steps; what the process holds does not grow in the latter.

    Traced memory may vary by a few objects, not by one a step in a long run.
    Resident memory is the allocator's: it may grow once, not with every step.
    """
    for step in range(warm_up):
        run(step)
    tensors, sizes, containers = endurance.live_tensors(), held(), endurance.containers()
    tracemalloc.start()
    try:
        for step in range(warm_up, warm_up + count // 2):
            run(step)
        endurance.live_tensors()
        traced, resident = tracemalloc.get_traced_memory()[0], endurance.resident()
        for step in range(warm_up + count // 2, warm_up + count):
            run(step)
        # Fewer if somebody else's have gone meanwhile.
        assert endurance.live_tensors() <= tensors
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    assert grown < 64 * 1024, f"traced memory has grown by {grown} bytes in {count // 2} steps"
    assert endurance.resident() - resident < 8 * 2**20
    # A step more or less may be pending in them.
    for before, now in ((sizes, held()), (containers, endurance.containers())):
        assert {name: size for name, size in now.items() if size > before.get(name, 0) + 4} == {}


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("backend", "count"),
    [
        ("torch", 100),
        ("triton", 4),
        pytest.param("torch", 20_000, marks=nightly),
        # In the interpreter.
        pytest.param("triton", 2_000, marks=nightly),
    ],
)
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

        flat_while(run, 8, count, lambda: endurance.held_by(optimizer))


@pytest.mark.parametrize(
    ("backend", "count"),
    [
        ("torch", 60),
        pytest.param("triton", 4, marks=nightly),
        pytest.param("torch", 5_000, marks=nightly),
        pytest.param("triton", 5_000, marks=nightly),
    ],
)
@pytest.mark.covering(1)
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "group"])
def test_layer_calls_hold_no_more_memory(backend: str, count: int, fused: bool) -> None:
    """Three projections a call, so a third of the calls; with few rows and many, gradients and none."""
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

        flat_while(run, 4, -(-count // 3), dict)
    assert not any(bool(each.any()) for each in counters._in_use.values())


# Determinism


@pytest.mark.parametrize("settings", [pytest.param(FEW, id="few"), pytest.param(SETTINGS, id="48", marks=nightly)])
def test_the_same_bits_again_and_in_other_processes(settings: list[Any]) -> None:
    """The spawned process also goes on with pickled optimizers, and infers as a data loader's worker would."""
    first = endurance.digests(settings)
    assert first == endurance.digests(settings)
    shuffled = random.Random(0).sample(range(len(settings)), len(settings))
    again = endurance.digests([settings[i] for i in shuffled])
    assert [first[i] for i in shuffled] == again

    inference = [(endurance.infer, (s, 2)) for s in settings if isinstance(s, LayerSetting) and not s.p]
    resumed = []
    for s in (s for s in settings if isinstance(s, StepSetting)):
        with slk.use_backend(s.backend):
            optimizer = endurance.make_optimizer(s)
            endurance.take_steps(optimizer, 0, 4)
        resumed.append((endurance.go_on, (optimizer, s.backend)))
    calls = [(endurance.digests, (settings,)), *inference, *resumed]
    spawned = endurance.in_process("spawn", calls)
    # Here last, since it changes the optimizers.
    differing = [settings[i] for i, (a, b) in enumerate(zip(spawned[0], first, strict=True)) if a != b]
    assert not differing, differing
    assert spawned == [first, *(function(*args) for function, args in (*inference, *resumed))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA forbids forks of a process that has used it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_worker_computes_the_same(backend: str) -> None:
    """After calls here, backward included. torch refuses backward in a fork, so the worker infers and steps."""
    layers, steps = LayerSetting(backend, FP32, 3, 0.0, 70), StepSetting(backend, BF16, 0.1, FP32)
    endurance.digests([layers, steps])
    with slk.use_backend(backend):
        optimizer = endurance.make_optimizer(steps)
        endurance.take_steps(optimizer, 0, 4)
    calls = [(endurance.infer, (layers, 3)), (endurance.go_on, (optimizer, backend)), (endurance.digests, ([steps],))]
    assert endurance.in_process("fork", calls) == [function(*args) for function, args in calls]


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


ROUNDS = [
    pytest.param("torch", 20),
    pytest.param("triton", 1),
    pytest.param("torch", 500, marks=nightly),
    pytest.param("triton", 20, marks=nightly),
]


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize(("backend", "rounds"), ROUNDS)
def test_threads_with_objects_of_their_own(backend: str, rounds: int) -> None:
    """Forward, backward and steps; each thread sees what it would see alone."""
    settings = [
        LayerSetting(backend, FP32, 3, 0.0, rows, fused) for rows, fused in ((70, False), (5, False), (70, True))
    ]
    steps = StepSetting(backend, BF16, 0.1, FP32)

    with slk.use_backend(backend):
        models = [[endurance.make_layers(s) for s in settings] for _ in range(4)]
        alone = [endurance.make_layers(s) for s in settings]
        optimizers = [endurance.make_optimizer(steps) for _ in range(4)]

        def work(own: list[Any], optimizer: Any) -> list[str]:
            found = []
            for i in range(rounds):
                for s, model in zip(settings, own, strict=True):
                    x = endurance.make_input(s, i)
                    y = model(x)
                    y.backward(torch.ones_like(y))
                    found.append(
                        endurance.digest([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
                    )
                found.append(endurance.digest(endurance.take_steps(optimizer, i, 1)))
            return found

        expected = work(alone, endurance.make_optimizer(steps))
        before = sum(base.launch_counts.values())
        found = in_threads(lambda i: work(models[i], optimizers[i]))
    assert found == [expected] * 4
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

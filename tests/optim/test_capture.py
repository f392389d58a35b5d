"""What a CUDA graph does to the optimizer's step alone, without one: ``torch.cuda.graph`` records a
capture, and a replay runs it again.

``test_replays_are_steps`` with real graphs: tests/gpu/test_cuda_graphs.py. With the backward pass,
whose gradients the graph owns: tests/test_captured_step.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.launch import base

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from stablelora_kernels.optim import staging
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.recorded_graphs import capture, use_recorded_graphs
from tests.helpers.steps import latches
from tests.optim.options import BF16, FP32, FP64, OPTIONS

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU has real graphs: tests/gpu/test_cuda_graphs.py"
)
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        name: OPTIONS[name].options
        for name in ("plain", "clipped", "lora-plus", "masters", "8-bit-moments")
    },
    "float64 tensors": {
        key: torch.tensor(value, dtype=FP64, device=DEVICE)
        for key, value in (("weight_decay", 0.1), ("shrink_ratio", 0.05))
    },
}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    use_recorded_graphs(monkeypatch)
    with settings(backend="triton"):
        yield


def fill_grads(optimizer: StableLoRAAdamW, seed: int) -> None:
    """New values in the gradients that are there."""
    kept = [p.grad for p in params_of(optimizer)]
    set_grads(params_of(optimizer), seed)
    for p, grad in zip(params_of(optimizer), kept, strict=True):
        p.grad = p.grad if grad is None else grad.copy_(p.grad)


def optimizers(dtype: torch.dtype = FP32, steps: int = 1, **settings: Any) -> list[StableLoRAAdamW]:
    """Two alike, after some steps."""
    settings = {"shrink_ratio": 0.05, "capturable": True, "seed": 3, **settings}
    made = [
        StableLoRAAdamW(make_pairs(dtype=dtype), lr=torch.tensor(3e-2, device=DEVICE), **settings)
        for _ in range(2)
    ]
    for optimizer in made:
        fill_grads(optimizer, 0)
        for _ in range(steps):
            optimizer.step()
    return made


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", SETTINGS)
def test_replays_are_steps(name, dtype):
    """New gradients each time, another lr halfway, verdicts of a GradScaler, and pairs that latch
    meanwhile.
    """
    both = eager, captured = optimizers(dtype, steps=0, **SETTINGS[name])
    verdict = torch.zeros(1, device=DEVICE)
    for optimizer in both:
        optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 2.0, device=DEVICE), verdict
        optimizer.step()
    graph, _ = capture(captured.step)
    for turn in range(1, 9):
        verdict.fill_(float(turn == 3))
        for optimizer in both:
            fill_grads(optimizer, turn)
            if turn == 5:
                optimizer.param_groups[0]["lr"].fill_(0.2)
        eager.step()
        graph.replay()
        assert all_equal(snapshot(eager), snapshot(captured)), turn
    assert latches(captured) == latches(eager)
    assert any(latch is not None and latch > 1 for latch in latches(captured).values())


def new_gradients(optimizer: StableLoRAAdamW) -> None:
    for p in params_of(optimizer):
        p.grad = p.grad.clone()


def a_large_b(optimizer: StableLoRAAdamW) -> None:
    with torch.no_grad():
        params_of(optimizer)[1].fill_(10.0)


@pytest.mark.parametrize("change", [new_gradients, a_large_b])
def test_a_step_does_not_count_on_what_was_only_captured(change):
    """A graph that is never replayed has copied no table and measured no norm."""
    eager, captured = optimizers()
    for optimizer in (eager, captured):
        change(optimizer)
    capture(captured.step)
    for optimizer in (eager, captured):
        optimizer.step()
    assert all_equal(snapshot(eager), snapshot(captured))
    assert any(latches(captured).values()) == (change is a_large_b)


def test_memory_is_set_aside_for_some_captures():
    optimizer, _ = optimizers()
    # Gradients that must not come back to the same addresses.
    kept = []

    def capture_with_new_gradients() -> None:
        new_gradients(optimizer)
        kept.append([p.grad for p in params_of(optimizer)])
        capture(optimizer.step)

    for _ in range(6):
        capture_with_new_gradients()
        optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"no memory is reserved for their table\. Run a step between captures"
    ):
        for _ in range(99):
            capture_with_new_gradients()


def test_no_two_copies_of_captures_share_host_memory(monkeypatch):
    """A replay copies from it again."""
    tables = staging.Staging(torch.device(DEVICE), 64, True)
    monkeypatch.setattr(staging, "capturing", lambda: True)
    for n in range(8):
        tables.upload([n], torch.int64)
        tables.refill()
    assert [host.view(torch.int64)[0].item() for host in tables.captured] == [*range(8)]


NOT_CAPTURED: dict[str, tuple[int, dict[str, Any], str]] = {
    "a first step": (0, {}, r"run step\(\) once before capturing it in a CUDA graph"),
    "gradients elsewhere": (1, {"capturable": False}, "Pass capturable=True to the optimizer"),
}


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_what_is_not_captured(name):
    steps, options, message = NOT_CAPTURED[name]
    optimizer, _ = optimizers(steps=steps, **options)
    optimizer.param_groups[0]["lr"] = 1e-3
    new_gradients(optimizer)
    before = [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises(RuntimeError, match=message):
        capture(optimizer.step)
    assert all_equal(before, [p.detach() for p in params_of(optimizer)])


# Memory that a graph or another stream still reads


class Reads(TorchDispatchMode):
    """Refers to the tables that launches and, if it is sharded, the sums before them read."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index_put_.default:
            self.held += map(weakref.ref, args[1])
        return func(*args, **(kwargs or {}))

    def launch(self, launch: base.Launch, device: torch.device) -> None:
        self.held += [weakref.ref(arg) for arg in launch.args if isinstance(arg, Tensor)]


@pytest.mark.parametrize("sharded", [False, True])
def test_tables_are_kept(monkeypatch, sharded):
    """A step with other gradients replaces tables. It used to free those that the graph reads."""
    if sharded:
        # One process sums as many do.
        monkeypatch.setattr(ShardSums, "__bool__", lambda sums: True)
    optimizer, _ = optimizers(max_grad_norm=1.0)
    with monkeypatch.context() as patch, Reads() as reads:
        patch.setattr(staging, "capturing", lambda: True)
        patch.setattr(base.Launch, "run", lambda launch, device: reads.launch(launch, device))
        optimizer.step()
    params_of(optimizer)[0].grad = None
    optimizer.param_groups[0]["eps"] = 1e-6
    optimizer.step()
    assert len(reads.held) > 5 and all(ref() is not None for ref in reads.held)


def test_an_uploaded_table_is_a_copy():
    table = torch.zeros(3)
    uploaded = staging.upload(table, FP32, torch.device(DEVICE))
    table.fill_(1)
    assert not uploaded.any()


def test_tables_wait_for_every_stream_that_read_them(monkeypatch):
    optimizer, _ = optimizers(steps=0)
    stream, kept = [7], []
    monkeypatch.setattr(staging, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(
        staging,
        "keep_for_stream",
        lambda tensors: kept.append((stream[0], bool(list(tensors)))),
    )
    for stream[0] in (7, 7, 8, 8, 7):
        optimizer.step()
    assert kept == [(7, True), (8, True), (7, True)]

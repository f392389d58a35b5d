"""What a CUDA graph does to the optimizer's step, without one: its launches are recorded, and made again as a replay would.

On a GPU, tests/gpu/test_cuda_graphs.py compares real graphs with eager steps.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stablelora_kernels.launch import base

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels.optim import graph_capture
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.launches import specialization
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import latches, operators

pytestmark = [
    pytest.mark.usefixtures("one_thread", "on_triton"),
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has real graphs: tests/gpu/test_cuda_graphs.py"),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "masters": {"master_weights": True},
    "8 bits": {"moments_dtype": torch.uint8},
    "tensors": {"weight_decay": torch.tensor(0.1), "lr_ratio_B": 4.0},
}


class Graph:
    """The launches of one step, which capture does not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: Callable[[], Any]) -> None:
        self.launches: list[base.Launch] = []
        with monkeypatch.context() as patch:
            patch.setattr(graph_capture, "capturing", lambda: True)
            patch.setattr(base.Launch, "run", lambda launch, device: self.launches.append(launch))
            step()

    def replay(self) -> None:
        for launch in self.launches:
            launch.run(torch.device(DEVICE))


def fill_grads(optimizer: StableLoRAAdamW, seed: int, scale: float = 1e-2) -> None:
    """New values in the gradients that are there."""
    kept = [p.grad for p in params_of(optimizer)]
    set_grads(params_of(optimizer), seed, scale)
    for p, grad in zip(params_of(optimizer), kept, strict=True):
        if grad is not None:
            p.grad = grad.copy_(p.grad)


def assign_grads(optimizer: StableLoRAAdamW, grads: list[torch.Tensor]) -> None:
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        p.grad = grad


def optimizers(dtype: torch.dtype = torch.float32, steps: int = 1, **settings: Any) -> list[StableLoRAAdamW]:
    """Two alike, after some steps."""
    settings = {"shrink_ratio": 0.05, "capturable": True, "seed": 3, **settings}
    made = [StableLoRAAdamW(make_pairs(dtype=dtype), lr=torch.tensor(3e-2), **settings) for _ in range(2)]
    for optimizer in made:
        fill_grads(optimizer, 0)
        for _ in range(steps):
            optimizer.step()
    return made


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_replays_are_steps(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """New gradients each time, another lr halfway, verdicts of a GradScaler, and pairs that latch meanwhile."""
    eager, captured = optimizers(dtype, steps=0, **SETTINGS[name])
    verdicts = [torch.zeros(1) for _ in range(2)]
    for optimizer, verdict in zip((eager, captured), verdicts, strict=True):
        optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 2.0), verdict
        optimizer.step()
    graph = Graph(monkeypatch, captured.step)
    assert len(graph.launches) == (2 if name == "clipped" else 1)
    for turn in range(1, 9):
        for optimizer, verdict in zip((eager, captured), verdicts, strict=True):
            fill_grads(optimizer, turn)
            verdict.fill_(float(turn == 3))
            if turn == 5:
                optimizer.param_groups[0]["lr"].fill_(0.2)
        eager.step()
        graph.replay()
        assert all_equal(snapshot(eager), snapshot(captured)), turn
    assert latches(captured) == latches(eager)
    assert any(latch is not None and latch > 1 for latch in latches(captured).values())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_its_launches_and_nothing_else(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No copy to or from the device, no allocation, no operator: nothing that a graph could not hold or a host wait for.

    A captured one compiles nothing either: each launch has what those before had of all that Triton specializes on.
    """
    optimizer, _ = optimizers(torch.bfloat16, steps=2, **SETTINGS[name])
    optimizer.param_groups[0]["lr"].fill_(1e-3)
    keys: list[Any] = []

    def record(launch: base.Launch, device: torch.device) -> None:
        told = sorted({**launch.constants, **launch.options}.items())
        keys.append((launch.kernel.__name__, *map(specialization, launch.args), *told))

    monkeypatch.setattr(base.Launch, "run", record)
    for capturing in (False, False, True):
        monkeypatch.setattr(graph_capture, "capturing", lambda capturing=capturing: capturing)
        with operators() as counts:
            optimizer.step()
        # Those that mark a step for profilers.
        assert [operator for operator in counts if "record_function" not in operator] == []
    assert keys and keys == keys[: len(keys) // 3] * 3


def test_gradients_of_the_graphs_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that is captured too puts gradients elsewhere, so the step copies a table within the graph."""
    eager, captured = optimizers()
    outside = [p.grad for p in params_of(captured)]
    inside = [torch.empty_like(grad) for grad in outside]
    assign_grads(captured, inside)
    before = snapshot(captured)
    graph = Graph(monkeypatch, captured.step)
    assert all_equal(before, snapshot(captured))
    ((_, engine),) = captured._engines
    (staged,) = engine.staging.captured
    table = staged.clone()
    for turn in range(1, 6):
        # The fourth is an eager step between replays, on gradients of its own.
        assign_grads(captured, outside if turn == 4 else inside)
        for optimizer in (eager, captured):
            fill_grads(optimizer, turn)
        eager.step()
        captured.step() if turn == 4 else graph.replay()
    assert all_equal(snapshot(eager), snapshot(captured))
    # What a replay copies from is still there as it was, and nobody else's.
    assert torch.equal(staged, table) and staged.data_ptr() not in [spare.data_ptr() for spare in engine.staging.spares]


@pytest.mark.parametrize("what", ["gradients", "parameters", "hyperparameters"])
def test_a_step_does_not_count_on_what_was_only_captured(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A graph that is never replayed has copied no table and measured no norm."""
    eager, captured = optimizers()
    for optimizer in (eager, captured):
        if what == "gradients":
            assign_grads(optimizer, [p.grad.clone() for p in params_of(optimizer)])
        elif what == "parameters":
            with torch.no_grad():
                params_of(optimizer)[1].fill_(10.0)
        else:
            optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    ((_, engine),) = captured._engines
    before = {name: getattr(engine, name) for name in ("addresses", "hyper", "words")}
    graph = Graph(monkeypatch, captured.step)
    # A replay measures what changed from outside before each step.
    assert len(graph.launches) == (2 if what == "parameters" else 1)
    # Tables that were only captured hold nothing yet.
    renewed = [name for name, table in before.items() if getattr(engine, name) is not table]
    assert renewed == {"gradients": ["addresses"], "parameters": [], "hyperparameters": ["hyper", "words"]}[what]
    for name in renewed:
        getattr(engine, name).zero_()
    for optimizer in (eager, captured):
        optimizer.step()
    assert all_equal(snapshot(eager), snapshot(captured))
    assert any(s.latched_at for s in captured.stability()) == (what == "parameters")


def test_memory_is_set_aside_for_some_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = optimizers()
    # Gradients that must not come back to the same addresses.
    kept: list[list[torch.Tensor]] = []

    def capture_new_gradients() -> None:
        kept.append([torch.zeros_like(p) for p in params_of(optimizer)])
        assign_grads(optimizer, kept[-1])
        Graph(monkeypatch, optimizer.step)

    for _ in range(6):
        capture_new_gradients()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"no memory is reserved for their table\. Run a step between captures"):
        for _ in range(graph_capture.Staging.SPARES + 1):
            capture_new_gradients()


def test_what_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step, and without ``capturable`` one with gradients elsewhere."""
    first, _ = optimizers(steps=0)
    with pytest.raises(RuntimeError, match=r"run step\(\) once before capturing it in a CUDA graph"):
        Graph(monkeypatch, first.step)
    optimizer, _ = optimizers(capturable=False)
    kept = [p.grad for p in params_of(optimizer)]
    assign_grads(optimizer, [grad.clone() for grad in kept])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="Pass capturable=True to the optimizer"):
        Graph(monkeypatch, optimizer.step)
    assert all_equal(before, snapshot(optimizer))


# Tables that a graph reads outlive later steps


def test_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with gradients elsewhere replaces the table of addresses. It used to free the one that the graph reads."""
    optimizer, _ = optimizers()
    graph = Graph(monkeypatch, optimizer.step)
    tables = [arg for launch in graph.launches for arg in launch.args if isinstance(arg, torch.Tensor)]
    held = {arg.data_ptr(): weakref.ref(arg) for arg in tables}
    graph.launches.clear()
    del tables
    set_grads(params_of(optimizer), 2)
    optimizer.param_groups[0]["eps"] = 1e-6
    optimizer.step()
    assert len(held) > 5 and all(ref() is not None for ref in held.values())


def test_the_index_table_of_a_sharded_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches do not take it: the sums before them do."""
    optimizer, _ = optimizers(max_grad_norm=1.0)
    ((_, engine),) = optimizer._engines
    # One process sums as many do.
    monkeypatch.setattr(engine, "sharded", True)
    monkeypatch.setattr(engine, "_sum_over_processes", lambda *args: None)
    monkeypatch.setattr(engine, "latch_monitor", SimpleNamespace(record=lambda: None))
    engine.present = torch.arange(4)
    held = weakref.ref(engine.present)
    Graph(monkeypatch, optimizer.step)
    engine.present = torch.arange(4)
    gc.collect()
    assert held() is not None


def test_tables_wait_for_every_stream_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = optimizers(steps=0)
    stream, kept = [7], []
    monkeypatch.setattr(graph_capture, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(graph_capture, "keep_for_stream", lambda tensors: kept.append((stream[0], len(list(tensors)))))
    for stream[0] in (7, 7, 8, 8, 7):
        optimizer.step()
    assert kept == [(7, 11), (8, 11), (7, 11)]

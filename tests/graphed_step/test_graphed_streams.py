"""The streams of a ``GraphedStep``, against a stand-in for torch.cuda that records its calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stablelora_kernels.graphed_step import Graphs

pytest.importorskip("triton", reason="Triton is not installed on this platform")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``graphed_step.Graphs`` asks of a fake torch.cuda, whose streams are named."""
    log: list[str] = []
    names, current = iter(("side", "capture")), ["caller's"]

    def stream(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}"))

    @contextmanager
    def enter(stream: Any) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def capture(graph: Any, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch.cuda.graph, which leaves its stream current if the capture fails."""
        before, current[0] = current[0], stream.name
        log.append(f"capture: {pool}, {stream.name}, {capture_error_mode}")
        yield
        current[0] = before

    fakes: dict[str, Any] = {
        "Stream": lambda device: stream(next(names)),
        "current_stream": lambda device: stream(current[0]),
        "stream": enter,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_eager_steps_run_on_the_side_stream_and_captures_on_theirs(log: list[str]) -> None:
    graphs = Graphs(torch.device("cuda", 0))

    def function() -> None:
        log.append(f"on {torch.cuda.current_stream(graphs.device).name}")

    graphs.run(function)
    replay, _ = graphs.capture(function)
    replay()
    assert log[:3] == ["side waits for caller's", "on side", "caller's waits for side"]
    assert log[3:] == ["capture: pool, capture, thread_local", "on capture", "replay"]
    assert torch.cuda.current_stream(graphs.device).name == "caller's"


def test_an_exception_leaves_the_callers_stream_current(log: list[str]) -> None:
    graphs = Graphs(torch.device("cuda", 0))

    def fails() -> None:
        raise KeyError("mine")

    for run in (graphs.run, graphs.capture):
        with pytest.raises(KeyError, match="mine"):
            run(fails)
        assert torch.cuda.current_stream(graphs.device).name == "caller's"
    assert log[1] == "caller's waits for side" and graphs.captured == []

"""The streams of a ``GraphedStep``, against a stand-in for torch.cuda that records its calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from stablelora_kernels.graphed_step import Graphs

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.helpers.graphed_steps import X


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log of what ``graphed_step.Graphs`` asks of a fake torch.cuda, whose streams are named."""
    log: list[str] = []
    made = iter(("side", "capture"))
    current = [FakeStream("caller's", log)]

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def enter(stream: FakeStream) -> Iterator[None]:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    class Capture:
        """As torch.cuda.graph, which leaves its stream current if the capture fails."""

        def __init__(self, graph: Graph, pool: str, stream: FakeStream, capture_error_mode: str) -> None:
            self.stream, self.settings = stream, f"{pool}, {stream.name}, {capture_error_mode}"

        def __enter__(self) -> None:
            log.append(f"capture: {self.settings}")
            self.before, current[0] = current[0], self.stream

        def __exit__(self, kind: Any, *_: Any) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            current[0] = self.before

    fakes: dict[str, Any] = {
        "Stream": lambda device: FakeStream(next(made), log),
        "current_stream": lambda device: current[0],
        "stream": enter,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
        "graph": Capture,
    }
    assert list(inspect.signature(torch.cuda.graph.__init__).parameters)[1:5] == [
        "cuda_graph", "pool", "stream", "capture_error_mode",
    ]  # fmt: skip
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_eager_steps_run_on_the_side_stream_and_captures_on_theirs(cuda: list[str]) -> None:
    graphs = Graphs(torch.device("cuda", 0))

    def function() -> Tensor:
        cuda.append(f"on {torch.cuda.current_stream(graphs.device).name}")
        return X

    assert graphs.run(function) is X
    waits = ["side waits for caller's", "on side", "caller's waits for side"]
    assert cuda == waits
    replay, output = graphs.capture(function)
    replay()
    assert output is X and cuda[3:] == ["capture: pool, capture, thread_local", "on capture", "replay"]
    assert torch.cuda.current_stream(graphs.device).name == "caller's"


def test_an_exception_leaves_the_callers_stream_current(cuda: list[str]) -> None:
    graphs = Graphs(torch.device("cuda", 0))

    def fails() -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        graphs.run(fails)
    assert cuda[-1] == "caller's waits for side"
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.capture(fails)
    assert torch.cuda.current_stream(graphs.device).name == "caller's" and graphs.captured == []

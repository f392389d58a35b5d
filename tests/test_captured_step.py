"""A training step captured by torch's own API, ``torch.cuda.graph``: forward, backward and the
optimizer's step in one graph, whose replays are eager steps to the bit.

On a CPU ``tests.helpers.recorded_graphs`` stands in for the graph. It shows that no part of the
library reads a tensor on the host while a capture goes on, that the library launches the same
kernels as in an eager step, and that no later step depends on a value that Python computed, such as
a seed or an address of a gradient. It does not show streams, the graphs' memory pools, and what
CUDA's driver refuses: tests/gpu/test_captured_step_in_graphs.py does. First use is off here;
tests/ops/test_first_use.py tests that it neither proves nor times during a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from tests.helpers.launches import count_launches
from tests.helpers.optimizers import DEVICE, all_equal, snapshot
from tests.helpers.recorded_graphs import capture, use_recorded_graphs
from tests.helpers.steps import latches

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU has real graphs: tests/gpu/test_captured_step_in_graphs.py"
)
SMALL = DEVICE == "cpu"
SIZES, ROWS, STEPS = ((64, 8, 5), 6, 9) if SMALL else ((512, 384, 256), 96, 40)
WARMUP, LR = 3, 1.2e-2


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    use_recorded_graphs(monkeypatch)
    with slk.settings(backend="triton"):
        yield


def layers(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    settings = {"r": 2, "lora_dropout": dropout, "dtype": dtype, "device": DEVICE}
    return nn.Sequential(
        slk.LoRALinear(*SIZES[:2], **settings), nn.Tanh(), slk.LoRALinear(*SIZES[1:], **settings)
    )


def peft_layers() -> nn.Module:
    """A PEFT model under ``accelerate_peft``."""
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:], bias=False)).to(
        DEVICE
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    assert len(slk.accelerate_peft(model).replaced) == 2
    return model


class Training:
    """A model with its optimizer, and where its step reads a batch. The second layer's pair latches
    at once, the first's during the replays.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        autocast: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model, self.autocast, self.scaler = make(), autocast, scaler
        options = {"shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
        self.lr = torch.tensor(LR, device=DEVICE)
        self.optimizer = slk.StableLoRAAdamW.from_model(self.model, lr=self.lr, **options)
        nn.init.ones_(self.optimizer.pairs[1].B)
        self.x = torch.empty(ROWS, SIZES[0], device=DEVICE)
        self.goal = torch.empty(ROWS, SIZES[2], device=DEVICE)
        self.side = None if SMALL else torch.cuda.Stream()

    def fill(self, turn: int, overflows: bool = False) -> None:
        """A batch, and a learning rate that a scheduler would give."""
        generator = torch.Generator().manual_seed(turn)
        for tensor in (self.x, self.goal):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if overflows:
            self.goal.mul_(1e38)
        self.lr.fill_(LR / (1 + turn / 4))

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16) if self.autocast else nullcontext():
            y = self.model(self.x.to(next(self.model.parameters()).dtype))
        loss = (y - self.goal).float().square().mean()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def warm_up(self) -> Tensor:
        """A step on a side stream, as torch's documentation wants it before a capture."""
        if self.side is None:
            return self.step()
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            loss = self.step()
        current.wait_stream(self.side)
        return loss

    def values(self) -> list[Tensor]:
        """All that a step may change."""
        scale = [] if self.scaler is None else [torch.tensor(self.scaler.get_scale())]
        return [*snapshot(self.optimizer), *scale]


def assert_replays_are_eager_steps(make: Callable[[], Training], overflow: int = -1) -> Training:
    """The same losses, parameters, moments and latches, to the bit."""
    results = []
    for captures in (False, True):
        training = make()
        torch.manual_seed(5)
        graph = None
        values = []
        for turn in range(STEPS):
            training.fill(turn, overflows=turn == overflow)
            if captures and turn == WARMUP:
                graph, loss = capture(training.step)
            if graph is None:
                loss = training.warm_up()
            else:
                graph.replay()
            values += [loss.clone(), *training.values()]
        results.append(values)
    assert all_equal(*results)
    return training


OPTIONS: dict[str, Callable[[], Training]] = {
    "plain": partial(Training, layers),
    "clipped": partial(Training, layers, max_grad_norm=0.05),
    "8 bits": partial(Training, layers, moments_dtype=torch.uint8),
    "bfloat16": partial(Training, partial(layers, dtype=torch.bfloat16)),
    "autocast": partial(Training, layers, autocast=True),
    "PEFT's layers": partial(Training, peft_layers),
}
if SMALL:
    # A GPU's graph draws its own numbers.
    OPTIONS["dropout"] = partial(Training, partial(layers, dropout=0.3))
DAILY = ("plain", "PEFT's layers")


@pytest.mark.parametrize(
    "name",
    [*DAILY, *(pytest.param(n, marks=pytest.mark.nightly) for n in OPTIONS if n not in DAILY)],
)
def test_replays_are_eager_steps(name):
    """lr is a tensor that changes at each step."""
    training = assert_replays_are_eager_steps(OPTIONS[name])
    first, second = latches(training.optimizer).values()
    assert second == 1 and WARMUP < first <= STEPS


def test_a_grad_scaler_is_part_of_the_graph():
    """The sixth batch overflows: its step is skipped and the scale halves, in a replay. Later the
    scale grows.
    """

    def make() -> Training:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=3)
        return Training(layers, scaler=scaler)

    assert_replays_are_eager_steps(make, overflow=5)


def test_a_capture_launches_what_an_eager_step_launches():
    training = Training(partial(layers, dropout=0.3))
    training.fill(0)
    for _ in range(WARMUP):
        with count_launches() as eager:
            training.warm_up()
    before = training.values()
    with count_launches() as captured:
        capture(training.step)
    assert captured == eager and len(eager) > 2
    # What it has captured has not run.
    assert all_equal(before, training.values())


def test_each_replay_draws_its_own_masks():
    training = Training(partial(layers, dropout=0.5), shrink_ratio=0.0)
    nn.init.ones_(training.optimizer.pairs[0].B)
    training.fill(0)
    training.lr.zero_()
    for _ in range(WARMUP):
        training.warm_up()
    graph, loss = capture(training.step)
    losses = []
    for _ in range(6):
        graph.replay()
        losses.append(float(loss))
    assert len(set(losses)) == 6

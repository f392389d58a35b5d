"""StableShrink inside what wraps a step: torch.compile, a CUDA graph, GradScaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from tests.helpers.optimizers import DEVICE, all_equal, halves, make_pairs, set_grads
from tests.helpers.recorded_graphs import capture, use_recorded_graphs

RATIO, STEPS = 0.1, 9
SHAPES = [(8, 24, 40), (1, 7, 13), (3, 31, 5)]


def counts(shrink: slk.StableShrink) -> list[tuple[int, int | None]]:
    """Of each pair: the steps that A has taken, and the one of the latch."""
    return [(pair.steps, pair.latched_at) for pair in shrink.stability()]


# torch.compile


@pytest.mark.filterwarnings("ignore:.*record_function.*")
def test_a_compiled_step_is_an_eager_step():
    """As many compilations and graph breaks as without StableShrink, whatever latches or changes; so
    it is for lr, too: a tensor.
    """
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    def run(compiles: bool, shrinks: bool = True) -> tuple[Any, ...]:
        torch._dynamo.reset()
        counters.clear()
        pairs = make_pairs(SHAPES)
        optimizer = torch.optim.AdamW(halves(pairs), lr=torch.tensor(0.1))
        if shrinks:
            ratio = torch.tensor(RATIO)
            shrink = slk.StableShrink(optimizer, pairs)
            optimizer.param_groups[0]["shrink_ratio"] = ratio
        counter = CompileCounter()

        def step() -> None:
            optimizer.step()

        step = torch.compile(step, backend=counter) if compiles else step
        for turn in range(STEPS):
            set_grads(halves(pairs), turn)
            if shrinks:
                ratio.fill_(RATIO / (1 + turn))
            step()
        breaks = sum(counters["graph_break"].values())
        params = [p.detach() for p in halves(pairs)]
        return params, shrinks and counts(shrink), (counter.frame_count, breaks)

    expected, latched, _ = run(compiles=False)
    params, found, (frames, breaks) = run(compiles=True)
    assert found == latched and len({step for _, step in latched}) > 1
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    _, _, (plain_frames, plain_breaks) = run(compiles=True, shrinks=False)
    assert frames == plain_frames == 1 and breaks <= max(plain_breaks, 1)


# A CUDA graph


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    pytest.importorskip("triton", reason="runs where Triton is installed")
    if DEVICE != "cpu":
        pytest.skip("a GPU has real graphs")
    use_recorded_graphs(monkeypatch)
    with slk.settings(backend="triton"):
        yield


class Training:
    """Layers, an optimizer of torch whose step a graph can hold, and where a step reads its batch.
    The second pair latches at once, the first during the replays.
    """

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype, scales: bool = False
    ) -> None:
        torch.manual_seed(0)
        settings = {"r": 2, "dtype": dtype}
        self.model = nn.Sequential(
            slk.LoRALinear(64, 8, **settings), nn.Tanh(), slk.LoRALinear(8, 5, **settings)
        )
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.shrink = slk.StableShrink(self.optimizer, self.model, seed=3)
        self.ratio = torch.tensor(0.0)
        self.optimizer.param_groups[0]["shrink_ratio"] = self.ratio
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=3, enabled=scales
        )
        nn.init.ones_(self.shrink.pairs[1].B)
        self.x, self.goal = torch.empty(6, 64, dtype=dtype), torch.empty(6, 5)

    def fill(self, turn: int, overflows: bool = False) -> None:
        generator = torch.Generator().manual_seed(turn)
        for tensor in (self.x, self.goal):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if overflows:
            self.goal.mul_(1e38)
        self.ratio.fill_(RATIO / (1 + turn / 4))

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.goal).float().square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def values(self) -> list[Tensor]:
        """All that a step may change."""
        (group,) = self.optimizer.param_groups
        state = [value for p in group["params"] for value in self.optimizer.state[p].values()]
        values = [*group["params"], *state, group["shrink_steps"], group["latched_at"]]
        return [value.detach().clone() for value in values if isinstance(value, Tensor)]


def fused_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.012, fused=True)


def momentum(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "dtype", "overflow"),
    [
        (fused_adamw, torch.float32, None),
        (fused_adamw, torch.float32, 5),
        (momentum, torch.bfloat16, None),
    ],
)
def test_replays_are_eager_steps(graphs, make, dtype, overflow):
    """To the bit: losses, parameters, state, latches. The ratio, a tensor, changes at each step; a
    batch that overflows in a replay neither shrinks nor latches nor counts.
    """
    results = []
    for captures in (False, True):
        training = Training(make, dtype, scales=overflow is not None)
        graph, values = None, []
        for turn in range(STEPS):
            training.fill(turn, overflows=turn == overflow)
            if captures and turn == 1:
                before = training.values()
                graph, loss = capture(training.step)
                assert all_equal(before, training.values())
            if graph is None:
                loss = training.step()
            else:
                graph.replay()
            values += [loss.clone(), *training.values()]
        results.append(values)
    assert all_equal(*results)
    (steps, first), (_, second) = counts(training.shrink)
    assert second == 1 and first and first > 1 and steps == STEPS - (overflow is not None)


def test_a_capture_of_what_has_changed_says_what_to_do(graphs):
    training = Training(fused_adamw, torch.float32)
    (group,) = training.optimizer.param_groups
    training.fill(0)
    training.step()
    training.shrink.pairs[0].A.grad = None
    with pytest.raises(
        RuntimeError, match=r"run step\(\) once before capturing it.*same parameters"
    ):
        capture(training.optimizer.step)
    training.step()
    group["shrink_ratio"] = 0.2
    with pytest.raises(
        RuntimeError, match=r"shrink_ratio was a tensor .* is 0\.2 .*: run step\(\) once"
    ):
        capture(training.optimizer.step)
    training.step()
    capture(training.step)
    fresh = Training(fused_adamw, torch.float32)
    fresh.fill(0)
    with pytest.raises(RuntimeError, match=r"run step\(\) once before capturing it"):
        capture(fresh.step)


# GradScaler


@pytest.mark.parametrize("make", [fused_adamw, momentum])
def test_a_step_that_a_scaler_skips_neither_shrinks_nor_counts(backend, make):
    """fused AdamW gets the verdict as found_inf; for other optimizers the scaler makes no step."""
    if DEVICE != "cpu":
        pytest.skip("torch's scaler of a CPU")
    training = Training(make, torch.float32, scales=True)
    taken = 0
    for turn in range(STEPS):
        overflows = turn in (0, 4)
        training.fill(turn, overflows)
        before = training.values()
        training.step()
        # SGD's buffers and AdamW's moments come with their first step.
        after = training.values()
        same = [torch.equal(p, q) for p, q in zip(before[:4], after[:4], strict=True)]
        assert all(same) == overflows
        taken += not overflows
        assert {steps for steps, _ in counts(training.shrink)} == {taken}
        if overflows:
            assert all_equal(before[-2:], after[-2:])
    (_, first), (_, second) = counts(training.shrink)
    # The first batch overflowed, so that the second pair latched in the second step, A's first.
    assert second == 1 and first != 1


# A state without it


def test_a_state_without_counters_leaves_each_group_its_ratio():
    pairs = make_pairs(SHAPES)
    groups = [{"params": [pair.A, pair.B], "shrink_ratio": 0.1 * k} for k, pair in enumerate(pairs)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    shrink = slk.StableShrink(optimizer, pairs, shrink_ratio=0.7)
    other = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=1.0)
    before = [pair.A.detach().clone() for pair in pairs]
    optimizer.load_state_dict(other.state_dict())
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    with pytest.warns(RuntimeWarning, match="'shrink_steps': it was saved without StableShrink"):
        optimizer.step()
    assert counts(shrink) == [(1, None)] * 3
    for k, (pair, a) in enumerate(zip(pairs, before, strict=True)):
        torch.testing.assert_close(pair.A.detach(), (1 - 0.1 * k) * a)

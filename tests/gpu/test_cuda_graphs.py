"""Forward, backward and the optimizer's step in CUDA graphs: replays on new inputs give the same bits as eager calls.

All three in one graph: test_graphed_step.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stablelora_kernels import StableLoRAAdamW
from tests.helpers.gpu_checks import (
    BF16,
    DEVICE,
    FP32,
    RESULTS,
    SMALL,
    Case,
    Inputs,
    assert_equal_bits,
    capture,
    keep_rows,
    run,
    seed_of,
)
from tests.helpers.optimizers import all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.oracle import DIFFERENTIATED, call, check, leaves
from tests.helpers.steps import latches, take_step

pytestmark = pytest.mark.gpu

SIZES = (
    ((9, 40, 24, 8), (70, 48, 40, 8)) if SMALL else ((16, 4096, 4096, 16), (257, 520, 1032, 40), (2048, 4096, 4096, 16))
)
REPLAYS, STEPS = 3, 10
by_size = pytest.mark.parametrize("shape", SIZES, ids=str)
by_first_size = pytest.mark.parametrize("shape", SIZES[:1] if SMALL else SIZES, ids=str)


def named(outputs: tuple[Tensor, ...], names: tuple[str, ...] = RESULTS) -> dict[str, Tensor]:
    return dict(zip(names, outputs, strict=True))


def differentiated(inputs: Inputs) -> list[Tensor]:
    return [inputs[name] for name in DIFFERENTIATED]


@pytest.mark.parametrize("results", [RESULTS[:1], RESULTS], ids=["forward", "both"])
@by_size
def test_a_call(shape, results):
    case = Case(*shape)
    sources = [case.inputs(seed) for seed in range(REPLAYS)]
    static = {name: value.clone() for name, value in sources[0].items()}
    given = static if results == ("Y",) else leaves(static)

    def run_once() -> tuple[Tensor, ...]:
        y = call(given)
        return (y.detach(), *(torch.autograd.grad(y, differentiated(given), static["grad"]) if y.requires_grad else ()))

    captured = capture(run_once)
    for source in sources:
        for name, value in source.items():
            static[name].copy_(value)
        captured.replay()
        expected = run(case, source)[0]
        assert_equal_bits({name: expected[name] for name in results}, named(captured.outputs, results))


@by_first_size
def test_backward_of_an_earlier_forward(shape):
    case = Case(*shape)
    inputs = case.inputs()
    gradients = [case.inputs(seed)["grad"] for seed in range(REPLAYS)]
    static = gradients[0].clone()
    given = leaves(inputs)
    y = call(given)
    captured = capture(lambda: torch.autograd.grad(y, differentiated(given), static, retain_graph=True))
    for grad in gradients:
        static.copy_(grad)
        captured.replay()
        expected = torch.autograd.grad(y, differentiated(given), grad, retain_graph=True)
        assert_equal_bits(named(expected, RESULTS[1:]), named(captured.outputs, RESULTS[1:]))


@by_first_size
def test_each_replay_draws_its_own_dropout_mask(shape, record_property):
    case = Case(*shape, 0.1)
    static = case.inputs()
    given = leaves(static)

    def both() -> tuple[Tensor, ...]:
        y = call(given, case.p)
        # Read the seed first: backward frees the saved tensors.
        seed = seed_of(y)
        return (y.detach(), *torch.autograd.grad(y, differentiated(given), static["grad"]), seed)

    captured, seeds, worst = capture(both), set(), 0.0
    rows = torch.arange(case.m, device=DEVICE)
    for _ in range(REPLAYS):
        captured.replay()
        *outputs, seed = captured.outputs
        seeds.add(int(seed))
        keep = keep_rows(rows, case.k, case.p, int(seed))
        worst = max(worst, check(static, named(tuple(outputs)), keep, case.p)[0])
    assert len(seeds) == REPLAYS, f"{REPLAYS} replays drew {len(seeds)} different seeds"
    record_property("figure", worst)
    record_property("bound", 1.0)
    record_property("note", "largest error over its bound, with the mask of each replay's own seed")


@pytest.mark.parametrize("dtype", (FP32,) if SMALL else (FP32, BF16), ids=str)
def test_optimizer_step(dtype, record_property):
    """Every step has new gradients, the fifth has a new lr, and pairs latch during the replays."""
    both = []
    for _ in range(2):
        made = make_pairs([(8, 256, 256)] * 4, dtype)
        torch.nn.init.ones_(made[0].B)
        lr = torch.tensor(1e-2, device=DEVICE)
        both.append(StableLoRAAdamW(made, lr=lr, shrink_ratio=0.05, capturable=True, seed=3))
        take_step(0, both[-1], scale=1.0)
    eager, replayed = both
    captured = capture(replayed.step, warmup=0)
    for turn in range(STEPS):
        set_grads(params_of(eager), turn, scale=1.0)
        for p, q in zip(params_of(eager), params_of(replayed), strict=True):
            q.grad.copy_(p.grad)
        if turn == 4:
            for optimizer in both:
                optimizer.param_groups[0]["lr"].fill_(3e-2)
        eager.step()
        captured.replay()
        assert all_equal(snapshot(eager), snapshot(replayed)), f"after step {turn + 2}"
    assert latches(eager) == latches(replayed)
    late = sum(latched_at > 2 for latched_at in latches(eager).values() if latched_at)
    assert late, "no pair latched during the replays, so the test did not cover it"
    record_property("note", f"{late} pairs latched during {STEPS} replays")

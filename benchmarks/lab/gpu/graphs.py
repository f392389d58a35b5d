"""CUDA graphs: forward, backward and the optimizer's step captured, and replayed on new inputs, against eager calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.lab.gpu.checks import (
    BF16,
    FP32,
    Case,
    Inputs,
    call,
    compare,
    equal_bits,
    keep_rows,
    leaves,
    run,
    seed_of,
)
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.section import Row
from stablelora_kernels import LoRALinear, LoRAPair, StableLoRAAdamW

Check = Callable[[Device], Iterator[Row]]
NAMES = ("Y", "dX", "dA", "dB")


def fill(static: Inputs, source: Inputs) -> None:
    """New values in the tensors that a graph reads."""
    for name, value in source.items():
        static[name].copy_(value)


def named(outputs: tuple[Tensor, ...], names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return dict(zip(names, outputs, strict=True))


def done(replays: int, what: str) -> Row:
    return {"figure": 0, "bound": 0, "note": f"places that differ from eager calls in {replays} replays{what}"}


def check_forward(device: Device, case: Case) -> Iterator[Row]:
    sources = [case.inputs(device.device, seed) for seed in range(3)]
    static = {name: value.clone() for name, value in sources[0].items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call(static, static["x"], static["lora_A"], static["lora_B"], 0.0),)

    captured = device.capture(forward)
    for source in sources:
        fill(static, source)
        captured.replay()
        device.synchronize()
        equal_bits({"Y": run(source, 0.0)[0]["Y"]}, named(captured.outputs, ("Y",)))
    yield done(len(sources), ", each on new inputs")


def check_both(device: Device, case: Case) -> Iterator[Row]:
    """Forward and backward in one graph."""
    sources = [case.inputs(device.device, seed) for seed in range(3)]
    static = {name: value.clone() for name, value in sources[0].items()}
    x, a, b = leaves(static)

    def both() -> tuple[Tensor, ...]:
        y = call(static, x, a, b, 0.0)
        return (y.detach(), *torch.autograd.grad(y, (x, a, b), static["grad"]))

    captured = device.capture(both)
    for source in sources:
        with torch.no_grad():
            fill(static, source)
        captured.replay()
        device.synchronize()
        equal_bits(run(source, 0.0)[0], named(captured.outputs))
    yield done(len(sources), ", each on new inputs")


def check_backward(device: Device, case: Case) -> Iterator[Row]:
    """Backward alone, of a forward that ran before."""
    inputs = case.inputs(device.device)
    gradients = [case.inputs(device.device, seed)["grad"] for seed in range(3)]
    static = gradients[0].clone()
    x, a, b = leaves(inputs)
    y = call(inputs, x, a, b, 0.0)
    captured = device.capture(lambda: torch.autograd.grad(y, (x, a, b), static, retain_graph=True))
    for grad in gradients:
        static.copy_(grad)
        captured.replay()
        device.synchronize()
        expected = torch.autograd.grad(y, (x, a, b), grad, retain_graph=True)
        equal_bits(named(expected, NAMES[1:]), named(captured.outputs, NAMES[1:]))
    yield done(len(gradients), ", each on a new gradient")


def check_dropout(device: Device, case: Case) -> Iterator[Row]:
    """Every replay draws a new seed, and its results are right for the mask of that seed."""
    static = case.inputs(device.device)
    x, a, b = leaves(static)

    def both() -> tuple[Tensor, ...]:
        y = call(static, x, a, b, case.p)
        # Before backward, which lets go of what was kept for it.
        seed = seed_of(y)
        return (y.detach(), *torch.autograd.grad(y, (x, a, b), static["grad"]), seed)

    captured, seeds, worst = device.capture(both), set(), 0.0
    rows = torch.arange(case.m, device=device.device)
    for _ in range(3):
        captured.replay()
        device.synchronize()
        *outputs, seed = captured.outputs
        seeds.add(int(seed))
        keep = keep_rows(rows, case.k, case.p, int(seed))
        worst = max(worst, compare(static, named(tuple(outputs)), keep, case.p)[0])
    assert len(seeds) == 3, f"3 replays drew {len(seeds)} different seeds"
    yield {
        "figure": worst,
        "bound": 1.0,
        "note": "largest error over its bound, with the mask of each replay's own seed",
    }


def pairs(device: Device, dtype: torch.dtype, count: int = 4, r: int = 8, width: int = 256) -> list[LoRAPair]:
    """Pairs with gradients; the first latches at its first step, the others once B has grown."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        a = torch.randn(r, width, generator=generator) / width**0.5
        b = torch.full((width, r), 0.0 if i else 1.0)
        found.append(LoRAPair(f"layer{i}", *(t.to(device.device, dtype).requires_grad_() for t in (a, b))))
    return found


def check_step(device: Device, dtype: torch.dtype) -> Iterator[Row]:
    """Captured steps against eager ones, with new gradients in each, a new lr in the fifth, and pairs that latch meanwhile."""
    twins = [pairs(device, dtype) for _ in range(2)]
    rates = [torch.tensor(1e-2, device=device.device) for _ in twins]
    optimizers = [
        StableLoRAAdamW(twin, lr=lr, shrink_ratio=0.05, capturable=True, seed=3)
        for twin, lr in zip(twins, rates, strict=True)
    ]
    parameters = [[p for pair in twin for p in (pair.A, pair.B)] for twin in twins]
    generator = torch.Generator().manual_seed(1)

    def new_gradients() -> None:
        for first, second in zip(*parameters, strict=True):
            grad = torch.randn(first.shape, generator=generator).to(device.device, dtype)
            for p in (first, second):
                p.grad = grad.clone() if p.grad is None else p.grad.copy_(grad)

    new_gradients()
    for optimizer in optimizers:
        optimizer.step()
    captured = device.capture(optimizers[1].step, warmup=0)
    steps = 10
    for turn in range(steps):
        new_gradients()
        if turn == 4:
            for lr in rates:
                lr.fill_(3e-2)
        optimizers[0].step()
        captured.replay()
        device.synchronize()
        names = [f"{name} after step {turn + 2}" for pair in twins[0] for name in (f"{pair.name} A", f"{pair.name} B")]
        eager, replayed = (dict(zip(names, (p.detach() for p in own), strict=True)) for own in parameters)
        equal_bits(eager, replayed)
    stood = [[(pair.stable, pair.latched_at) for pair in optimizer.stability()] for optimizer in optimizers]
    assert stood[0] == stood[1], f"latched {stood[1]} in the graph, {stood[0]} in eager steps"
    late = sum(at is not None and at > 2 for _, at in stood[0])
    assert late, "no pair latched during the replays, so that nothing was learnt about it"
    yield done(steps, f"; {late} pairs latched meanwhile, lr changed once")


def check_training(device: Device, dtype: torch.dtype) -> Iterator[Row]:
    """Forward, backward and step in one graph, so that gradients are in the graph's own memory, against eager training."""
    torch.manual_seed(0)
    first = LoRALinear(256, 192, r=8, dtype=dtype, lora_dtype=dtype, device=device.device)
    layers = [first, copy.deepcopy(first)]
    optimizers = [
        StableLoRAAdamW.from_model(layer, lr=1e-2, shrink_ratio=0.05, capturable=True, seed=3) for layer in layers
    ]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator).to(device.device, dtype)
    goal = torch.randn(64, 192, generator=generator).to(device.device, dtype)

    def train(which: int) -> None:
        optimizers[which].zero_grad()
        (layers[which](x) - goal).square().mean().backward()
        optimizers[which].step()

    for which in (0, 1):
        for _ in range(2):
            train(which)
        # Those of the graph are its own.
        optimizers[which].zero_grad()
    captured = device.capture(partial(train, 1), warmup=0)
    steps = 10
    for turn in range(steps):
        x.copy_(torch.randn(64, 256, generator=generator))
        train(0)
        captured.replay()
        device.synchronize()
        eager, replayed = (
            {f"{name} after step {turn + 3}": p.detach() for name, p in layer.named_parameters() if p.requires_grad}
            for layer in layers
        )
        equal_bits(eager, replayed)
    stood = [[(pair.stable, pair.latched_at) for pair in optimizer.stability()] for optimizer in optimizers]
    assert stood[0] == stood[1], f"latched {stood[1]} in the graph, {stood[0]} in eager steps"
    yield done(steps, f"; latched {stood[0]}")


def checks(dry: bool) -> list[tuple[str, Check]]:
    """Every check's name and the function that makes it."""
    sizes = (
        ((9, 40, 24, 8), (70, 48, 40, 8))
        if dry
        else ((16, 4096, 4096, 16), (257, 520, 1032, 40), (2048, 4096, 4096, 16))
    )
    found: list[tuple[str, Check]] = []
    for number, shape in enumerate(sizes):
        if not (dry and number):
            found.append((f"forward {Case(*shape)}", partial(check_forward, case=Case(*shape))))
            found.append((f"backward {Case(*shape)}", partial(check_backward, case=Case(*shape))))
            found.append((f"dropout {Case(*shape, 0.1)}", partial(check_dropout, case=Case(*shape, 0.1))))
        found.append((f"both {Case(*shape)}", partial(check_both, case=Case(*shape))))
    for dtype in (FP32,) if dry else (FP32, BF16):
        found.append((f"step {dtype}".replace("torch.", ""), partial(check_step, dtype=dtype)))
        found.append((f"training {dtype}".replace("torch.", ""), partial(check_training, dtype=dtype)))
    return found

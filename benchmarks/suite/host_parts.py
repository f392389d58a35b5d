"""Where the host's time of one layer's call goes: the call taken apart, each part timed alone, in microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops import plans
from stablelora_kernels.ops.lora_linear import draw_seed, lora_linear_bwd, lora_linear_fwd

ROUNDS, CALLS = 15, 50


def microseconds(call: Callable[[], Any]) -> float:
    """The median of some rounds."""
    call()
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(found)


def parts_of(layer: Any, x: Tensor) -> dict[str, float]:
    """A forward on Triton that is found, part by part, a first one and a second one whole; and the backward's launches."""
    with slk.use_backend("triton"):
        return _parts_of(layer, x)


def _parts_of(layer: Any, x: Tensor) -> dict[str, float]:
    p, scaling = layer.lora_dropout, layer.scaling
    tensors = (x, layer.weight, layer.bias, layer.lora_A, layer.lora_B)
    args = (*tensors, scaling, p, True)
    for _ in range(3):
        y = layer(x)
        y.backward(torch.empty_like(y))
    grad, y = torch.empty_like(y), layer(x)
    whole = microseconds(lambda: layer(x))
    function = microseconds(lambda: lora_linear(*args))
    with torch.no_grad():
        without_graph = microseconds(lambda: lora_linear(*args))
    key = plans.key_of("lora_linear", (*args, True))
    found = {
        "module": whole - function,
        "autograd": function - without_graph,
        "key, in place of checks and planning": microseconds(
            lambda: plans.find(plans.key_of("lora_linear", (*args, True)))
        ),
        "dropout's seed": microseconds(lambda: draw_seed(x, p)),
    }
    seed = draw_seed(x, p)
    forward = (*tensors, seed, scaling / (1 - p), p, True)
    found |= _launch_parts("forward", lora_linear_fwd, forward, plans.find(key))
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    backward = (saved[0], grad, *saved[1:], scaling / (1 - p), p, False, True, True)
    backward_key = plans.key_of(lora_linear_bwd._name, backward)
    found["backward: key"] = microseconds(lambda: plans.find(plans.key_of(lora_linear_bwd._name, backward)))
    found |= _launch_parts("backward", lora_linear_bwd, backward, plans.find(backward_key))
    in_graph = {"forward": (lora_linear_fwd._op, forward), "backward": (lora_linear_bwd._op, backward)}
    for name, (op, given) in in_graph.items():
        found[f"{name}: a compiled graph's op"] = microseconds(lambda op=op, given=given: op(*given))
    for name, (op, given) in in_graph.items():
        found[f"{name}: a compiled graph's op, planned anew"] = microseconds(
            lambda op=op, given=given: (plans.clear(), op(*given))
        )

    def first() -> None:
        plans.clear()
        layer(x)

    def first_and_second() -> None:
        first()
        layer(x)

    once, twice = microseconds(first), microseconds(first_and_second)
    return found | {"forward": whole, "a first forward": once, "a second forward": twice - once}


def _launch_parts(name: str, op: Any, args: tuple[Any, ...], entry: Any) -> dict[str, float]:
    if entry is None or not entry.prepared:
        return {}
    prepared, given = entry.prepared, op._operands(args)
    all_of = microseconds(lambda: op(args, entry))
    allocation = microseconds(prepared.allocate)
    tensors = [*given, *prepared.allocate()]
    launches = microseconds(lambda: prepared.launch(tensors))
    return {
        f"{name}: allocation": allocation,
        f"{name}: launch": launches,
        f"{name}: rest of the op": all_of - allocation - launches,
    }

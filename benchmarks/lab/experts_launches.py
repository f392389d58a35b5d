"""What a grouped product of our own would save on a GPU: operators and bytes of ``fuse_mlp`` for a
module of experts as it is, and of launches that would do the same. **Predicted**: no GPU has run
either.

    python -m benchmarks.lab.experts_launches [--tokens 4096]

As it is, PyTorch's operators are counted on the meta device, where they run without memory. Each
takes one launch at least, and moves each of its operands once. The launches of our own are listed
below; they gather rows as they load them, and have the branch, the bias and the zeros of unused
rows in their epilogue. The gate is the model's, by PyTorch's operators, in both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.tables import markdown
from stablelora_kernels.ops import lora_experts
from stablelora_kernels.ops.lora_experts_call import ExpertsBackward, ExpertsForward
from stablelora_kernels.ops.lora_experts_grouped import grouped_backward, grouped_forward
from stablelora_kernels.ops.lora_experts_mlp_call import (
    ExpertStack,
    FrozenStack,
    MLPCall,
    MLPGradients,
    Needs,
    Routing,
)
from stablelora_kernels.ops.lora_experts_mlp_together import backward_together, forward_together


class Sizes(NamedTuple):
    """Of a module of experts; Qwen3-30B-A3B's, and r 16."""

    tokens: int = 4096
    experts: int = 128
    width: int = 2048
    inner: int = 768
    top_k: int = 8
    rank: int = 16

    @property
    def slots(self) -> int:
        return self.tokens * self.top_k


class Launch(NamedTuple):
    """An operator or a launch: its name, and the bytes that it moves."""

    name: str
    size: int


class Passes(NamedTuple):
    forward: list[Launch]
    backward: list[Launch]


class _Counted(TorchDispatchMode):
    """Every operator that writes memory, with the ops of ``lora_experts`` taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.stablelora_kernels.lora_experts_fwd.default:
            with self:
                call = ExpertsForward(*args)
                return grouped_forward(lora_experts._to_multiply(call, call.x.dtype))
        if func is torch.ops.stablelora_kernels.lora_experts_bwd.default:
            with self:
                call = ExpertsBackward(*args)
                results = lora_experts._allocate_gradients(call)
                multiplied = lora_experts._to_multiply(call, call.grad.dtype)
                return tuple(grouped_backward(multiplied, results))
        outputs = func(*args, **(kwargs or {}))
        written = _tensors(outputs)
        is_free = func.is_view or "empty" in func.name() or "detach" in func.name()
        if written and not is_free:
            # What is changed in place is read and written.
            moved = [*_tensors((args, kwargs)), *written]
            name = func.name().removeprefix("aten::")
            self.launches.append(Launch(name, sum(map(_size, moved))))
        return outputs


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(t: Tensor) -> int:
    """The bytes of the distinct elements of ``t``."""
    strides = zip(t.shape, t.stride(), strict=True)
    elements = 1
    for length, stride in strides:
        elements *= length if stride else 1
    return elements * t.element_size()


@contextmanager
def _on_a_gpu() -> Iterator[None]:
    """With the products that a GPU takes."""
    with mock.patch.object(lora_experts, "can_group", lambda x, weight: True):
        yield


def _gate(g: Tensor) -> Tensor:
    gate, up = g.chunk(2, -1)
    return silu(gate) * up


def as_it_is(sizes: Sizes, device: str = "meta") -> Passes:
    """The operators of a forward and a backward, bfloat16 weights and adapters, without dropout."""
    factory = {"dtype": torch.bfloat16, "device": device}

    def stack(n: int, k: int) -> ExpertStack:
        weight = torch.zeros(sizes.experts, n, k, **factory)  # type: ignore[call-overload]
        a = torch.zeros(sizes.experts, sizes.rank, k, **factory)  # type: ignore[call-overload]
        # As PEFT packs it, with the expert fastest.
        b = torch.zeros(n, sizes.rank, sizes.experts, **factory)  # type: ignore[call-overload]
        return ExpertStack(FrozenStack(weight, None, False, 1.0), a, b.permute(2, 0, 1))

    up = stack(2 * sizes.inner, sizes.width)
    down = stack(sizes.width, sizes.inner)
    x = torch.zeros(sizes.tokens, sizes.width, **factory)  # type: ignore[call-overload]
    weights = torch.zeros(sizes.tokens, sizes.top_k, **factory)  # type: ignore[call-overload]
    order = torch.arange(sizes.slots, device=device)
    ends = torch.arange(1, sizes.experts + 1, device=device, dtype=torch.int32)
    routing = Routing(order, ends * (sizes.slots // sizes.experts), weights)
    every = Needs(True, True, True, True, True, True)
    nothing = x.new_empty(0)
    empty = MLPGradients(nothing, nothing, nothing, nothing, nothing, nothing)

    def call() -> MLPCall:
        tokens = routing.tokens()
        in_order = routing.weights_in_order()
        return MLPCall(_gate, up, down, None, None, routing, tokens, in_order, x.dtype)

    with _on_a_gpu(), torch.no_grad():
        with _Counted() as forward:
            y, kept = forward_together(call(), x, True)
        with _Counted() as backward:
            backward_together(call(), kept, y, every, empty)
    return Passes(forward.launches, backward.launches)


def of_our_own(sizes: Sizes) -> Passes:
    """Launches with a grouped product that gathers, and has the branch within."""
    half = 2
    tokens = half * sizes.tokens * sizes.width
    rows = half * sizes.slots * sizes.width
    gate_up = half * sizes.slots * 2 * sizes.inner
    inner = half * sizes.slots * sizes.inner
    thin = half * sizes.slots * sizes.rank
    up = half * sizes.experts * sizes.width * 2 * sizes.inner
    down = half * sizes.experts * sizes.width * sizes.inner
    up_pair = half * sizes.experts * sizes.rank * (sizes.width + 2 * sizes.inner)
    down_pair = half * sizes.experts * sizes.rank * (sizes.width + sizes.inner)
    indices = 8 * sizes.slots
    weights = half * sizes.slots
    gate = [Launch("silu", 2 * inner), Launch("mul", 3 * inner)]
    weighted = Launch("w H", 2 * inner + weights)
    forward = [
        Launch("up, S", tokens + indices + up + up_pair + gate_up + thin),
        *gate,
        weighted,
        Launch("down, S", inner + down + down_pair + rows),
        Launch("sum of slots", rows + indices + tokens),
    ]
    backward = [
        *gate,
        weighted,
        Launch("dZ, dS of down", tokens + indices + down + down_pair + inner + thin),
        Launch("dA, dB of down", tokens + indices + 2 * inner + thin + down_pair),
        Launch("dw, w dZ", 3 * inner + 2 * weights),
        Launch("mul backward", 5 * inner),
        Launch("silu backward", 3 * inner),
        Launch("cat", 2 * gate_up),
        Launch("dX, dS of up", gate_up + up + up_pair + rows + thin),
        Launch("dA, dB of up", tokens + indices + gate_up + 2 * thin + up_pair),
        Launch("sum of slots", rows + indices + tokens),
    ]
    return Passes(forward, backward)


def table(sizes: Sizes) -> str:
    """Operators and bytes of both, and what remains of them."""
    rows = [["pass", "operators now", "launches of our own", "GB now", "GB of our own"]]
    now = as_it_is(sizes)
    ours = of_our_own(sizes)
    for name in Passes._fields:
        rows.append([name, *_figures(getattr(now, name), getattr(ours, name))])
    rows.append(["both", *_figures([*now.forward, *now.backward], [*ours.forward, *ours.backward])])
    return markdown(rows, 1)


def _figures(now: Sequence[Launch], ours: Sequence[Launch]) -> list[str]:
    sizes = [sum(launch.size for launch in launches) / 1e9 for launches in (now, ours)]
    return [str(len(now)), str(len(ours)), *[f"{size:.2f}" for size in sizes]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.experts_launches", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=Sizes().tokens)
    parser.add_argument("--list", action="store_true", help="also list every operator and launch")
    args = parser.parse_args()
    sizes = Sizes(tokens=args.tokens)
    print(table(sizes))
    if args.list:
        for title, passes in (("now", as_it_is(sizes)), ("our own", of_our_own(sizes))):
            for name in Passes._fields:
                for launch in getattr(passes, name):
                    print(f"{title}, {name}: {launch.name} {launch.size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

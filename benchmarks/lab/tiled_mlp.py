"""The peak memory and the time of one layer with a gated MLP, with and without ``tile_mlp``.

    python -m benchmarks.lab.tiled_mlp [--width 512] [--inner 1792] [--tokens 8192] [--rounds 5]

A layer is a norm, a gated MLP under LoRA of rank 16 and the residual, in float32, with activation
checkpointing and without. A row has the bytes of its forward and backward at their peak and those
that it keeps for backward, both by PyTorch's allocator; and the seconds of processor time, median
and range of rounds in which the arms take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import pandas as pd
import peft
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from benchmarks.common.arms import PEFT, PLAIN
from benchmarks.common.measure import environment
from benchmarks.common.plain_pytorch import use_plain_pytorch
from stablelora_kernels.utils.memory import peak_over_start, saved_for_backward

MIB = 1 << 20
NAMES = ["gate_proj", "up_proj", "down_proj"]


class MLP(nn.Module):
    """As in Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x))
        return y


# What makes an arm of a PEFT model.
ARMS: dict[str, Callable[[nn.Module], object]] = {
    PEFT: lambda model: None,
    PLAIN: use_plain_pytorch,
    "fuse_mlp": partial(slk.accelerate_peft, strict=True, fuse_mlp=True),
    "tile_mlp": partial(slk.accelerate_peft, strict=True, tile_mlp=True),
}


def made(arm: str, width: int, inner: int) -> nn.Module:
    """A layer of an arm; those of all have the same values."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, target_modules=NAMES, init_lora_weights=False)
    model = peft.get_peft_model(Layer(width, inner), config).train()
    ARMS[arm](model)
    return model


def rows(width: int, inner: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    """One for each arm, checkpointed and not."""
    models = {arm: made(arm, width, inner) for arm in ARMS}
    x = torch.randn(1, tokens, width, requires_grad=True)
    grad = torch.randn(1, tokens, width)

    def step(arm: str, checkpointed: bool) -> None:
        model = models[arm]
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.backward(grad)
        for leaf in (x, *model.parameters()):
            leaf.grad = None

    found: list[dict[str, object]] = []
    for checkpointed in (True, False):
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for arm in ARMS:
            step(arm, checkpointed)
        for _ in range(rounds):
            for arm in ARMS:
                begun = time.process_time()
                step(arm, checkpointed)
                times[arm].append(time.process_time() - begun)
        for arm, model in models.items():
            peak = peak_over_start(partial(step, arm, checkpointed), x.device)
            assert peak is not None
            kept = 0
            if not checkpointed:
                kept = saved_for_backward(partial(model, x), [*model.parameters(), x])
            of_arm = times[arm]
            found.append(
                {
                    "": arm,
                    "checkpointed": checkpointed,
                    "peak, MiB": peak / MIB,
                    "kept, MiB": kept / MIB,
                    "seconds": statistics.median(of_arm),
                    "from": min(of_arm),
                    "to": max(of_arm),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.tiled_mlp", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1792)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(environment())
    with slk.settings(backend="torch"):
        table = pd.DataFrame(rows(args.width, args.inner, args.tokens, args.rounds))
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()

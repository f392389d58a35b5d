"""What first use costs, counted: for each kind of call of an 8B Llama's layers, the launches that prove
and time it, the memory beside the call's own, and the float64 operations of the comparison.

    python -m benchmarks.lab.first_use

prints a table, of which docs/guides/first-use.md has the largest figures. Nothing is launched: the launches are listed as the
ops plan them for an H100, and PyTorch's part runs on the CPU, on zeros in the place of weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.memory import MIB
from benchmarks.common.tables import markdown
from benchmarks.lab.compile_report.launches import mlp_calls
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.integrations.step_memory import LiveBytes
from stablelora_kernels.ops.first_use import TURNS, Subject
from stablelora_kernels.ops.lora_linear.triton import lora_linear_bwd, lora_linear_fwd
from stablelora_kernels.ops.lora_mlp.triton import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.ops.meta_calls import linear_calls
from stablelora_kernels.ops.plans import tensors_of
from stablelora_kernels.ops.proofs import Compared, plainly

TOKENS, RANK, DROPOUT = 4096, 16, 0.05
# (N, K) of an 8B Llama's projections.
LAYERS = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
}
# Output, inner and input features.
MLP = (4096, 14336, 4096)
DTYPES = (torch.bfloat16, torch.float32)


class Cost(NamedTuple):
    """Of one kind of call."""

    strategies: list[str]
    # Of the two runs of each strategy, and of one run of each.
    proof_launches: int
    launches: int
    # At the peak, beside the call's own operands.
    peak_bytes: int
    # Float64, one multiply-add counts two.
    operations: int


def cost_of(subject: Subject, call: Any) -> Cost:
    """What the first call of this kind costs."""
    device = DEVICES["sm_90"]
    oracle = subject.oracle
    strategies = oracle.strategies(call)
    launches = 0
    for name in strategies:
        choice = None if name == strategies[0] else Choice(name, "")
        launches += len(subject.plan(device, call, choice)[1])
    operands = [t for t in tensors_of(call) if t is not None]
    live, operations = LiveBytes(operands), FlopCounterMode(display=False)
    with plainly(torch.device("cpu")), live, operations:
        stand_in = oracle.stand_ins(call)
        results = subject.plan(device, stand_in, None)[0]
        for compared in oracle.compare(stand_in, results, ()):
            if isinstance(compared, Compared):
                compared.fault()
        # The second run's results, which are compared with the first's.
        del compared
        again = subject.plan(device, stand_in, None)[0]
        del again
    return Cost(strategies, 2 * launches, launches, live.peak, operations.get_total_flops())


def costs() -> dict[str, Cost]:
    """By the kind of call in words."""
    by_kind: dict[str, Cost] = {}
    for name, (n, k) in LAYERS.items():
        calls = linear_calls(TOKENS, n, k, RANK, DTYPES, DROPOUT, where="cpu")
        by_kind[f"{name}, forward"] = cost_of(lora_linear_fwd.subject, calls.forward)
        by_kind[f"{name}, backward"] = cost_of(lora_linear_bwd.subject, calls.backward)
    mlp = mlp_calls(TOKENS, MLP, RANK, DTYPES, DROPOUT, where="cpu")
    by_kind["fused MLP, forward"] = cost_of(lora_mlp_fwd.subject, mlp.forward)
    by_kind["fused MLP, backward"] = cost_of(lora_mlp_bwd.subject, mlp.backward)
    return by_kind


def table() -> str:
    head = ["kind of call", "strategies", "launches of the proof", "of the timing"]
    cells = [[*head, "MiB at the peak", "float64 operations, 10⁹"]]
    for kind, cost in costs().items():
        # Twice to warm up, then in turns.
        fewest, most = (cost.launches * (2 + turns) for turns in TURNS)
        cells.append(
            [
                kind,
                ", ".join(cost.strategies),
                str(cost.proof_launches),
                f"{fewest} to {most}",
                f"{cost.peak_bytes / MIB:,.0f}",
                f"{cost.operations / 1e9:,.0f}",
            ]
        )
    return markdown(cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.lab.first_use", description=__doc__)
    parser.parse_args(argv)
    print(table())


if __name__ == "__main__":
    main()

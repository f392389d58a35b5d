"""The prediction behind each row of dispatch's tables: how long the row's kernel takes, over the
best other one.

    python -m benchmarks.lab.predict.support [--gpu h100]

Below 0 the row's kernel is the fastest. Rows that no predicted call reaches have no prediction:
they follow from what a kernel cannot do, or from arithmetic, as their reasons say.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks.lab.predict import layer_time, quantized
from benchmarks.lab.predict.ceilings import Gpu, Range, load_gpu, points, range_over
from benchmarks.lab.predict.layer_time import (
    DIRECTIONS,
    MLPS,
    ONE_OP,
    SEPARATE,
    branch_seconds,
    call_of,
    kernel_seconds,
    seconds,
)
from benchmarks.lab.predict.rivals import MLP, Shape
from stablelora_kernels.dispatch.problem import Rule
from stablelora_kernels.dispatch.rules import (
    BRANCH_RULES,
    GATE_UP_RULES,
    QUANTIZED_RULES,
    RULES,
    choose,
    choose_gate_up,
    possible_strategies,
)


class Decision(NamedTuple):
    """One call that a row decides."""

    table: str
    # The row's place in its table.
    row: int
    choice: str
    reason: str
    # The time of the row's choice over that of the best other one, less 1.
    over_other: Range


def _row_of(rules: Sequence[Rule], *asked: Any) -> int:
    return next(row for row, rule in enumerate(rules) if rule.applies(*asked))


def _decision(
    name: str, rules: Sequence[Rule], row: int, choice: str, times: dict[str, list[float]]
) -> Decision:
    """``times``: of each choice, at each point."""
    others = zip(*(time for other, time in times.items() if other != choice), strict=True)
    over = [time / min(other) - 1 for time, other in zip(times[choice], others, strict=True)]
    return Decision(name, row, choice, rules[row].reason, range_over(over))


def of_layers(gpu: Gpu) -> list[Decision]:
    """``RULES``: by each of the kernels. An H100's layers have adapters in 16 bits, too."""
    decisions = []
    widths = (True, False) if layer_time.is_counted_in_full(gpu.device) else (True,)
    for dropout, wide_adapters in product((False, True), widths):
        for shape in layer_time.layers(gpu.device, dropout):
            shape = shape._replace(wide_adapters=wide_adapters)
            decisions += [_of_layer(gpu, shape, direction) for direction in DIRECTIONS]
    return decisions


def _of_layer(gpu: Gpu, shape: Shape, direction: str) -> Decision:
    call = call_of(shape, direction)
    times = {
        kernel: [kernel_seconds(point, shape, direction, kernel) for point in points(gpu)]
        for kernel in possible_strategies(call)
    }
    row = _row_of(RULES, gpu.device, call)
    return _decision("RULES", RULES, row, RULES[row].choice, times)


def of_branches(gpu: Gpu) -> list[Decision]:
    """``BRANCH_RULES``: the branch ahead of the vendor's product, with that product, for the calls
    that take it.
    """
    decisions = []
    for dropout in (False, True):
        for shape, direction in product(layer_time.layers(gpu.device, dropout), DIRECTIONS):
            call = call_of(shape, direction)
            if call.m < layer_time.BRANCH_ROWS or choose(gpu.device, call).strategy != "vendor":
                continue
            times = {
                strategy: [
                    branch_seconds(point, shape, direction, strategy) for point in points(gpu)
                ]
                for strategy in ("chained", "split")
            }
            row = _row_of(BRANCH_RULES, call)
            choice = BRANCH_RULES[row].choice
            decisions.append(_decision("BRANCH_RULES", BRANCH_RULES, row, choice, times))
    return decisions


def of_quantized(gpu: Gpu) -> list[Decision]:
    """``QUANTIZED_RULES``. Dequantizing in the loop overlaps with the products or takes turns with
    them: in the middle half of both.
    """
    decisions = []
    for (kind, bits), shape in product(quantized.BITS.items(), quantized.shapes()):
        at_points = [quantized.arms(point, shape, kind) for point in points(gpu)]
        for place, direction in enumerate(DIRECTIONS):
            overlapped = [arms["in loop"][place] for arms in at_points]
            in_turns = [arms["in turns"][place] for arms in at_points]
            middle = (overlapped[0] + in_turns[0]) / 2
            first = [arms["first"][place] for arms in at_points]
            row = _row_of(QUANTIZED_RULES, gpu.device, call_of(shape, direction), bits, True)
            times = {
                "in_loop": [middle, *overlapped, *in_turns],
                "dequantize": [first[0], *first, *first],
            }
            choice = QUANTIZED_RULES[row].choice
            decisions.append(_decision("QUANTIZED_RULES", QUANTIZED_RULES, row, choice, times))
    return decisions


def of_mlps(gpu: Gpu) -> list[Decision]:
    """``GATE_UP_RULES``: one op against three layers, forward and backward."""
    decisions = []
    for sizes, dropout in product(MLPS, (False, True)):
        mlp = MLP(*sizes, dropout)
        gate = call_of(mlp.layers()[0], "forward")
        if choose_gate_up(gpu.device, gate, True).kernel == "separate":
            continue
        row = _row_of(GATE_UP_RULES, gpu.device, gate, True)
        times = {
            arm: [sum(seconds(point, mlp, arm)) for point in points(gpu)]
            for arm in (ONE_OP, SEPARATE)
        }
        decisions.append(_decision("GATE_UP_RULES", GATE_UP_RULES, row, ONE_OP, times))
    return decisions


class Line(NamedTuple):
    """All calls that one row decides."""

    table: str
    row: int
    choice: str
    reason: str
    calls: int
    # Over the best other choice, less 1: the least and the most at any point, and at the middle the
    # median and the most.
    least: float
    median: float
    most: float
    worst: float

    def text(self) -> str:
        """The cells of a line in the page's table."""
        figures = [self.least, self.median, self.most, self.worst]
        shown = " | ".join(f"{100 * figure:+.0f} %" for figure in figures)
        return f"{self.table} {self.row + 1} | {self.choice} | {self.calls} | {shown}"


def summary(decisions: Sequence[Decision]) -> list[Line]:
    """A line for each row that decides a call."""
    by_row: dict[tuple[str, int, str, str], list[Range]] = {}
    for table, row, choice, reason, over_other in decisions:
        by_row.setdefault((table, row, choice, reason), []).append(over_other)
    lines = []
    for key, ranges in sorted(by_row.items()):
        middles = [over.middle for over in ranges]
        least = min(over.low for over in ranges)
        worst = max(over.high for over in ranges)
        lines.append(
            Line(*key, len(ranges), least, statistics.median(middles), max(middles), worst)
        )
    return lines


def lines_of(gpu: Gpu) -> list[Line]:
    decisions = of_layers(gpu) + of_branches(gpu)
    if layer_time.is_counted_in_full(gpu.device):
        decisions += of_quantized(gpu) + of_mlps(gpu)
    return summary(decisions)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict.support",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        help="a file's name in benchmarks/lab/predict/gpus (default: %(default)s)",
    )
    gpu = load_gpu(parser.parse_args(argv).gpu)
    print(f"PREDICTED for the {gpu.name}: a row's choice over the best other one, less 1")
    print("row | choice | calls | least | median, middle | most, middle | worst point | reason")
    for line in lines_of(gpu):
        print(f"{line.text()} | {line.reason}")


if __name__ == "__main__":
    main()

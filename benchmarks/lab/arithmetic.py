"""Bytes, multiply-adds and launches of a LoRA layer, and the least time that a data sheet allows:
arithmetic that anyone can check with a pencil. Nothing is measured.

    python -m benchmarks.lab.arithmetic

writes a table of docs/results/performance.md, which has the rules. Tests hold the formulas below
against the operators that PyTorch runs, and ours against the tensors that the launch takes;
``slk.explain`` says how many launches ours are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

import stablelora_kernels as slk
from benchmarks.common.arms import FROZEN, OURS, PEFT, PLAIN
from benchmarks.common.tables import RESULTS, markdown, write_text

PAGE = RESULTS.parents[1] / "docs" / "results" / "performance.md"
TOKENS, RANK, DROPOUT = 8192, 16, 0.1


class Layer(NamedTuple):
    """[m, k] to [m, n] at rank r."""

    name: str
    n: int
    k: int
    m: int = TOKENS
    r: int = RANK

    def product(self, letters: str) -> int:
        """Of sizes: that of "MNr" is m * n * r."""
        return math.prod(getattr(self, letter.lower()) for letter in letters)


LAYERS = (
    Layer("q and o of an 8B Llama", 4096, 4096),
    Layer("k and v of an 8B Llama", 1024, 4096),
    Layer("gate and up of an 8B Llama", 14336, 4096),
    Layer("down of an 8B Llama", 4096, 14336),
    Layer("gate and up of a 70B Llama", 28672, 8192),
)


class Gpu(NamedTuple):
    """Operations a second: bfloat16, sums in float32, no sparsity; and bytes a second."""

    name: str
    operations: float
    bandwidth: float


# The page names the data sheet.
H100 = Gpu("H100 SXM", 989e12, 3.35e12)


class Launch(NamedTuple):
    """``moves``: each operand as often as it is read or written. ``multiplies``: multiply-adds of
    matrix products. ``dropout``: whether only dropout needs it.
    """

    does: str
    moves: str
    multiplies: str = ""
    dropout: bool = False


class Arm(NamedTuple):
    """The launches of a layer's forward, and of its backward."""

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]


_Y, _DX = Launch("Y = X Wᵀ", "X + W + Y", "MNK"), Launch("dX = dY W", "Y + W + X", "MNK")
_S, _DD = Launch("S = D Aᵀ", "X + A + S", "MKr"), Launch("dD = dS A", "S + A + X", "MKr")
_DS, _DB = Launch("dS = dT B", "Y + B + S", "MNr"), Launch("dB = dTᵀ S", "Y + S + B", "MNr")
_DA, _ADD = Launch("dA = dSᵀ D", "S + X + A", "MKr"), Launch("dX + dD", "3 X")
# The 72 lines apply the mask by two launches, once forward and twice backward.
_MASKED = Launch("times the mask", "2 X + mask", "", True), Launch("over 1 - p", "2 X", "", True)
ARMS = {
    FROZEN: Arm((_Y,), (_DX,)),
    PEFT: Arm(
        (_Y, Launch("D = dropout(X)", "2 X + mask", "", True), _S, Launch("T = S Bᵀ", "S + B + Y", "MNr"),
         Launch("T times scaling", "2 Y"), Launch("Y + T", "3 Y")),
        (Launch("dT = dY times scaling", "2 Y"), _DB, _DS, _DA, _DD, Launch("dropout of dD", "2 X + mask", "", True),
         _DX, _ADD),
    ),
    PLAIN: Arm(
        (Launch("random zeros and ones", "X", "", True), Launch("as a mask of bytes", "X + mask", "", True), *_MASKED, _S,
         _Y, Launch("Y += scaling S Bᵀ", "2 Y + S + B", "MNr")),
        (*_MASKED, _DS._replace(does="dS = dY B"), Launch("dS times scaling", "2 S"), _DA, _DB._replace(does="dB = dYᵀ S"),
         Launch("dB times scaling", "2 B"), _DD, _DX, *_MASKED, _ADD),
    ),
    OURS: Arm(
        (Launch("S = D Aᵀ and Y = X Wᵀ + scaling S Bᵀ", "2 X + W + Y + A + B + 2 S + bits", "MNK + MKr + MNr"),),
        (Launch("dS and dB, then dX and dA", "2 Y + W + 2 X + 2 A + 2 B + 4 S + 2 bits", "MNK + 2 MKr + 2 MNr"),),
    ),
}  # fmt: skip


def _sum(formula: str, sizes: dict[str, float]) -> float:
    """A sum of names, each with a count before it or without: "2 X + mask"."""
    terms = [term.split() for term in formula.split(" + ") if term]
    return sum(float(count[0] if count else 1) * sizes[name] for *count, name in terms)


def bytes_of(launch: Launch, layer: Layer, dropout: bool) -> float:
    by_name = {"X": "MK", "Y": "MN", "W": "NK", "A": "Kr", "B": "Nr", "S": "Mr"}
    sizes = {name: 2.0 * layer.product(letters) for name, letters in by_name.items()}
    sizes |= {"mask": layer.product("MK"), "bits": dropout * layer.product("MK") / 8}
    return _sum(launch.moves, sizes)


def multiplies_of(launch: Launch, layer: Layer) -> float:
    return _sum(launch.multiplies, {name: layer.product(name) for name in ("MNK", "MNr", "MKr")})


def launches(arm: str, dropout: bool) -> Arm:
    return Arm(*(tuple(x for x in way if dropout or not x.dropout) for way in ARMS[arm]))


def moved(arm: str, layer: Layer, dropout: bool) -> list[float]:
    """Bytes of forward and of backward."""
    ways = launches(arm, dropout)
    return [sum(bytes_of(each, layer, dropout) for each in way) for way in ways]


def multiplied(arm: str, layer: Layer) -> list[float]:
    """Multiply-adds of forward and of backward."""
    return [sum(multiplies_of(each, layer) for each in way) for way in ARMS[arm]]


def least_seconds(arm: str, layer: Layer, dropout: bool, gpu: Gpu) -> float:
    """Each launch takes at least the time of its bytes, and that of its operations."""
    forward, backward = launches(arm, dropout)
    return sum(
        max(
            bytes_of(each, layer, dropout) / gpu.bandwidth,
            2 * multiplies_of(each, layer) / gpu.operations,
        )
        for each in forward + backward
    )


def launch_counts(arm: str, layer: Layer, dropout: bool) -> list[int]:
    """Of forward and of backward: those listed above, and ours by ``slk.explain``."""
    if arm != OURS:
        return [len(way) for way in launches(arm, dropout)]
    options = {"dropout_p": DROPOUT if dropout else 0.0, "lora_dtype": torch.bfloat16}
    told = slk.explain(layer.m, layer.n, layer.k, layer.r, device="sm_90", **options)
    return [len(told.forward), len(told.backward)]


def layers_table() -> str:
    """Bytes and least times of every layer, without dropout and with it."""
    names = {FROZEN: "frozen", PEFT: "PEFT", PLAIN: PLAIN, OURS: "ours"}
    heads = [f"{what}: {name}" for what in ("MB", "µs") for name in names.values()]
    cells = [["layer, N x K", *heads]]
    for layer, dropout in product(LAYERS, (False, True)):
        row = [f"{layer.name}, {layer.n:,} x {layer.k:,}{', dropout' * dropout}"]
        row += [f"{sum(moved(arm, layer, dropout)) / 1e6:,.0f}" for arm in names]
        row += [f"{1e6 * least_seconds(arm, layer, dropout, H100):,.0f}" for arm in names]
        cells.append(row)
    return markdown(cells)


def page() -> str:
    """The page's text, with its table made anew."""
    head, rest = PAGE.read_text(encoding="utf-8").split("<!-- layers -->")
    _, tail = rest.split("<!-- end of layers -->")
    return f"{head}<!-- layers -->\n\n{layers_table()}\n\n<!-- end of layers -->{tail}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.lab.arithmetic", description=__doc__)
    parser.parse_args(argv)
    print(f"wrote {write_text(PAGE, page())}")


if __name__ == "__main__":
    main()

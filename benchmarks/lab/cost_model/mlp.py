"""Predicted times of a gated MLP with LoRA, forward and backward: one op, three layers of this library, and rivals' sequences.

Rivals' layers are those of ``rivals.py``; around them come the activation's launches and the addition of both dX. PEFT runs the
activation by PyTorch's operators: silu and a product forward, three products backward. Unsloth has a kernel each way: G and U
to H, and dH, G and U to H, dG and dU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.lab.cost_model.gpu import Gpu, band_ends
from benchmarks.lab.cost_model.predict import BF16, SLOWEST, launch_seconds, lora_dtype, rival_seconds
from benchmarks.lab.cost_model.rivals import RIVALS, WITHOUT_DROPOUT, Shape, Work, passes
from stablelora_kernels.dispatch.settings import use_kernel
from stablelora_kernels.launch.dry_run import call_launches, mlp_launches


class MLP(NamedTuple):
    """[m, k] to [m, k] by f features."""

    m: int
    k: int
    f: int
    r: int
    dropout: bool = False

    def layers(self) -> tuple[Shape, Shape, Shape]:
        """Gate, up and down."""
        wide, narrow = (
            Shape(self.m, self.f, self.k, self.r, self.dropout),
            Shape(self.m, self.k, self.f, self.r, self.dropout),
        )
        return wide, wide, narrow


# Rows and ranks, in Llama 3.1 8B.
SHAPES = tuple((m, 4096, 14336, r) for r in (16, 64) for m in (2048, 8192, 16384))
# Passes over [M, F] of the activation's launches, forward and backward.
ACTIVATION = {"frozen": ((3,), (5,)), "eager (PEFT)": ((2, 3), (3, 3, 3)), "Unsloth": ((3,), (6,))}


def rival(name: str, mlp: MLP) -> tuple[list[Work], list[Work]]:
    """The launches of forward and backward."""
    ways: tuple[list[Work], list[Work]] = ([], [])
    for shape in mlp.layers():
        for found, way in zip(RIVALS[name](shape), ways, strict=True):
            way += found
    for counts, way in zip(ACTIVATION[name], ways, strict=True):
        way += [passes("activation", mlp.m * mlp.f, count) for count in counts]
    ways[1].append(passes("both dX", mlp.m * mlp.k, 3))
    return ways


def fused(gpu: Gpu, mlp: MLP, efficiency: float) -> tuple[float, float]:
    """Seconds of one op. Launches that are chained are priced as the pairs that they join."""
    kind = lora_dtype(mlp.layers()[0])
    with _priced(mlp):
        ways = mlp_launches(gpu.device, mlp.m, mlp.k, mlp.f, mlp.k, mlp.r, BF16, kind, mlp.layers()[0].p)
    return _seconds(gpu, ways, efficiency)


def apart(gpu: Gpu, mlp: MLP, efficiency: float) -> tuple[float, float]:
    """Seconds of three layers of this library and a fused activation."""
    ways: tuple[list[Any], list[Any]] = ([], [])
    with _priced(mlp):
        for s in mlp.layers():
            for found, way in zip(
                call_launches(gpu.device, s.m, s.n, s.k, s.r, BF16, lora_dtype(s), s.p), ways, strict=True
            ):
                way += found
    forward, backward = _seconds(gpu, ways, efficiency)
    wide = mlp.m * mlp.f
    return (
        forward + rival_seconds(gpu, [passes("activation", wide, 3)]),
        backward + rival_seconds(gpu, [passes("activation", wide, 5), passes("both dX", mlp.m * mlp.k, 3)]),
    )


def _priced(mlp: MLP) -> Any:
    # The model has no price for a chained launch; the table takes one up to this many rows.
    return use_kernel("split" if mlp.m <= 4096 else "auto")


def _seconds(gpu: Gpu, ways: Sequence[Sequence[Any]], efficiency: float) -> tuple[float, float]:
    forward, backward = (sum(launch_seconds(gpu, launch, efficiency) for launch in way) for way in ways)
    return forward, backward


def rows(gpu: Gpu, dropout: bool, efficiency: float = SLOWEST) -> list[dict[str, Any]]:
    """A row for each shape: predicted microseconds, forward and backward; ours at both ends of the band."""
    found = []
    for mlp in (MLP(*shape, dropout) for shape in SHAPES):
        row: dict[str, Any] = {
            "gpu": gpu.name,
            "m": mlp.m,
            "k": mlp.k,
            "f": mlp.f,
            "r": mlp.r,
            "dropout": 0.1 * mlp.dropout,
        }
        for name in ACTIVATION:
            if not (mlp.dropout and name in WITHOUT_DROPOUT):
                row |= _both(name, [rival_seconds(gpu, works) for works in rival(name, mlp)])
        for end, at in zip(("", " (slow)"), band_ends(gpu, efficiency), strict=True):
            row |= _both("three layers", apart(at.gpu, mlp, at.efficiency), end)
            row |= _both("one op", fused(at.gpu, mlp, at.efficiency), end)
        found.append(row)
    return found


def _both(name: str, seconds: Sequence[float], end: str = "") -> dict[str, float]:
    return {f"{name} {way}{end}": round(1e6 * s, 1) for way, s in zip(("forward", "backward"), seconds, strict=True)}


def cells(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A table of the rows: forward and backward over the frozen MLP's, ours as a band."""

    def over(row: dict[str, Any], name: str, end: str = "") -> float:
        frozen = row["frozen forward"] + row["frozen backward"]
        return (row[f"{name} forward{end}"] + row[f"{name} backward{end}"]) / frozen

    table = [["M", "r", "dropout", "frozen, us", "eager (PEFT), x", "Unsloth, x", "three layers, x", "one op, x"]]
    for row in found:
        bands = [f"{over(row, name):.2f}-{over(row, name, ' (slow)'):.2f}" for name in ("three layers", "one op")]
        unsloth = f"{over(row, 'Unsloth'):.2f}" if "Unsloth forward" in row else "-"
        frozen = f"{row['frozen forward'] + row['frozen backward']:,.0f}"
        names = [f"{row['m']}", f"{row['r']}", f"{row['dropout']:g}", frozen, f"{over(row, 'eager (PEFT)'):.2f}"]
        table.append([*names, unsloth, *bands])
    return table

"""Predicted times of one LoRA layer for this library and its rivals on a GPU, from bytes and operations. Nothing is measured.

    python -m benchmarks.model [--gpu h100] [--dropout 0.1] [--efficiency 1.0] [--out DIRECTORY]

A launch is predicted to take its launch cost and the longest of: bytes from memory over the bandwidth, bytes issued over L2's,
operations over the matrix units' rate, and bytes over what its programs can keep in flight. Ceilings are in benchmarks/gpus/,
with their sources. Our launches are the ones that dispatch picks, with their bytes by the formula that the traffic report
tests; the rivals' are in benchmarks/_sequences.py. ``--efficiency`` is the share of the vendor's matrix rate that Triton's
products are assumed to reach, which only a GPU can tell.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._sequences import RIVALS, WITHOUT_DROPOUT, Shape, Work
from benchmarks._traffic import formula
from benchmarks.report import aligned
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import KERNELS, Choice, check_possible, choose
from stablelora_kernels.launch.dry_run import call_launches

GPUS = Path(__file__).parent / "gpus"
# Where benchmarks.gpu leaves what it measured, in a directory named after the GPU.
RESULTS = Path(__file__).parent / "results"
# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
# Bytes take this long to come from memory, which says how many must be on their way.
LATENCY = 0.8e-6


class Gpu(NamedTuple):
    """Ceilings of a GPU: bytes and operations a second, seconds a launch."""

    name: str
    arch: str
    bandwidth: float
    l2_bandwidth: float
    matrix_rate: dict[str, float]
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    # Instructions a second of all threads together; of those to memory, shared memory's included, a quarter.
    issue_rate: float
    launch: float


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/gpus/<name>.json."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    return Gpu(**{field: content[field] for field in Gpu._fields})


def rival_seconds(gpu: Gpu, works: Sequence[Work]) -> float:
    return sum(
        gpu.launch + max(w.bytes / gpu.bandwidth, w.flops / gpu.matrix_rate["bf16"], w.l2_bytes / gpu.l2_bandwidth)
        for w in works
    )


# This library.


def matrix_operations(launch: Any, gpu: Gpu) -> float:
    """Operations on the matrix units, padding and narrow instructions included."""
    v = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    m, n, k, r, name = v["M"], v.get("N", 0), v["K"], v["R"], launch.kernel.__name__

    def up(size: int, block: int) -> int:
        return -(-size // block) * block

    def ranks_of(block: int) -> int:
        return up(r, block) // block * max(block, gpu.narrow_columns)

    if name == "_lora_weight_grads_kernel":
        programs_b = launch.grid[0] - v["PROGRAMS_A"]
        columns = up(k, v["BLOCK_C"]) * (v["PROGRAMS_A"] > 0) + up(n, v["BLOCK_C"]) * (programs_b > 0)
        return 2.0 * columns * m * ranks_of(v["BLOCK_R"])
    rows = up(m, v["BLOCK_M"])
    if name == "_lora_shrink_kernel":
        beside = 2.0 * up(k, v["GRAD_C"]) * m * ranks_of(v["GRAD_R"]) if v["HAS_GRAD"] else 0.0
        return 2.0 * rows * k * ranks_of(v["BLOCK_R"]) + beside
    columns = up(n, v["BLOCK_N"])
    branch = 2.0 * rows * columns * up(r, v["BLOCK_R"])
    if name == "_lora_expand_kernel":
        return branch + (0.0 if v["LOAD_S"] else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * launch.grid[1])
    s = 0.0 if v.get("LOAD_S", True) else 2.0 * rows * k * ranks_of(v["BLOCK_R"]) * columns / v["BLOCK_N"]
    beside = 2.0 * columns * m * ranks_of(v["GRAD_R"]) if v.get("HAS_GRAD") else 0.0
    return 2.0 * rows * columns * k + branch + s + beside


def _in_flight(launch: Any, gpu: Gpu) -> float:
    """Bytes that the launch's programs keep on their way at once."""
    v = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    inner = v.get("BLOCK_K", v["BLOCK_M"])
    across = v.get("BLOCK_C", v["BLOCK_M"] + v.get("BLOCK_N", 0))
    programs = 1
    for size in launch.grid:
        programs *= size
    resident = min(programs, 2 * DEVICES[gpu.arch].processors)
    return resident * (launch.options["num_stages"] - 1) * inner * across * 2.0


def launch_seconds(gpu: Gpu, launch: Any, efficiency: float = 1.0) -> float:
    """One of our launches, in bf16."""
    traffic = formula(launch)
    unique, issued = traffic.read_unique + traffic.written_unique, traffic.read_issued + traffic.written_issued
    if not hasattr(launch, "kernel"):
        # The vendor's own tiles are unknown: as for rivals, each operand is read once.
        operations = 2.0 * launch.y.shape[0] * launch.y.shape[1] * launch.x.shape[1]
        return gpu.launch + max(unique / gpu.bandwidth, operations / gpu.matrix_rate["bf16"])
    # A launch that may begin before the one ahead of it has ended costs no gap.
    gap = 0.0 if launch.options.get("launch_pdl") else gpu.launch
    return gap + max(
        unique / gpu.bandwidth,
        issued / gpu.l2_bandwidth,
        matrix_operations(launch, gpu) / (gpu.matrix_rate["bf16"] * efficiency),
        traffic.read_unique * LATENCY / _in_flight(launch, gpu),
    )


def ours(
    gpu: Gpu, s: Shape, efficiency: float = 1.0, forward: str | None = None, backward: str | None = None
) -> tuple[float, float]:
    """Predicted seconds of forward and backward, by the kernels that dispatch chooses unless they are given."""
    bf16, p = torch.bfloat16, 0.1 if s.dropout else 0.0
    choices = [None if kernel is None else Choice(kernel, "") for kernel in (forward, backward)]
    found = call_launches(DEVICES[gpu.arch], s.m, s.n, s.k, s.r, bf16, bf16, p, *choices)
    first, second = (sum(launch_seconds(gpu, launch, efficiency) for launch in launches) for launches in found)
    return first, second


def without_overlap(gpu: Gpu, s: Shape) -> float:
    """Predicted seconds of forward and backward, both split, should nothing run beside or behind anything else.

    dY comes from memory for dS and again for dB, dA begins when dX is done, and no launch begins before the one ahead has ended.
    """
    bf16, p, split = torch.bfloat16, 0.1 if s.dropout else 0.0, Choice("split", "")
    forward, (thin, wide) = call_launches(DEVICES[gpu.arch], s.m, s.n, s.k, s.r, bf16, bf16, p, split, split)
    alone = [launch._replace(options={**launch.options, "launch_pdl": False}) for launch in forward]
    traffic = formula(thin)
    again, x = 2 * s.m * s.n, 2 * s.m * s.k
    thin_seconds = gpu.launch + (traffic.read_unique + traffic.written_unique + again) / gpu.bandwidth
    product = (
        matrix_operations(wide._replace(constants=wide.constants | {"HAS_GRAD": False}), gpu) / gpu.matrix_rate["bf16"]
    )
    return (
        sum(launch_seconds(gpu, launch) for launch in alone) + thin_seconds + gpu.launch + product + x / gpu.bandwidth
    )


def possible(s: Shape, direction: str) -> list[str]:
    """The kernels that can do this call."""
    kernels = []
    for kernel in KERNELS[1:]:
        try:
            check_possible(Call(direction, s.m, s.n, s.k, s.r, torch.bfloat16, torch.bfloat16, s.dropout), kernel)
        except ValueError:
            continue
        kernels.append(kernel)
    return kernels


def best(gpu: Gpu, s: Shape, direction: str, efficiency: float = 1.0) -> dict[str, float]:
    """Predicted seconds of one direction by each kernel that can do it."""
    place = ("forward", "backward").index(direction)
    spare = "split"
    return {
        kernel: ours(gpu, s, efficiency, *((kernel, spare) if place == 0 else (spare, kernel)))[place]
        for kernel in possible(s, direction)
    }


def regret(gpu: Gpu, s: Shape, direction: str, efficiency: float = 1.0) -> tuple[str, str, float]:
    """The kernel that dispatch chooses, the one that is predicted to be fastest, and how much longer the choice takes."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    call = Call(direction, s.m, *sizes, s.r, torch.bfloat16, torch.bfloat16, s.dropout)
    chosen, times = choose(DEVICES[gpu.arch], call).kernel, best(gpu, s, direction, efficiency)
    fastest = min(times, key=times.__getitem__)
    return chosen, fastest, times[chosen] / times[fastest] - 1


def predicted(gpu: Gpu, s: Shape, direction: str, arm: str) -> float | None:
    """Seconds of "forward", "backward" or "both" for an arm of ``benchmarks.gpu``, or None where the model knows none such."""
    name = {"eager": "eager (PEFT)", "peft": "eager (PEFT)"}.get(arm, arm)
    if arm != "ours" and name not in RIVALS:
        return None
    times = ours(gpu, s) if arm == "ours" else [rival_seconds(gpu, works) for works in RIVALS[name](s)]
    return sum(times) if direction == "both" else times[direction == "backward"]


# What is printed.


def against_measured(gpu: Gpu, name: str, results: Path = RESULTS) -> list[str]:
    """What ``benchmarks.gpu`` measured on such a GPU, the device alone, and how far from it the predictions are."""
    errors: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for path in sorted(results.glob("*/layer.csv")):
        if name not in path.parent.name.split("-"):
            continue
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["status"] != "ok" or row["dry"] or row["mode"] != "graph":
                    continue
                m, n, k, r = (int(row[key]) for key in ("m", "n", "k", "r"))
                seconds = predicted(gpu, Shape(m, n, k, r, float(row["dropout"]) > 0), row["direction"], row["arm"])
                if seconds is not None:
                    error = seconds * 1e6 / float(row["us"]) - 1
                    shape = f"M {m} N {n} K {k} r {r} dropout {row['dropout']}"
                    errors.setdefault((row["arm"], row["direction"]), []).append((error, shape))
    if not errors:
        return [f"No measurements of an {gpu.name} to compare with: python -m benchmarks.gpu makes them."]
    cells = [["arm", "direction", "shapes", "predicted over measured, median", "worst", "at"]]
    for (arm, direction), found in sorted(errors.items()):
        worst, shape = max(found, key=lambda pair: abs(pair[0]))
        middle = statistics.median(error for error, _ in found)
        cells.append([arm, direction, f"{len(found)}", f"{middle:+.0%}", f"{worst:+.0%}", shape])
    return ["Predicted against measured, the device alone:", *aligned(cells, left=2)]


def check_published(gpu: Gpu) -> list[str]:
    """The published figure that the model must reproduce before it is believed, and what it says."""
    ratios = []
    for m in (2048, 4096, 8192, 16384):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            s = Shape(m, n, k, 16, True)
            totals = [
                sum(rival_seconds(gpu, works) for works in RIVALS[name](s)) for name in ("eager (PEFT)", "LoRAFusion")
            ]
            ratios.append(totals[0] / totals[1])
    mean, published = statistics.mean(ratios), 1.27
    off = mean / published - 1
    verdict = "within 15%" if abs(off) <= 0.15 else "NOT within 15%: the model is not to be believed"
    return [
        f"LoRAFusion over eager LoRA, r 16, dropout 0.1, 2k to 16k rows of an 8B model: predicted {mean:.2f}x mean, "
        f"{max(ratios):.2f}x best; published 1.27x mean, 1.39x best ({off:+.0%}: {verdict})"
    ]


def table(gpu: Gpu, dropout: bool, efficiency: float) -> list[dict[str, Any]]:
    """A row for each shape: predicted microseconds of everyone, forward and backward."""
    rows = []
    for n, k in SIZES:
        for m in ROWS:
            for r in RANKS:
                s = Shape(m, n, k, r, dropout)
                row: dict[str, Any] = {
                    "gpu": gpu.name,
                    "m": m,
                    "n": n,
                    "k": k,
                    "r": r,
                    "dropout": 0.1 if dropout else 0.0,
                }
                for name, sequence in RIVALS.items():
                    if not (dropout and name in WITHOUT_DROPOUT):
                        for direction, works in zip(("forward", "backward"), sequence(s), strict=True):
                            row[f"{name} {direction}"] = round(rival_seconds(gpu, works) * 1e6, 2)
                for direction, seconds in zip(("forward", "backward"), ours(gpu, s, efficiency), strict=True):
                    chosen, fastest, more = regret(gpu, s, direction, efficiency)
                    row[f"ours {direction}"] = round(seconds * 1e6, 2)
                    row |= {f"{direction} kernel": chosen, f"{direction} fastest": fastest}
                    row[f"{direction} regret"] = round(more, 3)
                rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], n: int, k: int) -> list[str]:
    """The rows of one layer, as times over the frozen layer's."""
    names = [name for name in RIVALS if name != "frozen" and f"{name} forward" in rows[0]] + ["ours"]
    cells = [["M", "r", "frozen, us", *(f"{name}, x" for name in names), "kernels", "regret, %"]]
    for row in rows:
        if (row["n"], row["k"]) == (n, k):
            whole = {name: row[f"{name} forward"] + row[f"{name} backward"] for name in ("frozen", *names)}
            cells.append([
                f"{row['m']}", f"{row['r']}", f"{whole['frozen']:.1f}",
                *(f"{whole[name] / whole['frozen']:.2f}" for name in names),
                f"{row['forward kernel']}/{row['backward kernel']}",
                f"{100 * row['forward regret']:.0f}/{100 * row['backward regret']:.0f}",
            ])  # fmt: skip
    return aligned(cells, left=0)


def worst_case(gpu: Gpu, rows: list[dict[str, Any]]) -> list[str]:
    """Where our time would be bound by products: as predicted, and without any overlap."""
    lines = []
    for row in rows:
        if (row["n"], row["k"], row["r"]) == (4096, 4096, 16) and row["m"] >= 2048:
            frozen = row["frozen forward"] + row["frozen backward"]
            bare = without_overlap(gpu, Shape(row["m"], 4096, 4096, 16, row["dropout"] > 0)) * 1e6
            planned = row["ours forward"] + row["ours backward"]
            lines.append(f"M {row['m']}: {bare / frozen:.2f} instead of {planned / frozen:.2f}")
    return lines


def plot(rows: list[dict[str, Any]], gpu: Gpu, directory: Path) -> list[Path]:
    """Predicted time over the frozen layer's against M and against r."""
    import matplotlib.pyplot as plt

    from benchmarks.plots import STYLE, save

    n, k = 4096, 4096
    mine = [row for row in rows if (row["n"], row["k"]) == (n, k)]
    names = [name for name in RIVALS if name != "frozen" and f"{name} forward" in mine[0]] + ["ours"]
    shades = dict(zip(names, ("#8a8f98", "#2a6fbb", "#5b9aa0", "#e07a3f", "#d1495b"), strict=False)) | {
        "ours": "#d1495b"
    }
    paths = []
    with plt.rc_context(STYLE):
        for axis, fixed, label in (("m", ("r", 16), "rows"), ("r", ("m", 8192), "rank")):
            chosen = [row for row in mine if row[fixed[0]] == fixed[1]]
            figure, ax = plt.subplots(figsize=(7.2, 4), layout="constrained")
            for name in names:
                over = [
                    (row[f"{name} forward"] + row[f"{name} backward"])
                    / (row["frozen forward"] + row["frozen backward"])
                    for row in chosen
                ]
                xs = [row[axis] for row in chosen]
                ax.plot(
                    xs,
                    over,
                    marker="o",
                    markersize=3.5,
                    color=shades[name],
                    label=name,
                    linewidth=2 if name == "ours" else 1.3,
                )
            ax.axhline(1, color="#444444", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xticks(xs, [f"{x // 1024}k" if x >= 1024 else f"{x}" for x in xs])
            ax.set_xlabel(f"{label} ({fixed[0] if fixed[0] == 'r' else 'M'} = {fixed[1]})")
            ax.set_ylabel("forward + backward, over the frozen layer")
            p = chosen[0]["dropout"]
            ax.set_title(f"Predicted, not measured: {gpu.name}, {n} x {k}, bf16, dropout {p:g}", fontsize=10)
            ax.legend()
            paths.append(save(figure, directory / f"time_against_{label}_dropout_{p:g}.png"))
    return paths


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", help="a file's name in benchmarks/gpus (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, choices=(0.0, 0.1), help="default: %(default)s")
    parser.add_argument(
        "--efficiency", type=float, default=1.0, help="Triton's share of the vendor's rate (default: 1)"
    )
    parser.add_argument("--out", type=Path, help="where to write a CSV and plots (default: nowhere)")
    options = parser.parse_args(arguments)
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency must be in (0, 1], got {options.efficiency}")
    gpu = load_gpu(options.gpu)
    rows = table(gpu, options.dropout > 0, options.efficiency)
    print(f"All times are PREDICTED for an {gpu.name} in bf16, dropout {options.dropout:g}; none is measured.\n")
    for n, k in SIZES:
        print(f"N {n}, K {k}: forward + backward over the frozen layer's", *show(rows, n, k), "", sep="\n")
    for line in (*check_published(load_gpu("h100")), *against_measured(gpu, options.gpu)):
        print(line)
    print(
        "Should nothing overlap as planned, 4096 x 4096, r 16, over the frozen layer's:",
        *worst_case(gpu, rows),
        sep="\n  ",
    )
    regrets = [row[f"{direction} regret"] for row in rows for direction in ("forward", "backward")]
    print(
        f"dispatch against the fastest predicted kernel: {statistics.mean(regrets):.1%} longer on average, "
        f"{max(regrets):.1%} at worst, over {len(rows)} shapes"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"predicted_dropout_{options.dropout:g}.csv"
        write_csv(rows, path)
        for written in (path, *plot(rows, gpu, options.out)):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()

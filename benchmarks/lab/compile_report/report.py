"""Check the machine code of every kernel and config that dispatch can pick, compiled for GPUs that
need not be present.

    python -m benchmarks.lab.compile_report [--arch sm_90 ...] [--kernel lora_down] [--triton 3.8.0]

Each launch's figures are printed as it is compiled: registers a thread; spills, bytes of local memory
a thread; bytes of shared memory a program; the mean bits of a load and of a store, see
``machine_code.read``; and the matrix instructions. The faults follow, and the exit status is 1 if
there is one:

- a hazard: code whose results may be wrong
- code that does not compile, or needs more memory than the GPU has
- WGMMAs of Hopper each of which ptxas lets wait for the last
- waits between tiles until their stores are in memory, but for Triton 3.8, which has them on Hopper
- under Triton 3.9, whose code the bounds are for: spills, a kernel without its matrix instructions,
narrow loads or stores

A launch takes 1 to 5 s of one core, all of them up to 40 minutes on two cores; 0.5 s once Triton has
it in its cache.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import triton

from benchmarks.common import tritons
from benchmarks.lab.compile_report import machine_code
from benchmarks.lab.compile_report.launches import every_launch
from stablelora_kernels.dispatch.problem import DEVICES

# Without sm_86, whose 212 launches compile to code with the same figures as sm_89's.
ARCHS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
# The Triton release whose code keeps the bounds.
TRITON = "3.9"
# Columns of Blackwell's tensor memory.
TENSOR_COLUMNS = 512


class Label(NamedTuple):
    """What names a launch."""

    kernel: str
    variant: str
    arch: str
    dtype: str

    def __str__(self) -> str:
        return " | ".join(self)


@cache
def jobs(arch: str) -> dict[Label, Any]:
    """The launches by their labels. If several pieces of code share a variant, the arguments that
    differ follow its name.
    """
    by_name: dict[tuple[str, str, str], dict[tuple[str, ...], Any]] = defaultdict(dict)
    for dtype, launch in every_launch(DEVICES[arch]):
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        kernel = "stable_adamw_square_sums" if kernel == "square_sums" else kernel
        by_name[kernel, launch.variant, dtype].setdefault(machine_code.words(launch, arch), launch)
    result = {}
    for (kernel, variant, dtype), alike in by_name.items():
        shared = set.intersection(*map(set, alike))
        for words, launch in alike.items():
            name = " ".join([variant, *(word for word in words if word not in shared)])
            result[Label(kernel, name, arch, dtype)] = launch
    return result


def labels_of(archs: Sequence[str], prefix: str = "") -> list[Label]:
    """The labels of the launches of kernels whose names begin with ``prefix``."""
    return [label for arch in archs for label in jobs(arch) if label.kernel.startswith(prefix)]


class Compiled(NamedTuple):
    """What was read from a launch's code, by the columns that are printed; and its faults."""

    figures: dict[str, Any]
    faults: list[str]


def check(label: Label) -> Compiled:
    """Compile one launch, and read what came out."""
    launch = jobs(label.arch)[label]
    try:
        compiled = machine_code.compile_launch(launch, label.arch)
        figures, metadata = machine_code.read(compiled), compiled.metadata
    except machine_code.HazardError as error:
        return Compiled({}, [str(error)])
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        message = " ".join(str(error).split())[-300:]
        return Compiled({}, [f"not compiled: {type(error).__name__}: {message}"])
    figures["shared_bytes"] = metadata.shared
    columns = getattr(metadata, "tmem_size", 0) or 0
    return Compiled(figures, [*faults_of(label, figures, columns)])


def faults_of(label: Label, figures: dict[str, Any], tensor_columns: int = 0) -> Iterator[str]:
    """A line for each bound that a launch's figures do not keep."""
    limit = DEVICES[label.arch].shared_limit
    if figures["shared_bytes"] > limit:
        yield f"{figures['shared_bytes']} bytes of shared memory, the GPU has {limit}"
    if tensor_columns > TENSOR_COLUMNS:
        yield f"{tensor_columns} columns of tensor memory, the GPU has {TENSOR_COLUMNS}"
    if figures["serialized"]:
        yield f"serialized: {figures['serialized']}"
    # What Triton 3.8 makes of the same source costs time: docs/reference/backends.md.
    if figures["store_waits"] > 1 and not triton.__version__.startswith("3.8."):
        yield f"{figures['store_waits']} waits for the end of stores of tiles, one is enough"
    if not triton.__version__.startswith(f"{TRITON}."):
        return
    if figures["spills"] > (allowed := allowed_spills(label)):
        yield f"{figures['spills']} bytes of spills a thread, at most {allowed} are allowed"
    if not label.kernel.startswith("lora"):
        return
    if wanted := lacking_instructions(label, figures["mma"]):
        yield f"its matrix instructions are {figures['mma'] or 'none'}, they must be {wanted}"
    least = least_bits(label)
    for column, bits in least.items():
        if figures[column] < bits:
            yield f"{column} {figures[column]}, at least {bits} are demanded"


def allowed_spills(label: Label) -> int:
    """Bytes a thread. A few around the epilogue are harmless; a spill inside the main loop is
    hundreds.
    """
    if label.arch == "sm_90":
        return 0
    # AMD's scratch has scalar registers, too, of which a chained launch has many.
    return 96 if label.arch.startswith("gfx") and "chained" in label.variant else 64


def lacking_instructions(label: Label, mma: str) -> str:
    """Which instructions a kernel of LoRA must have and has not, or "".

    Without any, a kernel is one that the compiler gave up on without a word, as it does when
    accumulators outgrow Blackwell's tensor memory. Exact products of float32 have no matrix
    instructions on NVIDIA's GPUs.
    """
    low = label.dtype.startswith(("bf16", "fp16"))
    units = low or label.arch.startswith("gfx")
    if not re.search("MMA|mfma" if units else "MMA|mfma|FFMA", mma):
        return "MMA or mfma" if units else "MMA or FFMA"
    if units and re.search(r"\bFFMA", mma):
        return "MMA or mfma alone"
    if label.arch == "sm_90" and low and not label.variant.startswith("small"):
        return "" if "HGMMA" in mma else "HGMMA"
    return ""


def least_bits(label: Label) -> dict[str, int]:
    """The mean widths of loads and stores that a kernel of LoRA must reach on NVIDIA's GPUs; AMD's
    code mixes scalars in.
    """
    if label.arch.startswith("gfx"):
        return {}
    # Values of NF4 are looked up one by one. A kernel with TMA has few accesses for a tile, and as
    # many as others for a bias.
    loads = {"lora_linear_quantized": 40, "lora_linear_tma": 48}.get(label.kernel, 90)
    # A mask's words have 32 bits, and are half of the loads beside a product that another launch
    # computed, or beside dS.
    if re.match("dx r(?:16|32) (?:alone|fused) masked", label.variant):
        loads = min(loads, 56)
    # A branch without a product has as few, of which a bias's are narrow.
    if re.search(" alone .* bias", label.variant):
        loads = min(loads, 64)
    # S stores bytes of a mask.
    drops = label.kernel == "lora_down" and label.variant.endswith("dropout")
    return {"load_bits": loads, "store_bits": 80 if drops else 96}


def check_all(labels: Sequence[Label]) -> Iterator[tuple[Label, Compiled]]:
    """Each label with what :func:`check` returns for it, and the progress on stderr."""
    # The compiler runs without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(check, labels)
        for number, (label, found) in enumerate(zip(labels, compiled, strict=True), start=1):
            yield label, found
            if number % 50 == 0 or number == len(labels):
                print(f"{number} of {len(labels)}", file=sys.stderr)


def run(labels: Sequence[Label]) -> int:
    """Print each launch's figures, and the faults behind them; return the exit status."""
    faults = []
    for label, compiled in check_all(labels):
        if compiled.figures:
            words = ", ".join(
                f"{name} {value}" for name, value in compiled.figures.items() if value
            )
            print(f"{label}: {words}", flush=True)
        faults += [f"{label}: {fault}" for fault in compiled.faults]
    print("", *faults, sep="\n")
    print(f"Triton {triton.__version__}: {len(faults)} faults in {len(labels)} launches")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", action="append", choices=DEVICES, help="only this GPU; may be repeated")
    add("--kernel", default="", metavar="PREFIX", help="only kernels whose names begin so")
    tritons.add_option(parser)
    args = parser.parse_args(argv)
    tritons.run_again("benchmarks.lab.compile_report", args.triton, argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error(
            "TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it"
        )
    return run(labels_of(args.arch or ARCHS, args.kernel))

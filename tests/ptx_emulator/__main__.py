"""Run the library's compiled kernels on a CPU and print a table, then every fault.

Without --landing, --warps, --order, --seed and --resident, the cases take six schedules in turn:
copies that land late or early; warps and programs in step, one by one, or at random. With one of
these options, the others are late, in step, forward, without turns, and all at a time.

Exit status: 0 without any fault; 1 with a fault or a wrong number; 2 if the options fit no case; 3
if --plant planted nothing, or its case could not run to the end, so that nobody knows whether the
fault is found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tests.helpers.threads import ONE_THREAD

# Before NumPy, which PyTorch imports, starts OpenBLAS's threads. The user's own setting has
# precedence.
os.environ.update(ONE_THREAD | os.environ)

import torch

from benchmarks.common import tritons
from tests.ptx_emulator import runner
from tests.ptx_emulator.cases import Case, cases, run_case
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.plants import BOTH, PLANTS

# Of products whose operand comes from registers: Triton 3.6 or 3.7 computed wrong dA, dB or Y in
# each.
FROM_REGISTERS = (
    "linear bf16/bf16 M33 N96 K160 r16 p0.1", "linear bf16/fp32 M130 r16 p0.1, X shifted",
    "mlp bf16 M130 r16 p0.0, 2 processors",
)  # fmt: skip
# Besides these: sums that programs share at once, a tile that only first use takes, two blocks of
# ranks, adapters on rows of their own. The tests run them at night alone, then under every Triton.
LONG = (
    *FROM_REGISTERS,
    "linear one_launch bf16/fp32 M520 N520 K64 r16 p0.0, shared sums", "linear bf16/fp32 M200 N264 r16 p0.1, measured 64 x 256",
    "linear bf16/fp32 M96 N72 K64 r100 p0.1", "rows bf16 M33+130 r16+1 p0.25+0.0",
)  # fmt: skip
# Each kernel, the optimizer's included, in few cases.
QUICK = (
    "linear few_rows bf16/fp32 M5 N64 K512 r16", "linear bf16/fp32 M33 K520 r16 p0.1, long sum",
    "linear one_launch bf16/fp32 M130 r16 p0.1", "linear one_launch bf16/fp32 M200 N96 K800 r16 p0.1, 9 processors",
    "linear branch_first bf16/fp32 M130 r200 p0.1", "branch bf16 M33 r16 p0.0", "linear branch_first bf16/fp32 M130 r16 p0.1",
    "group bf16 M130 r16+8+4 p0.1", "group split-K bf16 M66 N64+32+32 K1024 r16 p0.0", "mlp bf16 M130 r16+8+4 p0.1",
    "nf4 nested bf16 M33 N96 K192 r16 p0.1", "fp8 bf16 M300 N64 K128 r16 p0.1", "optimizer bf16, masters, clipped",
    "cross_entropy bf16 M7 V5000 mean softcap None", "cross_entropy fp16 M5 V4096 none softcap 5.0",
    "log_probs bf16 M5 V5000 softcap None", "optimizer fp32, sharded, latching", "shrink fp32", "shrink fp32, sharded",
    # Tiles by ticket, of more programs than are resident.
    "linear one_launch bf16/fp32 M300 N520 r16 p0.0, 6 processors",
    # Copies of accumulators behind a fence, which are no fault.
    "linear branch_first bf16/fp32 M1 N40 r1 p0.5",
    *LONG,
)  # fmt: skip
NOTHING_FITS, NOTHING_PLANTED = 2, 3
# GPUs whose PTX the emulator knows.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
WARPS = ("first", "last", "random", "groups-first", "groups-last", "groups-random")
# The cases of a whole run take these in turn, and each case another one on each GPU.
SCHEDULES = [
    Schedule(landing=landing, **others)
    for others in (
        {},
        {"warps": "first", "order": "reverse", "resident": 1},
        {"warps": "random", "order": "random", "resident": 3, "seed": 1},
    )
    for landing in ("late", "early")
]


def schedule_of(options: argparse.Namespace, arch: str, number: int) -> Schedule:
    """The schedule of case ``number``: what the command line asks for, else the next of
    ``SCHEDULES``. A quick run's is that in which most faults have been seen.
    """
    names = ("landing", "warps", "order", "seed", "resident")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.quick:
        schedule = Schedule(arch, "early", "first", "reverse", 1, 4)
    elif asked:
        schedule = Schedule(arch)
    else:
        schedule = SCHEDULES[(number + ARCHS.index(arch)) % len(SCHEDULES)]._replace(arch=arch)
    # Of groups of four warps on sm_90, which a wgmma needs whole; tcgen05 needs whole warps alone.
    if schedule.warps and arch == "sm_90":
        schedule = schedule._replace(warps=f"groups-{schedule.warps}")
    return schedule._replace(**asked)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx_emulator", description=__doc__, formatter_class=raw
    )
    help_ = f"of {', '.join(ARCHS)}, with commas between them (default: %(default)s)"
    parser.add_argument("--arch", default=",".join(BOTH), help=help_)
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="cases with all WORDS, with + between them"
    )
    help_ = "of copies and tcgen05.mma"
    parser.add_argument("--landing", choices=("late", "early", "random"), help=help_)
    parser.add_argument(
        "--warps", choices=WARPS, help="run warps, or the groups of four that wgmma needs, apart"
    )
    parser.add_argument("--order", choices=("forward", "reverse", "random"), help="of the CTAs")
    parser.add_argument("--seed", type=int, help="let CTAs take turns at random, some seldom")
    parser.add_argument("--resident", type=int, metavar="N", help="CTAs that run at a time")
    help_ = (
        "each kernel in a few cases, copies early, warps apart, four CTAs at a time, the last first"
    )
    parser.add_argument("--quick", action="store_true", help=help_)
    help_ = "take a barrier, wait or fence out of the PTX, which must be found; list: the names"
    parser.add_argument("--plant", choices=(*PLANTS, "list"), metavar="NAME", help=help_)
    tritons.add_option(parser)
    options = parser.parse_args(arguments)
    options.arch = options.arch.split(",")
    if unknown := [arch for arch in options.arch if arch not in ARCHS]:
        parser.error(f"--arch must name GPUs of {', '.join(ARCHS)}, got {unknown[0]!r}")
    if options.resident is not None and options.resident < 1:
        parser.error(f"--resident must be at least 1, got {options.resident}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and Triton's interpreter compiles nothing")
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Case, Schedule]]:
    """The cases to run, with their schedules."""
    found = []
    for arch in options.arch:
        plant = PLANTS.get(options.plant)
        for number, case in enumerate(cases()):
            if plant is not None and not (case.name == plant.case and arch in plant.archs):
                continue
            if options.quick and case.name not in QUICK:
                continue
            if all(word in case.name for word in options.only.split("+")):
                found.append(
                    (
                        case,
                        plant.schedule._replace(arch=arch)
                        if plant
                        else schedule_of(options, arch, number),
                    )
                )
    return found


def _refuse(message: str, status: int) -> int:
    print(f"python -m tests.ptx_emulator: error: {message}", file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    tritons.run_again("tests.ptx_emulator", options.triton, arguments)
    if options.plant == "list":
        print(
            *(
                f"{name}: {', '.join(plant.archs)}, {plant.kernel}"
                for name, plant in PLANTS.items()
            ),
            sep="\n",
        )
        return 0
    torch.set_num_threads(1)
    planted: list[str] = []

    def edit(name: str, ptx: str) -> str:
        edited = PLANTS[options.plant].edit(name, ptx)
        planted.extend([name] if edited != ptx else [])
        return edited

    runner.edits[:] = [edit] if options.plant else []
    todo = chosen(options)
    if not todo:
        return _refuse("no case fits the options", NOTHING_FITS)
    print(
        "| GPU | case | launches | error over bound | faults | seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    details, bad, stopped = [], 0, []
    for case, schedule in todo:
        began = time.monotonic()
        outcome = run_case(case, schedule)
        faults = outcome.log.faults.lines()
        words = outcome.words if outcome.share <= 1 else f"**{outcome.words}**"
        launches, seconds = outcome.log.launches, f"{time.monotonic() - began:.1f}"
        row = (schedule.arch, case.name, len(launches), words, len(faults), seconds)
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        bad += not outcome.right
        stopped += [] if outcome.ran else [outcome.words]
        if not outcome.right:
            details += [
                f"{schedule.arch} {case.name}: {line}"
                for line in (f"{outcome.words}: {schedule}", *launches, *faults)
            ]
    if options.plant and not planted:
        return _refuse(f"no code for {options.plant} to be planted in", NOTHING_PLANTED)
    if options.plant and stopped:
        return _refuse(
            f"{options.plant} is planted, but its case did not run to the end: {stopped[0]}",
            NOTHING_PLANTED,
        )
    print(f"\n{len(todo)} cases, {bad} with a fault or a wrong number")
    print(*details, sep="\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

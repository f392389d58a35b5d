"""Run the specialized product of ``benchmarks.lab.specialized`` on the emulator, as it is and with
planted faults.

    python -m tests.ptx_emulator.specialized [--quick] [--plant NAME] [--triton VERSION]

Exit status: 0 without any fault; 1 with a fault or a wrong number; 3 if --plant planted nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benchmarks.common import tritons
from benchmarks.lab.specialized.cases import CASES, PAIRS, Case, Made, make, share
from benchmarks.lab.specialized.launches import launch_product
from benchmarks.lab.specialized.product import product
from benchmarks.lab.specialized.support import reason_against
from benchmarks.lab.specialized.tiles import Sizes
from stablelora_kernels.kernels.common import stores_done
from stablelora_kernels.launch.base import Launch
from tests.ptx_emulator import runner
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.memory import EmulationError

NOTHING_PLANTED = 3
# Of copies, and of groups of four warps.
SCHEDULES = (
    Schedule("sm_90"),
    Schedule("sm_90", landing="early"),
    Schedule("sm_90", warps="groups-last", landing="random", seed=1),
    Schedule("sm_90", warps="groups-random", landing="random", seed=2),
)


class Job(NamedTuple):
    """A case, and whether a program of the same launch stores S."""

    case: Case
    chained: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name}, chained" if self.chained else self.case.name


# Several tiles and steps a program, each with a branch.
SINGLE = Job(Case(300, 512, 320, r=16, bias=True, programs=2))
PAIR = Job(Case(300, 512, 320, r=16, bias=True, pairs=True, programs=1))
CHAINED = SINGLE._replace(chained=True)


@gluon.jit(do_not_specialize=["M", "PRODUCTS"])
def chained_product_kernel(
    source, x_desc, w_desc, y_desc, branch, mask, flags, bias, M, N, K, PRODUCTS,
    TILE: gl.constexpr, BRANCH: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """The first program copies S from ``source`` and counts its tiles; the others compute Y."""
    program = gl.program_id(0)
    if program == 0:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
        tile_rows = gl.arange(0, BRANCH.S_BLOCK_M, layout=gl.SliceLayout(1, layout))
        ranks = gl.arange(0, BRANCH.BLOCK_R, layout=gl.SliceLayout(0, layout))
        for row0 in range(0, M, BRANCH.S_BLOCK_M):
            rows = row0 + tile_rows
            at = rows[:, None] * branch.stride_s + ranks[None, :]
            inside = (rows[:, None] < M) & (ranks[None, :] < branch.R)
            gl.store(branch.s + at, gl.load(source + at, mask=inside, other=0.0), mask=inside)
            stores_done(row0)
            gl.atomic_add(flags + row0 // BRANCH.FLAG_M, 1, sem="release", scope="gpu")
    else:
        sizes = Sizes(M, N, K, PRODUCTS, program - 1)
        product(x_desc, w_desc, y_desc, branch, mask, flags, bias, sizes, TILE, BRANCH, REGISTERS)


def launch_of(job: Job, made: Made) -> Launch:
    launch = launch_product(made.operands, job.case.programs, job.case.pairs)
    if not job.chained:
        return launch
    operands = made.operands
    assert operands.s is not None and operands.flags is not None
    source = operands.s.clone()
    # Nothing is there yet.
    operands.s.fill_(float("nan"))
    operands.flags.zero_()
    return launch._replace(
        kernel=chained_product_kernel,
        grid=(launch.grid[0] + 1,),
        args=(source, *launch.args),
    )


class Outcome(NamedTuple):
    """The largest error over its bound, and what was found. ``stopped``: why the launch did not
    end.
    """

    share: float
    faults: list[str]
    stopped: str = ""

    @property
    def right(self) -> bool:
        return self.share <= 1 and not self.faults and not self.stopped


def emulate(job: Job, schedule: Schedule) -> Outcome:
    made = make(job.case)
    try:
        faults = runner.run(launch_of(job, made), schedule)
    except EmulationError as error:
        return Outcome(float("inf"), [], str(error)[:300])
    return Outcome(share(made), faults.lines())


class Plant(NamedTuple):
    """``pattern`` of the PTX becomes ``by``: one synchronization less. ``job`` shows it."""

    pattern: str
    by: str
    job: Job = SINGLE

    def edit(self, ptx: str) -> str:
        return re.sub(self.pattern, self.by, ptx)


_INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), "
# By name.
PLANTS = {
    # Each consumer overlooks the product before the last.
    "wgmma-wait": Plant(
        r"wgmma\.wait_group\.sync\.aligned\s+1;", "wgmma.wait_group.sync.aligned 2;"
    ),
    "proxy-fence": Plant(r"fence\.proxy\.async\.shared::cta;", ""),
    # The buffer of Y is overwritten while a store reads it.
    "store-wait": Plant(r"cp\.async\.bulk\.wait_group\.read\s+0;", ""),
    # The barriers of a consumer's four warps.
    "role-barriers": Plant(r"bar\.sync\s+[02], 128;", ""),
    "init-barrier": Plant(r"barrier\.sync\s+1;", ""),
    # The loader overwrites tiles that one consumer has read.
    "one-consumer": Plant(_INIT + "2;", r"\1, 1;"),
    "flag-acquire": Plant(r"ld\.acquire\.gpu\.global\.b32", "ld.relaxed.gpu.global.b32", CHAINED),
    "flag-release": Plant(r"\.gpu\.release\.", ".gpu.relaxed.", CHAINED),
    # The leading CTA overwrites W of which the other CTA still reads its copy.
    "one-cta": Plant(_INIT + "4;", r"\1, 2;", PAIR),
    # A CTA ends while the other one arrives at its barriers.
    "cluster-end": Plant(
        r"barrier\.cluster\.arrive\.aligned;\s*barrier\.cluster\.wait\.aligned;", "", PAIR
    ),
}


def plant(name: str) -> tuple[bool, str]:
    """Run the plant's job under each schedule until the fault is found. Return whether code was
    planted, and what was found, or "".
    """
    planted = []

    def edit(kernel: str, ptx: str) -> str:
        edited = PLANTS[name].edit(ptx)
        planted.append(edited != ptx)
        return edited

    runner.edits[:] = [edit]
    try:
        for schedule in SCHEDULES:
            outcome = emulate(PLANTS[name].job, schedule)
            if not outcome.right:
                words = outcome.stopped or next(iter(outcome.faults), "")
                return any(planted), words or f"error {outcome.share:.3g} of its bound"
    finally:
        runner.edits.clear()
    return any(planted), ""


def todo(quick: bool) -> list[tuple[Job, Schedule]]:
    """The jobs with their schedules. Quick: small ones."""
    pairs = [] if reason_against(pairs=True) else [Job(case) for case in PAIRS]
    if quick:
        few = [(Job(CASES[4]), SCHEDULES[1]), (Job(CASES[6]), SCHEDULES[3])]
        return few + [(pair, SCHEDULES[2]) for pair in pairs[:1]]
    jobs = [*map(Job, CASES), CHAINED, *pairs]
    return [(job, schedule) for job in jobs for schedule in SCHEDULES]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx_emulator.specialized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small cases")
    help_ = "take a synchronization out of the PTX, which must be found"
    parser.add_argument("--plant", choices=PLANTS, metavar="NAME", help=help_)
    tritons.add_option(parser)
    options = parser.parse_args(arguments)
    tritons.run_again("tests.ptx_emulator.specialized", options.triton, arguments)
    torch.set_num_threads(1)
    if options.plant:
        planted, found = plant(options.plant)
        print(f"{options.plant}: {found or 'MISSED'}", flush=True)
        return int(bool(found)) if planted else NOTHING_PLANTED
    wrong = 0
    for job, schedule in todo(options.quick):
        began = time.monotonic()
        outcome = emulate(job, schedule)
        wrong += not outcome.right
        how = f"landing {schedule.landing}, warps {schedule.warps}"
        found = f"error {outcome.share:.2f} of its bound, {len(outcome.faults)} faults"
        print(f"{job.name}; {how}: {found}, {time.monotonic() - began:.1f} s", flush=True)
        for line in outcome.faults or filter(None, [outcome.stopped]):
            print(f"    {line}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

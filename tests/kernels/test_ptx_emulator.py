"""The library's compiled kernels on the emulator; the emulator's own validation; and the faults
that it must find.

Most run in processes of their own, because Triton's interpreter, in which other tests run, compiles
nothing.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.tritons import PINNED
from stablelora_kernels.dispatch.backend import judge
from tests.helpers.processes import python
from tests.ptx_emulator.__main__ import ARCHS, LONG, QUICK, schedule_of
from tests.ptx_emulator.__main__ import parse as parse_command
from tests.ptx_emulator.machine import LaunchState, Machine, Schedule
from tests.ptx_emulator.memory import EmulationError, global_memory
from tests.ptx_emulator.parse import parse
from tests.ptx_emulator.program import CompiledProgram

triton = pytest.importorskip(
    "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
)

BLACKWELL = [pytest.param(arch, marks=pytest.mark.nightly) for arch in ("sm_100", "sm_120")]
# By day, those of Hopper.
PLANTS = ["optimizer-barrier", "flag-acquire", "wgmma-wait"]


def run(code: str) -> None:
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr


# The library's products have a fence of their own; these have Triton's alone.
needs_fences = pytest.mark.skipif(
    triton.__version__ in ("3.6.0", "3.7.0"),
    reason="runs under Triton 3.7.1 and newer: older ones leave out fences between copies and WGMMAs, as is found",
)


@pytest.mark.parametrize(
    "arch",
    [pytest.param("sm_80", marks=pytest.mark.nightly), pytest.param("sm_90", marks=needs_fences)],
)
def test_kernels_of_its_own(arch: str) -> None:
    run(f"from tests.ptx_emulator.validation import main; main({arch!r})")


def emulate(*arguments: str, only: tuple[str, ...] = ("",), before: str = "") -> None:
    run(f"""{before}
from tests.ptx_emulator.__main__ import main
raise SystemExit(any([main([*{arguments!r}, "--only", name]) for name in {only!r}]))""")


# In processes of some cases each: importing Triton takes as long as a case. The third part has the
# kernels whose programs wait for each other; it runs by day.
SHORT = [name for name in QUICK if name not in LONG]
CASES = [
    tuple(SHORT[2::3]),
    *(
        pytest.param(names, marks=pytest.mark.nightly)
        for names in (tuple(SHORT[0::3]), tuple(SHORT[1::3]))
    ),
    *(pytest.param((name,), marks=pytest.mark.nightly) for name in LONG),
]


@pytest.mark.parametrize("names", CASES, ids=", ".join)
@pytest.mark.parametrize(
    "arch", [pytest.param("sm_80", marks=pytest.mark.nightly), "sm_90", *BLACKWELL]
)
def test_each_kernel_of_the_library(arch: str, names: tuple[str, ...]) -> None:
    emulate("--quick", "--arch", arch, only=names)


def test_kernels_of_blackwell() -> None:
    """By day, of few rows: products in tensor memory, packed float32. The library refuses a B200
    under older Tritons than 3.9, whose code for it has races.
    """
    runs_on_b200 = not judge((10, 0), triton.__version__).problem
    archs = "sm_100,sm_120" if runs_on_b200 else "sm_120"
    emulate("--quick", "--arch", archs, only=("linear few_rows",))


@pytest.mark.nightly
def test_programs_wait_as_on_amds_gpus() -> None:
    """Triton's own loop around an atomic waits for a flag there, as in the interpreter."""
    patched = """
import triton.language as tl
from stablelora_kernels.kernels.lora import chain
chain.INTERPRETING = tl.constexpr(True)"""
    emulate("--quick", "--arch", "sm_80", only=("linear one_launch",), before=patched)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    ["--arch sm_90", "--arch sm_80 --quick", "--arch sm_100 --quick", "--arch sm_120 --quick"],
)
@pytest.mark.parametrize("version", PINNED)
def test_every_case_under_every_triton(version: str, options: str) -> None:
    """Each torch pins one Triton. --triton installs it beside this one, and runs the command again
    with it.

    Where the table in ``dispatch.backend`` says that a release is wrong for a GPU, the emulator
    must find a fault.
    """
    arguments = ["-m", "--triton", version, *options.split()]
    done = python(f"""
import runpy, sys
sys.argv = {arguments!r}
runpy.run_module("tests.ptx_emulator", run_name="__main__")
""")
    arch = options.split()[1].removeprefix("sm_")
    wrong = judge((int(arch[:-1]), int(arch[-1])), version).problem
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr


@pytest.mark.nightly
def test_barriers_of_our_own_suffice() -> None:
    """Triton 3.9 adds a barrier of its own ahead of an atomic that releases, and 3.6 does not: the
    source must have all.
    """
    run("""
from tests.ptx_emulator import runner
from tests.ptx_emulator.cases import cases, run_case
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.plants import without_barriers_of_triton
runner.edits[:] = [without_barriers_of_triton]
names = ("linear one_launch bf16/fp32 M130 r16 p0.1", "linear bf16/fp32 M33 K520 r16 p0.1, long sum")
outcomes = [run_case(case, Schedule(warps="first")) for case in cases() if case.name in names]
wrong = [line for outcome in outcomes if not outcome.right for line in (outcome.words, *outcome.log.faults.lines())]
assert len(outcomes) == 2 and not wrong, wrong
""")


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_every_case(arch: str) -> None:
    """Under this environment's Triton; on sm_90, where most faults were, under each, above."""
    emulate("--arch", arch)


def test_cases_take_each_schedule_in_turn(monkeypatch) -> None:
    """A case another one on each GPU, and each GPU all."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = parse_command([])

    def schedule(arch: str, number: int) -> Schedule:
        taken = schedule_of(options, arch, number)
        assert taken.arch == arch
        assert taken.warps is None or taken.warps.startswith("groups-") == (arch == "sm_90")
        return taken._replace(arch="", warps=taken.warps and taken.warps.removeprefix("groups-"))

    for arch in ARCHS:
        assert len({schedule(arch, number) for number in range(30, 36)}) == 6
    for number in range(6):
        assert len({schedule(arch, number) for arch in ARCHS}) == 6
    asked = parse_command(["--landing", "random", "--arch", "sm_90"])
    assert schedule_of(asked, "sm_90", 1) == Schedule("sm_90", "random")


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_planted_fault_changes_the_ptx(arch: str) -> None:
    """Of each kernel that a plant names. Compiled, not run: whether the emulator finds the faults
    is the night's.
    """
    run(f"""
from tests.ptx_emulator.cases import cases, kernels_of
from tests.ptx_emulator.plants import PLANTS
here = {{name: plant for name, plant in PLANTS.items() if {arch!r} in plant.archs}}
wanted = {{plant.case for plant in here.values()}}
kernels = {{case.name: kernels_of(case, {arch!r}) for case in cases() if case.name in wanted}}
unplanted = [
    name for name, plant in here.items()
    if all(plant.edit(kernel.name, kernel.ptx) == kernel.ptx for kernel in kernels[plant.case])
]
assert not unplanted and len(here) >= 10, unplanted
""")


@pytest.mark.nightly
def test_a_fault_that_finds_no_place_is_not_one_that_is_found() -> None:
    """The exit status is none of those of a run."""
    run("""
from tests.ptx_emulator.__main__ import main
from tests.ptx_emulator.plants import PLANTS
PLANTS["optimizer-barrier"] = PLANTS["optimizer-barrier"]._replace(source="no_file.py")
assert main(["--plant", "optimizer-barrier", "--arch", "sm_80"]) == 3
assert main(["--plant", "tma-flag-release", "--arch", "sm_80"]) == 2
""")


@pytest.mark.parametrize(
    "names", [PLANTS, pytest.param(None, marks=pytest.mark.nightly)], ids=["few", "all"]
)
@pytest.mark.parametrize(
    "arch", [pytest.param("sm_80", marks=pytest.mark.nightly), "sm_90", *BLACKWELL]
)
def test_planted_faults_are_found(arch: str, names: list[str] | None) -> None:
    run(f"""
from tests.ptx_emulator.__main__ import main
from tests.ptx_emulator.plants import PLANTS
here = [name for name, plant in PLANTS.items() if {arch!r} in plant.archs]
assert len(here) >= 10
missed = [name for name in {names!r} or here if name in here and main(["--plant", name, "--arch", {arch!r}]) != 1]
assert not missed, missed
""")


PTX = """.version 8.7
.target sm_80
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 32
{
.reg .b32 %r<3>;
.loc 1 17 0
INSTRUCTION;
ret;
}
.file 1 "/somewhere/source.py"
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.bf16x2 %r1, %r1, %r2",
        "add.sat.f32 %r1, %r1, %r2",
        "add.f32 %r1, %r1, %r2, %r2",
        "bar.red.popc.u32 %r1, 0, 1",
        "ld.local.u32 %r1, [%r2]",
    ],
)
def test_an_unknown_instruction_is_named_with_its_line(instruction: str) -> None:
    assert CompiledProgram(parse(PTX.replace("INSTRUCTION", "mov.b32 %r1, %tid.x"))).runs
    with pytest.raises(NotImplementedError) as error:
        CompiledProgram(parse(PTX.replace("INSTRUCTION", instruction)))
    assert str(error.value) == f"the PTX emulator does not know {instruction} [source.py:17]"


def test_a_loop_without_end_is_stopped() -> None:
    program = CompiledProgram(
        parse(PTX.replace("INSTRUCTION", "mov.b32 %r1, 0;\nLOOP:\nbra.uni LOOP"))
    )
    x = torch.zeros(4)
    launch = LaunchState(program, "kernel", (1, 1, 1), bytes(8), 0, {})
    with pytest.raises(EmulationError, match=r"no end after 100000 steps: CTA 0 of kernel"):
        Machine(global_memory([(x.data_ptr(), x.nbytes, "x")], 2), launch, Schedule()).run()


@pytest.mark.parametrize(
    ("lane", "shape", "allowed"),
    [
        (0, "32x32b.x1.b32 {%r1}, [%r2 + 0]", True),
        (16, "16x32bx2.x1.b32 {%r1}, [%r2 + 0], 1", True),
        (8, "16x32bx2.x1.b32 {%r1}, [%r2 + 0], 1", False),
        (16, "32x32b.x1.b32 {%r1}, [%r2 + 0]", False),
        (32, "32x32b.x1.b32 {%r1}, [%r2 + 0]", False),
    ],
)
def test_a_warp_accesses_its_quarter_of_tensor_memory(lane: int, shape: str, allowed: bool) -> None:
    """Of the 128 lanes, the first warp has 0 to 31."""
    code = f"""mov.b32 %r1, global_smem;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
ld.shared.b32 %r0, [%r1];
add.u32 %r2, %r0, {lane << 16};
tcgen05.ld.sync.aligned.{shape};
tcgen05.wait::ld.sync.aligned;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r0, 32"""
    program = CompiledProgram(parse(PTX.replace("INSTRUCTION", code)))
    x = torch.zeros(4)
    launch = LaunchState(program, "kernel", (1, 1, 1), bytes(8), 16, {})
    machine = Machine(global_memory([(x.data_ptr(), x.nbytes, "x")], 2), launch, Schedule("sm_100"))
    machine.run()
    kinds = [kind for kind, _ in machine.faults.found]
    assert kinds == [] if allowed else kinds == ["tensor memory that a warp may not access"]


FENCE = "wgmma.fence.sync.aligned;"
MOVES = "mov.b32 %r1, %r5; mov.b32 %r2, %r6;"
# Of accumulators in registers 1 to 4 and 9 to 12, the second with A in registers 5 to 8.
FIRST = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, %rd1, %rd2, 1, 1, 1, 0, 0;"
SECOND = FIRST.replace("%r1,%r2,%r3,%r4", "%r9,%r10,%r11,%r12")
OF_REGISTERS = FIRST.replace("%rd1", "{%r13,%r14,%r15,%r16}").replace("1, 0, 0;", "1, 0;")
MOVES_OF_SECOND = MOVES.replace("%r1,", "%r9,").replace("%r2,", "%r10,")
ACCUMULATOR, LEFT = "missing wgmma.fence (accumulator)", "missing wgmma.fence (A in registers)"


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        (MOVES + FENCE + FIRST, {}),
        (MOVES + FIRST, {ACCUMULATOR: 4}),
        (FENCE + MOVES + FIRST, {}),
        # Of a copy, and of both accumulators ahead of the first product.
        (FENCE + "mov.b32 %r17, %r5; mov.b32 %r1, %r17;" + FIRST, {}),
        (FENCE + MOVES + MOVES_OF_SECOND + FIRST + SECOND, {}),
        (FENCE + "mov.b32 %r13, %r5;" + OF_REGISTERS, {}),
        # The fence has not ordered these values.
        (FENCE + "add.u32 %r1, %r5, 1;" + FIRST, {ACCUMULATOR: 1}),
        (FENCE + "add.u32 %r5, %r5, 1;" + MOVES + FIRST, {ACCUMULATOR: 1}),
        (FENCE + MOVES + "add.u32 %r1, %r1, 1;" + FIRST, {ACCUMULATOR: 1}),
        (FENCE + "mov.b32 %r1, 7;" + FIRST, {ACCUMULATOR: 1}),
        (FENCE + "selp.b32 %r1, %r5, %r6, %p1;" + FIRST, {ACCUMULATOR: 1}),
        (FENCE + "add.u32 %r13, %r5, 1;" + OF_REGISTERS, {LEFT: 1}),
        # Copies that ptxas cannot place ahead of the fence's own instruction.
        (FENCE + FIRST + MOVES_OF_SECOND + SECOND, {ACCUMULATOR: 2}),
        (FENCE + "@%p1 mov.b32 %r1, %r5;" + FIRST, {ACCUMULATOR: 1}),
        (FENCE + "bar.sync 0;" + MOVES + FIRST, {ACCUMULATOR: 2}),
        (FENCE + "@!%p1 bra JOIN; mov.b32 %r17, 1; JOIN: " + MOVES + FIRST, {ACCUMULATOR: 2}),
        # Behind a wait, its own accumulators alone are ordered.
        (FENCE + FIRST + "WAIT" + FIRST, {}),
        (FENCE + FIRST + "WAIT mov.b32 %r9, %r1;" + SECOND, {ACCUMULATOR: 1}),
    ],
)
def test_a_fence_orders_values_and_so_their_copies(code: str, faults: dict[str, int]) -> None:
    wait = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    values = "".join(f"add.u32 %r{i}, %r0, {100 * i};" for i in range(1, 18))
    # Of 64 x 16 and 8 x 16 elements without a swizzle, one behind the other.
    descriptor = 1024 >> 4 | (128 >> 4) << 16 | (256 >> 4) << 32
    first = f"mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 4000; mov.b64 %rd1, {descriptor};"
    text = f"{first} mov.b64 %rd2, {descriptor + (2048 >> 4)}; {values} {code} {wait}"
    ptx = PTX.replace("INSTRUCTION;", text.replace("WAIT", wait)).replace("32\n{", "128\n{")
    ptx = ptx.replace("%r<3>;", "%r<18>; .reg .b64 %rd<3>; .reg .pred %p<2>;")
    x = torch.zeros(4)
    launch = LaunchState(CompiledProgram(parse(ptx)), "kernel", (1, 1, 1), bytes(8), 4096, {})
    machine = Machine(global_memory([(x.data_ptr(), x.nbytes, "x")], 2), launch, Schedule("sm_90"))
    machine.run()
    found: dict[str, int] = {}
    for (kind, _), (count, _) in machine.faults.found.items():
        found[kind] = found.get(kind, 0) + count
    assert found == faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--arch sm_70",
            "--arch must name GPUs of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got 'sm_70'",
        ),
        (
            "--arch sm_80,gfx942",
            "--arch must name GPUs of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got 'gfx942'",
        ),
        ("--plant nothing", "invalid choice: 'nothing'"),
        ("--resident 0", "--resident must be at least 1, got 0"),
        ("", "TRITON_INTERPRET is set"),
    ],
)
def test_what_the_command_line_refuses(arguments: str, message: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        parse_command(arguments.split())
    assert message in capsys.readouterr().err

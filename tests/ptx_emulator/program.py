"""A kernel ready to run: straight runs of instructions become generated Python functions, branches
and barriers end a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx_emulator import accesses, tcgen05, tma, wgmma
from tests.ptx_emulator.arithmetic import Arithmetic
from tests.ptx_emulator.machine import CTA, GO, STOP, Group
from tests.ptx_emulator.memory import EmulationError
from tests.ptx_emulator.parse import SIZES, Instruction, Program

Control = Callable[[CTA, Group], str]


class Run:
    """Instructions from one label or control instruction to the next. ``end``: the pc behind it."""

    def __init__(
        self, compile_for: Callable[[bool], Callable[..., None]], end: int, control: Control | None
    ) -> None:
        self._compile, self.end, self.control = compile_for, end, control
        self._functions: dict[bool, Callable[..., None]] = {}

    def __call__(self, c: CTA, mask: Any) -> None:
        """For the threads of ``mask``; None is all."""
        partial = mask is not None
        if partial not in self._functions:
            self._functions[partial] = self._compile(partial)
        self._functions[partial](c, mask)


class CompiledProgram:
    """A kernel's ``runs`` by their first pc."""

    def __init__(self, program: Program) -> None:
        self.code, self.threads = program.code, program.threads
        self.registers, self.params, self.labels = program.registers, program.params, program.labels
        self.arithmetic = Arithmetic(program)
        self.shared_granule, self.global_granule = _granules(program.code)
        self.runs: dict[int, Run] = {}
        starts = {
            0,
            *program.labels.values(),
            *(ins.pc + 1 for ins in program.code if ins.is_control),
        }
        for start in starts - {len(program.code)}:
            self.runs[start] = self._run(start, starts)

    def _run(self, start: int, starts: set[int]) -> Run:
        end = start
        while not self.code[end].is_control and end + 1 < len(self.code) and end + 1 not in starts:
            end += 1
        last = self.code[end]
        code, control = self.code[start : end + 1], None
        if last.is_control:
            code, control = code[:-1], self._control(last)
        # Here, so that an unknown instruction stops the emulator even where no thread comes.
        lines = {
            partial: [line for ins in code for line in self._lines(ins, partial)]
            for partial in (False, True)
        }

        def compile_for(partial: bool) -> Callable[..., None]:
            text = "def run(c, m):\n    R = c.R\n" + "".join(
                f"    {line}\n" for line in lines[partial]
            )
            found: dict[str, Any] = {}
            exec(compile(text, f"<{last}>", "exec"), self.arithmetic.space, found)
            return found["run"]

        return Run(compile_for, end + 1, control)

    def _lines(self, ins: Instruction, partial: bool) -> list[str]:
        """Python for one instruction; ``m`` is the mask of the threads that run, of all if not
        ``partial``.
        """
        guard = (
            None
            if ins.guard is None
            else f"{'~' * ins.negated}R[{self.arithmetic.place(ins.guard)}]"
        )
        mask = " & ".join(each for each in (guard, "m" if partial else None) if each)
        made = self.arithmetic.expressions(ins)
        if made is not None:
            return [
                f"R[{at}] = np.where({mask}, {e}, R[{at}])" if mask else f"R[{at}] = {e}"
                for at, e in made
            ]
        name = f"X{ins.pc}"
        if name not in self.arithmetic.space:
            self.arithmetic.space[name] = self._action(ins)
        if guard is None:
            return [f"{name}(c, m)"]
        return [f"g = {mask}", f"if g.any(): {name}(c, None if g.all() else g)"]

    def _action(self, ins: Instruction) -> Callable[[CTA, Any], None]:
        """A function of the CTA and a mask for an instruction that is no arithmetic."""
        for module in (accesses, tma, wgmma, tcgen05):
            for prefix, build in module.INSTRUCTIONS.items():
                if ins.op.startswith(prefix):
                    return build(self.arithmetic, ins)
        raise ins.unknown()

    def special(self, c: CTA, name: str) -> Any:
        """A special register."""
        base, _, axis = name.partition(".")
        known = {
            "%tid": (c.all_lanes, 0, 0),
            "%ctaid": c.id,
            "%nctaid": c.launch.grid,
            "%ntid": (c.n, 1, 1),
        }
        if base not in known:
            raise NotImplementedError(f"the PTX emulator does not know the register {name}")
        return np.full(c.n, known[base]["xyz".find(axis or "x")], np.uint32)

    # Control instructions return what the group does next. Its pc is already behind them.

    def _control(self, ins: Instruction) -> Control:
        head, words = ins.mods[0], self.arithmetic
        if head == "bra":
            polls = ins.target <= ins.pc and any(
                _polls(each) for each in self.code[ins.target : ins.pc]
            )
            if ins.guard is None:
                return lambda c, group: c.branch(group, c.everyone, ins.target, polls)
            place = words.place(ins.guard)
            return lambda c, group: c.branch(group, c.R[place] != ins.negated, ins.target, polls)
        if ins.guard is not None:
            raise ins.unknown()
        if head == "brx":
            return self._branch_table(ins)
        if head == "ret":
            return lambda c, group: c.exit(group)
        if ins.op.startswith("mbarrier.try_wait"):
            return self._wait_for_phase(ins)
        if not ins.args[0].isdigit() or ins.op not in ("bar.sync", "barrier.sync"):
            raise ins.unknown()
        number, count = int(ins.args[0]), int(ins.args[1], 0) if len(ins.args) > 1 else None
        return lambda c, group: c.barrier(group, number, count)

    def _wait_for_phase(self, ins: Instruction) -> Control:
        place, address = self.arithmetic.place(ins.args[0]), self.arithmetic.address(ins.args[1])
        parity = self.arithmetic.reader(ins.args[2], "u32")

        def wait(c: CTA, group: Group) -> str:
            lanes = np.flatnonzero(group.mask)
            wanted = {
                *zip(address(c)[lanes].tolist(), (parity(c)[lanes] & 1).tolist(), strict=True)
            }
            if len(wanted) > 1:
                raise EmulationError(f"threads wait for several phases at {ins}")
            ((at, bit),) = wanted
            warps = np.unique(c.warp_of[lanes])
            barrier = tma.mbarrier(c, at, ins, warps)
            if not tma.phase_has_passed(c, at, bit, ins):
                group.waits, group.pc = ("mbarrier", at, bit, ins), ins.pc
                return STOP
            for warp in warps:
                c.machine.races.take(warp, barrier.published)
            c.set(place, True, lanes)
            return GO

        return wait

    def _branch_table(self, ins: Instruction) -> Control:
        read = self.arithmetic.reader(ins.args[0], "u32")
        targets = np.array([self.labels[name] for name in ins.args[2]])

        def branch(c: CTA, group: Group) -> str:
            where = targets[np.where(group.mask, read(c), 0)]
            for pc in np.unique(where[group.mask]):
                c.groups.append(Group(int(pc), group.mask & (where == pc), group.unit))
            c.groups.remove(group)
            return STOP

        return branch


def _polls(ins: Instruction) -> bool:
    """Whether it may read what other CTAs write."""
    return ins.mods[0] == "atom" or (
        ins.mods[0] == "ld" and bool({"volatile", "acquire", "relaxed"} & {*ins.mods})
    )


def _granules(code: list[Instruction]) -> tuple[int, int]:
    """The finest access to shared and to global memory, at most 4 and 2 bytes."""
    accessed = [
        ins for ins in code if ins.mods[0] in ("ld", "st", "atom", "red") and ".param" not in ins.op
    ]
    sizes = {
        shared: [SIZES[ins.kind] for ins in accessed if ins.shared == shared]
        for shared in (True, False)
    }
    return min([4, *sizes[True]]), min([2, *sizes[False]])

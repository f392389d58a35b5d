"""Run the programs of launches under seeded schedules, on a model of a GPU's memory.

A schedule switches between programs at each access of memory that some program writes. The model is as unkind as a GPU may be:

- A program has a view of memory, copied when the program begins. Loads read the view. Stores write to the view and stay out of
  memory, so a program sees its own stores, byte by byte.
- An atomic acts on memory. Release semantics first publish the stores before the last barrier, because only a barrier orders the
  stores of a program's other threads. Acquire semantics then copy memory into the view.
- A volatile load copies its own address from memory, and nothing else. ``.cg`` is only a hint: such a load is a plain one.
- A launch begins once all earlier launches have ended, and their stores are published.
- Unpublished stores reach memory when their program ends, or only when CUDA promises it; the schedule decides. The schedule also
  lets single loads read memory, and single stores reach it at once, because a GPU may do either.

Schedules follow PCT (Burckhardt et al., 2010): random priorities, and a few random steps at which the running program falls
behind all others. One schedule finds a fault that takes d ordered steps with probability at least 1 / (programs * steps^(d-1)).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor
from triton._C.libtriton import ir

from stablelora_kernels.launch.base import Launch
from tests.helpers.memory_image import Layout, OutOfBounds
from tests.helpers.program_trees import Access, Trees, Walk, tensors_of

RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
# The state of a byte in a program's view: not stored since it was published or copied; stored; stored before a barrier.
CLEAN, STORED, BEHIND_BARRIER = 0, 1, 2
# Change points of a schedule.
DEPTH = 3
# A program that reads the same value from one address this many times in a row waits for the value to change.
SPINS = 3


class Stuck(Exception):
    """No program can go on, or some never end. The message has each program's state."""


class Failure(NamedTuple):
    """A schedule that got stuck or left other bytes than the run in order."""

    # None is the run in order.
    schedule: int | None
    what: str


class Mutation(NamedTuple):
    """In memory only: the jitted ``function`` with every ``text`` in its source replaced by ``by``."""

    function: Any
    text: str
    by: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Triton's interpreter runs the mutated function, whoever calls it."""
        function, text = self.function, self.text
        # This sets the rewriter's file name and line.
        function.rewrite()
        rewriter = function.rewriter
        source = rewriter._prepare_source(inspect.getsourcelines(function.fn)[0])
        assert text in source, f"{function.__name__} has no {text!r}"
        made = rewriter._compile_and_exec(rewriter._transform_ast(source.replace(text, self.by)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(type(function).rewritten_fn, function.fn, made)
            yield


class Schedule:
    """Every choice of a run, drawn from the schedule's number. With None, programs run in order and see every store at once."""

    def __init__(self, number: int | None, programs: int, steps: int) -> None:
        self.rng = rng = random.Random(number)
        self.priorities = list(range(programs, 0, -1))
        # The most programs that run at a time, and whether programs begin in the grid's order.
        self.processors, self.in_order = programs, True
        self.change_points: set[int] = set()
        # The probabilities that a load reads memory, that a store reaches memory at once, and that all of a program's stores
        # reach memory when the program ends.
        self.fresh = self.early = self.at_end = 1.0
        if number is not None:
            rng.shuffle(self.priorities)
            self.processors, self.in_order = rng.choice((programs, rng.randint(1, programs))), rng.random() < 0.5
            self.change_points = {rng.randrange(max(steps, 1)) for _ in range(DEPTH)}
            self.fresh, self.early, self.at_end = rng.choice((0.0, 0.3)), rng.choice((0.0, 0.3)), 0.5

    def happens(self, share: float) -> bool:
        return self.rng.random() < share


@dataclass
class Program:
    launch: int
    index: tuple[int, ...]
    priority: int
    # Once the program has begun: its run, its view of memory and the state of each byte of the view.
    walk: Walk | None = None
    view: Any = None
    state: Any = None
    done: bool = False
    # The last read of a single address: the address, the value, and how many times in a row.
    read_from: int = -1
    value: bytes = b""
    times: int = 0

    def has_read(self, place: Any, value: bytes) -> None:
        """Count how many times in a row the program has read ``value`` from one address."""
        if len(place) > 1:
            self.times = 0
        elif self.times and place[0, 0] == self.read_from and value == self.value:
            self.times += 1
        else:
            self.read_from, self.value, self.times = int(place[0, 0]), value, 1


class Interleaving:
    """``launches`` of one stream, to be run under any schedule. Every schedule must leave the bytes that the run in order leaves.

    ``others`` are tensors that kernels reach through addresses in tables. Runs change no tensor; :meth:`write_back` does.
    """

    def __init__(self, launches: Sequence[Launch], others: Iterable[Tensor] = ()) -> None:
        self.launches = list(launches)
        named = [pair for launch in self.launches for pair in tensors_of(launch)]
        self.layout = Layout([*named, *((f"other {i}", t) for i, t in enumerate(others))])
        self.trees = Trees(self.launches, self.layout)
        self.programs = sum(int(np.prod(grid)) for grid in self.trees.grids)
        self.steps = 0
        with self._interpreting(self.trees):
            run = _Run(self, self.trees, Schedule(None, self.programs, 0))
            self.expected = run.finish()
        # Reads of a storage that no program writes return the same at any time, so they are no steps.
        self.written, self.steps = run.written, sum(run.accesses.get(number, 0) for number in run.written)
        self.trees = Trees(self.launches, self.layout, self.written)

    def write_back(self) -> None:
        """Copy what the launches leave into the tensors."""
        self.layout.write_back(self.expected)

    def first_failure(
        self, schedules: Iterable[int | None], processors: int | None = None, mutation: Mutation | None = None
    ) -> Failure | None:
        """Run ``schedules`` until one fails.

        Args:
            processors: the most programs that run at a time; None draws a number for each schedule.
            mutation: changes the programs, but not the bytes that they must leave.
        """
        trees = self.trees if mutation is None else Trees(self.launches, self.layout, self.written)
        with self._interpreting(trees, mutation):
            for number in schedules:
                schedule = Schedule(number, self.programs, self.steps)
                schedule.processors = processors or schedule.processors
                try:
                    found = _Run(self, trees, schedule).finish()
                except (Stuck, OutOfBounds, AssertionError) as error:
                    # An AssertionError is a tl.assume that does not hold.
                    return Failure(number, str(error))
                if difference := self.layout.difference(found, self.expected):
                    return Failure(number, difference)
        return None

    @contextmanager
    def _interpreting(self, trees: Trees, mutation: Mutation | None = None) -> Iterator[None]:
        with mutation.applied() if mutation else nullcontext(), trees.installed():
            yield


class _Run:
    """One schedule's run."""

    def __init__(self, interleaving: Interleaving, trees: Trees, schedule: Schedule) -> None:
        self.trees, self.schedule, self.layout = trees, schedule, interleaving.layout
        self.limit = 20 * interleaving.steps + 1000
        self.memory = self.layout.initial.copy()
        self.launches = interleaving.launches
        priorities = iter(schedule.priorities)
        self.of_launch = [
            [Program(i, index, next(priorities)) for index in np.ndindex(grid)] for i, grid in enumerate(trees.grids)
        ]
        if not schedule.in_order:
            for made in self.of_launch:
                schedule.rng.shuffle(made)
        self.running: list[Program] = []
        # The first launches, of which all stores are published.
        self.flushed = 0
        # The storages that programs have written, and the number of accesses of each storage.
        self.written: set[int] = set()
        self.accesses: dict[int, int] = {}

    def finish(self) -> Any:
        """Run all programs to their ends and return the memory."""
        try:
            self._schedule([program for made in self.of_launch for program in made])
        finally:
            for program in self.running:
                program.walk.close()
        self._flush(len(self.of_launch))
        return self.memory

    def _schedule(self, waiting: list[Program]) -> None:
        step = 0
        while waiting or self.running:
            while waiting and len(self.running) < self.schedule.processors and self._have_ended(waiting[0].launch):
                self._begin(waiting.pop(0))
            ready = [program for program in self.running if not self._waits(program)]
            if not ready or step > self.limit:
                raise Stuck(self._report("deadlock" if not ready else f"no end after {step} steps"))
            program = max(ready, key=lambda each: each.priority)
            if step in self.schedule.change_points:
                self.schedule.change_points.remove(step)
                program.priority = -step
                continue
            step += 1
            program.walk.answer(self._perform(program))
            while (access := program.walk.access) and access.kind == "barrier":
                # No other program can see a barrier, so it is no step.
                program.walk.answer(self._perform(program))
            if access is None:
                self._end(program)

    def _have_ended(self, count: int) -> bool:
        """Whether the first ``count`` launches have ended."""
        return all(program.done for made in self.of_launch[:count] for program in made)

    def _begin(self, program: Program) -> None:
        self._flush(program.launch)
        program.view, program.state = self.memory.copy(), np.zeros_like(self.memory)
        program.walk = Walk(self.trees, program.launch, program.index)
        self.running.append(program)
        if program.walk.access is None:
            self._end(program)

    def _end(self, program: Program) -> None:
        program.done = True
        program.walk.close()
        self.running.remove(program)
        if self.schedule.happens(self.schedule.at_end):
            self._publish(program, program.state != CLEAN)

    def _waits(self, program: Program) -> bool:
        start, value = program.read_from, program.value
        return program.times >= SPINS and self.memory[start : start + len(value)].tobytes() == value

    def _report(self, title: str) -> str:
        lines = [title]
        for program in (program for made in self.of_launch for program in made if not program.done):
            what = "has not begun"
            if program.walk:
                access = program.walk.access
                what = f"before {access.kind} at {access.where}"
                if program.times >= SPINS:
                    what += f", has read {self.layout.describe(program.read_from, program.value)} again and again"
            name = self.launches[program.launch].kernel.__name__
            lines.append(f"launch {program.launch}, {name}, program {program.index}: {what}")
        return "\n  ".join(lines)

    # Memory.

    def _perform(self, program: Program) -> bytes:
        """Carry out the access that ``program`` asks for and return its result."""
        access: Access = program.walk.access
        kind, place = access.kind, access.place
        if place is not None:
            number = self.layout.region_at(place[0, 0]).number
            self.accesses[number] = self.accesses.get(number, 0) + 1
            if kind in ("store", "atomic"):
                self.written.add(number)
        if kind in ("load", "volatile load"):
            return self._load(program, place, kind == "volatile load")
        if kind == "atomic":
            return self._atomic(program, access)
        program.times = 0
        if kind == "store":
            program.view[place] = access.data
            program.state[place] = STORED
            if self.schedule.happens(self.schedule.early):
                self._publish(program, place)
        else:
            program.state[program.state == STORED] = BEHIND_BARRIER
        return b""

    def _load(self, program: Program, place: Any, is_volatile: bool) -> bytes:
        if is_volatile or self.schedule.happens(self.schedule.fresh):
            fresh = place[program.state[place] == CLEAN]
            program.view[fresh] = self.memory[fresh]
        value = program.view[place].tobytes()
        program.has_read(place, value)
        return value

    def _atomic(self, program: Program, access: Access) -> bytes:
        place = access.place
        # The scope "cta" includes no other program.
        is_wide = access.scope != ir.MEM_SYNC_SCOPE.CTA
        if access.sem in RELEASES and is_wide:
            self._publish(program, program.state == BEHIND_BARRIER)
        # A program's accesses of one address stay in order.
        self._publish(program, place[program.state[place] != CLEAN])
        before = self.memory[place].tobytes()
        answer = access.apply(self.memory)
        program.view[place] = self.memory[place]
        if access.sem in ACQUIRES and is_wide:
            self._refresh(program)
        if self.memory[place].tobytes() == before:
            program.has_read(place, before)
        else:
            program.times = 0
        return answer

    def _flush(self, count: int) -> None:
        """Publish all stores of the first ``count`` launches, which have ended."""
        for made in self.of_launch[self.flushed : count]:
            # Two programs that store to one address race: either value may stay.
            for each in self.schedule.rng.sample(made, len(made)):
                self._publish(each, each.state != CLEAN)
        self.flushed = max(self.flushed, count)

    def _publish(self, program: Program, which: Any) -> None:
        """Write bytes of the program's view to memory; ``which`` is a mask or indices."""
        self.memory[which] = program.view[which]
        program.state[which] = CLEAN

    def _refresh(self, program: Program) -> None:
        """Copy memory into the program's view, except where the program has unpublished stores."""
        np.copyto(program.view, self.memory, where=program.state == CLEAN)

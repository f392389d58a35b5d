"""The first use of a kind of call: its launches are proven where they run, and the strategies that
can do it are timed there.

Proven: the launches run on stand-ins of the call's layouts (``proofs.py``). A sample of each result
must be what PyTorch's operators give, within the analysis of rounding, and a second run must be
equal to the first in every bit. If not, this call gets PyTorch's result, and the strategy is retired
on this machine.

Timed: the strategies run in turns between events of the GPU, on the call's own operands. The
fastest is taken, unless it gains less than a tie.

``dispatch/first_use.py`` keeps what comes out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import backend, first_use, problem, tiles
from stablelora_kernels.dispatch.first_use import OPERATORS, Finding, Kind
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.settings import settings, tf32_allowed
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.ops.proofs import (
    MARGIN,
    Compared,
    Oracle,
    is_poisoned,
    like,
    plainly,
    poison,
)

# A strategy must be faster than the table's by more than this share. Less is noise, which would
# make answers differ from run to run.
TIE = 0.02
# The reason for a strategy where no clock has decided.
NOT_TIMED = "not timed"
# Milliseconds of timing for a kind of call, and the fewest and the most turns.
BUDGET_MS = 10.0
TURNS = (3, 10)
# More than any GPU's clock has, so that it waits long enough.
_CYCLES_PER_SECOND = 4e9
# The record's fields whose sizes do not follow the rows of x.
_FIXED = {"operands", "scales", "lora_As", "lora_Bs"}
# Settings of an op on which neither code nor time depends.
_NUMBERS = {"scalings", "starts", "ends", "dropout_p", "dropout_ps"}
# Settings that say what a forward saves.
_SAVED = {"save_s", "save_mask", "save", "stores_mask"}

# Builds the results, without values, and the launches that fill them: for a device, a call, a choice,
# and what places the results elsewhere.
Plan = Callable[..., tuple[Any, list[Any]]]


class Subject(NamedTuple):
    """An op whose calls are looked at."""

    name: str
    plan: Plan
    oracle: Oracle


class Decision(NamedTuple):
    """How a call runs."""

    # The strategy's name, OPERATORS for PyTorch's operators.
    strategy: str
    reason: str
    # None: the table's.
    choice: Choice | None = None
    # The name of the strategy with its tile, if there is one.
    name: str = ""
    # Whether what was found out just now may change how other calls run.
    is_news: bool = False


class _Run(NamedTuple):
    """How long one run took: on the GPU, and until the host had enqueued it."""

    milliseconds: float
    host_seconds: float


def time_on_gpu(runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Median seconds of each of ``runs`` on the current stream of a GPU, in turns.

    The GPU waits while a turn is enqueued, so that the host's time does not count.
    """
    for run in runs:
        # The vendor's library chooses kernels at its first product of a size.
        _once(run)
    once = [_once(run) for run in runs]
    milliseconds = sum(of_run.milliseconds for of_run in once)
    turns = min(max(int(BUDGET_MS / max(milliseconds, 1e-3)), TURNS[0]), TURNS[1])
    cycles = int(sum(of_run.host_seconds for of_run in once) * _CYCLES_PER_SECOND)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        torch.cuda._sleep(cycles)
        marks = [_marks() for _ in runs]
        for run, mark in zip(runs, marks, strict=True):
            mark.start.record()
            run()
            mark.end.record()
        torch.cuda.synchronize(device)
        for of_run, mark in zip(times, marks, strict=True):
            of_run.append(mark.milliseconds * 1e-3)
    return [statistics.median(of_run) for of_run in times]


class _Marks(NamedTuple):
    """Events around a run."""

    start: Any
    end: Any

    @property
    def milliseconds(self) -> float:
        between: float = self.start.elapsed_time(self.end)
        return between


def _marks() -> _Marks:
    return _Marks(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))


def _once(run: Callable[[], None]) -> _Run:
    mark = _marks()
    mark.start.record()
    begun = time.perf_counter()
    run()
    host_seconds = time.perf_counter() - begun
    mark.end.record()
    mark.end.synchronize()
    return _Run(mark.milliseconds, host_seconds)


# Tests replace it.
measure: Callable[[Sequence[Callable[[], None]], torch.device], list[float]] = time_on_gpu


def timed_kind_of(op: str, call: Any) -> Kind:
    """The kind of a call by which times are kept: whatever the forward saves. A checkpointed layer
    thus takes the same strategy when its forward runs again.
    """
    saved = [name for name in call.settings._fields if name in _SAVED]
    if saved:
        call = call._replace(settings=call.settings._replace(**dict.fromkeys(saved, None)))
    words = kind_of(op, call).words
    return Kind(f"{op}, timed", words + (", tiles" if first_use.tries_tiles() else ""))


def kind_of(op: str, call: Any) -> Kind:
    """The kind of a call: what its launches' code depends on, in words.

    Rows are rounded up to a power of two, so that batches of any size share few answers. Dropout's
    probability and scalings are left out.
    """
    words: list[str] = []
    rows = [*_row_counts(call)]
    for name, value in zip(call._fields, call, strict=True):
        if name == "settings":
            words += _settings_words(value)
        elif name == "seeds":
            continue
        elif name in _FIXED:
            of_field = value if isinstance(value, (list, tuple)) else [value]
            words.append(f"{name} {' '.join(map(_shape_words, of_field))}")
        else:
            of_field = value if isinstance(value, (list, tuple)) else [value]
            words.append(f"{name} {' '.join(map(_layout_words, of_field))}")
    sizes = " ".join(f"{1 << (count - 1).bit_length()}{_divisible(count)}" for count in rows)
    precision = ", tf32" if tf32_allowed() else ""
    return Kind(op, f"rows {sizes}, {', '.join(words)}{precision}")


def _divisible(count: int) -> str:
    """Whether a number of rows takes the code of multiples of 16: kernels are compiled for both."""
    if count == 1:
        return " (one)"
    return "" if count % 16 == 0 else " (odd)"


def _row_counts(call: Any) -> Iterator[int]:
    """The rows of x, or of each adapter."""
    starts, ends = getattr(call.settings, "starts", None), getattr(call.settings, "ends", ())
    if starts is not None:
        yield from (end - start for start, end in zip(starts, ends, strict=True))
        return
    first = next(t for t in _tensors_in(call) if t is not None)
    yield first.shape[:-1].numel()


def _settings_words(values: Any) -> list[str]:
    words = [
        f"{name} {value}"
        for name, value in zip(values._fields, values, strict=True)
        if name not in _NUMBERS
    ]
    drops = getattr(values, "dropout_ps", None) or [getattr(values, "dropout_p", 0.0)]
    return [*words, f"dropout {' '.join(str(p > 0) for p in drops)}"]


def _shape_words(t: Tensor | None) -> str:
    return "-" if t is None else f"{str(t.dtype)[6:]}{[*t.shape]}{_strides(t)}"


def _layout_words(t: Tensor | None) -> str:
    return (
        "-" if t is None else f"{str(t.dtype)[6:]}[{t.shape[-1] if t.dim() else ''}]{_strides(t)}"
    )


def _strides(t: Tensor) -> str:
    """What of a layout decides on wide loads and descriptors."""
    if t.dim() < 2 or not t.numel():
        return ""
    if (t.stride(-1) != 1 and not (t.dim() == 2 and t.stride(0) == 1)) or 0 in t.stride():
        return " strided"
    by = "" if t.stride(-1) == 1 else " by columns"
    steps = max(t.stride()) * t.element_size()
    return f"{by}{' unaligned' if (t.data_ptr() | steps) % 16 else ''}"


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            yield from _tensors_in(value)


class _FirstCall(NamedTuple):
    """A call whose kind is looked at, with what is known of it."""

    subject: Subject
    device: torch.device
    call: Any
    # The names of its strategies, the table's first.
    strategies: list[str]
    kind: Kind
    proof: Finding
    # The kind by which times are kept, and the times.
    timed_kind: Kind
    times: Finding

    @classmethod
    def of(cls, subject: Subject, device: torch.device, call: Any) -> _FirstCall:
        kind = kind_of(subject.name, call)
        timed_kind = timed_kind_of(subject.name, call)
        return cls(
            subject,
            device,
            call,
            subject.oracle.strategies(call),
            kind,
            first_use.finding_of(kind, device) or Finding(),
            timed_kind,
            first_use.finding_of(timed_kind, device) or Finding(),
        )

    @property
    def default(self) -> str | None:
        """The first strategy that is not retired."""
        return next((name for name in self.strategies if not self.is_retired(name)), None)

    def is_retired(self, name: str) -> bool:
        strategy = name.split(",")[0]
        return bool(first_use.fault_of(self.subject.name, strategy, self.device))

    def choice_of(self, name: str, tile: Tile | None = None) -> Choice | None:
        """The choice of a strategy; None is the table's own."""
        strategy = name.split(",")[0]
        if strategy == self.strategies[0] and tile is None:
            return None
        return Choice(strategy, "", tile)

    def is_right(self, name: str, tile: Tile | None = None) -> bool:
        """Whether a strategy is proven, which this finds out."""
        if name not in self.proof.faults:
            choice = self.choice_of(name, tile)
            find_fault = partial(_fault_of, self.subject, self.device, self.call, choice)
            first_use.prove(self.kind, self.device, self.proof, name, find_fault)
            first_use.keep(self.kind, self.device, self.proof)
        return self.proof.faults.get(name) == ""


def decide(subject: Subject, device: torch.device, call: Any) -> Decision:
    """How a call runs: by what first use has found, or finds now."""
    if not first_use.is_on(device):
        return Decision(subject.oracle.strategies(call)[0], "first use is off")
    first = _FirstCall.of(subject, device, call)
    default = first.default
    # A capture must not record a proof.
    if default is None or not first_use.may_run(device):
        return _by_findings(first, _draws(call))
    is_right = first.is_right(default)
    fault = first.proof.faults.get(default)
    if fault:
        words = f"{default!r} is wrong on this machine: {fault}"
        return Decision(OPERATORS, words, is_news=True)
    is_news = False
    if is_right and first.times.fastest is None and _may_time(device):
        _time(first)
        is_news = first.times.fastest == OPERATORS or any(first.proof.faults.values())
    decision = _by_findings(first, _draws(call))
    # Times hold for kinds that were not proven yet.
    name = decision.name or decision.strategy
    if name not in (OPERATORS, default) and not first.is_right(name, first.times.tile(name)):
        return Decision(default, NOT_TIMED, first.choice_of(default), is_news=True)
    return decision._replace(is_news=is_news)


def known(subject: Subject, device: torch.device, call: Any) -> Decision:
    """How a call runs by what is known, without a proof."""
    if not first_use.is_on(device):
        return Decision(subject.oracle.strategies(call)[0], "first use is off")
    return _by_findings(_FirstCall.of(subject, device, call), draws=False)


def was_known(subject: Subject, device: torch.device, call: Any) -> bool:
    """Whether the disk said before this process looked that PyTorch's operators take such a call.

    Then the PyTorch path may take it. In the middle of a step it may not: what it saves for backward
    and the masks that it draws are others, and a checkpoint may run an earlier forward again.
    """
    if not first_use.is_on(device):
        return False
    first = _FirstCall.of(subject, device, call)
    if _by_findings(first, draws=False).strategy != OPERATORS:
        return False
    is_old = [first_use.was_retired_before(subject.name, n, device) for n in first.strategies]
    return all(is_old) or (first.default is not None and first.times.is_old)


def _draws(call: Any) -> bool:
    """Whether a call draws dropout's masks. PyTorch's operators then take long inside the op: they
    draw the bits that its seeds stand for.
    """
    return any(seed is not None for seed in getattr(call, "seeds", ()))


def _by_findings(first: _FirstCall, draws: bool) -> Decision:
    """How a call runs by what is known. ``draws``: PyTorch's operators run only if nothing else can."""
    table = first.strategies[0]
    default = first.default
    retired = first_use.fault_of(first.subject.name, table, first.device)
    if default is None:
        return Decision(OPERATORS, f"{table!r} is retired on this machine: {retired}")
    name, reason = default, NOT_TIMED
    if retired:
        reason = f"{table!r} is retired on this machine: {retired}"
    is_free = settings.strategy == "auto" and not torch.are_deterministic_algorithms_enabled()
    fastest = _fastest(first, draws) if is_free else None
    if fastest is not None:
        name, reason = fastest, first.times.reason
    if name == OPERATORS:
        return Decision(OPERATORS, reason)
    choice = first.choice_of(name, first.times.tile(name))
    return Decision(name.split(",")[0], reason, choice, name=name)


def _fastest(first: _FirstCall, draws: bool) -> str | None:
    """The fastest strategy that may run; None if nothing was timed."""

    def may_run(name: str) -> bool:
        return not draws if name == OPERATORS else not first.is_retired(name)

    fastest = first.times.fastest
    if fastest is None or may_run(fastest):
        return fastest
    others = {name: us for name, us in first.times.microseconds.items() if may_run(name)}
    return min(others, key=others.__getitem__, default=None)


def _may_time(device: torch.device) -> bool:
    """Whether a clock may decide. The interpreter's says nothing about a GPU."""
    if settings.strategy != "auto" or torch.are_deterministic_algorithms_enabled():
        return False
    is_gpu = device.type == "cuda" and not backend.INTERPRETING
    return is_gpu or measure is not time_on_gpu


def _fault_of(subject: Subject, device: torch.device, call: Any, choice: Choice | None) -> str:
    """What is wrong with a strategy, in words, or ""."""
    oracle = subject.oracle
    stand_in = oracle.stand_ins(call)
    copy = oracle.stand_ins(call) if oracle.written(stand_in) else stand_in
    results = _run_poisoned(subject, device, copy, choice)
    written = oracle.written(copy)
    for compared in oracle.compare(stand_in, results, written):
        fault = compared.fault() if isinstance(compared, Compared) else compared
        if fault:
            return fault
    # Programs that race differ: every sum has a fixed order.
    again = _run_poisoned(subject, device, stand_in, choice)
    first, second = [
        [*_tensors_in(of_run), *of_call]
        for of_run, of_call in ((results, written), (again, oracle.written(stand_in)))
    ]
    if not all(map(torch.equal, first, second)):
        return "two runs on the same operands differ"
    return ""


def _run_poisoned(subject: Subject, device: torch.device, call: Any, choice: Choice | None) -> Any:
    """The results of a call. They, the scratch of its launches and the memory around both were NaN
    before.
    """
    from stablelora_kernels.launch import workspace

    around: list[Tensor] = []

    def placed(t: Tensor) -> Tensor:
        memory, view = like(t)
        poison(memory)
        margin = MARGIN // t.itemsize
        around.extend((memory[:margin], memory[-margin:]))
        return view

    with workspace.noted(placed):
        results, launches = subject.plan(problem.device_of(device), call, choice, placed)
    try:
        _run(launches, device)
    finally:
        # The counters are those of all ops. Left as they are, they would spoil right kernels, and
        # let the next launch wait for ever.
        was_left = workspace.reset_counters(device)
    if was_left:
        raise RuntimeError("its counters are not 0 behind its launches")
    if not all(map(is_poisoned, around)):
        raise RuntimeError("a kernel has written beyond its results or its scratch")
    return results


def _run(launches: Sequence[Any], device: torch.device) -> None:
    for launch in launches:
        launch.run(device)


def _time(first: _FirstCall) -> None:
    """Time every strategy that a proof finds right, and PyTorch's operators."""
    subject, device, call = first.subject, first.device, first.call
    if subject.oracle.written(call):
        # Each run would add to the call's own operands.
        return
    choices: dict[str, Choice | None] = {}
    for name in first.strategies:
        if first.is_retired(name) or not first.is_right(name):
            continue
        choices[name] = first.choice_of(name)
        for tile in _tiles_to_try(subject, device, call, name):
            words = f"{name}, {'x'.join(map(str, tile[:3]))}, {tile.num_warps} warps, {tile.num_stages} stages"
            if first.is_right(words, tile):
                first.times.tiles[words] = [*tile]
                choices[words] = first.choice_of(name, tile)
    runs: dict[str, Callable[[], None]] = {}
    with plainly(device):
        try:
            for name, choice in choices.items():
                launches = subject.plan(problem.device_of(device), call, choice)[1]
                runs[name] = partial(_run, launches, device)
            runs[OPERATORS] = partial(_discard, subject.oracle.by_operators, call)
            seconds = measure([*runs.values()], device)
        # The call itself does not need times.
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            first_use.logger.warning("%s is not timed: %s", subject.name, words)
            return
    times = dict(zip(runs, seconds, strict=True))
    table, best = next(iter(times)), min(times, key=times.__getitem__)
    shown = {name: round(of_run * 1e6, 1) for name, of_run in times.items()}
    reason = f"measured: {shown[best]} us, {table!r} {shown[table]} us"
    if times[best] >= times[table] * (1 - TIE):
        best = table
        reason = f"measured: {shown[table]} us, and no other is more than {TIE:.0%} faster"
    first.times.microseconds.update(shown)
    first.times.fastest = best
    first.times.reason = reason
    first_use.keep(first.timed_kind, device, first.times)
    first_use.logger.info("%s, %s: %s", subject.name, first.timed_kind.words, reason)


def _tiles_to_try(subject: Subject, device: torch.device, call: Any, name: str) -> list[Tile]:
    """Tiles of a strategy that are timed besides the table's."""
    products = subject.oracle.products(call)
    if not first_use.tries_tiles() or len(products) != 1 or name == "branch_first":
        return []
    return tiles.tiles_to_try(problem.device_of(device), products[0])


def _discard(run: Callable[[Any], Any], call: Any) -> None:
    run(call)

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
# The record's fields whose sizes do not follow the rows of x.
_FIXED = {"operands", "scales", "lora_As", "lora_Bs"}
# Settings of an op on which neither code nor time depends.
_NUMBERS = {"scalings", "starts", "ends", "dropout_p", "dropout_ps"}

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
    # Whether what was found out just now may change how other calls run.
    is_news: bool = False


def time_on_gpu(runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Median seconds of each of ``runs`` on the current stream of a GPU, in turns.

    The GPU waits while a turn is enqueued, so that the host's time does not count.
    """
    milliseconds = sum(_once(run) for run in runs)
    turns = min(max(int(BUDGET_MS / max(milliseconds, 1e-3)), TURNS[0]), TURNS[1])
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        torch.cuda._sleep(1_000_000)
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
        for run, (start, end) in zip(runs, marks, strict=True):
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        for of_run, (start, end) in zip(times, marks, strict=True):
            of_run.append(start.elapsed_time(end) * 1e-3)
    return [statistics.median(of_run) for of_run in times]


def _once(run: Callable[[], None]) -> float:
    """Milliseconds of one run."""
    start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


# Tests replace it.
measure: Callable[[Sequence[Callable[[], None]], torch.device], list[float]] = time_on_gpu


def kind_of(op: str, call: Any) -> Kind:
    """The kind of a call: what its launches' code and time depend on, in words.

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


def decide(subject: Subject, device: torch.device, call: Any) -> Decision:
    """How a call runs: by what first use has found, or finds now."""
    op = subject.name
    strategies = subject.oracle.strategies(call)
    if not first_use.is_on(device):
        return Decision(strategies[0], "first use is off")
    kind = kind_of(op, call)
    finding = first_use.finding_of(kind, device) or Finding()
    default = _first_possible(op, device, strategies)
    is_news = False
    # A capture must not record a proof.
    if default is not None and first_use.may_run(device):
        is_new = default not in finding.faults
        if is_new:
            choice = _choice_of(default, strategies)
            find_fault = partial(_fault_of, subject, device, call, choice)
            first_use.prove(kind, device, finding, default, find_fault)
        if not finding.faults.get(default) and finding.fastest is None and _may_time(device):
            is_new = True
            _time(subject, device, call, finding, strategies, kind)
        if is_new:
            first_use.keep(kind, device, finding)
            first_use.logger.info("%s, %s: %s", op, kind.words, finding)
            is_news = any(finding.faults.values()) or finding.fastest == OPERATORS
        if finding.faults.get(default):
            words = f"{default!r} is wrong on this machine: {finding.faults[default]}"
            return Decision(OPERATORS, words, is_news=is_news)
    decision = _by_finding(op, device, strategies, finding, _draws(call))
    return decision._replace(is_news=is_news)


def known(subject: Subject, device: torch.device, call: Any) -> Decision:
    """How a call runs by what is known, without a proof. The PyTorch path, too, may take it."""
    strategies = subject.oracle.strategies(call)
    if not first_use.is_on(device):
        return Decision(strategies[0], "first use is off")
    finding = first_use.finding_of(kind_of(subject.name, call), device)
    return _by_finding(subject.name, device, strategies, finding or Finding(), draws=False)


def _draws(call: Any) -> bool:
    """Whether a call draws dropout's masks. PyTorch's operators then take long inside the op: they
    draw the bits that its seeds stand for.
    """
    return any(seed is not None for seed in getattr(call, "seeds", ()))


def _first_possible(op: str, device: torch.device, strategies: Sequence[str]) -> str | None:
    """The first strategy that is not retired."""
    return next((name for name in strategies if not first_use.fault_of(op, name, device)), None)


def _choice_of(name: str, strategies: Sequence[str], tile: Tile | None = None) -> Choice | None:
    """The choice of a strategy; None is the table's own."""
    if name == strategies[0] and tile is None:
        return None
    return Choice(name, "", tile)


def _by_finding(
    op: str, device: torch.device, strategies: Sequence[str], finding: Finding, draws: bool
) -> Decision:
    """How a call runs by a finding. ``draws``: PyTorch's operators run only if nothing else can."""
    default = _first_possible(op, device, strategies)
    if default is None:
        fault = first_use.fault_of(op, strategies[0], device)
        return Decision(OPERATORS, f"{strategies[0]!r} is retired on this machine: {fault}")
    name, reason = default, NOT_TIMED
    if default != strategies[0]:
        fault = first_use.fault_of(op, strategies[0], device)
        reason = f"{strategies[0]!r} is retired on this machine: {fault}"
    is_free = settings.strategy == "auto" and not torch.are_deterministic_algorithms_enabled()
    if finding.fastest is not None and is_free:
        fastest = _fastest(op, device, finding, draws)
        if fastest is not None:
            name, reason = fastest, finding.reason
    if name == OPERATORS:
        return Decision(OPERATORS, reason)
    strategy = name.split(",")[0]
    choice = _choice_of(strategy, strategies, finding.tile(name))
    return Decision(strategy, reason, choice)


def _fastest(op: str, device: torch.device, finding: Finding, draws: bool) -> str | None:
    """The fastest strategy that may run, or None."""

    def may_run(name: str) -> bool:
        if name == OPERATORS:
            return not draws
        return not first_use.fault_of(op, name.split(",")[0], device)

    if finding.fastest is not None and may_run(finding.fastest):
        return finding.fastest
    others = {name: us for name, us in finding.microseconds.items() if may_run(name)}
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


def _time(
    subject: Subject,
    device: torch.device,
    call: Any,
    finding: Finding,
    strategies: Sequence[str],
    kind: Kind,
) -> None:
    """Time every strategy that a proof finds right, and PyTorch's operators."""
    choices: dict[str, Choice | None] = {}
    for name in strategies:
        choice = _choice_of(name, strategies)
        if first_use.fault_of(subject.name, name, device):
            continue
        if name not in finding.faults:
            find_fault = partial(_fault_of, subject, device, call, choice)
            first_use.prove(kind, device, finding, name, find_fault)
        choices[name] = choice
        for tile in _tiles_to_try(subject, device, call, name):
            tiled = Choice(name, "", tile)
            words = f"{name}, {'x'.join(map(str, tile[:3]))}, {tile.num_warps} warps, {tile.num_stages} stages"
            find_fault = partial(_fault_of, subject, device, call, tiled)
            first_use.prove(kind, device, finding, words, find_fault)
            finding.tiles[words] = [*tile]
            choices[words] = tiled
    right = {name: choice for name, choice in choices.items() if finding.faults.get(name) == ""}
    runs: dict[str, Callable[[], None]] = {}
    with plainly(device):
        try:
            for name, choice in right.items():
                launches = subject.plan(problem.device_of(device), call, choice)[1]
                runs[name] = partial(_run, launches, device)
            runs[OPERATORS] = partial(_discard, subject.oracle.by_operators, call)
            seconds = measure([*runs.values()], device)
        except torch.OutOfMemoryError:
            first_use.logger.warning("%s is not timed: the GPU's memory is full", subject.name)
            return
    times = dict(zip(runs, seconds, strict=True))
    table, best = next(iter(times)), min(times, key=times.__getitem__)
    finding.microseconds = {name: round(of_run * 1e6, 1) for name, of_run in times.items()}
    shown = finding.microseconds
    if times[best] < times[table] * (1 - TIE):
        finding.reason = f"measured: {shown[best]} us, {table!r} {shown[table]} us"
    else:
        best = table
        finding.reason = f"measured: {shown[table]} us, and no other is more than {TIE:.0%} faster"
    finding.fastest = best


def _tiles_to_try(subject: Subject, device: torch.device, call: Any, name: str) -> list[Tile]:
    """Tiles of a strategy that are timed besides the table's."""
    product = subject.oracle.product(call)
    if not first_use.tries_tiles() or product is None or name == "branch_first":
        return []
    return tiles.tiles_to_try(problem.device_of(device), product)


def _discard(run: Callable[[Any], Any], call: Any) -> None:
    run(call)

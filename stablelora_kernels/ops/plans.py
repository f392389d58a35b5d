"""The package's torch.library ops, and the cache of their launch plans.

Whatever depends only on tensor layouts and settings is computed once per key.

An :class:`Entry` says that calls with its key pass the checks, on which backend they run, and, from
the second call on, holds their launches prepared. The key has layouts and settings, never
addresses: a parameter may move between calls, and layers of one shape share an entry. Traced,
transformed and watched calls have no key and take the path of a first call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from stablelora_kernels.dispatch import problem, settings
from stablelora_kernels.dispatch.backend import explain_backend
from stablelora_kernels.dispatch.first_use import OPERATORS
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tallies import Tally, tally_of
from stablelora_kernels.ops.first_use import NOT_TIMED, Decision, Subject, decide, known, was_known
from stablelora_kernels.ops.proofs import Oracle, plainly

NAMESPACE = "stablelora_kernels"
# Most entries. The oldest half of them goes when it is reached.
LIMIT = 4096


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def define_op(
    name: str,
    schema: str,
    fake: Callable[Arguments, Returned],
    device_types: Sequence[str] = ("cpu", "cuda"),
) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """Turn the decorated function into the op ``name``. ``fake`` takes its arguments and returns
    outputs without values.

    Under forward-mode differentiation the op raises: PyTorch would take its outputs for constants.
    """
    qualified = f"{NAMESPACE}::{name}"

    def in_reverse_mode(run: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        # Inside the op, because a compiled graph calls nothing else of this library.
        @functools.wraps(run)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"{qualified} must be called outside of forward-mode differentiation (torch.func.jvp, "
                    f"torch.func.jacfwd, torch.autograd.forward_ad), got level {forward_ad._current_level} of it: the "
                    "op has no forward derivative; differentiate with backward(), or this part with PyTorch's operators"
                )
            return run(*args, **kwargs)

        return checked

    def decorate(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, device_types, in_reverse_mode(function))
        torch.library.register_fake(qualified, in_reverse_mode(fake))
        op: Callable[Arguments, Returned] = getattr(getattr(torch.ops, NAMESPACE), name)
        return op

    return decorate


@dataclass(slots=True, eq=False)
class Entry:
    """What is known of the calls with one key."""

    backend: str
    # Whether autocast casts an operand.
    is_cast: bool = False
    # The op's LinearFacts or MLPFacts, once a call has run.
    facts: Any = None
    # Whether a call has run. A first call is not worth a preparation: batches may be of new sizes
    # all the time.
    seen: bool = False
    # How the op's calls run, once one has run.
    decision: Decision | None = None
    # None: not prepared yet. False: it can't be.
    prepared: Any = None


# Entries by key. The young ones were found or added since the last half of LIMIT keys.
_young: dict[Any, Entry] = {}
_old: dict[Any, Entry] = {}


def clear() -> None:
    """Forget every call."""
    _young.clear()
    _old.clear()


def key_of(kind: Any, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """The key of a call of ``kind``, any hashable value, with ``args``; None if the call is
    unusual.

    ``args`` are tensors, of which one at least is in no tuple or list, numbers, strings, None, and
    tuples and lists of these.
    """
    # First, because torch.compile traces no more than this.
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return None
    key: list[Any] = [kind, settings.in_force()]
    try:
        if not _describe(args, key):
            return None
    except (RuntimeError, NotImplementedError):
        # A sparse or nested tensor, or one without memory, has no strides or no address.
        return None
    first = (
        args[0]
        if type(args[0]) is Tensor
        else next((t for t in args if isinstance(t, Tensor)), None)
    )
    if first is None or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    # A tensor's facts have its device's number, not its type.
    key.append(first.is_cuda)
    # First use leaves the choice to the table where results must not depend on a clock.
    key.append(torch._C._get_deterministic_algorithms())
    return tuple(key)


def _describe(args: Sequence[Any], key: list[Any]) -> bool:
    """Append to ``key`` what a call reads of ``args`` before it launches; False if one of them is
    unusual.
    """
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            address = arg.data_ptr()
            # An empty tensor has no address, and a negated view's memory does not hold its values.
            if not address or arg.is_neg():
                return False
            key.append(
                (
                    arg.shape,
                    arg.stride(),
                    arg.dtype,
                    arg.get_device(),
                    address & 15,
                    arg.requires_grad,
                )
            )
        elif arg is None or kind is bool or kind is str or kind is int:
            key.append(arg)
        elif kind is float:
            # Keys compare 0.0 and -0.0 as equal.
            if not arg and math.copysign(1.0, arg) < 0:
                return False
            key.append(arg)
        elif isinstance(arg, (tuple, list)):
            key.append((len(arg),))
            if arg and not _describe(arg, key):
                return False
        else:
            return False
    return True


def find(key: tuple[Any, ...] | None) -> Entry | None:
    """The entry of ``key``, which from now on is a young one; None if there is none."""
    if key is None:
        return None
    # Other threads may move entries meanwhile.
    if (entry := _young.get(key)) is None and (entry := _old.get(key)) is not None:
        _add(key, entry)
    return entry


def remember(key: tuple[Any, ...] | None, backend: str, is_cast: bool = False) -> Entry | None:
    """A new entry for ``key``, if there is one: its calls pass the checks and run on ``backend``.

    ``is_cast``: whether autocast casts an operand.
    """
    return None if key is None else _add(key, Entry(backend, is_cast))


def _add(key: tuple[Any, ...], entry: Entry) -> Entry:
    global _young, _old
    if len(_young) >= LIMIT // 2:
        _old, _young = _young, {}
    _young[key] = entry
    return entry


def _prepared_for(key: tuple[Any, ...] | None) -> Any:
    """What is prepared for the calls with ``key``."""
    entry = find(key)
    return None if entry is None else entry.prepared


# Of a call without elements.
_NOTHING = Decision("nothing", NOT_TIMED)


class OpSettings(Protocol):
    """An op's arguments that are no tensors, in a named tuple that can be hashed."""

    @property
    def scalings(self) -> Sequence[float]: ...

    def __iter__(self) -> Iterator[Any]: ...


class OpCall(Protocol):
    """An op's arguments in a named tuple: first tensors, then lists of tensors, last ``settings``."""

    @property
    def settings(self) -> OpSettings: ...

    def __getitem__(self, places: slice, /) -> tuple[Any, ...]: ...


def tensors_of(call: OpCall) -> list[Tensor | None]:
    """The tensors of ``call``, those of lists by themselves."""
    tensors: list[Tensor | None] = []
    for value in call[:-1]:
        if isinstance(value, (list, tuple)):
            tensors += value
        else:
            tensors.append(value)
    return tensors


CallT = TypeVar("CallT", bound=OpCall)
ResultsT = TypeVar("ResultsT", bound=tuple[Any, ...])
# Launches of Triton, which is optional: launch/ has their types.
Launches = list[Any]


@dataclass(frozen=True)
class OpTypes(Generic[CallT, ResultsT]):
    """The named tuples of an op's arguments, of those that are no tensors, and of its results."""

    call: Callable[..., CallT]
    # Makes a call of what :func:`tensors_of` returns, and of its settings.
    call_of: Callable[[Sequence[Any], Any], CallT]
    settings: Callable[..., OpSettings]
    results: Callable[..., ResultsT]


class PlannedOp(Generic[CallT, ResultsT]):
    """A torch.library op that runs launches, which are prepared once calls repeat."""

    def __init__(
        self,
        name: str,
        schema: str,
        types: OpTypes[CallT, ResultsT],
        allocate: Callable[[CallT], ResultsT],
        build: Callable[[Device, CallT, ResultsT, Choice | None], Launches],
        oracle: Oracle,
    ) -> None:
        arguments = schema[1 : schema.index(") ->")].split(", ")
        kinds = [argument.split()[0] for argument in arguments]
        self._name = f"{NAMESPACE}::{name}"
        self._types = types
        # The results of a call, without values.
        self.allocate = allocate
        self._build = build
        self.subject = Subject(name, self.plan, oracle)
        # How many arguments come before the settings.
        self._settings_from = sum(kind.startswith("Tensor") for kind in kinds)
        self._op = define_op(name, schema, self._fake)(self._run)

    def __call__(
        self, entry: Entry | None, tensors: Sequence[Tensor | None], settings: OpSettings
    ) -> ResultsT:
        """Run the op.

        ``entry``: that of the caller's key, from which all but the tensors' addresses follow, or
        None. ``tensors``: those of the call one after another, see :func:`tensors_of`. A prepared
        launch reads them so, and a record of a call would take a tenth of its time.
        """
        prepared = None if entry is None else entry.prepared
        key = None
        if prepared is None:
            # The op prepares under a key of its own.
            key = self._key_of(settings, tensors)
            prepared = _prepared_for(key)
        if not prepared:
            call = self._types.call_of(tensors, settings)
            results = self._op(*call[:-1], *settings)
            prepared = _prepared_for(key)
        elif torch.autograd._profiler_enabled():
            # A trace shows the op by its name.
            with torch.profiler.record_function(self._name):
                results = prepared.run(tensors)
        else:
            results = prepared.run(tensors)
        if key is not None and entry is not None:
            entry.prepared = prepared
        return self._types.results(*results)

    def plan(
        self,
        device: Device,
        call: CallT,
        choice: Choice | None = None,
        placed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[ResultsT, Launches]:
        """The op's results, without values, and the launches on ``device`` that fill them. Tensors
        may be on the meta device.

        ``choice``: a strategy in place of the table's. ``placed``: returns the memory that takes the
        place of a result's.
        """
        # The first tensor of each op has a row for each of X.
        first = next(t for t in tensors_of(call) if t is not None)
        results = self.allocate(call)
        if placed is not None:
            results = tree_map_only(Tensor, placed, results)
        if not first.numel():
            tree_map_only(Tensor, Tensor.zero_, tuple(results))
            return results, []
        return results, self._build(device, call, results, choice)

    def _run(self, *args: Any) -> tuple[Any, ...]:
        """What the op does. Compiled graphs come here without :meth:`__call__`, so this has the
        plans too.
        """
        call = self._call_of(args)
        tensors = tensors_of(call)
        key = self._key_of(call.settings, tensors)
        if key is None:
            # PyTorch has resolved negated views in arguments of all kinds but "Tensor?[]".
            call = self._call_of(tree_map_only(Tensor, Tensor.resolve_neg, args))
        device = next(t.device for t in tensors if t is not None)
        entry = find(key) or remember(key, "triton")
        if entry is not None and (entry.prepared or self._prepare(entry, device, call)):
            return tuple(entry.prepared.run(tensors))
        decision = None if entry is None else entry.decision
        if decision is None:
            decision = self._decide(entry, device, call)
        tally_of(self.subject.name, decision.strategy, decision.reason).calls += 1
        if decision.strategy == OPERATORS:
            with plainly(device):
                return tuple(self.subject.oracle.by_operators(call))
        results, launches = self.plan(problem.device_of(device), call, decision.choice)
        for launch in launches:
            launch.run(device)
        return tuple(results)

    def _decide(self, entry: Entry | None, device: torch.device, call: CallT) -> Decision:
        """How a call runs, which the first one of its kind finds out."""
        first = next(t for t in tensors_of(call) if t is not None)
        if not first.numel():
            return _NOTHING
        decision = decide(self.subject, device, call)
        if decision.is_news:
            # Calls that were prepared may take a strategy that is retired now.
            clear()
        elif entry is not None:
            entry.decision = decision
        return decision

    def prefers_operators(self, tensors: Sequence[Tensor | None], settings: OpSettings) -> bool:
        """Whether an earlier process has found that PyTorch's operators compute such a call in less
        time, or that the kernels are wrong.
        """
        call = self._types.call_of(tensors, settings)
        first = next(t for t in tensors if t is not None)
        return first.numel() > 0 and was_known(self.subject, first.device, call)

    def known(self, device: torch.device, call: CallT) -> Decision:
        """How a call runs on ``device`` by what first use knows, which runs nothing."""
        first = next(t for t in tensors_of(call) if t is not None)
        return known(self.subject, device, call) if first.numel() else _NOTHING

    def _fake(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self.allocate(self._call_of(args)))

    def _call_of(self, args: Sequence[Any]) -> CallT:
        """The op's call, of the arguments in its schema's order."""
        # The op gets a list for what has to be a tuple in a key.
        settings = [
            tuple(value) if type(value) is list else value for value in args[self._settings_from :]
        ]
        return self._types.call(*args[: self._settings_from], self._types.settings(*settings))

    def _key_of(
        self, settings: OpSettings, tensors: Sequence[Tensor | None]
    ) -> tuple[Any, ...] | None:
        """The key of a call. The lengths of its lists follow from its settings and from the number
        of its tensors.
        """
        signs = None
        if 0.0 in settings.scalings:
            # Keys compare 0.0 and -0.0 as equal.
            signs = tuple([math.copysign(1.0, scaling) for scaling in settings.scalings])
        return key_of((self._name, settings, signs), tensors)

    def _prepare(self, entry: Entry, device: torch.device, call: CallT) -> Any:
        """The prepared launches of ``call``, from the second call of ``entry`` on."""
        if entry.seen and entry.prepared is None:
            from stablelora_kernels.launch.prepared import prepare

            call = _with_distinct_addresses(call)
            decision = entry.decision
            if decision is None or decision.strategy == OPERATORS:
                return entry.prepared
            plan = functools.partial(self.plan, problem.device_of(device), call, decision.choice)
            tally = tally_of(self.subject.name, decision.strategy, decision.reason)
            entry.prepared = prepare(tensors_of(call), plan, tally) or False
        entry.seen = True
        return entry.prepared


ForwardT = TypeVar("ForwardT")
BackwardT = TypeVar("BackwardT")


@dataclass(frozen=True)
class Backend(Generic[ForwardT, BackwardT]):
    """An op's two calls on one backend, which autograd around them does not tell apart.

    Each takes the entry of the call's key or None, the call's tensors one after another, and its
    settings.
    """

    forward: Callable[[Entry | None, Sequence[Tensor | None], Any], ForwardT]
    backward: Callable[[Entry | None, Sequence[Tensor | None], Any], BackwardT]


def on_torch(
    call_of: Callable[[Sequence[Any], Any], CallT], compute: Callable[[CallT], Returned]
) -> Callable[[Entry | None, Sequence[Tensor | None], Any], Returned]:
    """``compute`` of a call, as a :class:`Backend` runs it: PyTorch's operators need no entry."""

    def run(entry: Entry | None, tensors: Sequence[Tensor | None], settings: Any) -> Returned:
        return compute(call_of(tensors, settings))

    return run


def _with_distinct_addresses(call: CallT) -> CallT:
    """``call`` with a stand-in of the same layout for each tensor that shares its address with an
    earlier one.

    Operands are told apart by their addresses, and later calls need not give the same tensor twice.
    """
    addresses: set[int] = set()

    def distinct(t: Tensor) -> Tensor:
        if t.data_ptr() in addresses:
            t = _stand_in(t)
        addresses.add(t.data_ptr())
        return t

    replaced: CallT = tree_map_only(Tensor, distinct, call)
    return replaced


def tally_of_operators(op: str, device: torch.device) -> Tally:
    """The tally of an op's calls on ``device`` that PyTorch's operators compute."""
    answer = explain_backend(device)
    chosen = answer.reason if answer.backend == "torch" else "first use has chosen them"
    return tally_of(op, OPERATORS, chosen)


def _stand_in(t: Tensor) -> Tensor:
    """New memory without values, of the shape, strides and alignment of ``t``."""
    before = t.data_ptr() % 16 // t.itemsize
    last = sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    return t.new_empty(before + last + 1).as_strided(t.shape, t.stride(), before)


def define_launches(
    name: str,
    schema: str,
    types: OpTypes[CallT, ResultsT],
    allocate: Callable[[CallT], ResultsT],
    oracle: Oracle,
) -> Callable[
    [Callable[[Device, CallT, ResultsT, Choice | None], Launches]], PlannedOp[CallT, ResultsT]
]:
    """Turn the decorated function into the op ``name``.

    The schema has the arguments of ``types.call`` but the last, and then those of
    ``types.settings``. The first tensor has a row for each of X.

    ``allocate`` returns the op's results without values, tensors and lists of tensors. ``oracle``
    proves the launches at their first use. The function
    takes a :class:`~.dispatch.problem.Device`, the call, the results and a
    :class:`~.dispatch.rules.Choice` or None, and returns the launches that fill the results. There
    is at least one row.
    """

    return lambda build: PlannedOp(name, schema, types, allocate, build, oracle)

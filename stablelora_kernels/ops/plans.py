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
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

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
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice

NAMESPACE = "stablelora_kernels"
# Most entries. The oldest half of them goes when it is reached.
LIMIT = 4096


def define_op(
    name: str, schema: str, fake: Callable[..., Any], device_types: Sequence[str] = ("cpu", "cuda")
) -> Callable[[Callable[..., Any]], Any]:
    """Turn the decorated function into the op ``name``. ``fake`` takes its arguments and returns
    outputs without values.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, device_types, function)  # type: ignore[call-overload]
        torch.library.register_fake(qualified, fake)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return decorate


@dataclass(slots=True, eq=False)
class Entry:
    """What is known of the calls with one key."""

    backend: str
    # What autograd's side of the op knows of these calls, once one has run.
    facts: Any = None
    # Whether a call has run. A first call is not worth a preparation: batches may be of new sizes
    # all the time.
    seen: bool = False
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
    # Autotuning leaves the choice to the table where results must not depend on a clock.
    key.append(torch.are_deterministic_algorithms_enabled())
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
    if key is None:
        return None
    # Other threads may move entries meanwhile.
    if (entry := _young.get(key)) is None and (entry := _old.get(key)) is not None:
        _add(key, entry)
    return entry


def remember(key: tuple[Any, ...] | None, backend: str) -> Entry | None:
    """A new entry for ``key``, if there is one: its calls pass the checks and run on ``backend``."""
    return None if key is None else _add(key, Entry(backend))


def _add(key: tuple[Any, ...], entry: Entry) -> Entry:
    global _young, _old
    if len(_young) >= LIMIT // 2:
        _old, _young = _young, {}
    _young[key] = entry
    return entry


class PlannedOp:
    """A torch.library op that runs launches, which are prepared once calls repeat."""

    def __init__(
        self,
        name: str,
        schema: str,
        allocate: Callable[[Any], Any],
        build: Callable[..., list[Any]],
    ) -> None:
        kinds, names = zip(*map(str.split, schema[1 : schema.index(")")].split(", ")), strict=True)
        self._name, self._call = f"{NAMESPACE}::{name}", namedtuple(name, names)
        self._allocate, self._build = allocate, build
        self._op = define_op(name, schema, lambda *args: allocate(self._call(*args)))(self._run)
        # Where the lists of tensors and the numbers begin.
        self._lists = sum(kind in ("Tensor", "Tensor?") for kind in kinds)
        self._numbers = self._lists + sum(kind in ("Tensor[]", "Tensor?[]") for kind in kinds)

    def __call__(
        self,
        entry: Entry | None,
        tensors: Sequence[Tensor | None],
        lists: Sequence[Sequence[Tensor | None]],
        numbers: tuple[Any, ...],
    ) -> Any:
        """Run the op and return the schema's results.

        ``tensors``, ``lists`` and ``numbers`` are the schema's arguments, those of the last one
        hashable. ``entry``: that of the caller's key, from which all but the tensors' addresses
        follow, or None.
        """
        operands = [*tensors, *chain.from_iterable(lists)]
        known = entry or find(self._key_of(operands, lists, numbers))
        prepared = None if known is None else known.prepared
        if not prepared:
            results = self._op(*tensors, *lists, *numbers)
            if entry is not None and prepared is None:
                own = find(self._key_of(operands, lists, numbers))
                entry.prepared = None if own is None else own.prepared
            return results
        if torch.autograd._profiler_enabled():
            # A trace shows the op by its name.
            with torch.profiler.record_function(self._name):
                return prepared.run(operands)
        return prepared.run(operands)

    def plan(
        self, device: Device, args: Sequence[Any], choice: Choice | None = None
    ) -> tuple[Any, list[Any]]:
        """The op's results, without values, and the launches on ``device`` that fill them. ``args``
        may be on the meta device.

        ``choice``: a kernel in place of the table's.
        """
        # The first tensor of each op has a row for each of X.
        first, call = next(t for t in self._operands(args) if t is not None), self._call(*args)
        results = self._allocate(call)
        if not first.numel():
            tree_map_only(Tensor, Tensor.zero_, results)
            return results, []
        return results, self._build(device, call, results, choice)

    def _run(self, *args: Any) -> Any:
        """What the op does. Compiled graphs come here without :meth:`__call__`, so this has the
        plans too.
        """
        operands, lists = self._operands(args), args[self._lists : self._numbers]
        numbers = tuple(
            [tuple(each) if type(each) is list else each for each in args[self._numbers :]]
        )
        if (key := self._key_of(operands, lists, numbers)) is None:
            # PyTorch has resolved negated views in arguments of all kinds but "Tensor?[]".
            args = tree_map_only(Tensor, Tensor.resolve_neg, args)
        device = next(t.device for t in operands if t is not None)
        entry = find(key) or remember(key, "triton")
        if entry is not None and (entry.prepared or self._prepare(entry, device, args)):
            return tuple(entry.prepared.run(operands))
        results, launches = self.plan(problem.device_of(device), args)
        for launch in launches:
            launch.run(device)
        return results

    def _operands(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensors among ``args``, those of lists by themselves."""
        return [*args[: self._lists], *chain.from_iterable(args[self._lists : self._numbers])]

    def _key_of(
        self, operands: Sequence[Any], lists: Sequence[Any], numbers: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        lengths = tuple(map(len, lists))
        # Keys compare 0.0 and -0.0 as equal.
        signs = (
            tuple([math.copysign(1.0, scaling) for scaling in numbers[1]])
            if 0.0 in numbers[1]
            else None
        )
        return key_of((self._name, lengths, numbers, signs), operands)

    def _prepare(self, entry: Entry, device: torch.device, args: Sequence[Any]) -> Any:
        if entry.seen and entry.prepared is None:
            from stablelora_kernels.launch.prepared import prepare

            args = _with_distinct_addresses(args)
            call = functools.partial(self.plan, problem.device_of(device), args)
            entry.prepared = prepare(self._operands(args), call) or False
        entry.seen = True
        return entry.prepared


def _with_distinct_addresses(args: Any) -> Any:
    """``args`` with a stand-in of the same layout for each tensor that shares its address with an
    earlier one.

    Operands are told apart by their addresses, and later calls need not give the same tensor twice.
    """
    addresses: set[int] = set()

    def distinct(t: Tensor) -> Tensor:
        if t.data_ptr() in addresses:
            before = t.data_ptr() % 16 // t.itemsize
            size = 1 + sum(
                (length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True)
            )
            t = t.new_empty(before + size).as_strided(t.shape, t.stride(), before)
        addresses.add(t.data_ptr())
        return t

    return tree_map_only(Tensor, distinct, args)


def define_launches(
    name: str, schema: str, allocate: Callable[[Any], Any]
) -> Callable[[Callable[..., Any]], PlannedOp]:
    """Turn the decorated function into the op ``name``.

    The schema has tensors first, then lists of tensors, then numbers, of which the first two are
    layouts and scalings. The first tensor has a row for each of X.

    ``allocate(call)`` returns the op's results without values, a tuple of tensors and lists of
    tensors; ``call`` has the schema's arguments by name. The function takes a
    :class:`~.dispatch.problem.Device`, the call, the results and a :class:`~.dispatch.rules.Choice`
    or None, and returns the launches that fill the results. There is at least one row.
    """

    return lambda function: PlannedOp(name, schema, allocate, function)

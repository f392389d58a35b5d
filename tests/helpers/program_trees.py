"""A tree for each program of some launches: every sequence of memory accesses that runs have made so far.

A program's next access depends only on the results of its earlier accesses. So Triton's interpreter, which takes milliseconds a
program, runs each such history once. Later runs follow the tree. The interpreter runs in greenlets, because a program stops many
calls below its start, where a generator cannot yield.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from greenlet import getcurrent, greenlet
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels.launch.base import Launch
from tests.helpers.memory_image import Layout

builder = interpreter.interpreter_builder


class Access(NamedTuple):
    """An access that a program asks for, and the kernel's line."""

    # "load", "volatile load", "store", "atomic" or "barrier".
    kind: str
    where: str
    # The indices of the bytes in an image, [elements, bytes of an element].
    place: Any = None
    # The bytes to store, of the same shape.
    data: Any = None
    # For an atomic: a function that changes an image and returns the old value, and the atomic's semantics and scope.
    apply: Callable[[Any], bytes] | None = None
    sem: Any = None
    scope: Any = None


class _Node(NamedTuple):
    # None at the program's end.
    access: Access | None
    # The next nodes, by the access's result.
    after: dict[bytes | None, _Node]


class Trees:
    """The trees of all programs of ``launches``.

    Only accesses of the storages with numbers in ``written``, or of all storages if it is None, become nodes.
    """

    def __init__(self, launches: Sequence[Launch], layout: Layout, written: set[int] | None = None) -> None:
        self.launches, self.layout, self.written = launches, layout, written
        self.grids = [(*launch.grid, 1, 1)[:3] for launch in launches]
        self.roots: dict[tuple[int, tuple[int, ...]], _Node] = {}
        self.arguments: list[dict[str, Any]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the interpreter's memory accesses switch to the caller of the program."""
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, ours in (
                ("create_masked_load", self._load),
                ("create_masked_store", self._store),
                ("create_atomic_rmw", self._atomic),
                ("create_atomic_cas", None),
                ("create_barrier", lambda original: _ask(Access("barrier", _line()))),
            ):
                patch.setattr(builder, name, _bound(ours, getattr(builder, name)))
            for name in ("grid_idx", "grid_dim"):
                patch.setattr(builder, name, None, raising=False)
            self.arguments = []
            for launch in self.launches:
                stack.callback(interpreter._patch_lang(launch.kernel.fn).restore)
                self.arguments.append(_interpreted_arguments(launch))
            yield

    def _find(self, pointers: TensorHandle, mask: TensorHandle) -> tuple[Any, Any, Any, bool]:
        """The mask in full, the pointers' storage, their bytes' indices in an image, and whether the access becomes a node."""
        active = np.broadcast_to(mask.data, pointers.data.shape)
        if not active.any():
            return active, None, None, False
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        region, place = self.layout.locate(pointers.data[active], size)
        return active, region, place, self.written is None or region.number in self.written

    def _load(self, original: Any, pointers: Any, mask: Any, other: Any, *policies: Any, **named: Any) -> TensorHandle:
        active, _, place, matters = self._find(pointers, mask)
        if not matters:
            return original(pointers, mask, other, *policies, **named)
        is_volatile = named["is_volatile"] if named else policies[-1]
        answer = _ask(Access("volatile load" if is_volatile else "load", _line(), place))
        dtype = pointers.get_element_ty()
        kind = interpreter._get_np_dtype(dtype)
        data = (
            np.zeros(active.shape, kind) if other is None else np.array(np.broadcast_to(other.data, active.shape), kind)
        )
        data[active] = np.frombuffer(answer, kind)
        return TensorHandle(data, dtype)

    def _store(self, original: Any, pointers: Any, value: Any, mask: Any, *policies: Any) -> None:
        active, _, place, _ = self._find(pointers, mask)
        if active.any():
            data = np.ascontiguousarray(np.broadcast_to(value.data, active.shape)[active])
            _ask(Access("store", _line(), place, data.view(np.uint8).reshape(place.shape)))

    def _atomic(
        self, original: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> TensorHandle:
        _, region, place, _ = self._find(pointers, mask)
        if region is None:
            return original(op, pointers, value, mask, sem, scope)

        def apply(image: Any) -> bytes:
            return original(op, region.moved(pointers, image), value, mask, sem, scope).data.tobytes()

        answer = _ask(Access("atomic", _line(), place, None, apply, sem, scope))
        data = np.frombuffer(answer, value.data.dtype).reshape(pointers.data.shape)
        return TensorHandle(data, value.dtype.scalar)


class Walk:
    """One run of a program. ``access`` is the access that it asks for now, or None at its end."""

    def __init__(self, trees: Trees, launch: int, index: tuple[int, ...]) -> None:
        self.trees, self.launch, self.index = trees, launch, index
        self.answers: list[bytes | None] = []
        # The number of answers that the interpreter has received.
        self.given = 0
        self.coroutine: greenlet | None = None
        self.node = trees.roots.setdefault((launch, index), _Node(None, {}))
        self.answer(None)

    @property
    def access(self) -> Access | None:
        return self.node.access

    def answer(self, value: bytes | None) -> None:
        """Continue the program with its access's result; None starts the program."""
        self.answers.append(value)
        after = self.node.after.get(value)
        if after is None:
            after = self.node.after[value] = _Node(self._interpret(), {})
        self.node = after

    def _interpret(self) -> Access | None:
        builder.grid_idx, builder.grid_dim = self.index, self.trees.grids[self.launch]
        if self.coroutine is None:
            function, arguments = self.trees.launches[self.launch].kernel.rewrite(), self.trees.arguments[self.launch]
            self.coroutine = greenlet(lambda _: function(**arguments))
        access = None
        try:
            for answer in self.answers[self.given :]:
                access = self.coroutine.switch(answer)
        except interpreter.InterpreterError as error:
            # The interpreter wraps errors once for each function that a kernel calls.
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            raise cause from None
        self.given = len(self.answers)
        return None if self.coroutine.dead else access

    def close(self) -> None:
        """Drop the interpreter's part of the run."""
        if self.coroutine and not self.coroutine.dead:
            self.coroutine.throw()


def tensors_of(launch: Launch) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, with their names."""
    for name, value in launch.named.items():
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(tensor, Tensor):
            yield f"{launch.kernel.__name__}'s {name}", tensor


def _bound(ours: Callable[..., Any] | None, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        if ours is None:
            raise NotImplementedError(original.__name__)
        return ours(original, *args, **named)

    return call


def _ask(access: Access) -> bytes:
    return getcurrent().parent.switch(access)


def _line() -> str:
    """The file and line of the kernel that is running."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _interpreted_arguments(launch: Launch) -> dict[str, Any]:
    kernel = launch.kernel
    constants = interpreter.GridExecutor(kernel.fn, kernel.arg_names, launch.grid).constexprs
    given = inspect.getcallargs(kernel.fn, *launch.args, **launch.constants)
    return {name: v if name in constants else interpreter._implicit_cvt(v) for name, v in given.items()}

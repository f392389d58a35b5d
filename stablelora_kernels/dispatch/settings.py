"""The process-wide settings: backend, strategy and autotune.

The public names say "kernel" for the strategy (``use_kernel``, ``STABLELORA_KERNEL``, and in an
``Explanation`` ``forward_kernel``). Inside the package a kernel is a function on the GPU, and a
strategy says which launches compute a call (``dispatch/rules.py``).

An environment variable gives each its start value. It is read at first use, so that importing the
package never raises.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from stablelora_kernels.utils.validation import check_bool, check_choice

BACKENDS = ("auto", "triton", "torch")
# "auto" asks the table of rules.
STRATEGIES = ("auto", "fused", "chained", "split", "vendor")
# By setting, what its environment variable may say and the value that this stands for; the default
# comes first.
_VALUES: dict[str, dict[str, Any]] = {
    "backend": {name: name for name in BACKENDS},
    "kernel": {name: name for name in STRATEGIES},
    "autotune": {"0": False, "1": True},
}


class _Setting:
    def __init__(self, name: str) -> None:
        self.name = name
        # None: the environment's. torch.compile guards on a plain attribute; a context variable
        # would break its graph.
        self.value: Any = None
        # The process's value, at 0, and those of the open blocks, the last one in force. Blocks of
        # two threads may overlap, so each takes out its own.
        self._values: dict[int, Any] = {0: None}
        self._lock = threading.Lock()

    def get(self) -> Any:
        return _start_value(self.name) if self.value is None else self.value

    def _alone(self) -> AbstractContextManager[Any]:
        # torch.compile cannot trace a lock, and traces in one thread.
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def set(self, value: Any) -> None:
        """Set the process's value or, within a block, the block's."""
        with self._alone():
            self._values[max(self._values)] = self.value = value

    @contextmanager
    def use(self, value: Any) -> Iterator[None]:
        """Put ``value`` in force for a block. The block that began last has precedence, in whatever
        order blocks end.
        """
        with self._alone():
            block = max(self._values) + 1
            self._values[block] = self.value = value
        try:
            yield
        finally:
            with self._alone():
                del self._values[block]
                self.value = self._values[max(self._values)]


_backend = _Setting("backend")
_kernel = _Setting("kernel")
_autotune = _Setting("autotune")
_start_values: dict[str, Any] = {}


def _start_value(name: str) -> Any:
    if name not in _start_values:
        values, variable = _VALUES[name], f"STABLELORA_{name.upper()}"
        # An empty value means unset, as for most programs.
        word = os.environ.get(variable) or next(iter(values))
        _start_values[name] = values[
            check_choice(f"the environment variable {variable}", word, [*values])
        ]
    return _start_values[name]


# torch.compile then calls it while tracing and keeps the result, which never changes: each variable
# is read once. The flag is that of torch.compiler.assume_constant_result, which would import
# torch._dynamo and so take seconds.
_start_value._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_environment() -> None:
    """Read the environment variables now. ValueError: a setting does not take its value."""
    for name in _VALUES:
        _start_value(name)


def tf32_allowed() -> bool:
    """Whether PyTorch's switches allow TensorFloat-32 in float32 products on a GPU."""
    # torch.backends.cuda.matmul.fp32_precision, in a tenth of its time.
    # torch.get_float32_matmul_precision() raises once a newer switch has allowed it.
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def in_force() -> tuple[Any, ...]:
    """What was set of all settings, None for the environment's value: equal in two calls that the
    settings treat alike.
    """
    return (_backend.value, _kernel.value, _autotune.value, tf32_allowed())


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"torch"``."""
    return _backend.get()


def set_backend(name: str) -> None:
    """Set the process-wide backend.

    ``"auto"`` takes the Triton kernels for tensors on a GPU and PyTorch's fused operators on a CPU;
    ``"triton"`` and ``"torch"`` force one. The start value is the environment variable
    ``STABLELORA_BACKEND``, or ``"auto"``. Another name raises ValueError.
    """
    _backend.set(check_choice("backend", name, BACKENDS))


def use_backend(name: str) -> AbstractContextManager[None]:
    """Like :func:`set_backend`, for the body of a ``with`` statement, in all threads. The last
    block entered is in force.
    """
    return _backend.use(check_choice("backend", name, BACKENDS))


def get_kernel() -> str:
    """The strategy in force: ``"auto"`` or the one that was forced."""
    return _kernel.get()


def set_kernel(name: str) -> None:
    """Force one strategy on every call that runs on Triton, process-wide, or give the choice back
    with ``"auto"``.

    ``"fused"``: every program of the product computes the S that it needs. ``"chained"``: one
    launch, whose first programs compute S, and whose others wait for it before they add the branch.
    ``"split"``: the same in two launches. ``"vendor"``: the branch, then the product by the
    vendor's library, which adds to it. The start value is the environment variable
    ``STABLELORA_KERNEL``, or ``"auto"``. Another name raises ValueError, and so does a call that
    the forced strategy can't do.
    """
    _kernel.set(check_choice("kernel", name, STRATEGIES))


def use_kernel(name: str) -> AbstractContextManager[None]:
    """Like :func:`set_kernel`, for the body of a ``with`` statement, in all threads. The last block
    entered is in force.
    """
    return _kernel.use(check_choice("kernel", name, STRATEGIES))


def get_autotune() -> bool:
    """Whether calls are tuned."""
    return _autotune.get()


def set_autotune(on: bool) -> None:
    """Tune every later call that runs on Triton, process-wide, or leave the choice to the table
    again.

    The first call of a size measures every strategy that can do it. That takes seconds, most of
    them in the compiler. The answer is kept under ``~/.cache/stablelora-kernels`` (or the
    environment's ``STABLELORA_CACHE``) for this GPU and these versions. The start value is the
    environment variable ``STABLELORA_AUTOTUNE``, ``0`` or ``1``, or off. A value that is no bool
    raises TypeError.

    The table still decides where results must not depend on a clock
    (``torch.use_deterministic_algorithms``), where a strategy is forced, and while a CUDA graph
    captures a size that was not measured before.
    """
    _autotune.set(check_bool("autotune", on))


def use_autotune(on: bool) -> AbstractContextManager[None]:
    """Like :func:`set_autotune`, for the body of a ``with`` statement, in all threads. The last
    block entered is in force.
    """
    return _autotune.use(check_bool("autotune", on))

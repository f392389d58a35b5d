"""The process-wide settings: backend, strategy and first use.

An environment variable gives each its start value. It is read at first use, so that importing the
package never raises.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from stablelora_kernels.utils.validation import check_choice

BACKENDS = ("auto", "triton", "torch")
# "auto" asks the table of rules, or what first use has measured.
STRATEGIES = ("auto", "few_rows", "one_launch", "branch_first")
FIRST_USES = ("auto", "on", "tiles", "off")
# By setting, what its environment variable may say and the value that this stands for; the default
# comes first.
_VALUES: dict[str, dict[str, str]] = {
    "backend": {name: name for name in BACKENDS},
    "strategy": {name: name for name in STRATEGIES},
    "first_use": {name: name for name in FIRST_USES} | {"0": "off", "1": "on"},
}


class _Setting:
    def __init__(self, name: str) -> None:
        self.name = name
        # None: the environment's. torch.compile guards on a plain attribute; a context variable
        # would break its graph.
        self.value: str | None = None
        # The process's value, at 0, and those of the open blocks, the last one in force. Blocks of
        # two threads may overlap, so each takes out its own.
        self._values: dict[int, str | None] = {0: None}
        self._lock = threading.Lock()

    def get(self) -> str:
        return _start_value(self.name) if self.value is None else self.value

    def _alone(self) -> AbstractContextManager[object]:
        # torch.compile cannot trace a lock, and traces in one thread.
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def set(self, value: str) -> None:
        """Set the process's value or, within a block, the block's."""
        with self._alone():
            self._values[max(self._values)] = self.value = value

    def enter(self, value: str) -> int:
        """Put ``value`` in force for a block, and return the block's number. The block that began
        last has precedence, in whatever order blocks end.
        """
        with self._alone():
            block = max(self._values) + 1
            self._values[block] = self.value = value
        return block

    def leave(self, block: int) -> None:
        """End a block."""
        with self._alone():
            del self._values[block]
            self.value = self._values[max(self._values)]


_backend = _Setting("backend")
_strategy = _Setting("strategy")
_first_use = _Setting("first_use")
_start_values: dict[str, str] = {}


def _start_value(name: str) -> str:
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


def in_force() -> tuple[str | bool | None, ...]:
    """What was set of all settings, None for the environment's value: equal in two calls that the
    settings treat alike.
    """
    return (_backend.value, _strategy.value, _first_use.value, tf32_allowed())


@contextmanager
def _block(values: Sequence[tuple[_Setting, str]]) -> Iterator[None]:
    """Put ``values`` in force for a block."""
    entered = [(setting, setting.enter(value)) for setting, value in values]
    try:
        yield
    finally:
        for setting, number in entered:
            setting.leave(number)


class Settings:
    """The process-wide settings, as attributes that can be read and set::

        slk.settings.backend = "torch"

    and for the body of a ``with`` statement, in all threads. The last block entered is in force::

        with slk.settings(backend="triton", strategy="one_launch"):
            ...

    A value that a setting does not take raises ValueError. The start values are those of the
    environment variables ``STABLELORA_BACKEND``, ``STABLELORA_STRATEGY`` and
    ``STABLELORA_FIRST_USE``, or ``"auto"``.
    """

    # A misspelled name raises AttributeError.
    __slots__ = ()

    @property
    def backend(self) -> str:
        """``"auto"`` takes the Triton kernels for tensors on a GPU and PyTorch's operators on a
        CPU; ``"triton"`` and ``"torch"`` force one.
        """
        return _backend.get()

    @backend.setter
    def backend(self, name: str) -> None:
        _backend.set(check_choice("backend", name, BACKENDS))

    @property
    def strategy(self) -> str:
        """In which launches a call that runs on Triton computes the branch and the product.

        ``"one_launch"``: the first programs of the launch compute S = x @ A.T, and the others wait
        for it before they add the branch. ``"branch_first"``: the branch, then the product by the
        vendor's library, which adds to it. ``"few_rows"``: up to 64 rows, one launch in which each
        program computes the S that it needs. ``"auto"``: one launch where that can be, unless first
        use has measured that another strategy is faster. A call that a forced strategy can't do
        raises ValueError.
        """
        return _strategy.get()

    @strategy.setter
    def strategy(self, name: str) -> None:
        _strategy.set(check_choice("strategy", name, STRATEGIES))

    @property
    def first_use(self) -> str:
        """What the first call of each kind does on a GPU.

        ``"on"``: it proves the kernels there, on values of its own, against PyTorch's operators,
        and it times the strategies that can do the call. ``"tiles"``: it also times each strategy
        with other tiles, which compiles for seconds. ``"off"``: neither. ``"auto"``: on for a GPU,
        off in Triton's interpreter, which with ``"on"`` proves and does not time.

        What it finds is kept under ``~/.cache/stablelora-kernels`` (or the environment's
        ``STABLELORA_CACHE``) for this GPU, driver, torch, Triton and version. The environment
        variable also takes ``1`` and ``0`` for on and off.
        """
        return _first_use.get()

    @first_use.setter
    def first_use(self, name: str) -> None:
        _first_use.set(check_choice("first_use", name, FIRST_USES))

    def __call__(
        self,
        *,
        backend: str | None = None,
        strategy: str | None = None,
        first_use: str | None = None,
    ) -> AbstractContextManager[None]:
        """Put what is given in force for the body of a ``with`` statement."""
        values: list[tuple[_Setting, str]] = []
        if backend is not None:
            values.append((_backend, check_choice("backend", backend, BACKENDS)))
        if strategy is not None:
            values.append((_strategy, check_choice("strategy", strategy, STRATEGIES)))
        if first_use is not None:
            values.append((_first_use, check_choice("first_use", first_use, FIRST_USES)))
        return _block(values)

    def __repr__(self) -> str:
        return f"settings(backend={self.backend!r}, strategy={self.strategy!r}, first_use={self.first_use!r})"


settings = Settings()

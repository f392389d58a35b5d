"""The one place that decides whether a call runs on Triton kernels or on PyTorch's own operators."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

BACKENDS = ("auto", "triton", "torch")


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_default = _check(os.environ.get("STABLELORA_BACKEND", "auto"), "the environment variable STABLELORA_BACKEND")
_override: ContextVar[str | None] = ContextVar("stablelora_backend", default=None)


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"torch"``."""
    return _override.get() or _default


def set_backend(name: str) -> None:
    """Set the process-wide backend.

    ``"auto"`` takes the Triton kernels for tensors on a GPU and PyTorch's fused operators on a CPU; ``"triton"`` and
    ``"torch"`` force one. The start value is the environment variable ``STABLELORA_BACKEND``, or ``"auto"``.

    Raises:
        ValueError: ``name`` is not one of the three.
    """
    global _default
    _default = _check(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Like :func:`set_backend`, for the body of a ``with`` statement and the current thread or task only."""
    token = _override.set(_check(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


@cache
def has_triton() -> bool:
    """Whether Triton is installed. It is looked for, not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for (``TRITON_INTERPRET=1``), which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@cache
def _warn_no_triton() -> None:
    warnings.warn(
        "Triton is not installed, so stablelora_kernels runs on PyTorch's operators on this GPU, with more launches "
        "and more memory traffic; install triton, or call set_backend('torch') to choose this.",
        RuntimeWarning,
        stacklevel=4,
    )


def resolve_backend(device: torch.device) -> str:
    """``"triton"`` or ``"torch"``: what a call on tensors of ``device`` runs on.

    Raises:
        RuntimeError: Triton was asked for and can't run there.
    """
    name = get_backend()
    if name == "torch":
        return "torch"
    if name == "auto":
        if device.type != "cuda":
            return "torch"
        if not has_triton():
            _warn_no_triton()
            return "torch"
        return "triton"
    if not has_triton():
        raise RuntimeError("backend 'triton' was asked for, but Triton is not installed")
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"backend 'triton' was asked for on a tensor on {device}: the kernels run on a GPU, or on a CPU under "
            "Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
        )
    return "triton"

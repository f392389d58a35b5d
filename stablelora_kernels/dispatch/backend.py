"""The one place that decides whether a call runs on Triton kernels or on PyTorch's own operators."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

BACKENDS = ("auto", "triton", "torch")
MIN_TRITON = (3, 6)


def _triton_problem() -> str | None:
    """Why the kernels can't run whatever the device, or None. Triton is looked for, not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        # Built from source or repackaged under another name (pytorch-triton-rocm): its owner knows.
        return None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TRITON:
        return f"Triton {version} is installed, but the kernels need {'.'.join(map(str, MIN_TRITON))} or newer"
    return None


TRITON_PROBLEM = _triton_problem()
# Whether Triton's interpreter was asked for, which runs the kernels on CPU tensors. Triton reads it once, as this does.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


# Plain module state, which torch.compile guards on; a context variable would break its graph.
_backend = _check(os.environ.get("STABLELORA_BACKEND", "auto"), "the environment variable STABLELORA_BACKEND")
_warned = False


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"torch"``."""
    return _backend


def set_backend(name: str) -> None:
    """Set the process-wide backend.

    ``"auto"`` takes the Triton kernels for tensors on a GPU and PyTorch's fused operators on a CPU; ``"triton"`` and
    ``"torch"`` force one. The start value is the environment variable ``STABLELORA_BACKEND``, or ``"auto"``.

    Raises:
        ValueError: ``name`` is not one of the three.
    """
    global _backend
    _backend = _check(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Like :func:`set_backend`, for the body of a ``with`` statement. It holds for the whole process, threads included."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def _warn_no_triton() -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"{TRITON_PROBLEM}, so stablelora_kernels runs on PyTorch's operators on this GPU, with more launches and more "
        "memory traffic; install a newer triton, or call set_backend('torch') to choose this.",
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
        if TRITON_PROBLEM is not None:
            _warn_no_triton()
            return "torch"
        return "triton"
    if TRITON_PROBLEM is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but it can't run: {TRITON_PROBLEM}")
    if device.type != "cuda" and not INTERPRETING:
        raise RuntimeError(
            f"backend 'triton' was asked for on a tensor on {device}: the kernels run on a GPU, or on a CPU under "
            "Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
        )
    return "triton"


def explain_backend(device: torch.device) -> tuple[str, str]:
    """What :func:`resolve_backend` answers, and why, in words. It warns of nothing.

    Raises:
        RuntimeError: as it does.
    """
    name = get_backend()
    if name == "torch":
        return "torch", "it was asked for"
    if name == "auto" and device.type == "cuda" and TRITON_PROBLEM is not None:
        return "torch", f"{TRITON_PROBLEM}, so this GPU runs PyTorch's operators, with more launches and memory traffic"
    chosen = resolve_backend(device)
    if name == "triton":
        return chosen, "it was asked for" + ("" if device.type == "cuda" else ", and Triton's interpreter is on")
    if chosen == "triton":
        return chosen, "'auto' takes the Triton kernels on a GPU"
    return (
        chosen,
        f"'auto' takes PyTorch's operators on a device of type {device.type!r}; the Triton kernels want a GPU",
    )

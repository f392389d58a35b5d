"""Decides whether a call runs on the Triton kernels or on PyTorch's own operators."""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import suppress
from importlib import metadata

import torch

from stablelora_kernels.dispatch.settings import get_backend
from stablelora_kernels.utils.extras import release

MIN_TRITON = (3, 6)


def _triton_problem() -> str | None:
    """Why the kernels can't run on any device, or None. This looks for Triton without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    with suppress(metadata.PackageNotFoundError):
        if release(version := metadata.version("triton")) < MIN_TRITON:
            return f"Triton {version} is installed, but the kernels need {'.'.join(map(str, MIN_TRITON))} or newer"
    # Not found: built from source, or repackaged under another name (pytorch-triton-rocm). Trust it.
    return None


def interpreter_problem() -> str | None:
    """Why Triton's interpreter can't run the kernels, or None. Triton must be installed."""
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy, which is not installed: pip install 'stablelora-kernels[cli]'"
    with suppress(metadata.PackageNotFoundError):
        triton, numpy = metadata.version("triton"), metadata.version("numpy")
        if release(triton) < (3, 7) and release(numpy) >= (2, 4):
            return f"the interpreter of Triton {triton} does not run with NumPy {numpy}: pip install 'numpy<2.4'"
    return None


# Whether Triton's interpreter is on, which runs the kernels on CPU tensors. Triton, too, reads the variable once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
TRITON_PROBLEM = _triton_problem() or (interpreter_problem() if INTERPRETING else None)
_FORCED = "it is forced (set_backend or STABLELORA_BACKEND)"
_warned = False


def resolve_backend(device: torch.device) -> str:
    """``"triton"`` or ``"torch"``: the backend for a call on tensors of ``device``; a GPU that has no Triton is warned of once.

    Raises:
        RuntimeError: ``"triton"`` is forced and can't run there.
    """
    global _warned
    chosen, reason = explain_backend(device)
    if chosen == "torch" and device.type == "cuda" and get_backend() == "auto" and not _warned:
        _warned = True
        advice = "install a newer triton, or call set_backend('torch') to choose this"
        warnings.warn(f"stablelora_kernels: {reason}; {advice}", RuntimeWarning, stacklevel=3)
    return chosen


def explain_backend(device: torch.device) -> tuple[str, str]:
    """The answer of :func:`resolve_backend` and its reason in words, without a warning."""
    name = get_backend()
    if name == "torch":
        return "torch", _FORCED
    if device.type == "meta":
        return "torch", "on the meta device nothing is computed, and PyTorch's operators give the shapes"
    if name == "auto":
        if device.type != "cuda":
            kind = f"a device of type {device.type!r}"
            return "torch", f"'auto' takes PyTorch's operators on {kind}; the Triton kernels want a GPU"
        if TRITON_PROBLEM is None:
            return "triton", "'auto' takes the Triton kernels on a GPU"
        return "torch", f"{TRITON_PROBLEM}, so this GPU runs PyTorch's operators, with more launches and memory traffic"
    if TRITON_PROBLEM is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but it can't run: {TRITON_PROBLEM}")
    if device.type == "cuda":
        return "triton", _FORCED
    if INTERPRETING:
        return "triton", f"{_FORCED}, and Triton's interpreter is on"
    raise RuntimeError(
        f"backend 'triton' was asked for on a tensor on {device}: the kernels run on a GPU, or on a CPU under "
        "Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
    )

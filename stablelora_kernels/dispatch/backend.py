"""Decides whether a call runs on the Triton kernels or on PyTorch's own operators."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.utils.extras import release

MIN_TRITON = (3, 6)
# (9, 0) is an H100's.
Capability = tuple[int, int]


class Row(NamedTuple):
    """A row of :data:`ROWS`: what is known of the kernels on NVIDIA GPUs from one compute
    capability up to the next row's.
    """

    least: Capability
    # The capability that the row's GPUs are taken as, if the kernels are not compiled and checked
    # for their own.
    taken_as: Capability
    # The oldest release of Triton whose code of the kernels is right, or None if no release's is.
    triton: tuple[int, int, int] | None
    # What an older release does, or every release if ``triton`` is None.
    reason: str
    # GPUs by capability.
    gpus: Mapping[Capability, str]

    @property
    def requirement(self) -> str:
        """``"the row of compute capability 9.0 needs Triton 3.6.0 or newer"``, or "" if no Triton
        will do.
        """
        if self.triton is None:
            return ""
        return f"the row of compute capability {_dotted(self.least)} needs Triton {_dotted(self.triton)} or newer"


# Raise a release where the PTX emulator or a GPU finds wrong code of an older one. No row:
# capabilities beyond the last row's.
ROWS = (
    Row((0, 0), (0, 0), None, "makes scalar code, which spills registers, of these kernels",
        {(6, 0): "P100", (7, 0): "V100", (7, 5): "T4, RTX 2080"}),
    Row((8, 0), (8, 0), (3, 6, 0), "was not checked with these kernels",
        {(8, 0): "A100", (8, 6): "A40, RTX 3090", (8, 7): "Jetson Orin", (8, 9): "L40S, RTX 4090"}),
    Row((9, 0), (9, 0), (3, 6, 0), "makes wrong code of these kernels", {(9, 0): "H100, H200, GH200"}),
    # Triton 3.6 to 3.8 put a masked branch on the tensor memory of its product. 3.6 and 3.7.0 also
    # leave out fences.
    Row((10, 0), (10, 0), (3, 9, 0), "makes wrong code of these kernels",
        {(10, 0): "B200", (10, 3): "B300", (11, 0): "Jetson Thor"}),
    Row((12, 0), (12, 0), (3, 6, 0), "was not checked with these kernels", {(12, 0): "RTX 5090", (12, 1): "GB10"}),
    Row((13, 0), (12, 0), None, "cannot compile these kernels", {}),
)  # fmt: skip


class Verdict(NamedTuple):
    """What :data:`ROWS` says of a GPU under the installed Triton."""

    # Why the kernels are not proven there, or "".
    problem: str
    # What to install, or "".
    remedy: str
    # "compute capability 10.3 (B300) is taken as 10.0", or "" if the kernels are compiled and
    # checked for its own.
    taken_as: str


UNKNOWN = Verdict("", "", "")


def row_of(capability: Capability) -> Row:
    """The row of GPUs of ``capability``."""
    return max((row for row in ROWS if row.least <= capability), key=lambda row: row.least)


def judge(capability: Capability, version: str | None) -> Verdict:
    """The verdict on GPUs of ``capability`` under Triton ``version``; None is a Triton of unknown
    version, which is trusted.
    """
    row = row_of(capability)
    gpu = f"compute capability {_dotted(capability)}"
    if capability in row.gpus:
        gpu += f" ({row.gpus[capability]})"
    if row.triton is None:
        name = "Triton" if version is None else f"Triton {version}"
        return Verdict(f"{name} {row.reason} for {gpu}", "", "")
    compiled = f"sm_{capability[0]}{capability[1]}" in DEVICES
    taken_as = "" if compiled else f"{gpu} is taken as {_dotted(row.taken_as)}"
    if version is None or release(version, 3) >= row.triton:
        return Verdict("", "", taken_as)
    remedy = f"install Triton {_dotted(row.triton)} or newer"
    return Verdict(f"Triton {version} {row.reason} for {gpu}", remedy, taken_as)


def _dotted(numbers: tuple[int, ...]) -> str:
    """A version or a compute capability in words, as "3.6.0"."""
    return ".".join(map(str, numbers))


def _triton_version() -> str | None:
    """The installed Triton's version. None if it was built from source, or repackaged under another
    name.
    """
    # PyTorch's nightly builds for CUDA had it under the second name.
    for package in ("triton", "pytorch-triton"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def _triton_problem() -> str | None:
    """Why the kernels can't run on any device, or None. This looks for Triton without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = _triton_version()
    if version is not None and release(version) < MIN_TRITON:
        return f"Triton {version} is installed, but the kernels need {_dotted(MIN_TRITON)} or newer"
    return None


def interpreter_problem() -> str | None:
    """Why Triton's interpreter can't run the kernels, or None. Triton must be installed."""
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy, which is not installed: pip install 'stablelora-kernels[adapters]'"
    with suppress(metadata.PackageNotFoundError):
        triton, numpy = metadata.version("triton"), metadata.version("numpy")
        if release(triton) < (3, 7) and release(numpy) >= (2, 4):
            return f"the interpreter of Triton {triton} does not run with NumPy {numpy}: pip install 'numpy<2.4'"
    return None


# Whether Triton's interpreter is on, which runs the kernels on CPU tensors. Triton, too, reads the
# variable once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
TRITON_PROBLEM = _triton_problem() or (interpreter_problem() if INTERPRETING else None)
TRITON_VERSION = _triton_version()
# Triton 3.6 and 3.7.0 put no fence between a copy to shared memory by threads and a product that
# reads it through the asynchronous proxy (triton-lang/triton#9610).
TRITON_FENCES_COPIES = TRITON_VERSION is None or release(TRITON_VERSION, 3) >= (3, 7, 1)
_FORCED = "the backend is forced (slk.settings or STABLELORA_BACKEND)"
_warned: set[str] = set()


class Answer(NamedTuple):
    """The backend that a call takes."""

    backend: str
    reason: str
    # What to do about it, if it deserves a warning.
    advice: str = ""


# By setting and GPU: a call asks again and again.
_on_gpus: dict[tuple[str, int], Answer] = {}


def resolve_backend(device: torch.device) -> str:
    """``"triton"`` or ``"torch"``: the backend for a call on tensors of ``device``.

    It warns once of a GPU without a Triton that is proven for it.

    Raises:
        RuntimeError: ``"triton"`` is forced and can't run there.
    """
    answer = explain_backend(device)
    if answer.advice:
        _warn_once(f"stablelora_kernels: {answer.reason}; {answer.advice}")
    return answer.backend


def explain_backend(device: torch.device) -> Answer:
    """The answer of :func:`resolve_backend` and its reason in words, without a warning."""
    name = settings.backend
    if name == "torch":
        return Answer("torch", _FORCED)
    if device.type == "meta":
        return Answer(
            "torch",
            "on the meta device nothing is computed, and PyTorch's operators give the shapes",
        )
    if name == "triton" and TRITON_PROBLEM is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but it can't run: {TRITON_PROBLEM}")
    if device.type == "cuda":
        return _on_gpu(name, device)
    if name == "auto":
        kind = f"a device of type {device.type!r}"
        return Answer(
            "torch", f"'auto' takes PyTorch's operators on {kind}; the Triton kernels want a GPU"
        )
    if INTERPRETING:
        return Answer("triton", f"{_FORCED}, and Triton's interpreter is on")
    raise RuntimeError(
        f"backend 'triton' was asked for on a tensor on {device}: the kernels run on a GPU, or on a CPU under "
        "Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
    )


def verdict_of(index: int) -> Verdict:
    """The verdict on the GPU ``index`` of this process."""
    # ROWS has none of AMD's GPUs. A machine without a GPU may trace tensors that pretend to be on
    # one.
    if torch.version.hip or not torch.cuda.is_available():
        return UNKNOWN
    return judge(torch.cuda.get_device_capability(index), TRITON_VERSION)


def _on_gpu(name: str, device: torch.device) -> Answer:
    """The answer on a GPU where the setting is ``name``."""
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    key = (name, index)
    if key not in _on_gpus:
        _on_gpus[key] = _automatic(index) if name == "auto" else _forced(index)
    return _on_gpus[key]


def _automatic(index: int) -> Answer:
    """The backend of ``"auto"`` on a device, and the reason."""
    verdict = verdict_of(index)
    problem = TRITON_PROBLEM or verdict.problem
    if problem:
        remedy = "install a newer triton" if TRITON_PROBLEM else verdict.remedy
        reason = f"{problem}, so this GPU runs PyTorch's operators, with more launches and memory traffic"
        choice = "set slk.settings.backend = 'torch' to choose this"
        return Answer("torch", reason, f"{remedy}, or {choice}" if remedy else choice)
    return Answer("triton", _joined("'auto' takes the Triton kernels on a GPU", verdict.taken_as))


def _forced(index: int) -> Answer:
    verdict = verdict_of(index)
    if verdict.problem:
        advice = verdict.remedy or "set slk.settings.backend = 'auto' for PyTorch's operators"
        return Answer("triton", f"{_FORCED}, although {verdict.problem}", advice)
    return Answer("triton", _joined(_FORCED, verdict.taken_as))


def _joined(reason: str, note: str) -> str:
    """The reason, with the note if there is one."""
    return f"{reason}; {note}" if note else reason


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


# torch.compile calls both while tracing, as settings._start_value: an answer never changes, and it
# can't trace a warning.
_on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]

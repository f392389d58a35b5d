"""Reads of hundreds of tensors at once, in compiled loops if they can be had, else in Python.

Python takes about 60 ns to read one attribute of a tensor, and a step reads eight attributes of each parameter. The loops of
``tensor_lists.cpp`` read all of them in the time of one. :func:`compile_loops` compiles them once a machine, in a few seconds,
and keeps them in Triton's cache. It takes a C++ compiler and the headers that torch brings with it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
import tempfile
from array import array
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILE_SECONDS = 120
# The compiled module once somebody has asked for it and it could be compiled.
_loops: Any = None


class Layout(NamedTuple):
    """The addresses and the forms of some tensors. Tensors with equal layouts are the same bytes, read in the same way."""

    # One int64 a tensor.
    addresses: bytes
    # Compiled: dtypes, devices, sizes and strides. In Python: the dtypes of tensors that are all contiguous.
    forms: Any


def layout_of(tensors: Sequence[Any]) -> Layout | None:
    """The layout of ``tensors``.

    None if a tensor is missing or has no storage of its own. In Python also if a tensor is not contiguous.
    """
    found = _loops and _loops.layout(tensors)
    if found:
        return Layout(*found)
    try:
        addresses = array("q", map(Tensor.data_ptr, tensors)).tobytes()
    except (TypeError, RuntimeError):
        return None
    return Layout(addresses, [t.dtype for t in tensors]) if all(map(Tensor.is_contiguous, tensors)) else None


def grad_layout_of(params: Sequence[Tensor]) -> Layout | None:
    """The :func:`layout_of` the gradients of ``params``; None also if there are no compiled loops."""
    found = _loops and _loops.grad_layout(params)
    return Layout(*found) if found else None


def version_sum(tensors: Sequence[Tensor]) -> int:
    """The sum of the tensors' versions. It changes if one of them does, since versions only rise."""
    found = _loops and _loops.version_sum(tensors)
    return sum(map(attrgetter("_version"), tensors)) if found is None else found


def increment_versions(tensors: Sequence[Tensor]) -> None:
    """Let autograd know that the tensors were written to."""
    if not (_loops and _loops.increment_versions(tensors)):
        torch.autograd.graph.increment_version(tensors)


class KnownMemory:
    """Knows where tensors lay in memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self.layout = _loops and _loops.layout(tensors)

    def is_that_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` lie where those before did; in compiled loops also whether they have the same form."""
        if self.layout and (found := _loops.layout(tensors)):
            return found == self.layout
        return list(map(Tensor.data_ptr, tensors)) == self.addresses


class KnownEntries:
    """Knows the objects that a dict of dicts held, the optimizer's state."""

    def __init__(self, entries: dict[Any, dict[str, Any]]) -> None:
        self.entries = {key: dict(entry) for key, entry in entries.items()}
        self.flat = _loops and _loops.flatten(entries)

    def are_all_of(self, entries: dict[Any, dict[str, Any]]) -> bool:
        """Whether ``entries`` holds the very same objects in the same places, and no others."""
        if self.flat and isinstance(entries, dict) and _loops.is_flattened(entries, self.flat):
            return True
        return same_objects(entries, self.entries)


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that both hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


def same_objects(found: Any, known: Any) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Python's own comparison of containers does all of the work: a tenth of a microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return bool(found == known)


def compile_loops() -> None:
    """From now on use compiled loops, if they can be compiled here."""
    global _loops
    _loops = _compiled()


@functools.cache
def _compiled() -> Any:
    """The compiled module, or None."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        # Other threads could change a list under the loops.
        return None
    try:
        loops = _load(_build())
        example = torch.zeros(1, device="cpu")
        loops.connect(Tensor, torch.nn.Parameter, example, example._cdata)
    except Exception:
        # Whatever the reason, Python's loops find the same.
        return None
    return loops


def _build() -> str:
    """The path of the compiled module in Triton's cache, where it is compiled first if it is not there."""
    from triton.runtime.cache import get_cache_manager

    folder = Path(torch.__file__).parent
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    options = ["-std=c++20", "-O3", "-fPIC", "-shared", "-w"]
    options += [f"-I{folder / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    of = [SOURCE.read_text(encoding="utf-8"), torch.__version__, str(torch.version.git_version), suffix, *options]
    cache = get_cache_manager(hashlib.sha256("\0".join(of).encode()).hexdigest())
    name = f"tensor_lists{suffix}"
    kept = cache.get_file(name)
    if kept is not None:
        return kept
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / name
        command = [
            *shlex.split(os.environ.get("CXX", "c++")),
            *options,
            str(SOURCE),
            "-o",
            str(built),
            f"-L{folder / 'lib'}",
            "-lc10",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        return cache.put(built.read_bytes(), name, binary=True)


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("tensor_lists", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Triton over a CUDA library that does nothing: its own Python and C launcher run, kernels are
compiled, none is executed.

It measures and tests the host's side of a launch on a machine without a GPU. Tensors of the CPU
stand for those of a GPU, so what CUDA's allocator and the driver take is not in it. It needs a C
compiler, like Triton itself.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stablelora_kernels.dispatch import backend

SOURCE = Path(__file__).with_name("null_driver.c")
CAPABILITY = (9, 0)
# Before the null driver sets the flag.
INTERPRETING = backend.INTERPRETING


def null_driver_problem() -> str | None:
    """Why the null driver can't run here, or None."""
    if backend.TRITON_PROBLEM is not None:
        return backend.TRITON_PROBLEM
    if INTERPRETING:
        return "TRITON_INTERPRET is set, and Triton's interpreter launches nothing"
    if torch.cuda.is_available():
        return "there is a GPU, whose driver is loaded (CUDA_VISIBLE_DEVICES= in the environment hides it)"
    if not (shutil.which("gcc") or shutil.which("cc")):
        return "there is no C compiler"
    return None


@cache
def _library() -> ctypes.CDLL:
    """The library, loaded under the name by which Triton looks for CUDA's."""
    import triton.backends.nvidia

    include = Path(triton.backends.nvidia.__file__).parent / "include"
    target = Path(tempfile.mkdtemp(prefix="null-driver-")) / "libcuda.so.1"
    compiler = shutil.which("gcc") or shutil.which("cc")
    command = [
        str(compiler),
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        f"-I{include}",
        str(SOURCE),
        "-o",
        str(target),
    ]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def launches() -> int:
    """Kernel launches that have reached the library."""
    return ctypes.c_ulonglong.in_dll(_library(), "null_driver_launches").value


def _driver() -> Any:
    from triton import knobs
    from triton.backends.nvidia import driver

    knobs.nvidia.libcuda_path = str(Path(_library()._name).parent)
    driver.libcuda_dirs.cache_clear()

    class NullDriver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils = driver.CudaUtils()
            self.launcher_cls = driver.CudaLauncher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int) -> tuple[int, int]:
            return CAPABILITY

    return NullDriver()


@contextmanager
def null_driver() -> Iterator[None]:
    """Kernels launch on tensors of the CPU, and nothing happens to them.

    Raises:
        RuntimeError: it can't run here; the message says why.
    """
    if problem := null_driver_problem():
        raise RuntimeError(f"the null driver can't run: {problem}")
    from triton.runtime.driver import driver as active

    # INTERPRETING: kernels accept tensors of the CPU.
    with (
        mock.patch.object(active, "_active", _driver()),
        mock.patch.object(backend, "INTERPRETING", True),
    ):
        yield

"""Every choice of backend, kernel, form and tile, each with its reason. Needs no Triton."""

from stablelora_kernels.dispatch.autotune import get_autotune, set_autotune, use_autotune
from stablelora_kernels.dispatch.backend import get_backend, set_backend, use_backend
from stablelora_kernels.dispatch.rules import get_kernel, set_kernel, use_kernel

__all__ = [
    "get_autotune",
    "get_backend",
    "get_kernel",
    "set_autotune",
    "set_backend",
    "set_kernel",
    "use_autotune",
    "use_backend",
    "use_kernel",
]

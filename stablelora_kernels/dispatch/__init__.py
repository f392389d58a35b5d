"""Every choice of backend, kernel, form and tile, each with its reason. Needs no Triton."""

from stablelora_kernels.dispatch.settings import (
    get_autotune,
    get_backend,
    get_kernel,
    set_autotune,
    set_backend,
    set_kernel,
    use_autotune,
    use_backend,
    use_kernel,
)

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

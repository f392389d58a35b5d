"""The kinds of processors that ``python -m tests.processors`` runs tests as: how each is made, and
how it is recognized.

Functions import PyTorch, because the command only starts processes that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tests.helpers.threads import ONE_THREAD

# The instructions of ATen, oneDNN, MKL, and of OpenBLAS, by which Triton's interpreter multiplies.
# Each reads its variable once, when it is loaded. MKL's works on Intel's processors; on others MKL
# has no more than AVX2 anyway.
AVX2 = MappingProxyType({
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
})  # fmt: skip
SSE41 = MappingProxyType({
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OPENBLAS_CORETYPE": "Nehalem",
})  # fmt: skip
MKL_OF_AMD = MappingProxyType({"MKL_ENABLE_INSTRUCTIONS": "AVX2"})
VARIABLES = {*AVX2, *SSE41, *ONE_THREAD}


class Kind(NamedTuple):
    """A kind of processor. ``None`` leaves a property as this machine has it.

    ``environment`` and ``threads`` hold in the processes that tests start, too; the vendor and
    oneDNN's switch only in pytest's.
    """

    name: str
    description: str
    environment: Mapping[str, str] = MappingProxyType({})
    # What torch.backends.cpu.get_cpu_capability() answers.
    capability: str | None = None
    # Whether oneDNN may have instructions for bfloat16 and float16.
    multiplies_low_precision: bool | None = None
    onednn: bool | None = None
    is_amd: bool | None = None
    threads: int | None = None

    def variables(self) -> dict[str, str]:
        """The environment variables of a process of this kind."""
        threads = {} if self.threads is None else dict.fromkeys(ONE_THREAD, str(self.threads))
        return {**self.environment, **threads}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("native", "this machine, as it is"),
        Kind("avx2", "AVX2 and no more", AVX2, capability="AVX2", multiplies_low_precision=False),
        Kind(
            "sse41",
            "SSE4.1 and no more",
            SSE41,
            capability="DEFAULT",
            multiplies_low_precision=False,
        ),
        Kind("no-onednn", "PyTorch's switch turns oneDNN off", onednn=False),
        Kind("one-thread", "one thread for each library", threads=1),
        Kind("two-threads", "two threads for each library", threads=2),
        Kind("amd", "the vendor is AMD", MKL_OF_AMD, is_amd=True),
        Kind("intel", "the vendor is Intel", is_amd=False),
    )
}


def set_up(kind: Kind) -> None:
    """Give this process what no environment variable gives it."""
    import torch

    from stablelora_kernels.ops import cpu_products

    if kind.onednn is not None:
        torch._C._set_mkldnn_enabled(kind.onednn)
    if kind.threads is not None:
        torch.set_num_threads(kind.threads)
    if kind.is_amd is not None:
        cpu_products.IS_AMD = kind.is_amd
        cpu_products.ONEDNN_HELPS = cpu_products.onednn_helps(kind.is_amd)


class Property(NamedTuple):
    name: str
    wanted: object
    actual: object


def properties(kind: Kind) -> list[Property]:
    """Every property that a kind may fix, with what this process has."""
    import torch

    from stablelora_kernels.ops import cpu_products

    low_precision = any(cpu_products.MULTIPLIED.values())
    return [
        Property("ATen's capability", kind.capability, torch.backends.cpu.get_cpu_capability()),
        Property(
            "oneDNN multiplies bfloat16 or float16", kind.multiplies_low_precision, low_precision
        ),
        Property("oneDNN is on", kind.onednn, torch.backends.mkldnn.enabled),
        Property("the vendor is AMD", kind.is_amd, cpu_products.IS_AMD),
        Property("PyTorch's threads", kind.threads, torch.get_num_threads()),
    ]


def differences(kind: Kind) -> Iterator[str]:
    """Where this process is not of the kind: a library may have renamed its variable."""
    for one in properties(kind):
        if one.wanted is not None and one.actual != one.wanted:
            yield f"{one.name}: {one.actual}, not {one.wanted}"

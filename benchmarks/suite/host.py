"""The Python of a call until its launches, which are left out.

"Triton" is everything from the layer or the step to the point where Triton is asked to launch: checks, autograd, the op's
dispatch, the choice of kernels, outputs, grids. On a machine without a GPU it needs TRITON_INTERPRET=1 in the environment:
only Triton's interpreter accepts tensors of a CPU, and nothing is interpreted.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite.layers import EAGER, OURS_TORCH, OURS_TRITON, PEFT, build_arms
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.dispatch import backend, settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import make_pairs

LINEAR = "nn.Linear"
# Timed at once: one call is as short as reading the clock twice.
CALLS = 20
WIDTH, R = 16, 8
# CUDA's caching allocator gives out memory in units of this many bytes.
ALLOCATED = 512


@contextmanager
def without_launches() -> Iterator[None]:
    """Skip our kernels' launches and PyTorch's fused AdamW; outputs stay as they were allocated."""
    from stablelora_kernels.launch import base, stable_adamw  # noqa: F401  (imports every place that launches)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    real = base.launch
    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("stablelora_kernels.")]:
            if getattr(module, "launch", None) is real:
                stack.enter_context(mock.patch.object(module, "launch", nothing))
        # _foreach_add_ increments AdamW's step counters: a launch or two of its own on a GPU.
        for name in ("_fused_adamw_", "_foreach_add_"):
            stack.enter_context(mock.patch.object(torch, name, nothing))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread, no garbage collection: threads would wait for each other, and a collection visits a million objects."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def _check_triton(device: torch.device) -> None:
    with settings.use_backend("triton"):
        try:
            backend.resolve_backend(device)
        except RuntimeError as error:
            raise Unavailable(
                f"{error} (TRITON_INTERPRET=1 in the environment will do: nothing is launched)"
            ) from error


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


@dataclass(frozen=True)
class HostCase(Case):
    mark = "host"

    def open(self) -> None:
        stack = self.shared["stack"] = ExitStack()
        stack.enter_context(without_launches())
        stack.enter_context(_quiet())

    def close(self) -> None:
        self.shared["stack"].close()
        super().close()


@dataclass(frozen=True)
class HostLayerCase(HostCase):
    """A layer so small that nothing but Python is left."""

    base = LINEAR
    rival = PEFT
    ours = (OURS_TRITON, OURS_TORCH)
    arms = (LINEAR, EAGER, PEFT, OURS_TORCH, OURS_TRITON)
    phases: ClassVar = {name: (name,) for name in ("forward, no gradient", "forward", "forward and backward")}

    rows: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"host layer {self.rows} rows"

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"calls": CALLS}

    def build(self, arm: str) -> Parts:
        if arm == OURS_TRITON:
            _check_triton(self.device)
        modules = build_arms(WIDTH, WIDTH, R, 0.0, torch.float32, self.device)
        module = modules[{LINEAR: "frozen", EAGER: "eager", PEFT: "peft"}.get(arm, "ours")]
        x = torch.randn(self.rows, WIDTH, device=self.device, requires_grad=True)
        grad = torch.randn(self.rows, WIDTH, device=self.device)
        parameters = [p for p in module.parameters() if p.requires_grad]
        use = "triton" if arm == OURS_TRITON else "torch"

        def no_gradient() -> None:
            with torch.no_grad():
                module(x)

        def both() -> None:
            for tensor in (x, *parameters):
                tensor.grad = None
            module(x).backward(grad)

        def on_backend(call: Callable[[], Any]) -> Callable[[], None]:
            run = repeated(call)

            def run_there() -> None:
                with slk.use_backend(use):
                    run()

            return run_there

        return dict(zip(self.phases, map(on_backend, (no_gradient, lambda: module(x), both)), strict=True))


@dataclass(frozen=True)
class HostStepCase(HostCase):
    """An optimizer's step, with gradients at the addresses of the last step, or elsewhere each time."""

    base = optimizers.ADAMW_FUSED
    rival = optimizers.ADAMW_FUSED
    ours = (optimizers.OURS,)
    arms = (optimizers.ADAMW_FUSED, optimizers.OURS)
    phases: ClassVar = {"step": ("step",)}

    pairs: int
    gradients: str
    device: torch.device
    r: int = 2
    width: int = 8

    @property
    def name(self) -> str:
        return f"host step {2 * self.pairs} tensors r{self.r} width {self.width}, gradients {self.gradients}"

    def notes(self, arm: str) -> dict[str, Any]:
        return memory_beyond_adamw(self._pairs()) if arm == optimizers.OURS else {}

    def _pairs(self) -> list[LoRAPair]:
        return make_pairs(self.pairs, self.r, self.width, self.device, False)

    def build(self, arm: str) -> Parts:
        if arm == optimizers.OURS:
            _check_triton(self.device)
        pairs = self._pairs()
        params = halves(pairs)
        step = optimizers.build(arm, pairs, lr=optimizers.LR).step
        # Two sets in turn: neither lies where the other does.
        sets = [[torch.zeros_like(p) for p in params] for _ in range(2 if self.gradients == "moved" else 1)]

        def prepare() -> None:
            sets.reverse()
            for p, grad in zip(params, sets[0], strict=True):
                p.grad = grad

        def run() -> None:
            with slk.use_backend("triton"):
                step()

        return {"prepare": prepare, "step": run}


def halves(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [half for pair in pairs for half in (pair.A, pair.B)]


def memory_beyond_adamw(pairs: list[LoRAPair]) -> dict[str, float]:
    """Bytes of the Triton step's tables, counters and sums, and the percentage of the parameters' bytes by which they exceed
    AdamW's step counters: as they are, and as CUDA's allocator counts them."""
    optimizer, params = StableLoRAAdamW(pairs), halves(pairs)
    with settings.use_backend("triton"), without_launches():
        optimizer.step()
    ((_, engine),) = optimizer._engines
    theirs = {p.data_ptr() for p in params}
    theirs |= {optimizer.state[p][name].data_ptr() for p in params for name in ("exp_avg", "exp_avg_sq")}
    owners = [engine, *(v for v in vars(engine).values() if type(v).__module__ == "stablelora_kernels.optim.sharding")]
    tensors = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in (value for owner in owners for value in vars(owner).values())
        if isinstance(value, torch.Tensor) and value.numel() and value.data_ptr() not in theirs
    }
    kept, counters, count = sum(tensors.values()), 4 * len(params), sum(p.nbytes for p in params)
    allocated = sum(math.ceil(n / ALLOCATED) * ALLOCATED for n in tensors.values()) - ALLOCATED * len(params)
    return {
        "kept_bytes": kept,
        "beyond_percent": 100 * (kept - counters) / count,
        "allocated_beyond_percent": 100 * allocated / count,
    }

"""The host's time of a call: its Python, Triton's, and Triton's C launcher, over a CUDA library that does nothing.

It needs no GPU, and no time of CUDA's driver or allocator is in it. "Triton" takes its launches from real sizes, on tensors of
the CPU that no kernel touches. The other arms compute on tiny tensors, whose arithmetic takes a few microseconds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.null_driver import null_driver, null_driver_problem
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite.host_parts import parts_of
from benchmarks.suite.layers import ACCELERATED, EAGER, OURS_TORCH, OURS_TRITON, PEFT, build_arms
from benchmarks.suite.rivals import Case, Parts
from stablelora_kernels.dispatch import settings
from stablelora_kernels.functional import lora_branch
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import make_pairs

LINEAR = "nn.Linear"
# Timed at once: one call is as short as reading the clock twice.
CALLS = 20
# Sizes of arms that compute, and of the one that does not.
SMALL_WIDTH, SMALL_ROWS, WIDTH, R = 16, 4, 1024, 16
# What the case calls: one layer, three that share x, a gated MLP of three, a branch onto another layer's output, or 96 layers in
# turn, whose Python objects are in no cache of the processor.
KINDS = {"layer": 1, "group": 3, "mlp": 3, "branch": 1, "96 layers": 96}
# Frozen weight and autocast's dtype. A and B are float32 in all of them.
PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp32 autocast": (torch.float32, torch.bfloat16),
    "bf16 autocast": (torch.bfloat16, torch.bfloat16),
}
# CUDA's caching allocator gives out memory in units of this many bytes.
ALLOCATED = 512
# glibc's mallopt: keep freed memory, and take large blocks from it too. CUDA's allocator calls no system either.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT = -1, -3, 1 << 30


@contextmanager
def without_launches() -> Iterator[None]:
    """Skip our kernels' launches; outputs stay as they were allocated."""
    from stablelora_kernels.launch import base, stable_adamw  # noqa: F401  (imports every place that launches)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    real = base.launch
    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("stablelora_kernels.")]:
            if getattr(module, "launch", None) is real:
                stack.enter_context(mock.patch.object(module, "launch", nothing))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread, no garbage collection: threads would wait for each other, and a collection visits a million objects."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        if hasattr(ctypes.CDLL(None), "mallopt"):
            ctypes.CDLL(None).mallopt(parameter, _KEPT)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def repeated(call: Callable[[], Any], use: str) -> Callable[[], None]:
    def run() -> None:
        with slk.use_backend(use):
            for _ in range(CALLS):
                call()

    return run


@dataclass(frozen=True)
class HostCase(Case):
    mark = "host"

    device: torch.device

    def open(self) -> None:
        stack = self.shared["stack"] = ExitStack()
        if null_driver_problem() is None:
            stack.enter_context(null_driver())
        stack.enter_context(_quiet())
        for name in ("_fused_adamw_", "_foreach_add_"):
            # PyTorch's fused AdamW, and the increment of its step counters: each a launch on a GPU.
            stack.enter_context(mock.patch.object(torch, name, lambda *args, **kwargs: None))

    def close(self) -> None:
        self.shared["stack"].close()
        super().close()

    def check_triton(self) -> None:
        """Raises :class:`Unavailable` if the null driver can't run."""
        if problem := null_driver_problem():
            raise Unavailable(f"the null driver can't run: {problem}")


@dataclass(frozen=True)
class HostLayerCase(HostCase):
    """Layers of which no arm's time is arithmetic."""

    base = LINEAR
    rival = PEFT
    ours = (OURS_TRITON, OURS_TORCH, ACCELERATED)
    arms = (LINEAR, EAGER, PEFT, OURS_TORCH, OURS_TRITON, ACCELERATED)
    phases: ClassVar = {name: (name,) for name in ("forward, no gradient", "forward", "forward and backward")}

    rows: int = 1
    kind: str = "layer"
    dropout: float = 0.0
    precision: str = "bf16"

    @property
    def name(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"host {self.kind} {self.rows} rows {self.precision}{dropout}"

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"calls": CALLS, "dtype": self.precision}

    def notes(self, arm: str) -> dict[str, Any]:
        if arm != OURS_TRITON or self.kind != "layer" or self.precision != "bf16":
            return {}
        if "parts" not in self.shared:
            layer = self._module(arm, WIDTH, torch.bfloat16)
            x = torch.randn(self.rows, WIDTH, device=self.device, dtype=torch.bfloat16)
            self.shared["parts"] = {"parts_us": parts_of(layer, x)}
        return self.shared["parts"]

    def build(self, arm: str) -> Parts:
        on_triton = arm in (OURS_TRITON, ACCELERATED)
        if on_triton:
            self.check_triton()
        dtype, autocast = PRECISIONS[self.precision]
        # Autocast casts a float32 weight in each call, which is arithmetic.
        ours = SMALL_WIDTH if autocast is not None and autocast != dtype else WIDTH
        rows, width = (self.rows, ours) if on_triton else (SMALL_ROWS, SMALL_WIDTH)
        modules = [self._module(arm, width, dtype) for _ in range(KINDS[self.kind])]
        if self.kind == "group":
            modules = self._group(arm, modules)
        elif self.kind == "mlp":
            modules = [self._mlp(arm, modules)]
        x = torch.randn(rows, width, device=self.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, width, device=self.device, dtype=autocast or dtype)
        calls = [self._call(arm, module, x) for module in modules]
        leaves = [[x, *(p for p in module.parameters() if p.requires_grad)] for module in modules]
        every_leaf = [tensor for members in leaves for tensor in members]
        turn = 0

        def forward() -> Any:
            nonlocal turn
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                if self.kind == "group":
                    return [call() for call in calls]
                turn = (turn + 1) % len(calls)
                return calls[turn]()

        def no_gradient() -> None:
            with torch.no_grad():
                forward()

        def both() -> None:
            for tensor in every_leaf if self.kind == "group" else leaves[(turn + 1) % len(calls)]:
                tensor.grad = None
            out = forward()
            torch.autograd.backward(out, [grad] * len(out) if isinstance(out, list) else grad)

        use = "triton" if on_triton else "torch"
        return dict(zip(self.phases, (repeated(call, use) for call in (no_gradient, forward, both)), strict=True))

    def _module(self, arm: str, width: int, dtype: torch.dtype) -> nn.Module:
        modules = build_arms(width, width, R, self.dropout, dtype, self.device)
        if arm == ACCELERATED:
            holder = nn.Sequential(modules["peft"])
            slk.accelerate_peft(holder)
            return holder[0]
        return modules[{LINEAR: "frozen", EAGER: "eager", PEFT: "peft"}.get(arm, "ours")]

    def _group(self, arm: str, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Projections of one x, computed together where an arm can."""
        named = nn.ModuleDict(dict(zip(("q_proj", "k_proj", "v_proj"), modules, strict=True)))
        if arm == ACCELERATED:
            slk.accelerate_peft(named, fuse_projections=True)
        elif arm in (OURS_TRITON, OURS_TORCH):
            make_group(named)
        return [*named.values()]

    def _mlp(self, arm: str, modules: Sequence[nn.Module]) -> nn.Module:
        """A gated MLP, in one op where an arm can."""
        mlp = _MLP(*modules)
        if arm == ACCELERATED:
            slk.accelerate_peft(mlp, fuse_mlp=True)
        elif arm in (OURS_TRITON, OURS_TORCH):
            from stablelora_kernels.nn.fused_mlp import fuse_mlps
            from stablelora_kernels.nn.mlp_operands import OWN_LAYERS

            fuse_mlps(mlp, OWN_LAYERS)
        return mlp

    def _call(self, arm: str, module: Any, x: Tensor) -> Callable[[], Tensor]:
        if self.kind != "branch" or arm not in (OURS_TRITON, OURS_TORCH):
            return lambda: module(x)
        # Another layer's product: its host time, and an output of the branch's size.
        small = torch.randn(SMALL_ROWS, SMALL_WIDTH, device=self.device, dtype=x.dtype)
        base = nn.Linear(SMALL_WIDTH, SMALL_WIDTH, device=self.device, dtype=x.dtype).requires_grad_(False)
        out = torch.randn(x.shape[0], module.out_features, device=self.device, dtype=x.dtype)

        def call() -> Tensor:
            base(small)
            return lora_branch(out, x, module.lora_A, module.lora_B, module.scaling, self.dropout)

        return call


class _MLP(nn.Module):
    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def make_group(named: nn.ModuleDict) -> None:
    """Let our layers share their input, as ``apply_lora(..., fuse_projections=True)`` does."""
    from stablelora_kernels.nn.linear import projection_group_key
    from stablelora_kernels.nn.mlp_operands import compute_projection_group
    from stablelora_kernels.nn.projection_group import make_projection_groups

    make_projection_groups(named, dict(named.items()), projection_group_key, compute_projection_group)


@dataclass(frozen=True)
class HostStepCase(HostCase):
    """An optimizer's step, with gradients at the addresses of the last step, or elsewhere each time."""

    base = optimizers.ADAMW_FUSED
    rival = optimizers.ADAMW_FUSED
    ours = (optimizers.OURS,)
    arms = (optimizers.ADAMW_FUSED, optimizers.OURS)
    phases: ClassVar = {"step": ("step",)}

    pairs: int = 4
    gradients: str = "kept"
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
            self.check_triton()
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

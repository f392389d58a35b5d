"""The layer's arms for the suite: one frozen weight, equal A and non-zero B, forward and backward timed apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.bench_lora_linear import build_arms
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite.rivals import Case, Parts, size
from stablelora_kernels.dispatch import backend
from stablelora_kernels.ops import matmul
from stablelora_kernels.testing import DTYPES

AUTOCAST = "bf16-autocast"
DTYPE_NAMES = ("fp32", "bf16", AUTOCAST)
FROZEN, EAGER, PEFT, PEFT_COMPILED, LORALIB = "frozen nn.Linear", "eager LoRA", "PEFT", "PEFT compiled", "loralib"
# What the branch itself costs ours, where the base product is not the library's that PyTorch takes.
FROZEN_ONEDNN = "frozen, by oneDNN"
OURS_TORCH, OURS_TRITON, OURS_COMPILED = "ours, PyTorch", "ours, Triton", "ours compiled"
ACCELERATED = "accelerated PEFT"


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision around float32 weights and adapters, for the dtype that asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == AUTOCAST)


def stored_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == AUTOCAST else DTYPES[dtype]


def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """``module`` under torch.compile; what the compiler can't do is the reason why the arm is not there."""
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(module, dynamic=False)

    def call(*args: Any) -> Any:
        try:
            return run(*args)
        except TorchDynamoException as error:
            raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error

    return call


def choose_backend(name: str, device: torch.device) -> None:
    """Raises :class:`Unavailable` where ``name`` is Triton and there is no GPU."""
    if name == "triton" and device.type == "cpu":
        raise Unavailable("Triton's kernels need a GPU, and times in its interpreter tell nothing of them")
    with backend.use_backend(name):
        try:
            backend.resolve_backend(device)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
    slk.set_backend(name)


@dataclass(frozen=True)
class LayerCase(Case):
    base: ClassVar[str] = FROZEN
    rival: ClassVar[str] = PEFT
    ours: ClassVar[tuple[str, ...]] = (OURS_TORCH, OURS_TRITON, OURS_COMPILED, ACCELERATED)
    arms: ClassVar[tuple[str, ...]] = (FROZEN, FROZEN_ONEDNN, EAGER, PEFT, PEFT_COMPILED, LORALIB, *ours)
    phases: ClassVar[dict[str, tuple[str, ...]]] = {
        "forward": ("forward",),
        "backward": ("backward",),
        "both": ("forward", "backward"),
    }

    rows: int
    k: int
    n: int
    r: int
    dtype: str
    device: torch.device
    dropout: float = 0.0
    _shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"layer {size(self.rows, self.k, self.n)} r{self.r} {self.dtype}{dropout}"

    def facts(self) -> dict[str, Any]:
        sizes = {"rows": self.rows, "in_features": self.k, "out_features": self.n, "r": self.r}
        return {"shape": sizes, "dtype": self.dtype, "dropout": self.dropout, "device": str(self.device)}

    def open(self) -> None:
        # Graphs of the case before are not this one's, and Dynamo gives up on code that it has compiled too often.
        torch._dynamo.reset()
        generator = torch.Generator(self.device).manual_seed(1)
        stored = stored_dtype(self.dtype)
        out = torch.bfloat16 if self.dtype == AUTOCAST else stored
        x, grad = (
            torch.randn(self.rows, width, generator=generator, device=self.device, dtype=dtype)
            for width, dtype in ((self.k, stored), (self.n, out))
        )
        self._shared.update(backend=slk.get_backend(), x=x.requires_grad_(), grad=grad, modules=self._modules())

    def close(self) -> None:
        slk.set_backend(self._shared["backend"])
        self._shared.clear()

    def _modules(self) -> dict[str, Any]:
        return build_arms(self.k, self.n, self.r, self.dropout, stored_dtype(self.dtype), self.device)

    def build(self, arm: str) -> Parts:
        use = "triton" if arm == OURS_TRITON else "torch" if arm == OURS_TORCH else "auto"
        choose_backend(use, self.device)
        modules = self._shared["modules"]
        module: nn.Module = {
            FROZEN: lambda: modules["frozen"],
            FROZEN_ONEDNN: lambda: FrozenByOneDNN(modules["frozen"].weight, self.dtype),
            EAGER: lambda: modules["eager"],
            LORALIB: lambda: _loralib(modules["ours"], self.dropout),
            ACCELERATED: lambda: _accelerated(self._modules()["peft"], modules["frozen"].weight),
        }.get(arm, lambda: modules["peft" if arm in (PEFT, PEFT_COMPILED) else "ours"])()
        call = compiled(module) if arm in (PEFT_COMPILED, OURS_COMPILED) else module
        return self._parts(call, [p for p in module.parameters() if p.requires_grad], use)

    def _parts(self, call: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], use: str) -> Parts:
        x, grad = self._shared["x"], self._shared["grad"]
        out: list[Tensor] = []

        def prepare() -> None:
            slk.set_backend(use)
            out.clear()
            for tensor in (x, *parameters):
                tensor.grad = None

        def forward() -> None:
            with autocast(self.device, self.dtype):
                out.append(call(x))

        return {"prepare": prepare, "forward": forward, "backward": lambda: out[0].backward(grad)}


def _loralib(ours: slk.LoRALinear, dropout: float) -> nn.Module:
    try:
        import loralib
    except ImportError as error:
        raise Unavailable(f"loralib can't be imported: {error}") from error
    (n, k), r = ours.weight.shape, ours.lora_A.shape[0]
    alpha = ours.scaling * r
    layer = loralib.Linear(k, n, r, alpha, dropout, merge_weights=False, bias=False, device="meta")
    layer.weight = nn.Parameter(ours.weight.detach(), requires_grad=False)
    layer.lora_A, layer.lora_B = (nn.Parameter(half.detach().clone()) for half in (ours.lora_A, ours.lora_B))
    return layer


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return matmul.wide_product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return matmul.wide_product(grad, *ctx.saved_tensors), None


class FrozenByOneDNN(nn.Module):
    """The frozen layer, its two products computed as ours computes them."""

    def __init__(self, weight: Tensor, dtype: str) -> None:
        super().__init__()
        if dtype != "fp32" or not matmul.by_onednn(weight.dtype, weight.device):
            raise Unavailable("the base product is PyTorch's own there: as the frozen nn.Linear")
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


def _accelerated(peft: Any, weight: nn.Parameter) -> nn.Module:
    # The weight that all arms share, lest the cache decide.
    peft.base_layer.weight = weight
    slk.accelerate_peft(nn.Sequential(peft), strict=True)
    return peft

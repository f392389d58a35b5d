"""A layer and its rivals over one frozen weight, with equal A and nonzero B."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite import scaling
from benchmarks.suite.rivals import Case, Parts, size
from stablelora_kernels.dispatch import backend, settings
from stablelora_kernels.ops import matmul
from stablelora_kernels.testing import DTYPES, layer_arms

AUTOCAST = "bf16-autocast"
DTYPE_NAMES = ("fp32", "bf16", AUTOCAST)
FROZEN, EAGER, PEFT, PEFT_COMPILED, LORALIB = "frozen nn.Linear", "eager LoRA", "PEFT", "PEFT compiled", "loralib"
# The frozen layer by the library that our base product uses: shows what the branch alone costs us.
FROZEN_ONEDNN = "frozen, by oneDNN"
OURS_TORCH, OURS_TRITON, OURS_COMPILED = "ours, PyTorch", "ours, Triton", "ours compiled"
ACCELERATED = "accelerated PEFT"


def build_arms(
    k: int, n: int, r: int, dropout: float, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """The uncompiled arms, all in ``dtype``."""
    frozen, eager, ours = layer_arms(k, n, r, dropout, dtype, device)
    return {"frozen": frozen, "eager": eager, "peft": peft_layer(ours, dropout), "ours": ours}


def peft_layer(ours: slk.LoRALinear, dropout: float) -> nn.Module:
    """PEFT's layer over the weight of ``ours``, with equal A and B."""
    from peft import LoraConfig, get_peft_model

    holder = nn.Sequential(nn.Linear(ours.in_features, ours.out_features, bias=False, device="meta"))
    holder[0].weight = nn.Parameter(ours.weight.detach(), requires_grad=False)
    r = ours.lora_A.shape[0]
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    peft = get_peft_model(holder, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours.lora_A if "lora_A" in name else ours.lora_B)
    return peft.base_model.model[0]


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 around float32 weights and adapters if ``dtype`` is ``AUTOCAST``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == AUTOCAST)


def stored_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == AUTOCAST else DTYPES[dtype]


def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """``module`` under torch.compile; raises :class:`Unavailable` if the compiler fails."""
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(module, dynamic=False)

    def call(*args: Any) -> Any:
        try:
            return run(*args)
        except TorchDynamoException as error:
            raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error

    return call


def choose_backend(name: str, device: torch.device) -> None:
    """Raises :class:`Unavailable` if ``name`` is Triton and there is no GPU."""
    if name == "triton" and device.type == "cpu":
        raise Unavailable("Triton's kernels need a GPU; times in its interpreter say nothing about them")
    with settings.use_backend(name):
        try:
            backend.resolve_backend(device)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
    slk.set_backend(name)


@dataclass(frozen=True)
class LayerCase(Case):
    base = FROZEN
    rival = PEFT
    ours = (OURS_TRITON, OURS_TORCH, OURS_COMPILED, ACCELERATED)
    arms = (
        FROZEN, FROZEN_ONEDNN, EAGER, PEFT, PEFT_COMPILED, LORALIB, OURS_TORCH, OURS_TRITON, OURS_COMPILED, ACCELERATED,
    )  # fmt: skip
    phases: ClassVar = {
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

    @property
    def name(self) -> str:
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"layer {size(self.rows, self.k, self.n)} r{self.r} {self.dtype}{dropout}"

    def open(self) -> None:
        # Dynamo gives up on code that it has compiled too often.
        torch._dynamo.reset()
        generator = torch.Generator(self.device).manual_seed(1)
        stored = stored_dtype(self.dtype)
        out = torch.bfloat16 if self.dtype == AUTOCAST else stored
        x, grad = (
            torch.randn(self.rows, width, generator=generator, device=self.device, dtype=dtype)
            for width, dtype in ((self.k, stored), (self.n, out))
        )
        self.shared.update(backend=slk.get_backend(), x=x.requires_grad_(), grad=grad, modules=self._modules())

    def close(self) -> None:
        slk.set_backend(self.shared["backend"])
        super().close()

    def _modules(self) -> dict[str, Any]:
        return build_arms(self.k, self.n, self.r, self.dropout, stored_dtype(self.dtype), self.device)

    def build(self, arm: str) -> Parts:
        use = "triton" if arm == OURS_TRITON else "torch" if arm == OURS_TORCH else "auto"
        choose_backend(use, self.device)
        modules = self.shared["modules"]
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
        x, grad = self.shared["x"], self.shared["grad"]
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


@dataclass(frozen=True)
class ScalingLayerCase(LayerCase):
    """One point of an axis: time and saved bytes, and the least time on this machine."""

    ours = (OURS_TRITON, OURS_TORCH)
    arms = (FROZEN, PEFT, OURS_TORCH, OURS_TRITON)
    phases: ClassVar = {"both": ("forward", "backward")}
    mark = "scaling"

    axis: str = "width"

    @property
    def name(self) -> str:
        return f"{self.axis}: {super().name}"

    def facts(self) -> dict[str, Any]:
        sizes = {"width": self.k, "rank": self.r, "tokens": self.rows}
        floors = scaling.layer_floors(self.rows, self.k, self.n, self.r, scaling.machine(self.device))
        return super().facts() | {"axis": {"name": self.axis, "size": sizes[self.axis]}, "floor_ms": floors}

    def notes(self, arm: str) -> dict[str, Any]:
        module = self.shared["modules"][{FROZEN: "frozen", PEFT: "peft"}.get(arm, "ours")]
        x = self.shared["x"]
        return {"saved_bytes": saved_for_backward(lambda: module(x), [x, *module.parameters()])}


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
    """The frozen layer with our two products."""

    def __init__(self, weight: Tensor, dtype: str) -> None:
        super().__init__()
        if dtype != "fp32" or not matmul.by_onednn(weight.dtype, weight.device):
            raise Unavailable("our base product is PyTorch's own here: the same as the frozen nn.Linear's")
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


def _accelerated(peft: Any, weight: nn.Parameter) -> nn.Module:
    # All arms share one weight; otherwise the cache decides.
    peft.base_layer.weight = weight
    slk.accelerate_peft(nn.Sequential(peft), strict=True)
    return peft
